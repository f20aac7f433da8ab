"""The answers about many files, in the files' order, with a progress bar and the failures named on stderr."""

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from fullframe.cli import complain
from fullframe.errors import FullframeError

if TYPE_CHECKING:
    from fullframe.engine.query import Answer


class Answers:
    """What `stream` says of each file: to be iterated once.

    Attributes:
        failed: files without an answer so far.
    """

    def __init__(self, files: Sequence[str], stream: "Iterator[tuple[int, Answer | FullframeError]]") -> None:
        self._files, self._stream = files, stream
        self.failed = 0

    def __iter__(self) -> "Iterator[tuple[str, Answer | FullframeError]]":
        with _progress() as progress:
            task = progress.add_task("", total=len(self._files))
            last: FullframeError | None = None
            for file, outcome in zip(self._files, self._in_order(), strict=True):
                progress.advance(task)
                if isinstance(outcome, FullframeError):
                    self.failed += 1
                    if outcome is not last:  # the end of a stream fails all that is left; once is enough
                        complain(f"{file}: {outcome}")
                    last = outcome
                yield file, outcome
        if self.failed and len(self._files) > 1:
            complain(f"{self.failed} of {len(self._files)} images failed")

    def _in_order(self) -> "Iterator[Answer | FullframeError]":
        early: dict[int, Answer | FullframeError] = {}
        due = 0
        try:
            for number, outcome in self._stream:
                early[number] = outcome
                while due in early:
                    yield early.pop(due)
                    due += 1
        except FullframeError as error:
            for number in range(due, len(self._files)):
                yield early.pop(number, error)


def _progress() -> Progress:
    """A bar on stderr while it is a terminal, below whatever else is printed there, gone at the end."""
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
        redirect_stdout=sys.stdout.isatty(),
    )
