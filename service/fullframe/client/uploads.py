"""One encoded image as the messages of an upload, read as they are sent."""

import io
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from fullframe.errors import InvalidInput
from fullframe.v1 import vision_pb2 as pb

CHUNK: Final = 1 << 20
"""Bytes of a file in one message, where the server takes such long ones."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A regular file, left where it is until it is known how it has to travel."""

    path: Path
    size: int


def stored_file(path: Path) -> StoredFile | None:
    """The file if it is a regular one, whose size is known. Raises InvalidInput if it cannot be found."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    return StoredFile(path, status.st_size) if stat.S_ISREG(status.st_mode) else None


def unreadable(path: str | os.PathLike[str], error: OSError | ValueError) -> InvalidInput:
    """The error of a file that cannot be read; a ValueError is that of a path with a null in it."""
    return InvalidInput(
        f"cannot read {os.fspath(path)}: {error.strerror if isinstance(error, OSError) else error}", "images"
    )


class Upload:
    """What is sent of one image.

    The file itself waits for `let_go`: what a server refuses at once need not be sent, and the refusal is not lost
    among writes that fail.

    Args:
        most: bytes of the file that the server takes in one message.

    Attributes:
        size: bytes of the file.
        error: why the last of `messages` ended before the file did, if it did.
    """

    def __init__(
        self, file: bytes | StoredFile, model: pb.ModelRef, options: pb.PredictOptions, most: int = CHUNK
    ) -> None:
        self._file, self._most = file, most
        self.size = len(file) if isinstance(file, bytes) else file.size
        self.error: InvalidInput | None = None
        self._go = threading.Event()
        self._start = pb.PredictUploadRequest.Start(model=model, options=options, total_bytes=self.size)

    def messages(self) -> Iterator[pb.PredictUploadRequest]:
        """All of them, from the file's beginning; never raises, since gRPC would put it in words of its own."""
        self.error, self._go = None, threading.Event()
        return self._parts(self._go)

    def let_go(self) -> None:
        """The server has room, or the call is over: nobody waits any more."""
        self._go.set()

    def _parts(self, go: threading.Event) -> Iterator[pb.PredictUploadRequest]:
        left = self.size
        try:
            with self._open() as file:
                yield pb.PredictUploadRequest(start=self._start)
                go.wait()
                while left > 0 and (chunk := file.read(min(CHUNK, self._most, left))):
                    yield pb.PredictUploadRequest(chunk=chunk)
                    left -= len(chunk)
            if left:
                self.error = InvalidInput("the file became shorter while it was being sent", "images")
        except OSError as error:
            self.error = unreadable(error.filename or "the file", error)

    def _open(self) -> BinaryIO:
        return io.BytesIO(self._file) if isinstance(self._file, bytes) else self._file.path.open("rb")
