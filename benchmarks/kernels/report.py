"""Results kept as CSV, shown as a table and drawn under the roof of a plain copy."""

import csv
import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from rich.table import Table

import fusedpool

Row = dict[str, str]

COLUMNS: Final = (
    *("date", "gpu", "torch", "triton", "code", "command", "workload", "operator", "shape", "dtype", "layout"),
    *("implementation", "direction", "ms", "megabytes", "gb_per_s", "percent_of_copy", "peak_mb", "error", "note"),
)
"""error: of the fused operator, from float64, over the largest value; megabytes: by the formula, whoever moves more."""

_SAME: Final = ("gpu", "torch", "triton", "code", "workload", "operator", "shape", "dtype", "layout", "implementation")


def code() -> str:
    """A digest of fusedpool's source: what was measured."""
    digest = hashlib.sha256()
    for path in sorted(Path(fusedpool.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


class Results:
    """The rows of a CSV file, written one by one as they come, so that a run that stops can be resumed."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self._path = path
        self.rows: list[Row] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))
        self._known = set() if fresh else {_key(row) for row in self.rows}

    def has(self, row: Row) -> bool:
        """Whether the same code was measured on the same work with the same versions."""
        return _key(row) in self._known

    def add(self, row: Row) -> None:
        """Append it to the file, with a header to a new one."""
        new = not self._path.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in _SAME)


Work = tuple[str, ...]


def latest(rows: Iterable[Row], gpu: str) -> dict[Work, dict[tuple[str, str], Row]]:
    """The last row of each (implementation, direction) by work: (workload, operator, dtype, layout)."""
    found: dict[Work, dict[tuple[str, str], Row]] = {}
    for row in rows:
        if row["gpu"] == gpu and row["implementation"] != "copy":
            work = tuple(row[name] for name in ("workload", "operator", "dtype", "layout"))
            found.setdefault(work, {})[row["implementation"], row["direction"]] = row
    return found


def table(rows: Iterable[Row], gpu: str) -> Table:
    """Each work and direction: the fused operator's figures, and how many times as long the others take."""
    result = Table(title=f"fusedpool on {gpu}", row_styles=("", "dim"))
    for name in ("workload", "operator", "type", "layout", "direction"):
        result.add_column(name)
    for name in ("ms", "GB/s", "% of copy", "x eager", "x compile", "x determ.", "MB peak", "MB eager", "error"):
        result.add_column(name, justify="right")
    for work, by in sorted(latest(rows, gpu).items()):
        for direction in ("forward", "backward", "both"):
            fused, *others = (
                _figures(by, implementation, direction)
                for implementation in ("fused", "eager", "compile", "compile deterministic")
            )
            ms = float(fused.get("ms") or 0)
            times = [f"{float(other['ms']) / ms:.2f}" if ms and other.get("ms") else "-" for other in others]
            shown = [fused.get(name) or "-" for name in ("ms", "gb_per_s", "percent_of_copy")]
            memory = [row.get("peak_mb") or "-" for row in (fused, others[0])]
            result.add_row(*work, direction, *shown, *times, *memory, fused.get("error") or fused.get("note") or "-")
    return result


def _figures(by: dict[tuple[str, str], Row], implementation: str, direction: str) -> Row:
    if direction != "both":
        return by.get((implementation, direction), {})
    parts = [by.get((implementation, part), {}).get("ms") for part in ("forward", "backward")]
    return {"ms": f"{sum(float(part) for part in parts if part):.4f}"} if all(parts) else {}


def draw(rows: Iterable[Row], gpu: str, path: Path) -> None:
    """A PNG of GB/s over megabytes moved, under the roof: what a copy of as many bytes reaches."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # of each font that is not there
    rows = list(rows)
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    copies = {
        float(r["megabytes"]): float(r["gb_per_s"]) for r in rows if r["gpu"] == gpu and r["implementation"] == "copy"
    }
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        axis.plot(*zip(*sorted(copies.items()), strict=True), color="black", label="copy")
        for implementation, marker in (
            ("eager", "s"),
            ("compile", "^"),
            ("compile deterministic", "v"),
            ("fused", "o"),
        ):
            points = [
                by[implementation, direction] for by in latest(rows, gpu).values() if (implementation, direction) in by
            ]
            points = [row for row in points if row["ms"]]
            axis.scatter(*_coordinates(points), marker=marker, s=18, alpha=0.7, label=implementation)
        axis.set(xscale="log", yscale="log", title=direction, xlabel="MB that must move")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("GB/s of them")
    axes[0].legend()
    figure.suptitle(f"fusedpool on {gpu}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _coordinates(points: list[Row]) -> tuple[Any, Any]:
    return [float(row["megabytes"]) for row in points], [float(row["gb_per_s"]) for row in points]
