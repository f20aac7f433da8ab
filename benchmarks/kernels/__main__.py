"""The kernels of fusedpool on a GPU, beside PyTorch: checked against float64, then timed, forward and backward apart.

    python -m benchmarks.kernels [--quick] [--only TEXT] [--dtypes float16,...] [--implementations fused,...] [--fresh]
                                 [--minutes 9]

Each operator is first compared with plain PyTorch in float64, on the same numbers, values and gradients; one that
differs is not timed. Then each runs on its own (the median of the GPU's time, its cache emptied before each run) as
NCHW and NHWC, beside the same work in eager PyTorch, torch.compile, and torch.compile under deterministic algorithms.
Bytes are those that must move, by the formulas that --list shows; GB/s and "% of copy" count them for every
implementation alike, and the copy is a large one within the GPU. Where a convolution does the work, they say little.

Adds rows to benchmarks/results/kernels.csv, draws kernels.png beside it, and shows the table. What the file already has
of this GPU, these versions and, for fused operators, this source is not measured again, unless --fresh is given: a run
that is stopped, by --minutes or by hand, goes on where it was. What --quick measures comes first.
--device cpu --tiny tries the script itself where there is no GPU; its figures mean nothing, so they need --out.
"""

import argparse
import datetime
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.kernels import measure, report
from benchmarks.kernels.measure import DTYPES, IMPLEMENTATIONS, Case
from benchmarks.kernels.report import Results, Row
from benchmarks.kernels.workloads import WORKLOADS

RESULTS: Final = Path(__file__).parents[1] / "results" / "kernels.csv"
COPIES: Final = (1, 4, 16, 64, 256, 1024)
"""Megabytes that the copies move, the last of which is the measure of the others."""


def main(words: list[str] | None = None) -> int:
    arguments = _arguments(words)
    console = Console(width=None if sys.stdout.isatty() else 180)
    if arguments.list:
        console.print(_listed())
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.kernels: PyTorch sees no GPU here; --list shows what would be measured", file=sys.stderr)
        return 2
    if arguments.device == "cpu" and arguments.out == RESULTS:
        print("benchmarks.kernels: figures from a CPU are not kept; name another file with --out", file=sys.stderr)
        return 2
    setting = _setting(arguments, words)
    results = Results(arguments.out, arguments.fresh)
    copy = _copies(results, setting, arguments)
    todo = [(case, name) for case, name in _cases(arguments) if not results.has(_row(setting, case, name))]
    deadline = time.monotonic() + 60 * arguments.minutes
    measured = failed = 0
    with Progress(console=console) as progress, suppress(KeyboardInterrupt):
        task = progress.add_task("measuring", total=len(todo))
        for case, name in todo:
            if time.monotonic() > deadline:
                break
            progress.update(task, description=f"{name}: {case.workload.name}, {case.dtype} {case.layout}")
            rows = list(_measured(_row(setting, case, name), case, name, arguments.device, copy))
            for row in rows:
                results.add(row)
            if name == "fused" and rows[0]["note"]:
                failed += 1
                progress.console.print(f"{case.workload.name}, {case.workload.operation.name}: {rows[0]['note']}")
            if "CUDA error" in rows[0]["note"]:
                progress.console.print("nothing can be trusted after that; run again to go on with the others")
                return 1
            measured += 1
            progress.advance(task)
    report.draw(results.rows, setting["gpu"], arguments.out.with_suffix(".png"))
    console.print(report.table(results.rows, setting["gpu"]))
    console.print(f"{arguments.out} and {arguments.out.with_suffix('.png').name}: {measured} measured, {failed} wrong")
    if measured < len(todo):
        console.print(f"{len(todo) - measured} are left: the same command goes on with them")
    return 1 if failed else 0


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="show workloads and byte formulas, and stop")
    parser.add_argument("--quick", action="store_true", help="float16 alone, the workloads that matter most")
    parser.add_argument("--only", default="", help="workloads whose name or operator has this text")
    parser.add_argument("--dtypes", help="comma-separated; all of " + ",".join(DTYPES))
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS), help="comma-separated")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so many")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file already has")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the same work in miniature")
    arguments = parser.parse_args(words)
    given = arguments.dtypes or ("float16" if arguments.quick else ",".join(DTYPES))
    for name, known in (("dtypes", tuple(DTYPES)), ("implementations", IMPLEMENTATIONS)):
        values = (given if name == "dtypes" else arguments.implementations).split(",")
        if wrong := set(values) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(wrong))} is not among {', '.join(known)}")
        setattr(arguments, name, [value for value in known if value in values])
    return arguments


