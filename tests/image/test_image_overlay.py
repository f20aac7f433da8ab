"""The class map over the picture: where it is strong, how strong, and where it leaves the photograph alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fullframe.image import Pixels, draw_class_map
from tests.pictures import pixels


def change(drawn: Pixels, picture: Pixels) -> NDArray[np.int64]:
    return np.asarray(np.abs(drawn.astype(int) - picture).sum(axis=2))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 9), st.integers(1, 9))
def test_the_pictures_own_resolution(height: int, width: int, rows: int, columns: int) -> None:
    picture = pixels(height, width)
    before = picture.copy()
    class_map = np.random.default_rng(rows).normal(size=(rows, columns)).astype(np.float32)
    drawn = draw_class_map(picture, class_map)
    assert drawn.shape == picture.shape and drawn.dtype == np.uint8
    assert np.array_equal(picture, before)


@pytest.mark.parametrize("value", [0.0, -7.5, 3e38, 1e-42])
def test_equal_cells_leave_the_photograph(value: float) -> None:
    picture = pixels(20, 30)
    assert np.array_equal(draw_class_map(picture, np.full((2, 3), value, np.float32)), picture)


def test_scale_and_offset_of_the_map_do_not_matter() -> None:
    picture = pixels(50, 70)
    class_map = np.random.default_rng(0).integers(0, 9, (5, 7)).astype(np.float32)
    drawn = draw_class_map(picture, class_map)
    assert np.array_equal(draw_class_map(picture, class_map * 4 - 64), drawn)
    assert not np.array_equal(draw_class_map(picture, -class_map), drawn)


def test_a_stretched_cell_is_drawn_in_its_own_part() -> None:
    picture = np.full((60, 90, 3), 128, np.uint8)
    class_map = np.zeros((6, 9), np.float32)
    class_map[1, 7] = 1
    strength = change(draw_class_map(picture, class_map), picture)
    assert strength[10:20, 70:80].min() > 0
    row, column = np.unravel_index(strength.argmax(), strength.shape)
    assert 10 <= row < 20 and 70 <= column < 80
    assert strength[:, :60].max() == 0 and strength[30:].max() == 0


def test_cells_sit_at_start_plus_stride() -> None:
    picture = np.full((64, 64, 3), 128, np.uint8)
    class_map = np.zeros((8, 8), np.float32)
    class_map[2, 5] = 1
    strength = change(draw_class_map(picture, class_map, stride=(8, 8), start=(3, -1)), picture)
    assert strength.argmax() == (3 + 2 * 8) * 64 + (-1 + 5 * 8)
    assert strength[3 + 1 * 8].max() == 0  # a neighbouring cell's centre


def test_opacity() -> None:
    picture = pixels(20, 30)
    class_map = np.eye(4, dtype=np.float32)
    assert np.array_equal(draw_class_map(picture, class_map, opacity=0), picture)
    full = draw_class_map(picture, class_map, stride=(1, 1), opacity=1)
    assert np.array_equal(full[0, 0], (252, 255, 164))


def test_rows_are_drawn_alike_however_they_are_cut() -> None:
    """Strips are 256 rows: a map constant along the height gives equal rows across their seams."""
    picture = np.full((600, 40, 3), 77, np.uint8)
    drawn = draw_class_map(picture, np.tile(np.arange(5, dtype=np.float32), (7, 1)))
    assert (drawn == drawn[:1]).all()
