"""Any region of a picture, without holding all of it: as shown, the same pixels as a whole decode gives."""

import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import isqrt, prod
from types import TracebackType
from typing import Final, Self

import numpy as np

from fullframe.errors import Overloaded
from fullframe.image.colour import Pixels
from fullframe.image.orientation import Area, Orientation, copy_pixels
from fullframe.image.stored import Stored

Checkpoint = Callable[[], object]
"""Called before each block of rows or tiles is decoded; what it raises ends the read, and another may follow."""

_BLOCK_PIXELS: Final = 2**20  # of tiles
_RETRY_SECONDS: Final = 10.0


def no_checkpoint() -> None:
    """For those who read to the end."""


class Regions(ABC):
    """A picture that is open for reading, by one thread at a time; a context manager.

    Attributes:
        height, width: pixels as displayed.
        random_access: whether regions may be read in any order. If not, none may begin above one read before; the
            rows from the top of the latest to the bottom of the lowest are held, in all their width.
    """

    random_access = True

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width

    def read(self, top: int, left: int, height: int, width: int) -> Pixels:
        """Decode a region.

        Returns:
            uint8 [height, width, 3], sRGB, the caller's to keep.

        Raises:
            InvalidInput: the file is damaged there, ends there or has changed since it was opened. The message says
                how many rows could be read.
            ValueError: the region is empty, or not within the picture, or above an earlier one without random access.
        """
        if not (0 <= top < top + height <= self.height and 0 <= left < left + width <= self.width):
            raise ValueError(
                f"no region of {width}x{height} (width x height) at row {top}, column {left} "
                f"is within {self.width}x{self.height}"
            )
        return self._read(Area(top, left, height, width))

    @abstractmethod
    def close(self) -> None:
        """Let go of the picture; nothing can be read any more."""

    @abstractmethod
    def _read(self, area: Area) -> Pixels: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class HeldRegions(Regions):
    """Of pixels that are there, in memory or in a file mapped into it."""

    def __init__(self, pixels: Pixels) -> None:
        super().__init__(*pixels.shape[:2])
        self._pixels: Pixels | None = pixels

    def close(self) -> None:
        """Let go of the pixels."""
        self._pixels = None

    def _read(self, area: Area) -> Pixels:
        if self._pixels is None:
            raise ValueError("the picture was closed")
        top, left, height, width = area
        region = np.empty((height, width, 3), np.uint8)
        copy_pixels(self._pixels[top : top + height, left : left + width], region)
        return region


class RowRegions(Regions):
    """Of a file that can only be decoded from its first row on, and is stored upright or mirrored."""

    random_access = False

    def __init__(self, stored: Stored, orientation: Orientation, checkpoint: Checkpoint) -> None:
        super().__init__(stored.height, stored.width)
        self._stored, self._orientation, self._checkpoint = stored, orientation, checkpoint
        self._blocks: deque[tuple[int, Pixels]] = deque()  # each with the row after its last
        self._next = 0  # the first row that is not decoded
        self._oldest = 0  # the first that may still be asked for

    def close(self) -> None:
        """Let go of the file."""
        self._blocks.clear()
        self._stored.close()

    def _read(self, area: Area) -> Pixels:
        if area.top < self._oldest:
            raise ValueError(f"row {area.top} is above row {self._oldest}, where the last region began")
        self._oldest = area.top
        while self._blocks and self._blocks[0][0] <= area.top:
            self._blocks.popleft()
        while self._next < area.top + area.height:
            self._checkpoint()
            block = self._stored.rows_from(self._next)
            self._next += len(block)
            if self._next > area.top:
                self._blocks.append((self._next, block))
        return self._assembled(area)

    def _assembled(self, area: Area) -> Pixels:
        region = np.empty((area.height, area.width, 3), np.uint8)
        target = self._orientation.stored(region)
        _, left, _, width = self._orientation.stored_area(area, self.height, self.width)
        for end, block in self._blocks:
            start = end - len(block)
            first, last = max(area.top, start), min(area.top + area.height, end)
            if first < last:
                source = block[first - start : last - start, left : left + width]
                copy_pixels(source, target[first - area.top : last - area.top])
        return region


class TileRegions(Regions):
    """Of a tiled file; some megapixels of tiles are held beside the region, or one tile that is larger."""

    def __init__(self, stored: Stored, tile: tuple[int, int], orientation: Orientation, checkpoint: Checkpoint) -> None:
        super().__init__(*orientation.size(stored.height, stored.width))
        self._stored, self._orientation, self._checkpoint = stored, orientation, checkpoint
        tiles = max(1, isqrt(_BLOCK_PIXELS // (tile[0] * tile[1])))
        self._block_height, self._block_width = tile[0] * tiles, tile[1] * tiles

    def close(self) -> None:
        """Let go of the file."""
        self._stored.close()

    def _read(self, area: Area) -> Pixels:
        region = np.empty((area.height, area.width, 3), np.uint8)
        target = self._orientation.stored(region)
        whole = self._orientation.stored_area(area, self._stored.height, self._stored.width)
        for top, height in _cut(whole.top, whole.height, self._block_height):
            for left, width in _cut(whole.left, whole.width, self._block_width):
                self._checkpoint()
                pixels = self._stored.area(Area(top, left, height, width))
                below, right = top - whole.top, left - whole.left
                copy_pixels(pixels, target[below : below + height, right : right + width])
        return region


def gather(stored: Stored, orientation: Orientation, checkpoint: Checkpoint = no_checkpoint) -> Pixels:
    """Decode a whole picture: uint8 [height, width, 3], as displayed. Raises InvalidInput if it is damaged."""
    pixels = np.empty((*orientation.size(stored.height, stored.width), 3), np.uint8)
    target = orientation.stored(pixels)
    top = 0
    for block in _blocks(stored, checkpoint):
        copy_pixels(block, target[top : top + len(block)])
        top += len(block)
    return pixels


def gather_on_disk(stored: Stored, orientation: Orientation, checkpoint: Checkpoint) -> Pixels:
    """As gather; the pixels are a view of a temporary file, which goes with them.

    Raises:
        InvalidInput: the picture is damaged.
        Overloaded: the disk is full.
    """
    size = (stored.height, stored.width, 3)
    with ExitStack() as opened:
        with _disk_space(prod(size)):
            file = opened.enter_context(tempfile.TemporaryFile(buffering=0))
        for block in _blocks(stored, checkpoint):
            rest = block.reshape(-1).data
            while rest:
                with _disk_space(prod(size)):
                    rest = rest[file.write(rest) :]
        with _disk_space(prod(size)):
            return orientation.shown(np.memmap(file, np.uint8, "r", shape=size))


@contextmanager
def _disk_space(count: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Overloaded(
            f"there is no disk space to turn this picture ({count} bytes) as its EXIF orientation says; "
            "stored upright, or as a tiled TIFF, it takes none",
            retry_after=_RETRY_SECONDS,
        ) from error


def _blocks(stored: Stored, checkpoint: Checkpoint) -> Iterator[Pixels]:
    """All rows, in order."""
    top = 0
    while top < stored.height:
        checkpoint()
        block = stored.rows_from(top)
        yield block
        top += len(block)


def _cut(start: int, length: int, step: int) -> Iterator[tuple[int, int]]:
    """Start and length of the pieces of a range, cut at the multiples of `step`."""
    end = start + length
    while start < end:
        piece = min(end, (start // step + 1) * step) - start
        yield start, piece
        start += piece
