"""A contact sheet: a query's picture, and beneath it others in a grid, each with its caption."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

import numpy as np
import pyvips
from numpy.typing import NDArray

from fullframe.image.colour import Pixels
from fullframe.image.decode import Picture
from fullframe.image.reduce import reduced

SIDE: Final = 160
"""Pixels of a tile's picture, at most."""

_MARGIN: Final = 12
_LINE: Final = 18
_CELL: Final = (SIDE + 2 * _LINE + _MARGIN, SIDE + _MARGIN)  # height, width: two lines of text
_FONT: Final = "sans 9"
_DPI: Final = 96
_PAPER: Final = 255
_INK: Final = 32
_RULE: Final = 160
_MISSING: Final = 208


@dataclass(frozen=True, slots=True)
class Tile:
    """A picture of at most SIDE x SIDE pixels, or None for a grey square, and up to two lines of text beneath it."""

    picture: Pixels | None
    caption: Sequence[str]


def thumbnail(picture: Picture) -> Pixels:
    """uint8 [h, w, 3], the longer side SIDE; a picture of less than half of that is enlarged by whole pixels.

    A huge picture is read in strips. Raises InvalidInput if the data is damaged.
    """
    longest = max(picture.height, picture.width)
    pixels = reduced(picture, max(1, longest // (2 * SIDE)))
    if longest <= SIDE:
        times = SIDE // longest
        return pixels.repeat(times, axis=0).repeat(times, axis=1)
    height, width = (max(1, round(size * SIDE / longest)) for size in (picture.height, picture.width))
    image = pyvips.Image.new_from_array(pixels, interpretation="srgb")
    resized: Pixels = image.thumbnail_image(width, height=height, size="force").numpy()
    return resized


def draw_sheet(query: Tile, tiles: Sequence[Tile], columns: int) -> Pixels:
    """uint8 [H, W, 3]: the query above a line, beneath it the tiles in rows of so many."""
    rows = 1 + -(-len(tiles) // columns)
    height, width = corner(rows, columns)
    sheet: Pixels = np.full((height, width, 3), _PAPER, np.uint8)
    sheet[corner(1, 0)[0] - _MARGIN // 2 - 1, _MARGIN:-_MARGIN] = _RULE
    _draw(sheet, query, *corner(0, 0))
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        _draw(sheet, tile, *corner(1 + row, column))
    return sheet


def corner(row: int, column: int) -> tuple[int, int]:
    """Top and left of a tile's square, in which its picture lies in the middle; the query is in row 0."""
    return _MARGIN + row * _CELL[0], _MARGIN + column * _CELL[1]


def _draw(sheet: Pixels, tile: Tile, top: int, left: int) -> None:
    if tile.picture is None:
        sheet[top : top + SIDE, left : left + SIDE] = _MISSING
    else:
        height, width, _ = tile.picture.shape
        y, x = top + (SIDE - height) // 2, left + (SIDE - width) // 2
        sheet[y : y + height, x : x + width] = tile.picture
    for number, line in enumerate(tile.caption):
        ink = _text(line)[:_LINE, :SIDE]
        height, width = ink.shape
        y = top + SIDE + number * _LINE + (_LINE - height) // 2
        x = left + (SIDE - width) // 2
        under = sheet[y : y + height, x : x + width]
        under[:] = np.rint(under + (_INK - under.astype(np.float32)) * (ink[..., None] / np.float32(255)))


def _text(line: str) -> NDArray[np.uint8]:
    """How much ink a line takes, uint8 [h, w] of at most SIDE columns; the beginning of a longer one is left out."""
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)
    if not line.strip():  # libvips takes that for an error
        return np.zeros((0, 0), np.uint8)
    shown, letters = line, len(line)
    while True:
        ink: NDArray[np.uint8] = pyvips.Image.text(escape(shown), font=_FONT, dpi=_DPI).numpy()
        if ink.shape[1] <= SIDE:
            return ink
        letters = min(letters - 1, letters * SIDE // ink.shape[1])
        shown = "…" + line[len(line) - letters :]
