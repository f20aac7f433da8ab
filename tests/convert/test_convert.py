"""Each step of the conversion on a graph that needs it."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from fullframe.convert.options import Options
from fullframe.convert.pipeline import Converted, convert
from fullframe.convert.pixels import source_images
from fullframe.convert.proof import Proof, Source
from fullframe.convert.reading import read_onnx
from fullframe.engine.ort import OrtEngine
from fullframe.engine.query import FloatArray
from fullframe.errors import InvalidModel
from fullframe.model.contract import LOGITS_FROM_FEATURES, LOGITS_FROM_MAP
from fullframe.model.geometry import graph_geometry
from tests.convert.classifiers import (
    CLASSES,
    HEAD,
    HEAD_WEIGHTS,
    OPTIONS,
    POOLED,
    SIDE,
    STEM,
    STEM_WEIGHTS,
    classifier,
    plain,
)
from tests.pictures import pixels


def steps(converted: Converted) -> str:
    return "\n".join(converted.report)


def run(model: onnx.ModelProto, feeds: dict[str, Any]) -> dict[str, FloatArray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def assert_same(model: onnx.ModelProto, converted: Converted, options: Options = OPTIONS, side: int = SIDE) -> None:
    """The converted graph's logits are the source's output, of one image and of two at once."""
    pictures = np.stack([pixels(side, side, seed) for seed in range(2)])
    found = run(converted.model, {"images": pictures})["logits"]
    for number in range(2):
        wanted = run(model, {"x": source_images(options, pictures[number : number + 1])})["y"].reshape(-1)
        assert np.abs(found[number] - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert np.abs(found[0] - found[1]).max() > 1e-3 * np.abs(found).max(), "else nothing is compared"


def test_a_plain_classifier_becomes_a_model_of_the_contract(tmp_path: Path) -> None:
    options = replace(OPTIONS, labels=tuple("abcde"), license="CC0", source="here")
    model = plain()
    before = model.SerializeToString()
    converted = convert(model, options)
    assert model.SerializeToString() == before
    assert_same(model, converted)
    onnx.save(converted.model, tmp_path / "net.onnx")
    contract = OrtEngine(tmp_path / "net.onnx").contract
    assert contract == converted.contract or contract.to_metadata() == converted.contract.to_metadata()
    assert contract.labels == tuple("abcde") and contract.name == "net" and contract.logits == LOGITS_FROM_MAP
    assert (contract.stride, contract.feature_channels, contract.smallest_size) == ((4, 4), 8, (1, 1))
    assert contract.normalisation == {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}
    assert contract.training["license"] == "CC0" and contract.training["source"] == "here"
    assert contract.tiles is not None and contract.tiles.possible
    assert converted.difference < 1e-5


@pytest.mark.parametrize("input_range", [1, 255])
@pytest.mark.parametrize("bgr", [False, True])
def test_preprocessing_is_inside(input_range: int, bgr: bool) -> None:
    model, options = plain(), replace(OPTIONS, input_range=input_range, bgr=bgr)
    assert_same(model, convert(model, options), options)
    picture = pixels(SIDE, SIDE)
    by_hand = (picture / 255 - np.array(options.mean)) / np.array(options.std) * input_range
    by_hand = np.moveaxis(by_hand[..., ::-1] if bgr else by_hand, -1, 0)
    assert np.allclose(source_images(options, picture[np.newaxis])[0], by_hand, rtol=1e-6)


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 18, 20])
def test_old_and_new_opsets(opset: int) -> None:
    model = plain(opset=opset)
    converted = convert(model, OPTIONS)
    assert_same(model, converted)
    assert converted.model.opset_import[0].version == max(opset, 18)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_a_softmax_at_the_end_is_taken_off(op: str) -> None:
    text = (STEM + HEAD).replace("y = Gemm", "s = Gemm") + f"\n y = {op} <axis = 1> (s)"
    model = classifier(text, {**STEM_WEIGHTS, **HEAD_WEIGHTS})
    converted = convert(model, OPTIONS)
    assert f"{op} " in steps(converted) and "taken off" in steps(converted)
    assert_same(plain(), converted)


def test_training_s_leftovers_go() -> None:
    norm = "n, m1, v1 = BatchNormalization <training_mode = 1> (m, s, o, mean, var) \n d, mask = Dropout (n)"
    text = STEM + norm + HEAD.replace("(m)", "(d)")
    statistics: dict[str, Any] = {"s": (8,), "o": (8,), "mean": (8,), "var": np.full(8, 2, np.float32)}
    weights = {**STEM_WEIGHTS, **HEAD_WEIGHTS, **statistics}
    converted = convert(classifier(text, weights, opset=14), OPTIONS)
    assert "1 node left in training" in steps(converted) and "1 Dropout dropped" in steps(converted)
    served = (
        norm.replace("n, m1, v1", "n").replace(" <training_mode = 1>", "").replace("d, mask = Dropout", "d = Identity")
    )
    assert_same(classifier(STEM + served + HEAD.replace("(m)", "(d)"), weights, opset=14), converted)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_padding_that_depends_on_the_size_is_written_out(auto_pad: str) -> None:
    text = STEM.replace("pads = [1, 1, 1, 1]", f'auto_pad = "{auto_pad}"') + HEAD
    model = classifier(text, {**STEM_WEIGHTS, **HEAD_WEIGHTS})
    converted = convert(model, OPTIONS)
    assert_same(model, converted)
    assert ("SAME padding of 2 strided windows" in steps(converted)) == auto_pad.startswith("SAME")
    assert converted.contract.tiles is not None and converted.contract.tiles.possible


@pytest.mark.parametrize(
    "pool",
    [
        "p = AveragePool <kernel_shape = [8, 8]> (m) \n f = Flatten (p)",
        "p = AveragePool <kernel_shape = [9, 9], pads = [0, 0, 1, 1]> (m) \n f = Flatten (p)",
        "p = AveragePool <kernel_shape = [9, 9], pads = [0, 0, 1, 1], count_include_pad = 1> (m) \n f = Flatten (p)",
        "f = ReduceMean <axes = [2, 3], keepdims = 0> (m)",
        "p = ReduceMean <axes = [3], keepdims = 0> (m) \n f = ReduceMean <axes = [-1], keepdims = 0> (p)",
        "t = Transpose <perm = [0, 2, 3, 1]> (m) \n f = ReduceMean <axes = [1, 2], keepdims = 0> (t)",
    ],
)
def test_pools_of_the_whole_map(pool: str) -> None:
    model = classifier(STEM + pool + HEAD.removeprefix(POOLED), {**STEM_WEIGHTS, **HEAD_WEIGHTS})
    converted = convert(model, OPTIONS)
    assert_same(model, converted)
    assert converted.contract.smallest_size == (1, 1) and converted.contract.logits == LOGITS_FROM_MAP


@pytest.mark.parametrize("channels_last", [False, True])
def test_layers_over_the_whole_map_become_convolutions(channels_last: bool, tmp_path: Path) -> None:
    order = "t = Transpose <perm = [0, 2, 3, 1]> (m) \n f = Reshape (t, to)" if channels_last else "f = Reshape (m, to)"
    head = "h = Gemm (f, k, j) \n r = Relu (h) \n z = MatMul (r, w) \n y = Add (z, v)"
    weights: dict[str, Any] = {"k": (8 * 8 * 8, 12), "j": (12,), "w": (12, CLASSES), "v": (CLASSES,)}
    model = classifier(STEM + order + head, {**STEM_WEIGHTS, **weights, "to": np.array([1, -1])})
    converted = convert(model, OPTIONS)
    assert_same(model, converted)
    assert "convolution of 8x8" in steps(converted) and "convolution of 1x1" in steps(converted)
    contract = converted.contract
    assert (contract.smallest_size, contract.feature_channels) == ((29, 29), 12)
    # At a larger size it is the source everywhere it fits, averaged.
    onnx.save(converted.model, tmp_path / "net.onnx")
    engine, picture = OrtEngine(tmp_path / "net.onnx"), pixels(SIDE, SIDE + 4)
    classes = engine.run(picture, ["class_map", "logits"])
    assert classes["class_map"].shape == (CLASSES, 1, 2)
    assert np.allclose(classes["logits"], classes["class_map"].mean((1, 2)), atol=1e-6)


def test_a_single_layer_over_the_whole_map_has_features_in_the_same_cells() -> None:
    weights = {**STEM_WEIGHTS, "w": (CLASSES, 512), "v": (CLASSES,)}
    model = classifier(STEM + "f = Flatten (m) \n y = Gemm <transB = 1> (f, w, v)", weights)
    converted = convert(model, OPTIONS)
    assert_same(model, converted)
    assert converted.contract.tiles is not None and converted.contract.tiles.possible
    found = run(converted.model, {"images": pixels(SIDE, SIDE)[np.newaxis]})
    assert np.allclose(found["features"], found["feature_map"].mean((2, 3)), atol=1e-6)


def test_scores_that_are_a_convolution_over_the_whole_map_are_pooled() -> None:
    text = STEM + "y = Conv <kernel_shape = [8, 8]> (m, w)"
    model = classifier(text, {**STEM_WEIGHTS, "w": (CLASSES, 8, 8, 8)}, scores=f"float[1, {CLASSES}, 1, 1] y")
    converted = convert(model, OPTIONS)
    assert_same(model, converted)
    assert run(converted.model, {"images": pixels(SIDE + 8, SIDE)[np.newaxis]})["class_map"].shape == (1, CLASSES, 3, 1)


def test_channel_shuffles_are_gathers() -> None:
    shuffle = "s = Reshape (m, apart) \n t = Transpose <perm = [0, 2, 1, 3, 4]> (s) \n u = Reshape (t, back)"
    shapes = {"apart": np.array([1, 2, 4, 8, 8]), "back": np.array([1, 8, 8, 8])}
    model = classifier(STEM + shuffle + HEAD.replace("(m)", "(u)"), {**STEM_WEIGHTS, **HEAD_WEIGHTS, **shapes})
    converted = convert(model, OPTIONS)
    assert_same(model, converted)
    assert "1 channel shuffle" in steps(converted)
    assert converted.contract.tiles is not None and converted.contract.tiles.possible


def test_squeeze_and_excite_is_served_whole() -> None:
    excite = """
        g = GlobalAveragePool (m) \n h = Reshape (g, flat) \n i = Gemm (h, e, eb) \n j = Sigmoid (i)
        k = Reshape (j, back) \n q = Mul (m, k)
    """
    weights: dict[str, Any] = {"e": (8, 8), "eb": (8,), "flat": np.array([1, 8]), "back": np.array([1, 8, 1, 1])}
    model = classifier(STEM + excite + HEAD.replace("(m)", "(q)"), {**STEM_WEIGHTS, **HEAD_WEIGHTS, **weights})
    converted = convert(model, OPTIONS)
    assert_same(model, converted)
    tiles = converted.contract.tiles
    assert tiles is not None and "takes one value from the whole image" in tiles.obstacles[0]


@pytest.mark.parametrize(("pools", "pooling"), [(("Average", "Max"), "avg+max"), (("Max", "Average"), "max+avg")])
def test_heads_that_are_not_linear_follow_the_features(pools: tuple[str, str], pooling: str) -> None:
    both = f"""
        p = Global{pools[0]}Pool (m) \n q = Global{pools[1]}Pool (m)
        r = Concat <axis = 1> (p, q) \n f = Flatten (r)
    """
    head = "h = Gemm (f, k, j) \n i = HardSwish (h) \n y = Gemm <transB = 1> (i, w, v)"
    weights = {"k": (16, 12), "j": (12,), "w": (CLASSES, 12), "v": (CLASSES,)}
    model = classifier(STEM + both + head, {**STEM_WEIGHTS, **weights}, opset=14)
    converted = convert(model, OPTIONS)
    assert_same(model, converted)
    assert (converted.contract.logits, converted.contract.pooling) == (LOGITS_FROM_FEATURES, pooling)
    assert run(converted.model, {"images": pixels(9, 7)[np.newaxis]})["features"].shape == (1, 16)


def test_products_of_features_are_not_linear() -> None:
    text = STEM + POOLED + "\n g = Mul (f, f) \n y = Gemm <transB = 1> (g, w, v)"
    model = plain(text)
    converted = convert(model, OPTIONS)
    assert_same(model, converted)
    assert converted.contract.logits == LOGITS_FROM_FEATURES


def test_a_source_that_sees_no_difference_proves_nothing() -> None:
    model = classifier(STEM + HEAD, {**STEM_WEIGHTS, "w": np.zeros((CLASSES, 8), np.float32), "v": (CLASSES,)})
    with pytest.raises(InvalidModel, match="different images the same scores"):
        convert(model, OPTIONS)


def test_branches_of_odd_sizes_are_padded_where_their_own_size_is_not_touched() -> None:
    branches = """
        s = Conv <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (m, w3)
        t = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [0, 0, 1, 1]> (m)
        u = Concat <axis = 1> (s, t)
    """
    weights = {**STEM_WEIGHTS, **HEAD_WEIGHTS, "w3": (8, 8, 3, 3), "w": (CLASSES, 16)}
    model = classifier(STEM + branches + HEAD.replace("(m)", "(u)"), weights)
    converted = convert(model, OPTIONS)
    assert_same(model, converted)
    assert "MaxPool 't' further at the end" in steps(converted)
    assert not graph_geometry(converted.model).graph.disagreements
    assert run(converted.model, {"images": pixels(35, 41)[np.newaxis]})["feature_map"].shape == (1, 16, 5, 6)


def test_the_proof_fails_where_the_two_differ(tmp_path: Path) -> None:
    converted, path = convert(plain(), OPTIONS), tmp_path / "net.onnx"
    onnx.save(converted.model, path)
    geometry = graph_geometry(converted.model)
    proof = Proof(path, converted.contract, geometry)
    prepare = partial(source_images, OPTIONS)
    assert proof.difference(Source(plain(), prepare), (SIDE, SIDE)) == converted.difference
    other = plain()
    bias = next(each for each in other.graph.initializer if each.name == "v")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * np.float32(1.01), "v"))
    with pytest.raises(InvalidModel, match="differ from the source's"):
        proof.difference(Source(other, prepare), (SIDE, SIDE))
    wrong = graph_geometry(
        convert(
            classifier(
                STEM.replace("strides = [2, 2]", "strides = [1, 1]", 1) + HEAD, {**STEM_WEIGHTS, **HEAD_WEIGHTS}
            ),
            OPTIONS,
        ).model
    )
    with pytest.raises(InvalidModel, match="'feature_map' is"):
        Proof(path, converted.contract, wrong).run_elsewhere((SIDE, SIDE))


def test_weights_beside_the_file_are_read_and_those_outside_its_folder_are_not(tmp_path: Path) -> None:
    inside, outside = tmp_path / "model", tmp_path / "elsewhere"
    inside.mkdir()
    outside.mkdir()
    onnx.save(plain(), inside / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    assert_same(plain(), convert(read_onnx(inside / "net.onnx"), OPTIONS))
    (inside / "net.data").rename(outside / "net.data")
    for place in ("../elsewhere/net.data", str(outside / "net.data"), "link.data"):
        model = onnx.load(inside / "net.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = place
        (inside / "bad.onnx").write_bytes(model.SerializeToString())
        if place == "link.data":
            (inside / place).symlink_to(outside / "net.data")
        with pytest.raises(InvalidModel, match=r"outside the folder of bad\.onnx"):
            read_onnx(inside / "bad.onnx")
    with pytest.raises(InvalidModel, match=r"not beside net\.onnx"):
        read_onnx(inside / "net.onnx")
    (inside / "text.onnx").write_text("no model")
    with pytest.raises(InvalidModel, match="no ONNX file"):
        read_onnx(inside / "text.onnx")


def test_a_branch_takes_what_was_computed_from_constants_outside_it() -> None:
    branch = """
        same = Equal (one, one) \n k = Mul (two, two)
        q = If (same) <
            then_branch = yes () => (float[1, 8, 8, 8] r) { r = Mul (m, k) },
            else_branch = no () => (float[1, 8, 8, 8] s) { s = Relu (m) }
        >
    """
    weights = {**STEM_WEIGHTS, **HEAD_WEIGHTS, "one": np.array([1]), "two": np.array([2], np.float32)}
    model = classifier(STEM + branch + HEAD.replace("(m)", "(q)"), weights)
    assert_same(model, convert(model, OPTIONS))


def test_a_source_may_use_the_names_that_are_made_up() -> None:
    names = {name: f"weights.{number}" for number, name in enumerate("abcmpfwv", 1)}
    model = plain()
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    parts: list[Any] = [*model.graph.initializer, *model.graph.input]
    for each in parts:
        each.name = names.get(each.name, each.name)
    assert_same(model, convert(model, OPTIONS))


def test_images_of_any_size_in_the_source_s_own_words() -> None:
    model = plain(image='float["N", 3, "H", "W"] x', scores='float["N", 5] y')
    converted = convert(model, replace(OPTIONS, size=(40, 24)))
    assert "40 x 24 pixels" in steps(converted)
    assert_same(model, converted)
    with pytest.raises(InvalidModel, match=r"fixed to 32 x 32 .* not 40 x 24"):
        convert(plain(), replace(OPTIONS, size=(40, 24)))
    assert converted.model.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
