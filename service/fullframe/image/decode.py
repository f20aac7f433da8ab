"""Encoded bytes <-> pixels."""

from typing import Protocol

import numpy as np
import pyvips

from fullframe.errors import InvalidInput
from fullframe.image import formats
from fullframe.image.colour import Pixels, check_colour, is_srgb, to_pixels, to_srgb
from fullframe.image.jpeg import PlainHeader, decode_plain, read_plain
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


class VipsPicture:
    """A file whose header libvips has read, within limits."""

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


class PlainJpeg:
    """A plain JPEG within limits; libvips has the last word on one that has a fault or other colours than sRGB."""

    format = "jpeg"

    def __init__(self, data: bytes, header: PlainHeader, limits: Limits) -> None:
        self.height, self.width, self._profile = header
        self._data, self._limits = data, limits

    def pixels(self) -> Pixels:
        """uint8 [height, width, 3], sRGB; decodes anew at each call, safe from any thread.

        Raises:
            InvalidInput: the data ends early or is damaged.
        """
        if not self._profile or is_srgb(self._profile):
            pixels = decode_plain(self._data, self.height, self.width)
            if pixels is not None:
                return pixels
        return _open_with_vips(self._data, self.format, self._limits).pixels()


def open_encoded(data: bytes, limits: Limits) -> Picture:
    """Recognise a file, read its header and hold it against limits; no pixel is decoded.

    Raises:
        InvalidInput: empty, not of an allowed format, damaged, beyond a limit, or of colours that cannot be read.
    """
    limits.check_bytes(len(data))
    format = _allowed_format(data, limits)
    header = read_plain(data) if format == "jpeg" else None
    if header is None:
        return _open_with_vips(data, format, limits)
    limits.check_size(header.height, header.width)
    return PlainJpeg(data, header, limits)


def _open_with_vips(data: bytes, format: str, limits: Limits) -> VipsPicture:
    try:
        image = formats.open_vips(data, format)
        frames = image.get("n-pages") if image.get_typeof("n-pages") else 1
    except formats.VIPS_ERRORS:
        raise _unreadable(format) from None
    limits.check_size(image.height, image.width)
    limits.check_frames(frames)
    check_colour(image)
    return VipsPicture(data, format, image)


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
    format = formats.sniff(data)
    if format in limits.formats:
        return format
    what = f"this is {format or 'no known image format'}" if data else "the image is empty (0 bytes)"
    raise refused(f"{what}; supported are {listed(limits.formats)}")


def _unreadable(format: str) -> InvalidInput:
    return refused(f"the {format} file ends early, is damaged or is of a variant that cannot be read")


def _orientation(image: pyvips.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or it is none of these."""
    value = image.get("orientation") if image.get_typeof("orientation") else 1
    return value if 1 <= value <= 8 else 1
