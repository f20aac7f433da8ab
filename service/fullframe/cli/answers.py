"""The answers about many files, in the files' order, with progress bars and the failures named on stderr."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fullframe.cli import complain
from fullframe.errors import FullframeError

if TYPE_CHECKING:
    from fullframe.engine.progress import Progress as ImageProgress
    from fullframe.engine.query import Answer


class Answers:
    """What a stream says of each file: to be iterated once.

    Args:
        ask: begins the stream; takes `on_progress`.

    Attributes:
        failed: files without an answer so far.
    """

    def __init__(
        self, files: Sequence[str], ask: "Callable[..., Iterator[tuple[int, Answer | FullframeError]]]"
    ) -> None:
        self._files, self._ask = files, ask
        self.failed = 0

    def __iter__(self) -> "Iterator[tuple[str, Answer | FullframeError]]":
        with Bars(len(self._files), self._files.__getitem__) as bars:
            last: FullframeError | None = None
            stream = self._ask(on_progress=bars.hear if bars.shown else None)
            for number, (file, outcome) in enumerate(zip(self._files, self._in_order(stream), strict=True)):
                bars.end(number)
                if isinstance(outcome, FullframeError):
                    self.failed += 1
                    if outcome is not last:  # the end of a stream fails all that is left; once is enough
                        complain(f"{file}: {outcome}")
                    last = outcome
                yield file, outcome
        if self.failed and len(self._files) > 1:
            complain(f"{self.failed} of {len(self._files)} images failed")

    def _in_order(self, stream: "Iterator[tuple[int, Answer | FullframeError]]") -> "Iterator[Answer | FullframeError]":
        early: dict[int, Answer | FullframeError] = {}
        due = 0
        try:
            for number, outcome in stream:
                early[number] = outcome
                while due in early:
                    yield early.pop(due)
                    due += 1
        except FullframeError as error:
            for number in range(due, len(self._files)):
                yield early.pop(number, error)


class Bars:
    """On stderr while it is a terminal, below whatever else is printed there, gone at the end: one bar for all files,
    and one for each that takes a while, first for its upload and then for its computation.

    Args:
        total: how many files there are; None where that is not known.
        file_of: the file of that number.
        doing: what is done with them, where that is not to answer.

    Attributes:
        shown: whether there are any.
    """

    def __init__(self, total: int | None, file_of: Callable[[int], str] = str, doing: str = "") -> None:
        self.shown = sys.stderr.isatty()
        self._file_of, self._doing, self._total, self._done = file_of, doing, total, 0
        self._progress = Progress(
            BarColumn(),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not self.shown,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._all = self._progress.add_task("", total=total)
        self._slow: dict[int, tuple[TaskID, bool]] = {}  # the bool: it is still being sent
        self._show()

    def hear(self, number: int, news: "ImageProgress") -> None:
        """How far an image is; from any thread."""
        sending = news.received < news.total
        name = Path(self._file_of(number)).name
        if sending:
            state, share = f"{decimal(news.received)} of {decimal(news.total)} sent", news.received / news.total
        else:
            state, share = f"{news.computed:.0%} computed", news.computed
        task, was_sending = self._slow.get(number, (None, sending))
        turned = task is None or sending is not was_sending
        if task is None:
            task = self._progress.add_task("", total=1)
        elif turned:
            self._progress.reset(task)  # so that the time that is left is not told from the upload's pace
        self._slow[number] = task, sending
        self._progress.update(task, completed=share, description=f"{name}: {state}", refresh=turned)

    def end(self, number: int) -> None:
        """An image is done."""
        if number in self._slow:
            self._progress.remove_task(self._slow.pop(number)[0])
        self._done += 1
        self._show()

    def skip(self, count: int = 1) -> None:
        """So many are done at no cost; not each of a great many is shown."""
        self._done += count
        if count > 1 or self._done % 1000 == 0:
            self._show()

    def _show(self) -> None:
        total = "?" if self._total is None else self._total
        self._progress.update(self._all, completed=self._done, description=f"{self._doing}{self._done}/{total}")

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._show()
        self._progress.stop()
