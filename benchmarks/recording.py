"""What every recorded figure has beside it, and the files that figures are added to."""

import csv
import datetime
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import onnxruntime


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def machine() -> dict[str, str]:
    """When, where and with what."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {cores()} cores",
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
