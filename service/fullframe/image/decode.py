"""Encoded bytes <-> pixels."""

from typing import Protocol

import numpy as np
import pyvips

from fullframe.errors import InvalidInput
from fullframe.image import formats
from fullframe.image.colour import Pixels, check_colour, to_pixels, to_srgb
from fullframe.image.limits import Limits, listed, refused


class Picture(Protocol):
    """An image whose size is known and whose pixels can be had.

    Attributes:
        height, width: pixels as displayed, EXIF orientation applied.
        format: "jpeg", "png"..., "raw".
    """

    height: int
    width: int
    format: str

    def pixels(self) -> Pixels:
        """uint8 [height, width, 3], sRGB. Raises InvalidInput if the data is damaged."""
        ...


class EncodedPicture:
    """A file whose header is read and within limits."""

    def __init__(self, data: bytes, format: str, image: pyvips.Image) -> None:
        self.format = format
        self.height, self.width = image.height, image.width
        if _orientation(image) >= 5:
            self.height, self.width = self.width, self.height
        self._data = data
        self._unread = [image]

    def pixels(self) -> Pixels:
        """uint8 [height, width, 3], sRGB; decodes anew at each call, safe from any thread.

        Raises:
            InvalidInput: the data ends early or is damaged.
        """
        try:
            return _decode(self._open())
        except formats.VIPS_ERRORS:
            pass  # and raise below: an error that is kept somewhere must not keep libvips' image through its context
        raise _unreadable(self.format)

    def _open(self) -> pyvips.Image:
        try:
            return self._unread.pop()
        except IndexError:
            return formats.open_vips(self._data, self.format)


def open_encoded(data: bytes, limits: Limits) -> EncodedPicture:
    """Recognise a file, read its header and hold it against limits; no pixel is decoded.

    Raises:
        InvalidInput: empty, not of an allowed format, damaged, beyond a limit, or of colours that cannot be read.
    """
    limits.check_bytes(len(data))
    format = _allowed_format(data, limits)
    try:
        image = formats.open_vips(data, format)
        frames = image.get("n-pages") if image.get_typeof("n-pages") else 1
    except formats.VIPS_ERRORS:
        raise _unreadable(format) from None
    limits.check_size(image.height, image.width)
    limits.check_frames(frames)
    check_colour(image)
    return EncodedPicture(data, format, image)


def _decode(image: pyvips.Image) -> Pixels:
    orientation = _orientation(image)
    image = to_srgb(image)
    if orientation > 1:
        image = pyvips.Operation.call("autorot", image.copy_memory())
    return to_pixels(image)


def encode_png(pixels: Pixels) -> bytes:
    """A PNG file of uint8 [H, W, 3] RGB pixels."""
    height, width, bands = pixels.shape
    image = pyvips.Image.new_from_memory(np.ascontiguousarray(pixels), width, height, bands, "uchar")
    return bytes(image.copy(interpretation="srgb").pngsave_buffer())


def _allowed_format(data: bytes, limits: Limits) -> str:
    allowed = f"supported are {listed(limits.formats)}"
    if not data:
        raise refused(f"the image is empty (0 bytes); {allowed}")
    format = formats.sniff(data)
    if format not in limits.formats:
        raise refused(f"this is {format or 'no known image format'}; {allowed}")
    return format


def _unreadable(format: str) -> InvalidInput:
    return refused(f"the {format} file ends early, is damaged or is of a variant that cannot be read")


def _orientation(image: pyvips.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or it is none of these."""
    value = image.get("orientation") if image.get_typeof("orientation") else 1
    return value if 1 <= value <= 8 else 1
