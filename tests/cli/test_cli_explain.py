"""`--explain`: drawn at the picture's own resolution, a huge picture reduced and never held whole."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fullframe
from fullframe.cli import explain as explaining
from fullframe.image import Limits, Pixels, Regions, draw_class_map, open_source
from fullframe.image.regions import Checkpoint, HeldRegions, no_checkpoint
from tests.cli.command import run_here
from tests.pictures import encode, pixels
from tests.serving import Running


class NeverWhole:
    """A picture that can be read in pieces alone."""

    format = "raw"

    def __init__(self, held: Pixels) -> None:
        self.height, self.width, _ = held.shape
        self._held = held

    def pixels(self) -> Pixels:
        raise AssertionError("it must not be held whole")

    def regions(self, checkpoint: Checkpoint = no_checkpoint) -> Regions:
        return HeldRegions(self._held)


@given(st.integers(1, 700), st.integers(1, 90), st.integers(2, 9))
def test_reduced_pixels_are_means_of_all_pixels(height: int, width: int, factor: int) -> None:
    picture = pixels(height, width)
    reduced = explaining._reduced(NeverWhole(picture), factor)
    assert reduced.shape == (-(-height // factor), -(-width // factor), 3)
    for row, column in ((0, 0), (len(reduced) - 1, reduced.shape[1] - 1), (len(reduced) // 2, reduced.shape[1] // 2)):
        block = picture[row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
        np.testing.assert_array_equal(reduced[row, column], np.rint(block.mean((0, 1))))


@pytest.mark.parametrize("where", ["here", "server"])
def test_a_huge_picture_is_drawn_reduced_and_says_so(
    tmp_path: Path, tiny_model: Path, server: Running, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explaining, "_DRAWN_PIXELS", 5000)
    file, out = tmp_path / "picture.png", tmp_path / "why.png"
    file.write_bytes(encode(pixels(161, 203)))
    options = ["--model", tiny_model] if where == "here" else ["--server", server.target]
    done = run_here("classify", file, "--explain", out, *options)
    assert f"wrote {out}: where it looks like" in done.stderr and "drawn at 1/3 of its size" in done.stderr
    drawn = open_source(out, Limits()).pixels()
    assert drawn.shape == (54, 68, 3)
    with fullframe.load(str(tiny_model)) as predictor:
        answer = predictor.predict(file, class_map=True)
    assert answer.class_map is not None
    # The same as the full drawing reduced, but for the order of rounding and of interpolation.
    full = draw_class_map(
        open_source(file, Limits()).pixels(), answer.class_map[answer.classes[0].index], stride=(4, 4), start=(0, 0)
    )
    whole = full[:159, :201].reshape(53, 3, 67, 3, 3).mean((1, 3))
    assert np.abs(whole - drawn[:53, :67]).mean() < 3
    shifted = np.roll(whole, 3, axis=(0, 1))
    assert np.abs(shifted - drawn[:53, :67]).mean() > 6


def test_a_map_of_too_many_cells_is_asked_for_reduced_and_stretched(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explaining, "_MAP_VALUES", 7 * 10**2)
    file, out = tmp_path / "picture.png", tmp_path / "why.png"
    file.write_bytes(encode(pixels(160, 200)))
    run_here("classify", file, "--explain", out, "--model", tiny_model)
    with fullframe.load(str(tiny_model)) as predictor:
        answer = predictor.predict(file, class_map=True, max_map_side=10)
    assert answer.class_map is not None and answer.class_map.shape == (7, 8, 10)
    expected = draw_class_map(open_source(file, Limits()).pixels(), answer.class_map[answer.classes[0].index])
    np.testing.assert_array_equal(open_source(out, Limits()).pixels(), expected)
