"""Finished rows on disk while others are still being made: parts in a folder beside the table that they become.

A part is a small Parquet file, whole or not there. Parts may hold the same path: the newest row counts. What a process
that was killed had stored is all there for the next one.
"""

import fcntl
import heapq
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from fullframe.errors import InvalidInput
from fullframe.files import replacing, write_atomically
from fullframe.table.damage import reading
from fullframe.table.recipe import Recipe
from fullframe.table.rows import Row, Stamp, group_rows, part_of, part_schema, table_schema

T = TypeVar("T")

_RECIPE: Final = "recipe.json"
_PART: Final = re.compile(r"(\d{6,})\.parquet")
_WRITTEN: Final[dict[str, Any]] = {"compression": "zstd", "use_dictionary": ["label"], "write_page_checksum": True}


@dataclass
class Joined:
    """What has become of a table.

    Attributes:
        rows: how many it has.
        failures: how many rows have an error, by the error with its numbers left out.
        examples: path and error of the first of each.
    """

    rows: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    file: Path
    number: int
    first: str
    last: str

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """Raises InvalidInput where the file is damaged: every page has a checksum."""
        with reading(self.file), pq.ParquetFile(self.file, page_checksum_verification=True) as file:
            return file.read(columns)


class Journal:
    """A table in the making, which one process at a time may write.

    Args:
        output: the table; its parts are kept beside it, in `folder`, until it is written.
        recipe: how its rows are made.
        restart: begin anew, whatever there is.

    Attributes:
        resumed: whether there is work of an earlier process.
        damaged: parts that could not be read; their images have no rows.

    Raises:
        InvalidInput: another process writes it, or rows of another recipe are there; the message says what differs.
        OSError: the folder can't be written to.
    """

    def __init__(self, output: Path, recipe: Recipe, *, restart: bool = False) -> None:
        self.folder, self._output, self._recipe = parts_folder(output), output, recipe
        self.folder.mkdir(exist_ok=True)
        self._lock = _locked(self.folder)
        try:
            self.resumed = not restart and self._is_ours()
            self.damaged: list[str] = []
            if not self.resumed:
                self._clear()
                write_atomically(self.folder / _RECIPE, json.dumps(recipe.to_metadata(), indent=1).encode())
            for file in self.folder.glob(".*.tmp"):  # of a process that was killed
                file.unlink()
            self._parts = list(self._stored_parts())
        except BaseException:
            os.close(self._lock)
            raise
        self._begin = self._next = 1 + max((part.number for part in self._parts), default=-1)

    def stored(self) -> Iterator[tuple[str, Stamp]]:
        """Path and stamp of every image whose features are there, in the order of paths."""

        def read(part: _Part) -> Iterator[tuple[str, Stamp | None]]:
            table = part.read(["path", "error", "size", "modified"])
            for path, error, *stamp in zip(*(column.to_pylist() for column in table.columns), strict=True):
                yield path, None if error is not None else (stamp[0], stamp[1])

        for path, stamp in _newest([part for part in self._parts if part.number < self._begin], read):
            if stamp is not None:
                yield path, stamp

    def add(self, rows: Sequence[Row]) -> None:
        """Store rows: once this returns, they are on the disk. Raises OSError where there is no room."""
        if not rows:
            return
        table = part_of(rows, self._recipe)
        data = io.BytesIO()
        pq.write_table(table, data, **_WRITTEN)
        file = self.folder / f"{self._next:06}.parquet"
        write_atomically(file, data.getvalue())
        self._parts.append(_Part(file, self._next, table["path"][0].as_py(), table["path"][-1].as_py()))
        self._next += 1

    def join(self, on_rows: Callable[[int], object]) -> Joined:
        """Write the table, in the order of paths; errors of earlier processes are left out.

        Where it can't be, the parts stay and the table is as it was.

        Args:
            on_rows: told of so many rows more that are written.

        Raises:
            OSError: there is no room.
            InvalidInput: a part has been damaged meanwhile.
        """
        joined, schema = Joined(), table_schema(self._recipe)
        with (
            replacing(self._output, self.folder) as file,
            pq.ParquetWriter(file, schema, **_WRITTEN) as writer,
        ):
            for group in _groups(self._slices(schema.names), group_rows(self._recipe)):
                _count(group, joined)
                writer.write_table(group, len(group))
                on_rows(len(group))
        return joined

    def discard(self) -> None:
        """Remove the parts; the table is there."""
        self._clear()
        with suppress(OSError):  # something else lies there
            self.folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._lock)

    def _is_ours(self) -> bool:
        file = self.folder / _RECIPE
        try:
            there = Recipe.from_metadata(json.loads(file.read_bytes()))
        except FileNotFoundError:
            return False
        except (ValueError, AttributeError, InvalidInput) as error:
            raise InvalidInput(f"{file} can't be read ({error}); --restart begins anew", "output") from error
        if differences := self._recipe.differences(there):
            raise InvalidInput(
                f"{self.folder} holds the work of a run with {'; '.join(differences)}: give that run's options to go "
                "on with it, another --output, or --restart to begin anew",
                "output",
            )
        return True

    def _stored_parts(self) -> Iterator[_Part]:
        for number, file in sorted(_part_files(self.folder)):
            try:
                table = _Part(file, number, "", "").read()
                if table.schema != part_schema(self._recipe) or not len(table):
                    raise InvalidInput("it has other columns")
            except InvalidInput:
                self.damaged.append(file.name)
                file.unlink()
                continue
            yield _Part(file, number, table["path"][0].as_py(), table["path"][-1].as_py())

    def _slices(self, columns: list[str]) -> Iterator[pa.Table]:
        """The rows of the table, in pieces as they lie in the parts."""

        def read(part: _Part) -> Iterator[tuple[str, tuple[pa.Table, int, bool]]]:
            table = part.read(columns)
            old = part.number < self._begin
            failed = table["error"].is_valid().to_pylist()
            for row, path in enumerate(table["path"].to_pylist()):
                yield path, (table, row, old and failed[row])

        table, start, stop = None, 0, 0
        for _, (here, row, void) in _newest(self._parts, read):
            if void:
                continue
            if here is not table or row != stop:
                if table is not None:
                    yield table.slice(start, stop - start)
                table, start = here, row
            stop = row + 1
        if table is not None:
            yield table.slice(start, stop - start)

    def _clear(self) -> None:
        """Remove what a journal writes and nothing else; the recipe first, so that a rest is never taken for work."""
        for file in (self.folder / _RECIPE, *(file for _, file in _part_files(self.folder))):
            file.unlink(missing_ok=True)


