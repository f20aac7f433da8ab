"""`fullframe export --ragged`: a file that takes images of different sizes together, or none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from fullframe.convert import ragged
from fullframe.convert.metadata import get_contract, load_model, set_contract
from fullframe.convert.quantize import quantize
from fullframe.convert.ragged import make_ragged
from fullframe.engine.fused import TorchEngine
from fullframe.engine.ort import OrtEngine
from fullframe.engine.ragged import RaggedEngine
from fullframe.errors import InvalidModel
from fullframe.learn.export import build_graph, describe
from fullframe.learn.nets import Net
from fullframe.learn.settings import NetConfig, Recipe
from fullframe.model.ragged import ragged_graph, ragged_model
from fullframe.model.repository import BUNDLED, int8_copy
from tests.cli.command import run_here
from tests.models import write_model
from tests.pictures import encode, pixels

SMALL = NetConfig(classes=3, stem=4, width=16, depth=(1, 1))
NETS = {
    "inception": replace(SMALL, block="inception", block_pooling="max", global_pooling="avg+max"),
    "residual": replace(SMALL, block="residual", global_pooling="gem", activation="silu", first_stride=2),
    "bottleneck": replace(SMALL, block="bottleneck", global_pooling="max", activation="gelu"),
    "levels": replace(SMALL, block="inception", block_pooling="avg", levels=3, activation="leaky_relu"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETS)
def test_every_net_that_can_be_trained(kind: str, tmp_path: Path) -> None:
    net, recipe = Net(NETS[kind]).eval(), Recipe()
    model = build_graph(net, recipe)
    describe(model, net, name=kind, recipe=recipe, labels=["a", "b", "c"], training={})
    onnx.save(model, tmp_path / "plain.onnx")
    contract, worst = make_ragged(tmp_path / "plain.onnx", tmp_path / "ragged.onnx")
    assert (contract.name, contract.ragged) == (kind, True)
    assert worst < 1e-4


def test_the_file_runs_in_the_plain_runtime_and_in_the_engine(tiny_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "ragged.onnx"
    done = run_here("export", tiny_model, "--ragged", "-o", target)
    assert "largest difference between an image in a batch and alone" in done.stderr
    model = onnx.load(target)
    assert {each.key: each.value for each in model.metadata_props}["fullframe.ragged"] == "true"
    assert [each.name for each in model.graph.input] == ["images", "sizes"]
    assert "map_sizes" in [each.name for each in model.graph.output]
    shown = run_here("inspect", target).stdout
    assert "of images of different sizes" in shown
    assert "a file for batches of different sizes is not cut into tiles" in shown
    plain, engine = OrtEngine(tiny_model), OrtEngine(target)
    assert engine.contract.ragged and engine.contract.labels == plain.contract.labels
    images = [pixels(40, 50), pixels(9, 61)]
    outputs = ["features", "logits", "feature_map", "class_map"]
    for image, together in zip(images, RaggedEngine(engine).run(images, outputs), strict=True):
        alone, wanted = engine.run(image, outputs), plain.run(image, outputs)
        for name in outputs:
            np.testing.assert_allclose(alone[name], wanted[name], atol=1e-5)
            np.testing.assert_allclose(together[name], wanted[name], atol=1e-5)
    answer = run_here("classify", "--model", target, "--json", write_picture(tmp_path)).stdout
    assert answer == run_here("classify", "--model", tiny_model, "--json", write_picture(tmp_path)).stdout


def write_picture(folder: Path) -> Path:
    (folder / "picture.png").write_bytes(encode(pixels(33, 40)))
    return folder / "picture.png"


def test_no_file_where_a_batch_would_change_an_answer(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: masks that let the padding through."""

    def leaking(model: onnx.ModelProto) -> onnx.ModelProto:
        found = ragged_model(model)
        for node in found.graph.node:
            if node.op_type == "Where" and node.output[0] not in ("feature_map", "class_map"):
                node.CopyFrom(helper.make_node("Identity", [node.input[1]], [node.output[0]]))
        return found

    monkeypatch.setattr(ragged, "ragged_model", leaking)
    with pytest.raises(InvalidModel, match=r"differs by .* in a batch of .*; at most 1e-04 is allowed"):
        make_ragged(tiny_model, tmp_path / "ragged.onnx")
    assert not (tmp_path / "ragged.onnx").exists()


def refused(model: Path, target: Path) -> str:
    done = run_here("export", model, "--ragged", "-o", target, code=1)
    assert not target.exists()
    return done.stderr


