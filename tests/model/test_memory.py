"""Bytes that a graph's maps take for a pixel, counted by hand."""

from pathlib import Path

import onnx
import pytest

from fullframe.model.memory import bytes_per_pixel
from fullframe.model.repository import BUNDLED, int8_copy
from tests.model.graphs import Branches, Stage, Window, build
from tests.models import write_model

CONV = Window("Conv", (3, 3), pads=(1, 1, 1, 1))
HALVE = Window("MaxPool", (2, 2), (2, 2))


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        # uint8 and float32 image together, then float32 in and out
        ((CONV,), 24),
        ((CONV, "Relu", "Relu"), 24),
        ((HALVE, CONV), 24),
        # the source, two branches of it, and their sum in place
        ((Branches((CONV, CONV), "Add"),), 36),
        ((Branches((CONV, CONV, CONV), "Concat"),), 72),
    ],
)
def test_maps_live_from_their_maker_to_their_last_reader(
    tmp_path: Path, stages: tuple[Stage, ...], expected: int
) -> None:
    onnx.save(build(*stages), tmp_path / "m.onnx")
    assert bytes_per_pixel(tmp_path / "m.onnx") == expected


def test_wider_layers_take_more_and_integers_less(tmp_path: Path) -> None:
    narrow, wide = (write_model(tmp_path / f"{c}.onnx", channels=c) for c in (16, 32))
    assert bytes_per_pixel(wide) > bytes_per_pixel(narrow) > 0
    assert bytes_per_pixel(int8_copy(BUNDLED)) < bytes_per_pixel(BUNDLED)
