"""`embed -o FILE.parquet`: the images below a folder become a table, stored as they are done, taken up after a stop."""

import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer

from fullframe.cli import complain, fail, in_words
from fullframe.cli.answers import Bars
from fullframe.cli.files import complain_of, file_at, paths_inside, text_of
from fullframe.cli.options import Asked
from fullframe.errors import DeadlinePassed, FullframeError, InvalidInput, NotFound, Overloaded, Unavailable
from fullframe.table.journal import Joined, Journal, is_begun
from fullframe.table.recipe import Recipe
from fullframe.table.rows import Row, Stamp, group_rows

if TYPE_CHECKING:
    from fullframe.engine.pooling import Pooling
    from fullframe.engine.query import Answer

RETRIES: Final = 100
"""Nobody is waiting: a server may be full for minutes, and away for as long as --timeout allows."""

_NOT_ITS_FAULT: Final = (Unavailable, Overloaded, DeadlinePassed, NotFound)
"""What may go better later: such a failure of an image ends the run, so that no row tells of it."""
_KINDS_SHOWN: Final = 10

Stream = Callable[..., "Iterator[tuple[int, Answer | FullframeError]]"]


def folder_of(images: Sequence[str], output: Path, restart: bool) -> str:
    """The one folder that a table is made of; raises typer.BadParameter where it can't be."""
    if len(images) == 1 and not Path(images[0]).exists():
        raise typer.BadParameter(f"there is no folder {images[0]!r}")
    if len(images) != 1 or not Path(images[0]).is_dir():
        raise typer.BadParameter("a .parquet takes one folder; .npz takes any files", param_hint="--output")
    if output.exists() and not restart and not is_begun(output):
        raise typer.BadParameter(f"{output} is finished; --restart computes it anew", param_hint="--output")
    return images[0]


def embed_folder(
    folder: str, output: Path, pooling: "Pooling", chosen: Asked, *, restart: bool, save_every: float
) -> bool:
    """Make the table, or go on with it; returns whether every image has features.

    Raises typer.Exit where it could not be finished, having said how to go on.
    """
    count = _count(folder)
    contract, served = chosen.contract, chosen.served
    recipe = Recipe(
        root=text_of(os.path.realpath(folder)),
        model=served.name,
        version=served.version,
        digest=served.digest,
        pooling=str(pooling),
        normalize=pooling.l2_normalize,
        length=pooling.dimension(contract.feature_channels),
        compute=chosen.compute,
    )
    goes_on = f"the same command{' without --restart' if restart else ''} goes on"
    with Journal(output, recipe, restart=restart) as journal:
        for name in journal.damaged:
            complain(f"{journal.folder / name} is damaged: its images are computed again")
        if journal.resumed:
            complain(f"goes on with what is stored in {journal.folder}")
        run = _Run(folder, journal, partial(chosen.stream, poolings=[pooling]), group_rows(recipe), save_every)
        try:
            with Bars(count, run.file_of) as bars:
                run.answer(bars)
            with Bars(run.rows, doing="writing the table: ") as bars:
                joined = journal.join(bars.skip)
            journal.discard()
        except KeyboardInterrupt:
            complain(f"stopped; {run.done + run.kept} of {count} images are stored in {journal.folder}: {goes_on}")
            raise typer.Exit(130) from None
        except (FullframeError, OSError) as error:
            fail(f"{in_words(error)}; what was done before is stored in {journal.folder}: {goes_on}")
    _tell(output, folder, recipe, run, joined)
    return not (joined.failures or run.unreadable)


@dataclass(frozen=True, slots=True)
class _Found:
    """An image as it was found; a stamp, or why there is nothing to read."""

    path: str
    file: str
    stamp: Stamp | str


