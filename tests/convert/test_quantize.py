"""An int8 copy: the same contract, geometry and nearly the same answers; what can't be copied says why."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from fullframe.convert.metadata import get_contract, set_contract
from fullframe.convert.quantize import quantize
from fullframe.engine.ort import OrtEngine
from fullframe.errors import InvalidInput, InvalidModel
from fullframe.image import Pixels
from fullframe.model.contract import INT8
from fullframe.model.geometry import graph_geometry
from tests.models import write_model
from tests.pictures import pixels

SIZES = ((24, 24), (37, 51), (64, 40))


def images() -> Iterator[Pixels]:
    """The same pictures each time."""
    yield from (pixels(height, width, seed) for seed in range(5) for height, width in SIZES)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and its copy."""
    folder = tmp_path_factory.mktemp("quantize")
    model = write_model(folder / "net.onnx", depth=3, least=7)
    quantize(model, folder / "copy.onnx", images())
    return model, folder / "copy.onnx"


def test_a_copy_follows_its_models_contract_and_says_what_it_is(files: tuple[Path, Path]) -> None:
    model, copy = map(onnx.load, files)
    contract, copied = get_contract(model), get_contract(copy)
    assert copied.precision == INT8
    assert copied.training == {"float32": contract.training, "calibration_images": 5 * len(SIZES)}
    for name in ("name", "labels", "stride", "receptive_field", "start", "smallest_size", "pooling", "logits"):
        assert getattr(copied, name) == getattr(contract, name)
    assert graph_geometry(copy) == graph_geometry(model)


def test_convolutions_have_int8_weights_with_a_scale_for_each_channel(files: tuple[Path, Path]) -> None:
    graph = onnx.load(files[1]).graph
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made_by = {node.output[0]: node for node in graph.node}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert [node.output[0] for node in convolutions if node.input[1] in weights] == ["class_map"], "a head stays float"
    for node in convolutions:
        if node.output[0] != "class_map":
            values, scales, _ = (weights[name] for name in made_by[node.input[1]].input)
            assert values.dtype == np.int8 and abs(values).max() <= 64, "7 bits: sums of two products fit 16"
            assert scales.shape == values.shape[:1]


@pytest.mark.parametrize(("height", "width"), [(7, 7), (8, 90), (31, 33), (120, 77)])
def test_its_answers_are_nearly_the_models(files: tuple[Path, Path], height: int, width: int) -> None:
    asked = ["features", "logits", "feature_map", "class_map"]
    wanted, found = (OrtEngine(file).run(pixels(height, width, 9), asked) for file in files)
    for name in asked:
        difference = np.abs(found[name] - wanted[name]).max() / np.abs(wanted[name]).max()
        assert 0 < difference < 0.1, name
    np.testing.assert_allclose(found["class_map"].mean((1, 2)), found["logits"], atol=1e-4)
    np.testing.assert_allclose(found["feature_map"].mean((1, 2)), found["features"], atol=1e-4)


def test_images_decide_the_ranges(files: tuple[Path, Path], tmp_path: Path) -> None:
    """The control: grey pictures leave activations no room, so that real ones come out wrong."""
    grey = (np.full((30, 30, 3), 128, np.uint8) for _ in range(3))
    quantize(files[0], tmp_path / "grey.onnx", grey)
    picture = pixels(31, 33, 9)
    wanted, found = (OrtEngine(file).run(picture, ["logits"])["logits"] for file in (files[0], tmp_path / "grey.onnx"))
    assert np.abs(found - wanted).max() / np.abs(wanted).max() > 0.2


def test_every_image_counts(files: tuple[Path, Path], tmp_path: Path) -> None:
    """The first of many shows more than the rest; ONNX Runtime's limits on what is held at once would forget it."""
    grey = [np.full((9, 9, 3), 128, np.uint8)] * 199
    quantize(files[0], tmp_path / "copy.onnx", [pixels(31, 33, 9), *grey])
    picture = pixels(31, 33, 9)
    wanted, found = (OrtEngine(file).run(picture, ["logits"])["logits"] for file in (files[0], tmp_path / "copy.onnx"))
    assert np.abs(found - wanted).max() / np.abs(wanted).max() < 0.1


def test_what_cannot_be_copied_says_why_and_leaves_no_file(files: tuple[Path, Path], tmp_path: Path) -> None:
    model, copy = files
    output = tmp_path / "out.onnx"
    with pytest.raises(InvalidModel, match=r"copy\.onnx is int8 already"):
        quantize(copy, output, images())
    with pytest.raises(InvalidInput, match=r"no image .* 7 x 7"):
        quantize(model, output, [pixels(6, 40), pixels(40, 6)])
    bare = onnx.load(model)
    contract = get_contract(bare)
    node = next(node for node in bare.graph.node if node.output[0] == "feature_map")
    del bare.graph.node[:]
    bare.graph.node.extend(
        [
            onnx.helper.make_node("Transpose", ["images"], ["planes"], perm=[0, 3, 1, 2]),
            onnx.helper.make_node("Cast", ["planes"], [*node.output], to=onnx.TensorProto.FLOAT),
        ]
    )
    set_contract(bare, contract)
    onnx.save(bare, tmp_path / "bare.onnx")
    with pytest.raises(InvalidModel, match="no convolution before its feature map"):
        quantize(tmp_path / "bare.onnx", output, images())
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(InvalidModel, match=r"text\.onnx is no ONNX file"):
        quantize(tmp_path / "text.onnx", output, images())
    assert not output.exists()
