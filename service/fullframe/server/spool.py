"""Where uploads are kept while they are worked on: files without a name, within a quota, free once they are closed."""

import io
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from fullframe.errors import InvalidInput, Overloaded
from fullframe.image import OnDisk
from fullframe.server.logs import event
from fullframe.settings import PREFIX, Settings

_RETRY_AFTER: Final = 2.0  # seconds; an upload takes longer than a request


class Spool:
    """A quota for files that come in; safe to use from any thread.

    Args:
        folder: where they are; None: in memory.
        largest: bytes of one file.
        max_bytes: of all together.
        min_free: bytes of the disk that are left free.

    Attributes:
        largest: bytes of one file at most.
    """

    def __init__(self, folder: str | None, largest: int, max_bytes: int, min_free: int = 0) -> None:
        self.largest = min(largest, max_bytes)
        self._folder, self._max_bytes, self._min_free = folder, max_bytes, min_free
        self._lock = threading.Lock()
        self._reserved = self._written = 0

    def reserved(self) -> int:
        """Bytes of all files that are open, those announced included."""
        return self._reserved

    def make(self) -> Any:
        """A file open for writing; raises Overloaded if the disk takes no more."""
        with _disk():
            return io.BytesIO() if self._folder is None else tempfile.TemporaryFile(dir=self._folder, buffering=0)

    def check(self, size: int) -> None:
        """Raise InvalidInput if one file may not have `size` bytes."""
        if size > self.largest:
            raise InvalidInput(
                f"an upload of {size} bytes is more than the limit of {self.largest} bytes", "total_bytes"
            )

    def reserve(self, count: int) -> None:
        """Count `count` bytes as taken; raises Overloaded if the quota or the disk has no room for them now."""
        with _disk():
            free = None if self._folder is None else _free_bytes(self._folder)
        with self._lock:
            if self._reserved + count > self._max_bytes:
                raise Overloaded(
                    f"uploads of {self._reserved} bytes are being worked on, of at most {self._max_bytes}: "
                    f"no room for {count} now",
                    _RETRY_AFTER,
                )
            # What others have announced is not on the disk yet.
            if free is not None and free - (self._reserved - self._written) - count < self._min_free:
                raise Overloaded(
                    f"the disk for uploads is nearly full: no room for {count} bytes more now", _RETRY_AFTER
                )
            self._reserved += count

    def wrote(self, count: int) -> None:
        """Hear that `count` bytes of those reserved are there."""
        with self._lock:
            self._written += count

    def release(self, reserved: int, written: int) -> None:
        """Take back what a file had reserved, and how much of it was there."""
        with self._lock:
            self._reserved -= reserved
            self._written -= written


class SpooledFile:
    """One file of a spool, to be closed on every path; its methods may wait for the disk, and for each other.

    Args:
        announced: bytes that it will have, 0 if that is not known.

    Attributes:
        size: bytes written.

    Raises:
        InvalidInput: it is announced larger than one may be.
    """

    def __init__(self, spool: Spool, announced: int = 0) -> None:
        spool.check(announced)
        self.size = self._reserved = 0
        self._spool, self._announced = spool, announced
        self._file: Any = None
        self._closed = False
        self._lock = threading.Lock()

    def open(self) -> None:
        """Make room for what is announced; raises Overloaded if there is none now."""
        with self._lock:
            if not self._closed:
                self._reserve(self._announced)
                self._file = self._spool.make()

    def write(self, chunk: bytes) -> None:
        """Add to the file, which must be open; does nothing once it is closed.

        Raises:
            InvalidInput: it becomes larger than one may be.
            Overloaded: the quota or the disk is full.
        """
        with self._lock:
            if self._closed:
                return
            self._spool.check(self.size + len(chunk))
            self._reserve(max(0, self.size + len(chunk) - self._reserved))
            rest = memoryview(chunk)
            while rest:
                with _disk():
                    count = self._file.write(rest)
                self._spool.wrote(count)
                self.size += count
                rest = rest[count:]

    def data(self) -> bytes | OnDisk:
        """What was written, to be read in place; of no use once the file is closed."""
        if isinstance(self._file, io.BytesIO):
            return self._file.getvalue()
        return OnDisk(os.dup(self._file.fileno()))

    def close(self) -> None:
        """Free its space, whoever may still read it; once more does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._file is not None:
                with suppress(OSError):
                    self._file.truncate(0)
                self._file.close()
            self._spool.release(self._reserved, self.size)

    def _reserve(self, count: int) -> None:
        self._spool.reserve(count)
        self._reserved += count


def open_spool(settings: Settings) -> Spool:
    """The spool that `settings` describe, in memory where no folder is named and the system's can't be written.

    Raises:
        InvalidInput: the folder that is named can't be written.
    """
    try:
        folder = settings.spool_folder or tempfile.gettempdir()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if settings.spool_folder:
            raise InvalidInput(
                f"the folder {settings.spool_folder!r} (setting spool_folder, in the environment {PREFIX}SPOOL_FOLDER) "
                f"can't be written: {error.strerror}",
                "spool_folder",
            ) from error
        largest = int(settings.max_image_bytes)
        event(
            "no spool", logging.WARNING, message=f"no temporary folder: uploads of {largest} bytes at most, in memory"
        )
        return Spool(None, largest, int(settings.max_bytes_in_flight))
    return Spool(folder, int(settings.max_upload_bytes), int(settings.max_spool_bytes), int(settings.min_free_bytes))


def _free_bytes(folder: str) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


@contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Overloaded(f"the disk for uploads takes no more now: {error.strerror}", _RETRY_AFTER) from error
