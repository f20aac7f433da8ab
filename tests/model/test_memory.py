"""Bytes that a graph's maps take for a pixel, counted by hand."""

from pathlib import Path

import onnx
import pytest

from fullframe.model.memory import map_memory
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
    assert map_memory(tmp_path / "m.onnx").bytes_per_pixel == expected


def test_wider_layers_take_more_and_integers_less(tmp_path: Path) -> None:
    paths = [*(write_model(tmp_path / f"{c}.onnx", channels=c) for c in (16, 32)), int8_copy(BUNDLED), BUNDLED]
    narrow, wide, integers, floats = (map_memory(path).bytes_per_pixel for path in paths)
    assert wide > narrow > 0
    assert integers < floats


@pytest.mark.parametrize(
    ("size", "together"),
    [
        # Two copies of the image, or six of what the halving leaves.
        ((64, 64), 24 * 64 * 64),
        ((1, 64), 72 * 32),
        ((64, 1), 72 * 32),
        ((5, 64), 24 * 5 * 64),
        ((1, 1), 72),
    ],
)
def test_a_side_that_can_not_be_halved_keeps_its_cells(tmp_path: Path, size: tuple[int, int], together: int) -> None:
    onnx.save(build(HALVE, Branches((CONV, CONV, CONV), "Concat")), tmp_path / "m.onnx")
    maps = map_memory(tmp_path / "m.onnx")
    assert maps.bytes_per_pixel * maps.pixels_for(*size) == pytest.approx(together)
