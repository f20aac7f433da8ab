"""An encoded file, in memory or on disk, and how libvips reads it."""

import os
import weakref
from typing import Final, Protocol

import pyvips

_HEAD_BYTES: Final = 1024


class Encoded(Protocol):
    """An encoded file.

    Attributes:
        head: its first bytes, for telling its format.
    """

    head: bytes

    def __len__(self) -> int: ...

    def source(self) -> pyvips.Source:
        """A new reader of it, which has to outlive the images made from it."""
        ...

    def has_changed(self) -> bool:
        """Whether it was written to since it was opened."""
        ...


class InMemory:
    """An encoded file's bytes, read in place."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.head = data[:_HEAD_BYTES]

    def __len__(self) -> int:
        return len(self.data)

    def source(self) -> pyvips.Source:
        """A new reader of it, which has to outlive the images made from it."""
        return pyvips.Source.new_from_memory(self.data)

    def has_changed(self) -> bool:
        """Never."""
        return False


class OnDisk:
    """A regular file, read in place; what it is renamed to, or whether it is removed, doesn't matter.

    Takes over an open descriptor, and closes it when nobody reads the file any more.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self._state = self._look()
        self.head = os.pread(descriptor, _HEAD_BYTES, 0)

    def __len__(self) -> int:
        return self._state[0]

    def source(self) -> pyvips.Source:
        """A new reader of it, which has to outlive the images made from it.

        None of libvips' own, which map some formats' files: one cut short meanwhile would end the process.
        """
        cursor = _Cursor(self, self._descriptor)
        source = pyvips.SourceCustom()
        source.signal_connect("read", cursor.read)
        source.signal_connect("seek", cursor.seek)
        return source

    def has_changed(self) -> bool:
        """Whether it was written to since it was opened."""
        return self._look() != self._state

    def _look(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns


class _Cursor:
    """A position in a file, moved as libvips asks. Called from C, where nothing may be raised."""

    def __init__(self, file: OnDisk, descriptor: int) -> None:
        self._file, self._descriptor = file, descriptor  # the file is kept open by being kept
        self._position = 0

    def read(self, buffer: memoryview) -> int:
        try:
            count = os.preadv(self._descriptor, [buffer], self._position)
        except OSError:
            return -1
        self._position += count
        return count

    def seek(self, offset: int, whence: int) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._file)}.get(whence)
        if start is None or start + offset < 0:
            return -1
        self._position = start + offset
        return self._position
