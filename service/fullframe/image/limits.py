"""How large an image may be, and the refusal of those that are larger."""

from dataclasses import dataclass

from fullframe.defaults import (
    MAX_BYTES,
    MAX_FRAMES,
    MAX_HELD_PIXELS,
    MAX_PIXELS,
    MAX_TEMPORARY_BYTES,
    OWN_HELD_PIXELS,
    OWN_PIXELS,
)
from fullframe.errors import InvalidInput
from fullframe.image.formats import SUPPORTED


@dataclass(frozen=True)
class Limits:
    """What one image may cost; all of it is checked before any pixel is decoded.

    Attributes:
        max_pixels: height x width.
        max_bytes: of an encoded file. Raw pixels are bounded by max_pixels alone.
        max_frames: frames or pages of a file, of which the first is read.
        max_held_pixels: that must be in memory at once, even to read a region: all of an interlaced or progressive
            file, one tile or up to 512 rows of another.
        max_temporary_bytes: on disk, for a picture beyond max_held_pixels that is stored turned.
        formats: names of SUPPORTED formats.
    """

    max_pixels: int = MAX_PIXELS
    max_bytes: int = MAX_BYTES
    max_frames: int = MAX_FRAMES
    max_held_pixels: int = MAX_HELD_PIXELS
    max_temporary_bytes: int = MAX_TEMPORARY_BYTES
    formats: frozenset[str] = SUPPORTED

    def __post_init__(self) -> None:
        if unknown := self.formats - SUPPORTED:
            raise ValueError(f"cannot read {listed(unknown)}; supported formats are {listed(SUPPORTED)}")

    def check_bytes(self, count: int) -> None:
        """Raise InvalidInput if an encoded file of `count` bytes is too large."""
        if count > self.max_bytes:
            raise refused(f"{count} bytes are more than the limit of {self.max_bytes} bytes")

    def check_frames(self, count: int) -> None:
        """Raise InvalidInput if a file has too many frames or pages."""
        if count > self.max_frames:
            raise refused(f"{count} frames or pages are more than the limit of {self.max_frames}")

    def check_held(self, pixels: int, what: str) -> None:
        """Raise InvalidInput if `what` of a file, which must be held in memory at once, is too large."""
        if pixels > self.max_held_pixels:
            raise refused(
                f"{what} must be held in memory at once, and {pixels / 1e6:.1f} megapixels are more than the limit of "
                f"{self.max_held_pixels / 1e6:g}; as a tiled TIFF (256x256, say) it is read piece by piece"
            )

    def check_temporary(self, count: int) -> None:
        """Raise InvalidInput if a picture that is stored turned takes too much disk to be turned."""
        if count > self.max_temporary_bytes:
            raise refused(
                f"to turn this picture as its EXIF orientation says takes {count} bytes of disk; the limit is "
                f"{self.max_temporary_bytes} bytes; stored upright, or as a tiled TIFF, it takes none"
            )

    def check_size(self, height: int, width: int) -> None:
        """Raise InvalidInput if height x width pixels are too many, or none."""
        if height < 1 or width < 1:
            raise refused(f"{width}x{height} (width x height) has no pixels; both must be at least 1")
        if height * width > self.max_pixels:
            raise refused(
                f"{width}x{height} (width x height) is {height * width / 1e6:.1f} megapixels; "
                f"the limit is {self.max_pixels / 1e6:g}"
            )


def own_limits(max_pixels: int = OWN_PIXELS) -> Limits:
    """For one's own files, which are read in place however long they are."""
    return Limits(max_pixels=max_pixels, max_bytes=2**60, max_held_pixels=OWN_HELD_PIXELS)


def listed(names: frozenset[str]) -> str:
    """Names in order, as a sentence shows them."""
    return ", ".join(sorted(names))


def refused(message: str) -> InvalidInput:
    """The error of an image that cannot be taken."""
    return InvalidInput(message, field="images")