def test_what_cannot_be_is_refused_with_the_node(tiny_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    assert "QuantizeLinear" in refused(int8_copy(BUNDLED), target)
    make_ragged(tiny_model, tmp_path / "ragged.onnx")
    assert "is for batches of different sizes already" in refused(tmp_path / "ragged.onnx", target)
    (tmp_path / "no.onnx").write_text("no model")
    assert "no.onnx is no ONNX file" in refused(tmp_path / "no.onnx", target)
    model = load_model(tiny_model)
    ones = numpy_helper.from_array(np.ones(16, np.float32), "ones")
    model.graph.initializer.append(ones)
    last = next(node for node in model.graph.node if "feature_map" in node.output)
    last.output[0] = "before"
    norm = helper.make_node("InstanceNormalization", ["before", "ones", "ones"], ["feature_map"], "norm")
    model.graph.node.insert(list(model.graph.node).index(last) + 1, norm)
    set_contract(model, get_contract(load_model(tiny_model)))
    onnx.save(model, tmp_path / "norm.onnx")
    assert "InstanceNormalization 'norm' computes every cell from all of the image's" in refused(
        tmp_path / "norm.onnx", target
    )


def test_a_ragged_file_is_not_quantized(tiny_model: Path, tmp_path: Path) -> None:
    make_ragged(tiny_model, tmp_path / "ragged.onnx")
    with pytest.raises(InvalidModel, match="give the model that it was made of"):
        quantize(tmp_path / "ragged.onnx", tmp_path / "int8.onnx", [pixels(40, 40)])


def test_the_source_is_not_written_over(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "m.onnx"
    source.write_bytes(tiny_model.read_bytes())
    (tmp_path / "link.onnx").symlink_to(source)
    for output in (source, tmp_path / "link.onnx"):
        done = run_here("export", source, "--ragged", "-o", output, code=2)
        assert "is the source; name another file" in " ".join(done.stderr.split())
    assert source.read_bytes() == tiny_model.read_bytes()


def test_it_goes_to_one_file(tiny_model: Path, tmp_path: Path) -> None:
    assert "--output" in run_here("export", tiny_model, "--ragged", code=2).stderr
    done = run_here("export", tiny_model, "--ragged", "--repository", tmp_path, "-o", tmp_path / "m.onnx", code=2)
    assert "not to --repository" in done.stderr


WRONG_SIZES = {
    "taller than the batch": [[41, 50], [9, 50]],
    "wider than the batch": [[40, 50], [9, 51]],
    "none": [[40, 50], [0, 50]],
    "below the smallest": [[40, 50], [9, 4]],
    "negative": [[-40, 50], [9, 50]],
    "of one image more": [[40, 50], [9, 50], [9, 50]],
    "of one image less": [[40, 50]],
}


@pytest.mark.parametrize("wrong", WRONG_SIZES)
def test_a_plain_runtime_refuses_sizes_that_no_image_has(
    wrong: str, checked_and_not: tuple[ort.InferenceSession, ort.InferenceSession]
) -> None:
    checked, unchecked = checked_and_not
    images = np.stack([pixels(40, 50), pixels(40, 50, seed=1)])
    right, given = (np.array(each, np.int64) for each in ([[40, 50], [9, 5]], WRONG_SIZES[wrong]))
    outputs = ["logits", "map_sizes"]
    for name, one, other in zip(
        outputs, *(session.run(outputs, {"images": images, "sizes": right}) for session in checked_and_not), strict=True
    ):
        np.testing.assert_array_equal(one, other, err_msg=name)
    with pytest.raises(Exception, match="sizes must be each image's own height and width"):
        checked.run(outputs, {"images": images, "sizes": given})
    if not wrong.startswith("of one"):  # the control: without the check there is an answer
        assert len(unchecked.run(outputs, {"images": images, "sizes": given})[0]) == 2


def test_the_torch_engine_refuses_them_too(tiny_model: Path, tmp_path: Path) -> None:
    make_ragged(tiny_model, tmp_path / "ragged.onnx")
    session = TorchEngine(tmp_path / "ragged.onnx").open_session(tmp_path / "ragged.onnx")
    feeds = {"images": pixels(40, 50)[np.newaxis], "sizes": np.array([[40, 50]])}
    assert session.run(["logits"], feeds)[0].shape == (1, 7)
    with pytest.raises(RuntimeError, match="invalid for input of size 1"):
        session.run(["logits"], feeds | {"sizes": np.array([[41, 50]])})


@pytest.fixture(scope="module")
def checked_and_not(tmp_path_factory: pytest.TempPathFactory) -> tuple[ort.InferenceSession, ort.InferenceSession]:
    """Sessions on a file for batches, and on its graph as the engine runs it."""
    folder = tmp_path_factory.mktemp("ragged")
    plain = write_model(folder / "plain.onnx", least=5)
    make_ragged(plain, folder / "ragged.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    checked, unchecked = (
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for model in (folder / "ragged.onnx", ragged_graph(plain))
    )
    return checked, unchecked