def _listed() -> Table:
    table = Table("workload", "operator", "shape", "bytes forward", "bytes backward", "quick")
    for work in WORKLOADS:
        operation = work.operation
        quick = "yes" if work.quick else ""
        table.add_row(work.name, operation.name, _shape(work.shape), operation.forward, operation.backward, quick)
    table.caption = "s: bytes of an element; e: elements of x; o: of all outputs"
    return table


def _cases(arguments: argparse.Namespace) -> list[tuple[Case, str]]:
    """What --quick measures, then the rest; of each, fused operators first, then the baselines one after another."""
    found = []
    for implementation, dtype, workload in product(arguments.implementations, arguments.dtypes, WORKLOADS):
        named = arguments.only in f"{workload.name} {workload.operation.name}"
        if named and (workload.quick or not arguments.quick):
            for layout in ("NCHW", "NHWC") if len(workload.shape) == 4 else ("packed",):
                found.append((Case(workload.tiny() if arguments.tiny else workload, dtype, layout), implementation))
    return sorted(found, key=lambda item: not item[0].workload.quick or item[0].dtype != "float16")


def _setting(arguments: argparse.Namespace, words: list[str] | None) -> Row:
    """When, where, with what."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name() if arguments.device == "cuda" else "none",
        "torch": torch.__version__,
        "triton": triton,
        "command": " ".join(["python -m benchmarks.kernels", *(sys.argv[1:] if words is None else words)]),
    }


def _row(setting: Row, case: Case, implementation: str) -> Row:
    return {
        **setting,
        "code": report.code() if implementation == "fused" else "",
        "workload": case.workload.name,
        "operator": case.workload.operation.name,
        "shape": _shape(case.workload.shape),
        "dtype": case.dtype,
        "layout": case.layout,
        "implementation": implementation,
    }


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape)


def _measured(row: Row, case: Case, implementation: str, device: str, copy: float) -> Iterator[Row]:
    """Rows of both directions, or one whose note says why there are no figures."""
    try:
        error = f"{measure.check(case, device):.2g}" if implementation == "fused" else ""
        results = measure.measure(case, implementation, device)
    except Exception as wrong:  # a baseline that can't do the work, or an operator that is wrong, is a result too
        reason = str(wrong).strip().partition("\n")[0][:120]
        yield {**row, "direction": "", "ms": "", "note": f"{type(wrong).__name__}: {reason}"}
        return
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()
    for direction, found in results.items():
        rate = found.bytes / (found.milliseconds / 1e3)
        yield {
            **row,
            "direction": direction,
            "ms": f"{found.milliseconds:.4f}",
            "megabytes": f"{found.bytes / 1e6:.3f}",
            "gb_per_s": f"{rate / 1e9:.1f}",
            "percent_of_copy": f"{100 * rate / copy:.1f}",
            "peak_mb": f"{found.peak_bytes / 1e6:.1f}",
            "error": error,
            "note": "",
        }


def _copies(results: Results, setting: Row, arguments: argparse.Namespace) -> float:
    """Bytes per second of the largest copy; all go to the results."""
    rate = 0.0
    for megabytes in COPIES[:2] if arguments.tiny else COPIES:
        rate = measure.copy_rate(megabytes, arguments.device)
        figures = {"megabytes": f"{megabytes}", "gb_per_s": f"{rate / 1e9:.1f}", "percent_of_copy": ""}
        results.add(
            {**setting, "code": "", **dict.fromkeys(report.COLUMNS[6:], ""), "implementation": "copy", **figures}
        )
    return rate


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
