"""A picture's pixels as its file stores them, in 8-bit sRGB, read piece by piece in bounded memory."""

from contextlib import suppress
from math import prod
from typing import Final

import numpy as np
import pyvips

from fullframe.errors import InvalidInput
from fullframe.image.colour import Pixels, to_srgb
from fullframe.image.encoded import Encoded
from fullframe.image.formats import LOADERS, VIPS_ERRORS
from fullframe.image.limits import Limits, refused
from fullframe.image.orientation import Area

_BLOCK_PIXELS: Final = 2**18
_BLOCK_ROWS: Final = 64  # how precisely the end of a file that was cut short can be told
_CACHED_PIXELS: Final = 2**23  # of tiles
_ROWS_HELD: Final = 512  # by libvips behind the row that is read
_ROWS_AROUND: Final = 192  # that its operators hold beside them
_BUFFERS: Final = 16  # at most, in which they hold them: none has more rows than the picture
_AROUND_BYTES: Final = 2**23  # of a decoder's own, whatever the picture
_DECODED_WHOLE: Final = {"gif": "gif", "webp": "webp", "png": "interlaced png", "jpeg": "progressive jpeg"}


class Stored:
    """An open file, from which rows are read once and in order, or areas where it is tiled.

    Attributes:
        height, width: as stored.
        tile: height and width of its tiles; None if it has none.
    """

    def __init__(self, encoded: Encoded, format: str, image: pyvips.Image) -> None:
        self.height, self.width = image.height, image.width
        self.tile = tile_size(image)
        self._encoded, self._format = encoded, format
        self._image: pyvips.Image | None = to_srgb(image)
        self._cached = 0  # pixels of tiles, at most

    def close(self) -> None:
        """Let go of the file."""
        self._image = None

    def rows_from(self, top: int) -> Pixels:
        """uint8 [rows, width, 3]: the next rows, at most 64 of them.

        Raises:
            InvalidInput: the file is damaged or ends there, or has changed.
        """
        count = min(_BLOCK_ROWS, max(1, _BLOCK_PIXELS // self.width), self.height - top)
        return self._fetched(Area(top, 0, count, self.width))

    def area(self, area: Area) -> Pixels:
        """uint8 [area.height, area.width, 3] of a tiled file.

        Raises:
            InvalidInput: the file is damaged there, or has changed.
        """
        if self.tile is None:
            raise ValueError("only tiled files have areas")
        tiles = _spanned(area.top, area.height, self.tile[0]) * _spanned(area.left, area.width, self.tile[1])
        self._cached += tiles
        if self._cached > _CACHED_PIXELS:
            # libvips keeps more than two rows of tiles, however wide, as long as the image.
            self._renew(area.top)
            self._cached = tiles
        return self._fetched(area)

    def _fetched(self, area: Area) -> Pixels:
        data = None
        with suppress(*VIPS_ERRORS):
            # Regions belong to the thread that makes them, reading may move between threads. No thread of libvips'
            # own takes part: memory allocated by ever new threads is given back late, if at all.
            data = pyvips.Region.new(self._opened()).fetch(area.left, area.top, area.width, area.height)
        if data is None or self._encoded.has_changed():
            raise self._fault(area.top)
        return np.ndarray((area.height, area.width, 3), np.uint8, data)

    def _renew(self, top: int) -> None:
        """Open the file anew, with nothing cached."""
        self._opened()
        image = None
        with suppress(*VIPS_ERRORS):
            image = to_srgb(open_vips(self._encoded, self._format))
        if image is None:
            raise self._fault(top)
        self._image = image

    def _opened(self) -> pyvips.Image:
        if self._image is None:
            raise ValueError("the picture was closed")
        return self._image

    def _fault(self, top: int) -> InvalidInput:
        """The error of a file whose pixels from row `top` on could not be had."""
        far = f"{top} of {self.height} rows ({100 * top // self.height} %)"
        if self._encoded.has_changed():
            return refused(f"the file changed when {far} had been read; it can be read once nobody writes to it")
        return unreadable(self._format, f"; {far} could be read")


def open_vips(encoded: Encoded, format: str) -> pyvips.Image:
    """Read a file's header; its pixels can then be read once, top to bottom, or anywhere if it is tiled.

    Raises:
        pyvips.Error: the header is damaged.
    """
    image = _open(encoded, format, fail_on="error")
    if tile_size(image):
        # A TIFF's missing tiles come out black unless warnings count too (which refuses tiled TIFFs of untidy tags).
        image = _open(encoded, format, fail_on="warning")
    return image


def tile_size(image: pyvips.Image) -> tuple[int, int] | None:
    """Height and width of a file's tiles; None if it has none."""
    if not image.get_typeof("tile-width"):
        return None
    return image.get("tile-height"), image.get("tile-width")


def check_held(image: pyvips.Image, format: str, limits: Limits) -> None:
    """Raise InvalidInput if reading the file, even piece by piece, holds more pixels at once than limits allow."""
    tile = tile_size(image)
    if tile:
        limits.check_held(tile[0] * tile[1], f"a tile of this {format}")
    elif is_decoded_whole(image, format):
        limits.check_held(image.height * image.width, f"all of this {_DECODED_WHOLE[format]}")
    else:
        rows = min(_ROWS_HELD, image.height)
        limits.check_held(rows * image.width, f"{rows} rows of this {format}")


def is_decoded_whole(image: pyvips.Image, format: str) -> bool:
    """Whether a file's first row can't be had before its last."""
    return format in ("gif", "webp") or any(
        image.get_typeof(field) and image.get(field) for field in ("interlaced", "jpeg-multiscan")
    )


def decoding_bytes(image: pyvips.Image, format: str) -> int:
    """About how many bytes libvips holds while it decodes a file, at most."""
    sample: int = image.bands * (2 if image.format == "ushort" else 1)
    tile, width = tile_size(image), int(image.width)
    pixels = width * int(image.height)
    if tile:
        # What is cached, by an image opened anew too, and given back late; where each tile is, and how long.
        return _AROUND_BYTES + 3 * sample * (_CACHED_PIXELS + prod(tile)) + 16 * pixels // prod(tile)
    if is_decoded_whole(image, format):
        # A JPEG's coefficients; of others all samples, beside a canvas of RGBA where there may be frames.
        return _AROUND_BYTES + pixels * {"jpeg": 2 * sample, "png": sample}.get(format, 8)
    height = int(image.height)
    rows = min(_ROWS_HELD, height) + min(_ROWS_AROUND, _BUFFERS * height)
    return _AROUND_BYTES + sample * width * rows


def unreadable(format: str, where: str = "") -> InvalidInput:
    """The error of a file that libvips cannot read."""
    return refused(f"the {format} file ends early, is damaged or is of a variant that cannot be read{where}")


def _spanned(start: int, length: int, step: int) -> int:
    """The length of a range that is widened to multiples of `step`."""
    return (-(-(start + length) // step) - start // step) * step


def _open(encoded: Encoded, format: str, fail_on: str) -> pyvips.Image:
    source = encoded.source()
    image = pyvips.Operation.call(LOADERS[format], source, access="sequential", fail_on=fail_on)
    image._references.append(source)  # as pyvips does where it chooses the loader itself
    return image
