"""The contact sheet: whose picture lies where, unaltered, and what is written beneath it."""

import numpy as np
import pytest

from fullframe.image import Pixels, Tile, draw_sheet, open_source, own_limits, thumbnail
from fullframe.image.sheet import SIDE, corner
from tests.pictures import encode, pixels


def of_size(height: int, width: int, seed: int = 0) -> Pixels:
    return thumbnail(open_source(encode(pixels(height, width, seed)), own_limits()))


def square(sheet: Pixels, row: int, column: int) -> Pixels:
    top, left = corner(row, column)
    return sheet[top : top + SIDE, left : left + SIDE]


def caption(sheet: Pixels, row: int, column: int) -> Pixels:
    top, left = corner(row, column)
    return sheet[top + SIDE : corner(row + 1, column)[0] - 9, left : left + SIDE]


def ink(region: Pixels) -> int:
    """How many pixels are dark."""
    return int((region < 128).all(axis=2).sum())


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((160, 160), (160, 160)),
        ((320, 160), (160, 80)),
        ((161, 480), (54, 160)),
        ((1200, 800), (160, 107)),
        ((2, 900), (1, 160)),
        ((80, 40), (160, 80)),
        ((81, 40), (81, 40)),
        ((1, 1), (160, 160)),
        ((1, 100), (1, 100)),
    ],
)
def test_thumbnails_fit_and_keep_their_shape(size: tuple[int, int], expected: tuple[int, int]) -> None:
    small = of_size(*size)
    assert small.dtype == np.uint8
    assert small.shape == (*expected, 3)


def test_a_thumbnail_shows_the_picture() -> None:
    picture = np.zeros((1000, 2000, 3), np.uint8)
    picture[:500, :1000], picture[500:, 1000:] = (255, 0, 0), (0, 0, 255)
    small = thumbnail(open_source(picture, own_limits()))
    assert small.shape == (80, 160, 3)
    np.testing.assert_array_equal(small[5:35, 5:75], np.full((30, 70, 3), (255, 0, 0)))
    np.testing.assert_array_equal(small[45:75, 85:155], np.full((30, 70, 3), (0, 0, 255)))
    tiny = pixels(20, 30)
    np.testing.assert_array_equal(thumbnail(open_source(tiny, own_limits()))[2::5, 2::5], tiny)


@pytest.mark.parametrize(("count", "columns"), [(0, 1), (1, 1), (4, 4), (7, 3)])
def test_every_tile_lies_in_its_place(count: int, columns: int) -> None:
    pictures = [of_size(160, 160, seed) for seed in range(count + 1)]
    tiles = [Tile(picture, (f"{number}", "name.png")) for number, picture in enumerate(pictures)]
    sheet = draw_sheet(tiles[0], tiles[1:], columns)
    np.testing.assert_array_equal(square(sheet, 0, 0), pictures[0])
    for number, picture in enumerate(pictures[1:]):
        place = 1 + number // columns, number % columns
        np.testing.assert_array_equal(square(sheet, *place), picture)
        assert ink(caption(sheet, *place)) > 20
    if count % columns:
        assert (square(sheet, 1 + count // columns, count % columns) == 255).all()
        assert not ink(caption(sheet, 1 + count // columns, count % columns))


def test_a_smaller_picture_lies_in_the_middle_and_a_missing_one_is_grey() -> None:
    small = of_size(100, 50)
    sheet = draw_sheet(Tile(small, ()), [Tile(None, ("1", "gone.png"))], 1)
    inside = square(sheet, 0, 0)
    np.testing.assert_array_equal(inside[30:130, 55:105], small)
    assert (inside[:, :55] == 255).all()
    assert (inside[:, 105:] == 255).all()
    assert (inside[:30] == 255).all()
    assert (square(sheet, 1, 0) == 208).all()
    assert not ink(caption(sheet, 0, 0))
    assert ink(caption(sheet, 1, 0))


def test_captions_are_text_whatever_they_hold() -> None:
    """Not markup, no line breaks, and none leaves its tile."""
    plain = Tile(None, ("1", ""))
    names = ('<b>a</b> & "c"', "a\nb\x00\udce9.png", " ", "x" * 500, "猫" * 300, "W" * 30 + "end.png")
    for name in names:
        sheet = draw_sheet(plain, [Tile(None, ("2", name)), plain], 2)
        assert (sheet[:, corner(0, 1)[1] - 11 : corner(0, 1)[1] - 1][corner(1, 0)[0] :] == 255).all()
        np.testing.assert_array_equal(caption(sheet, 1, 1), caption(draw_sheet(plain, [plain] * 2, 2), 1, 1))
        assert ink(caption(sheet, 1, 0)) > 10 or name == " "
    shown = [caption(draw_sheet(plain, [Tile(None, ("", "W" * 30 + end))], 1), 1, 0) for end in ("end.png", "and.png")]
    assert (shown[0] != shown[1]).any()  # the end of a name is kept
