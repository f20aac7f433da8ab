"""What every recorded figure has beside it, the files that figures are added to, and their table."""

import csv
import datetime
import platform
from collections.abc import Sequence
from pathlib import Path

import onnxruntime
from rich.console import Console
from rich.table import Table

from fullframe.engine.machine import available_cores


def machine() -> dict[str, str]:
    """When, where and with what."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {available_cores()} cores",
        "versions": f"python {platform.python_version()}, onnxruntime {onnxruntime.__version__}",
    }


def append_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Add rows to a CSV, with a header where the file is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


def show(rows: Sequence[dict[str, str]], title: str) -> None:
    """The figures as a table on the terminal."""
    columns = [name for name in rows[0] if name not in {"date", "machine", "versions", "command"}]
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    Console(width=160).print(table)
