"""`--explain`: drawn at the picture's own resolution, a huge picture reduced and never held whole."""

from pathlib import Path

import numpy as np
import pytest

import fullframe
from fullframe.cli import explain as explaining
from fullframe.image import Limits, draw_class_map, open_source
from tests.cli.command import run_here
from tests.pictures import encode, pixels
from tests.serving import Running


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
