"""Reduced pictures: the mean of all pixels, whatever lies at the edges, without holding the picture."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fullframe.image import Pixels, reduced
from fullframe.image.source import RawPicture
from tests.pictures import pixels


class NeverWhole(RawPicture):
    """A picture that can be read in pieces alone."""

    def pixels(self) -> Pixels:
        raise AssertionError("it must not be held whole")


@given(st.integers(1, 700), st.integers(1, 90), st.integers(2, 9))
def test_reduced_pixels_are_means_of_all_pixels(height: int, width: int, factor: int) -> None:
    picture = pixels(height, width)
    small = reduced(NeverWhole(picture), factor)
    assert small.shape == (-(-height // factor), -(-width // factor), 3)
    for row, column in ((0, 0), (len(small) - 1, small.shape[1] - 1), (len(small) // 2, small.shape[1] // 2)):
        block = picture[row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
        np.testing.assert_array_equal(small[row, column], np.rint(block.mean((0, 1))))
