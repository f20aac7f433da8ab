"""Maps reduced to fewer cells: exact shares of area, the mean kept, whatever the pieces."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fullframe.engine.maps import MAX_MAP_BYTES, MapState, reduced, reduced_size
from fullframe.engine.query import FloatArray
from fullframe.errors import InvalidInput

SIDES = st.integers(1, 40)


def values(height: int, width: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).normal(size=(3, height, width)).astype(np.float32)


def shares(size: int, cells: int) -> NDArray[np.float64]:
    """[cells, size]: the part of each position that lies in each cell, from the definition, in fractions."""
    found = np.zeros((cells, size))
    for cell in range(cells):
        begin, end = Fraction(cell * size, cells), Fraction((cell + 1) * size, cells)
        for position in range(size):
            inside = min(end, Fraction(position + 1)) - max(begin, Fraction(position))
            found[cell, position] = max(Fraction(0), inside) / (end - begin)
    return found


@settings(deadline=None)
@given(SIDES, SIDES, st.integers(1, 45))
def test_each_cell_is_the_mean_of_its_share_of_the_area(height: int, width: int, most: int) -> None:
    whole = values(height, width)
    rows, columns = reduced_size(height, width, most)
    expected = np.einsum("ri,cij,sj->crs", shares(height, rows), whole.astype(np.float64), shares(width, columns))
    found = reduced("map", whole, most)
    assert found.dtype == np.float32 and max(found.shape[1:]) == min(most, max(height, width))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@settings(deadline=None)
@given(SIDES, SIDES, st.integers(1, 45))
def test_the_mean_is_that_of_the_whole_map(height: int, width: int, most: int) -> None:
    whole = values(height, width).astype(np.float64)
    found = reduced("map", whole.astype(np.float32), most).astype(np.float64)
    np.testing.assert_allclose(found.mean(axis=(1, 2)), whole.mean(axis=(1, 2)), rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(st.data())
def test_pieces_in_any_order_are_the_whole(data: st.DataObject) -> None:
    height, width, most = data.draw(SIDES), data.draw(SIDES), data.draw(st.integers(0, 45))
    whole = values(height, width)
    cuts = [
        [0, *sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=4)) if size > 1 else []), size]
        for size in (height, width)
    ]
    places = [
        (slice(top, bottom), slice(left, right))
        for top, bottom in zip(cuts[0], cuts[0][1:], strict=False)
        for left, right in zip(cuts[1], cuts[1][1:], strict=False)
    ]
    state = MapState("map", 3, height, width, most)
    for rows, columns in data.draw(st.permutations(places)):
        state.add(whole[:, rows, columns], rows.start, columns.start)
    np.testing.assert_allclose(state.finish(), reduced("map", whole, most), rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(SIDES, SIDES, st.integers(0, 45), st.integers(0, 40))
def test_pieces_that_are_tensors_are_the_whole(height: int, width: int, most: int, cut: int) -> None:
    whole = values(height, width)
    state = MapState("map", 3, height, width, most)
    for piece, top in ((whole[:, cut:], min(cut, height)), (whole[:, :cut], 0)):
        state.add(torch.from_numpy(piece), top, 0)
    np.testing.assert_allclose(state.finish(), reduced("map", whole, most), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("most", [0, 7])
def test_no_value_is_asked_for_before_the_end(most: int) -> None:
    """On tensors without values."""
    state = MapState("map", 3, 20, 30, most)
    for top in (0, 10):
        state.add(torch.empty(3, 10, 30, device="meta"), top, 0)
    with pytest.raises(NotImplementedError):
        state.finish()


@pytest.mark.parametrize(
    ("size", "most", "expected"),
    [((100, 200), 0, (100, 200)), ((100, 200), 200, (100, 200)), ((100, 200), 50, (25, 50)), ((1, 900), 3, (1, 3))],
)
def test_the_longer_side_has_at_most_so_many_cells(size: tuple[int, int], most: int, expected: tuple[int, int]) -> None:
    assert reduced_size(*size, most) == expected


def test_a_map_that_takes_too_much_memory_is_refused_and_the_error_names_the_way_out() -> None:
    with pytest.raises(
        InvalidInput, match=rf"class_map of this image is \[10, 9000, 9000\].*{MAX_MAP_BYTES}.*max_map_side"
    ):
        MapState("class_map", 10, 9000, 9000, 0)
    MapState("class_map", 10, 9000, 9000, 1000)
