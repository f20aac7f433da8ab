"""Encoded bytes <-> pixels."""

from contextlib import closing
from typing import Protocol

import numpy as np
import pyvips

from fullframe.image import formats
from fullframe.image.colour import Pixels, check_colour, is_srgb
from fullframe.image.encoded import Encoded, InMemory, OnDisk
from fullframe.image.jpeg import PlainHeader, decode_plain, read_plain
from fullframe.image.limits import Limits, listed, refused
from fullframe.image.orientation import orientation_of
from fullframe.image.regions import (
    Checkpoint,
    HeldRegions,
    Regions,
    RowRegions,
    TileRegions,
    gather,
    gather_on_disk,
    no_checkpoint,
)
from fullframe.image.stored import (
    Stored,
    check_held,
    decoding_bytes,
    is_decoded_whole,
    open_vips,
    tile_size,
    unreadable,
)


class Picture(Protocol):
    """An image whose size is known and whose pixels can be had.

    Attributes:
        height, width: pixels as displayed, EXIF orientation applied.
        format: "jpeg", "png"..., "raw".
        random_access: whether its regions can be read in any order.
        opening_bytes: about how many bytes `regions()` takes at most, before anything is read.
    """

    height: int
    width: int
    format: str
    random_access: bool
    opening_bytes: int

    def pixels(self) -> Pixels:
        """uint8 [height, width, 3], sRGB. Raises InvalidInput if the data is damaged."""
        ...

    def regions(self, checkpoint: Checkpoint = no_checkpoint) -> Regions:
        """Open it for reading in pieces, each the same pixels as in `pixels()`.

        What cannot be decoded in pieces is decoded here, within limits: files that are interlaced or progressive, and
        those stored in rows that are shown from the bottom up, or as columns.

        Args:
            checkpoint: called again and again, here and while regions are read; what it raises ends the reading.

        Raises:
            InvalidInput: the data is damaged.
            Overloaded: no disk space is left to turn a huge picture.
        """
        ...

    def reading_bytes(self, rows: int) -> int:
        """About how many bytes are held while regions of so many rows are read, beside the region itself."""
        ...


class VipsPicture:
    """A file whose header libvips has read, within limits."""

    def __init__(self, encoded: Encoded, format: str, image: pyvips.Image, limits: Limits) -> None:
        self.format = format
        self._orientation = orientation_of(image)
        self._in_rows = not is_decoded_whole(image, format) and self._orientation.keeps_rows
        self._tiled, self._decoding_bytes = tile_size(image) is not None, decoding_bytes(image, format)
        self.height, self.width = self._orientation.size(image.height, image.width)
        self._encoded = encoded
        self._unread = [image]
        self._held = self.height * self.width <= limits.max_held_pixels
        self._pixel_bytes = 3 * self.height * self.width
        if not (self._held or self._tiled or self._orientation.keeps_rows):
            limits.check_temporary(self._pixel_bytes)
        self.random_access = self._tiled or not self._in_rows
        gathered = self._pixel_bytes if self._held else 0  # the others are gathered on disk
        self.opening_bytes = 0 if self._tiled or self._in_rows else self._decoding_bytes + gathered

    def pixels(self) -> Pixels:
        """uint8 [height, width, 3], sRGB; decodes anew at each call, safe from any thread.

        Raises:
            InvalidInput: the data ends early or is damaged.
        """
        with closing(self._open()) as stored:
            return gather(stored, self._orientation)

    def regions(self, checkpoint: Checkpoint = no_checkpoint) -> Regions:
        """As Picture.regions; each call opens it anew."""
        stored = self._open()
        if stored.tile:
            return TileRegions(stored, stored.tile, self._orientation, checkpoint)
        if self._in_rows:
            return RowRegions(stored, self._orientation, checkpoint)
        with closing(stored):
            gathered = gather if self._held else gather_on_disk
            return HeldRegions(gathered(stored, self._orientation, checkpoint))

    def reading_bytes(self, rows: int) -> int:
        """As Picture.reading_bytes."""
        if self._tiled:
            return self._decoding_bytes
        if self._in_rows:
            return self._decoding_bytes + 2 * 3 * rows * self.width  # two strips' worth, as blocks overlap
        return self._pixel_bytes if self._held else 0

    def _open(self) -> Stored:
        try:
            return Stored(self._encoded, self.format, self._image())
        except formats.VIPS_ERRORS:
            pass  # and raise below: an error that is kept somewhere must not keep libvips' image through its context
        raise unreadable(self.format)

    def _image(self) -> pyvips.Image:
        try:
            return self._unread.pop()
        except IndexError:
            return open_vips(self._encoded, self.format)


class PlainJpeg:
    """A plain JPEG within limits; libvips has the last word on one that has a fault or other colours than sRGB."""

    format = "jpeg"
    random_access = True

    def __init__(self, data: bytes, header: PlainHeader, limits: Limits) -> None:
        self.height, self.width, self._profile = header
        self.opening_bytes = 3 * self.height * self.width
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
        return _open_with_vips(InMemory(self._data), self.format, self._limits).pixels()

    def regions(self, checkpoint: Checkpoint = no_checkpoint) -> Regions:
        """As Picture.regions; small as it is, decoded at once."""
        checkpoint()
        return HeldRegions(self.pixels())

    def reading_bytes(self, rows: int) -> int:
        """As Picture.reading_bytes."""
        return self.opening_bytes


def open_encoded(data: bytes | OnDisk, limits: Limits) -> Picture:
    """Recognise a file, read its header and hold it against limits; no pixel is decoded.

    Raises:
        InvalidInput: empty, not of an allowed format, damaged, beyond a limit, or of colours that cannot be read.
    """
    encoded = InMemory(data) if isinstance(data, bytes) else data
    limits.check_bytes(len(encoded))
    format = _allowed_format(encoded, limits)
    if isinstance(data, bytes) and format == "jpeg" and (header := read_plain(data)) is not None:
        limits.check_size(header.height, header.width)
        return PlainJpeg(data, header, limits)
    return _open_with_vips(encoded, format, limits)


def encode_png(pixels: Pixels) -> bytes:
    """A PNG file of uint8 [H, W, 3] RGB pixels."""
    height, width, bands = pixels.shape
    image = pyvips.Image.new_from_memory(np.ascontiguousarray(pixels), width, height, bands, "uchar")
    return bytes(image.copy(interpretation="srgb").pngsave_buffer())


def _open_with_vips(encoded: Encoded, format: str, limits: Limits) -> VipsPicture:
    try:
        image = open_vips(encoded, format)
        frames = image.get("n-pages") if image.get_typeof("n-pages") else 1
    except formats.VIPS_ERRORS:
        raise unreadable(format) from None
    limits.check_size(image.height, image.width)
    limits.check_frames(frames)
    check_held(image, format, limits)
    check_colour(image)
    return VipsPicture(encoded, format, image, limits)


def _allowed_format(encoded: Encoded, limits: Limits) -> str:
    format = formats.sniff(encoded.head)
    if format in limits.formats:
        return format
    what = f"this is {format or 'no known image format'}" if len(encoded) else "the image is empty (0 bytes)"
    raise refused(f"{what}; supported are {listed(limits.formats)}")