class _Run:
    """One process's share of the work.

    Args:
        stream: asks the model.
        most: rows that may wait to be stored.
        save_every: seconds that they may.

    Attributes:
        kept: images whose features were there.
        done: images that have been asked about, `changed` of them because their files had changed.
        gone: images whose features are there, but whose files were not found any more.
        unreadable: folders that could not be read.
    """

    def __init__(self, folder: str, journal: Journal, stream: "Stream", most: int, save_every: float) -> None:
        self._folder, self._journal, self._stream = folder, journal, stream
        self._most, self._save_every, self._stored_at = most, save_every, time.monotonic()
        self._under_way: dict[int, _Found] = {}
        self._rows: list[Row] = []
        self.kept = self.done = self.changed = self.gone = self.unreadable = 0

    @property
    def rows(self) -> int:
        """That the table will have."""
        return self.kept + self.done + self.gone

    def file_of(self, number: int) -> str:
        """That the stream has the number of, while it is under way."""
        return self._under_way[number].file

    def answer(self, bars: Bars) -> None:
        """Ask about all images whose features are not there; store what is said of them, also if this ends early."""
        try:
            hear = bars.hear if bars.shown else None
            for number, outcome in self._stream(self._files(bars), top_k=1, on_progress=hear):
                image = self._under_way[number]
                self._take(image, self._settled(image, outcome))
                bars.end(number)
                del self._under_way[number]
        finally:
            self._store()

    def _files(self, bars: Bars) -> Iterator[str]:
        """Those to be asked about, in the stream's numbering."""
        number = 0
        for image in self._to_do(bars):
            if isinstance(image.stamp, str):
                self._take(image, image.stamp)
                bars.skip()
            else:
                self._under_way[number] = image
                number += 1
                yield image.file

    def _to_do(self, bars: Bars) -> Iterator[_Found]:
        """What is found and not stored as it is; what is found and what is stored are both in the order of paths."""
        stored = self._journal.stored()
        known = next(stored, None)
        for image in self._found():
            while known and known[0] < image.path:
                self.gone += 1
                known = next(stored, None)
            if known and known[0] == image.path:
                as_it_is = known[1] == image.stamp
                known = next(stored, None)
                if as_it_is:
                    self.kept += 1
                    bars.skip()
                    continue
                self.changed += 1
            yield image
        self.gone += bool(known) + sum(1 for _ in stored)

    def _found(self) -> Iterator[_Found]:
        for path in paths_inside(self._folder, self._miss):
            file = file_at(self._folder, path)
            try:
                status = Path(file).stat()
            except OSError as error:
                yield _Found(path, file, f"cannot read it: {error.strerror}")
                continue
            regular = stat.S_ISREG(status.st_mode)
            yield _Found(path, file, (status.st_size, status.st_mtime_ns) if regular else "it is no regular file")

    def _miss(self, path: str, error: OSError) -> None:
        self.unreadable += 1
        complain_of(self._folder, path, error)

    def _settled(self, image: _Found, outcome: "Answer | FullframeError") -> "Answer | str":
        """The answer, or why there is none and never will be."""
        if isinstance(outcome, InvalidInput) and outcome.field == "top_k":  # it is too large for this model's classes
            [(_, outcome)] = self._stream([image.file], top_k=0)
        if isinstance(outcome, _NOT_ITS_FAULT):
            raise FullframeError(f"{image.file}: {outcome}")
        if not isinstance(outcome, FullframeError):
            return outcome
        return text_of(str(outcome).replace(f"cannot read {image.file}:", "cannot read it:"))

    def _take(self, image: _Found, outcome: "Answer | str") -> None:
        """A row more, stored now if it is time."""
        if isinstance(outcome, str):
            complain(f"{image.file}: {outcome}")
        self._rows.append(Row(image.path, None if isinstance(image.stamp, str) else image.stamp, outcome))
        self.done += 1
        if len(self._rows) >= self._most or time.monotonic() >= self._stored_at + self._save_every:
            self._store()

    def _store(self) -> None:
        self._journal.add(self._rows)
        self._rows = []
        self._stored_at = time.monotonic()


def _count(folder: str) -> int:
    """How many images there are; raises typer.BadParameter for none."""
    count = 0
    with Bars(None, doing="images found: ") as bars:
        for _ in paths_inside(folder, lambda path, error: None):
            count += 1
            bars.skip()
    if not count:
        raise typer.BadParameter(f"no images in the folder {folder!r}")
    return count


def _tell(output: Path, folder: str, recipe: Recipe, run: _Run, joined: Joined) -> None:
    """What has come of it."""
    before = f", {run.kept + run.gone} of them from before" if run.kept + run.gone else ""
    complain(f"wrote {output}: {joined.rows} x {recipe.length} features{before}")
    if run.changed:
        complain(f"changed since, and computed again: {run.changed}")
    if run.gone:
        complain(f"not found any more, but in the table as they were: {run.gone}")
    if run.unreadable:
        complain(f"folders that could not be read, so that nothing new in them is in the table: {run.unreadable}")
    if failed := joined.failures.total():
        complain(f"{failed} of {joined.rows} images failed; the table's errors tell of each:")
        for kind, count in joined.failures.most_common(_KINDS_SHOWN):
            path, error = joined.examples[kind]
            complain(f"  {'' if count == 1 else f'{count} as '}{Path(folder, path)}: {error}")
        if len(joined.failures) > _KINDS_SHOWN:
            complain("  ...")
