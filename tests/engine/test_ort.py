"""The ONNX Runtime engine: what is refused before it could crash, and the same bits on one core and on all."""

from pathlib import Path

import numpy as np
import pytest

from fullframe.engine.ort import OrtEngine
from fullframe.errors import InvalidInput, InvalidModel
from tests.models import write_model
from tests.pictures import pixels

SIZES = [(1, 1), (1, 500), (500, 1), (7, 5), (31, 33), (224, 224), (300, 451), (767, 1023), (1201, 1999)]
OUTPUTS = ["features", "logits", "feature_map", "class_map"]


@pytest.fixture(scope="module")
def engine(slow_model: Path) -> OrtEngine:
    return OrtEngine(slow_model)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_one_core_and_all_cores_give_the_same_bits(engine: OrtEngine, height: int, width: int) -> None:
    image = pixels(height, width)
    one, all_cores = (engine.run(image, OUTPUTS, alone=alone) for alone in (False, True))
    for name in OUTPUTS:
        assert one[name].tobytes() == all_cores[name].tobytes(), name


def test_one_pixel_changes_the_bits(engine: OrtEngine) -> None:
    """The control of every test here that compares bits."""
    image = pixels(300, 451)
    changed = image.copy()
    changed[150, 200, 1] ^= 1
    assert engine.run(image, ["logits"])["logits"].tobytes() != engine.run(changed, ["logits"])["logits"].tobytes()


def test_asking_for_fewer_outputs_changes_none(engine: OrtEngine) -> None:
    image = pixels(61, 83)
    together = engine.run(image, OUTPUTS)
    for name in OUTPUTS:
        assert engine.run(image, [name])[name].tobytes() == together[name].tobytes()


def test_too_small_an_image_is_refused_with_the_smallest_size(tmp_path: Path) -> None:
    engine = OrtEngine(write_model(tmp_path / "picky.onnx", least=9))
    for height, width in [(8, 100), (100, 8), (1, 1)]:
        with pytest.raises(InvalidInput, match=f"is {width}x{height} pixels; this model needs at least 9x9"):
            engine.run(pixels(height, width), ["logits"])
    engine.run(pixels(9, 9), ["logits"])


def test_files_that_are_no_models_are_named(tmp_path: Path, tiny_model: Path) -> None:
    text = tmp_path / "notes.onnx"
    text.write_text("not a model")
    half = tmp_path / "half.onnx"
    half.write_bytes(tiny_model.read_bytes()[: tiny_model.stat().st_size // 2])
    for path in (text, half, tmp_path / "absent.onnx"):
        with pytest.raises(InvalidModel, match=f"{path.stem}.onnx can't be loaded"):
            OrtEngine(path)


def test_features_and_logits_are_means_of_their_maps(engine: OrtEngine) -> None:
    outputs = engine.run(pixels(97, 131), OUTPUTS)
    for vector, grid in (("features", "feature_map"), ("logits", "class_map")):
        np.testing.assert_allclose(outputs[vector], outputs[grid].mean((1, 2), dtype=np.float64), rtol=1e-4, atol=1e-5)
