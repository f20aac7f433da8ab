"""Tables for people, and JSON lines for programs."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> None:
    """Print columns under headings, those numbered in `right` aligned there; piped output is never cut or folded."""
    table = Table(box=SIMPLE, pad_edge=False, show_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


def console() -> Console:
    """Standard output, as wide as the terminal, or as it takes if there is none."""
    return Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)


def print_json(fields: Mapping[str, Any]) -> None:
    """Print one JSON object on a line, at once."""
    print(json.dumps(fields), flush=True)


def size_text(height: int, width: int) -> str:
    """Width x height, as people say it."""
    return f"{width}x{height}"