def parts_folder(output: Path) -> Path:
    """Where the parts of a table are kept."""
    return output.with_name(output.name + ".parts")


def is_begun(output: Path) -> bool:
    """Whether there is a run to go on with."""
    return (parts_folder(output) / _RECIPE).exists()


def _locked(folder: Path) -> int:
    """The folder, opened and locked until it is closed or this process ends, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InvalidInput(f"another process is writing to {folder}", "output") from None
    except OSError:  # a file system without locks
        pass
    return descriptor


def _part_files(folder: Path) -> Iterator[tuple[int, Path]]:
    for file in folder.iterdir():
        if match := _PART.fullmatch(file.name):
            yield int(match[1]), file


def _newest(parts: Iterable[_Part], read: Callable[[_Part], Iterator[tuple[str, T]]]) -> Iterator[tuple[str, T]]:
    """The newest row of every path, in the order of paths; few parts are open at a time.

    Args:
        read: a part's rows, each with its path, in that order.
    """

    def rows(chain: Iterable[_Part]) -> Iterator[tuple[str, int, int, T]]:
        for part in chain:
            for row, (path, value) in enumerate(read(part)):
                yield path, -part.number, row, value

    last = None
    for path, _, _, value in heapq.merge(*map(rows, _chains(parts))):
        if path != last:
            yield path, value
        last = path


def _chains(parts: Iterable[_Part]) -> list[list[_Part]]:
    """Parts that follow each other; so many chains as parts overlap somewhere."""
    chains: list[list[_Part]] = []
    for part in sorted(parts, key=lambda part: part.first):
        for chain in chains:
            if chain[-1].last < part.first:
                chain.append(part)
                break
        else:
            chains.append([part])
    return chains


def _groups(slices: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows, so many at a time."""
    held: list[pa.Table] = []
    count = 0
    for piece in slices:
        while len(piece):
            taken = piece.slice(0, rows - count)
            piece = piece.slice(len(taken))
            held.append(taken)
            count += len(taken)
            if count == rows:
                yield pa.concat_tables(held).combine_chunks()
                held, count = [], 0
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _count(group: pa.Table, joined: Joined) -> None:
    joined.rows += len(group)
    failed = group.filter(group["error"].is_valid())
    for path, error in zip(failed["path"].to_pylist(), failed["error"].to_pylist(), strict=True):
        kind = re.sub(r"\d+", "", error)
        joined.failures[kind] += 1
        joined.examples.setdefault(kind, (path, error))
