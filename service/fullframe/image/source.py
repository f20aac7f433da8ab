"""Raw pixels, and whatever a local caller holds as an image -> Picture."""

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fullframe.image.colour import Pixels, flatten_rgba
from fullframe.image.decode import Picture, open_encoded
from fullframe.image.encoded import OnDisk
from fullframe.image.limits import Limits, refused
from fullframe.image.regions import Checkpoint, HeldRegions, Regions, no_checkpoint

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | NDArray[np.uint8] | PilImage"
"""A path, an encoded file's bytes, uint8 [H, W, 3] RGB, or a PIL image."""

_READ_WHOLE_BYTES: Final = 8 * 2**20


class RawPicture:
    """Pixels that need no decoding."""

    format = "raw"
    random_access = True
    opening_bytes = 0

    def __init__(self, pixels: Pixels) -> None:
        self.height, self.width, _ = pixels.shape
        self._pixels = pixels

    def pixels(self) -> Pixels:
        """uint8 [height, width, 3], the caller's own memory where it can be."""
        return self._pixels

    def regions(self, checkpoint: Checkpoint = no_checkpoint) -> Regions:
        """Open it for reading in pieces."""
        return HeldRegions(self._pixels)

    def reading_bytes(self, rows: int) -> int:
        """None: the pixels are there."""
        return 0


def open_raw(data: bytes | memoryview, height: int, width: int, limits: Limits) -> RawPicture:
    """Take uint8 RGB pixels, row-major [height, width, 3] without padding; nothing is copied.

    Raises:
        InvalidInput: no pixels, too many, or another number of bytes than height * width * 3.
    """
    limits.check_size(height, width)
    given = len(memoryview(data).cast("B"))
    if given != height * width * 3:
        raise refused(f"raw {width}x{height} (width x height) RGB takes {height * width * 3} bytes; {given} were given")
    return RawPicture(np.frombuffer(data, np.uint8).reshape(height, width, 3))


def open_source(source: ImageSource, limits: Limits) -> Picture:
    """Open a path, an encoded file's bytes, a uint8 array [H, W, 3] or a PIL image.

    A file of more than 8 MB is not read into memory; it must stay as it is until its picture has been read.
    A PIL image is taken as it stands: alpha flattened on white, EXIF orientation left to the caller.

    Raises:
        InvalidInput: no image can be made of it; for a path, the message names it.
        TypeError: none of these.
    """
    if isinstance(source, bytes):
        return open_encoded(source, limits)
    if isinstance(source, str | os.PathLike):
        return open_encoded(_open_file(source, limits), limits)
    if isinstance(source, np.ndarray):
        return _open_array(source, limits)
    pil = sys.modules.get("PIL.Image")
    if pil is not None and isinstance(source, pil.Image):
        return _open_pil(source, limits)
    raise TypeError(f"an image is a path, bytes, a uint8 array [H, W, 3] or a PIL image, not {type(source).__name__}")


def _open_file(path: str | os.PathLike[str], limits: Limits) -> bytes | OnDisk:
    """A file's bytes; a large one is left where it is."""
    try:
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            limits.check_bytes(status.st_size)
            if stat.S_ISREG(status.st_mode) and status.st_size > _READ_WHOLE_BYTES:
                return OnDisk(os.dup(file.fileno()))
            return b"".join(_pieces(file, limits.max_bytes + 1))
    except (OSError, ValueError) as error:  # ValueError: a path with a null in it
        reason = error.strerror if isinstance(error, OSError) else error
        raise refused(f"cannot read {os.fspath(path)}: {reason}") from error


def _pieces(file: BinaryIO, count: int) -> Iterator[bytes]:
    """At most `count` bytes, for which memory is taken as they come."""
    while count > 0 and (piece := file.read(min(count, 2**20))):
        yield piece
        count -= len(piece)


def _open_array(array: NDArray[Any], limits: Limits) -> RawPicture:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        shape = "x".join(map(str, array.shape))
        raise refused(f"an array must be uint8 [height, width, 3] (RGB); this one is {array.dtype} [{shape}]")
    limits.check_size(*array.shape[:2])
    return RawPicture(np.ascontiguousarray(array))


def _open_pil(image: "PilImage", limits: Limits) -> RawPicture:
    limits.check_size(image.height, image.width)
    if image.mode.startswith(("I", "F")):
        raise refused(f"a PIL image of mode {image.mode} has no known white; convert it to L or RGB first")
    try:
        if image.has_transparency_data:
            return RawPicture(flatten_rgba(np.asarray(image.convert("RGBA"))))
        return RawPicture(np.asarray(image.convert("RGB")))
    except OSError as error:  # PIL decodes only now
        raise refused(f"the PIL image cannot be decoded: {error}") from error
