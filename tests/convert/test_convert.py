"""Each step of the conversion on a graph that needs it; what can't be converted, and why."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fullframe.convert.options import Options
from fullframe.convert.pipeline import Converted, convert
from fullframe.convert.pixels import source_images
from fullframe.convert.proof import Proof, Source
from fullframe.convert.reading import read_onnx
from fullframe.engine.ort import OrtEngine
from fullframe.engine.query import FloatArray
from fullframe.errors import InvalidInput, InvalidModel
from fullframe.model.contract import LOGITS_FROM_FEATURES, LOGITS_FROM_MAP
from fullframe.model.geometry import graph_geometry
from tests.convert.classifiers import CLASSES, HEAD, HEAD_WEIGHTS, POOLED, SIDE, STEM, STEM_WEIGHTS, classifier, plain
from tests.pictures import pixels

OPTIONS = Options("net", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))


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


def test_branches_that_no_padding_makes_agree_are_refused() -> None:
    branches = """
        s = MaxPool <kernel_shape = [1, 1], strides = [8, 8]> (m)
        t = MaxPool <kernel_shape = [8, 8]> (m)
        u = Add (s, t)
    """
    model = classifier(STEM + branches + HEAD.replace("(m)", "(u)"), {**STEM_WEIGHTS, **HEAD_WEIGHTS})
    with pytest.raises(InvalidModel, match=r"Add 'u' joins branches of different sizes"):
        convert(model, OPTIONS)


def test_position_embeddings_are_refused() -> None:
    tokens = """
        s = Reshape (m, to) \n t = Transpose <perm = [0, 2, 1]> (s)
        u = Add (t, where) \n f = ReduceMean <axes = [1], keepdims = 0> (u)
    """
    weights = {**STEM_WEIGHTS, **HEAD_WEIGHTS, "to": np.array([1, 8, 64]), "where": (1, 64, 8)}
    with pytest.raises(InvalidModel, match=r"Add 'u' takes 'where', which has 64 values .* position embedding"):
        convert(classifier(STEM + tokens + HEAD.removeprefix(POOLED), weights), OPTIONS)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: plain(opset=6), "opset 6; 7 is the least"),
        (lambda: plain(image="float[4, 3, 32, 32] x"), "takes 4 images"),
        (lambda: classifier("y = Identity (x)", scores="float[1, 3, 32, 32] y"), "found: none"),
        (
            lambda: plain(STEM + "y = Relu (m)", scores="float[1, 8, 8, 8] y"),
            "scores 'y' are a map of 8 x 8 cells",
        ),
        (lambda: plain(image="float[1, 32, 32, 3] x"), r"must be \[N, 3, height, width\]"),
        (lambda: plain(image="float[1, 3, 32, 32] x, float[1] other"), "2 inputs"),
        (lambda: plain(scores="float[1, 5] y, float[1, 8] f"), "2 outputs"),
        (lambda: plain(text=STEM + HEAD.replace("y =", "s =") + "\n y = Sigmoid (s)"), "yes or no"),
        (
            lambda: classifier(
                STEM + "r = Resize (m, , , to) \n" + HEAD.replace("(m)", "(r)"),
                {**STEM_WEIGHTS, **HEAD_WEIGHTS, "to": np.array([1, 8, 12, 12])},
            ),
            "Resize 'r' scales every map to 12 cells",
        ),
    ],
)  # fmt: skip
def test_what_stands_in_the_way_is_named(model: Any, message: str) -> None:
    with pytest.raises(InvalidModel, match=message):
        convert(model(), OPTIONS)


def test_operators_of_others_are_refused() -> None:
    model = plain()
    model.graph.node[1].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    with pytest.raises(InvalidModel, match=r"Relu 'b' is an operator of 'com.example'"):
        convert(model, OPTIONS)


def test_operators_of_others_are_refused_inside_branches_too() -> None:
    branch = """
        one = ReduceSum <keepdims = 0> (x) \n more = Greater (one, one)
        q = If (more) <
            then_branch = yes () => (float[1, 8, 8, 8] r) { r = Relu (m) },
            else_branch = no () => (float[1, 8, 8, 8] s) { s = Relu (m) }
        >
    """
    model = classifier(STEM + branch + HEAD.replace("(m)", "(q)"), {**STEM_WEIGHTS, **HEAD_WEIGHTS})
    chosen = next(node for node in model.graph.node if node.op_type == "If").attribute[0].g
    chosen.node[0].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    with pytest.raises(InvalidModel, match=r"Relu '[rs]' is an operator of 'com.example'"):
        convert(model, OPTIONS)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("offset", "abc", r"'w1' \[8, 3, 3, 3\] can't be read: .*'abc'"),
        ("offset", "-5", "'w1' .* can't be read: .*-5"),
        ("length", "abc", "'w1' .* can't be read: .*'abc'"),
        ("", "", "'w1' are of type 77, which ONNX does not have"),
    ],
)
def test_weights_beside_the_file_that_make_no_sense_are_named(
    key: str, value: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(plain(), path, save_as_external_data=True, location="net.data", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    weights = model.graph.initializer[0]
    for entry in weights.external_data:
        if entry.key == key:
            entry.value = value
    if not key:
        weights.data_type = 77
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InvalidModel, match=message):
        read_onnx(path)


def test_weights_inside_the_file_that_make_no_sense_are_named() -> None:
    unknown, longer = plain(), plain()
    unknown.graph.initializer[0].data_type = 77
    longer.graph.initializer[0].dims[0] = 7
    with pytest.raises(InvalidModel, match="'w1' are of type 77, which ONNX does not have"):
        convert(unknown, OPTIONS)
    with pytest.raises(InvalidModel, match=r"'w1' \[7, 3, 3, 3\] can't be read"):
        convert(longer, OPTIONS)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"v": (3,)}, "Gemm 'y' has 3 values of bias for 5 outputs"),
        ({"w": np.zeros((0, 8), np.float32), "v": np.zeros(0, np.float32)}, "Gemm 'y' .* has no classes"),
    ],
)
def test_a_head_whose_sizes_do_not_fit_is_named(weights: Any, message: str) -> None:
    model = classifier(STEM + HEAD, {**STEM_WEIGHTS, **HEAD_WEIGHTS, **weights}, scores='float[1, "K"] y')
    with pytest.raises(InvalidModel, match=message):
        convert(model, OPTIONS)


def test_a_graph_that_contradicts_itself_is_refused_in_the_words_of_shape_inference() -> None:
    wrong = STEM.replace("strides = [2, 2], pads = [1, 1, 1, 1]", 'strides = [2, 2, 2], auto_pad = "SAME_UPPER"')
    with pytest.raises(InvalidModel, match=r"malformed.*Conv.*strides has incorrect size$"):
        convert(plain(wrong + HEAD), OPTIONS)


def test_a_source_of_more_pixels_than_can_be_proved_is_refused() -> None:
    with pytest.raises(InvalidModel, match=r"fixed to 100000 x 100000 .* at most 67,108,864"):
        convert(plain(image="float[1, 3, 100000, 100000] x"), OPTIONS)
    with pytest.raises(InvalidInput, match=r"size is 100000 x 100000 .* at most 67,108,864"):
        convert(plain(image='float["N", 3, "H", "W"] x'), replace(OPTIONS, size=(100_000, 100_000)))


@pytest.mark.parametrize(
    ("end", "node"),
    [
        ("y = Conv (m, k)", "Conv 'y'"),
        ("s = Conv (m, k) \n y = Resize (s, , scales)", "Resize 'y'"),
        ("s = Conv (m, k) \n y = Resize (s, , , to)", "Resize 'y'"),
        ("s = Conv (m, k) \n y = Softmax <axis = 1> (s)", "Conv 's'"),
        ("g = GlobalAveragePool (m) \n j = Add (m, g) \n y = Conv (j, k)", "Conv 'y'"),
    ],
)
def test_segmentation_networks_are_told_from_classifiers(end: str, node: str) -> None:
    sizes = {"scales": np.array([1, 1, 4, 4], np.float32), "to": np.array([1, CLASSES, SIDE, SIDE])}
    weights = {**STEM_WEIGHTS, "k": (CLASSES, 8, 1, 1), **sizes}
    model = classifier(STEM + end, weights, scores='float[1, 5, "h", "w"] y')
    with pytest.raises(InvalidModel, match=rf"{node} makes the output.* scores for each place.*\[N, K\]"):
        convert(model, OPTIONS)


def test_a_missing_tensor_s_taker_is_named() -> None:
    model = plain()
    model.graph.node[2].input[0], model.graph.node[2].name = "ghost", "second"
    with pytest.raises(InvalidModel, match="'ghost' of node: name: second OpType: Conv"):
        convert(model, OPTIONS)


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers_are_named_themselves_not_what_prepares_their_state(op: str, gates: int) -> None:
    tokens = f"""
        s = Reshape (m, to) \n t = Transpose <perm = [2, 0, 1]> (s)
        sizes = Shape (s) \n n = Gather (sizes, first) \n state = Concat <axis = 0> (one, n, hidden)
        h = ConstantOfShape (state) \n o, last = {op} <hidden_size = 6> (t, ws, rs, , , h)
        f = Squeeze (last, first) \n y = Gemm <transB = 1> (f, w, v)
    """
    numbers = {"to": [0, 8, -1], "first": [0], "one": [1], "hidden": [6]}
    weights = {
        **{**STEM_WEIGHTS, **HEAD_WEIGHTS, "w": (CLASSES, 6), "ws": (1, gates * 6, 8), "rs": (1, gates * 6, 6)},
        **{name: np.array(value) for name, value in numbers.items()},
    }
    model = classifier(STEM + tokens, weights, image='float["N", 3, "H", "W"] x')
    with pytest.raises(InvalidModel, match=f"other sizes: {op} 'o' is not known"):
        convert(model, replace(OPTIONS, size=(SIDE, SIDE)))


def test_labels_must_be_as_many_as_classes() -> None:
    with pytest.raises(InvalidInput, match="3 labels for 5 classes"):
        convert(plain(), replace(OPTIONS, labels=("a", "b", "c")))


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


def test_constants_larger_than_memory_are_not_computed() -> None:
    text = (
        "big = ConstantOfShape (to) \n s = ReduceSum <keepdims = 0> (big)"
        + STEM
        + HEAD.replace("y =", "z =")
        + "\n y = Add (z, s)"
    )
    weights = {**STEM_WEIGHTS, **HEAD_WEIGHTS, "to": np.array([2**20, 2**20])}
    with pytest.raises(InvalidModel, match=r"numbers from constants"):
        convert(classifier(text, weights), OPTIONS)


def test_images_of_any_size_in_the_source_s_own_words() -> None:
    model = plain(image='float["N", 3, "H", "W"] x', scores='float["N", 5] y')
    converted = convert(model, replace(OPTIONS, size=(40, 24)))
    assert "40 x 24 pixels" in steps(converted)
    assert_same(model, converted)
    with pytest.raises(InvalidModel, match=r"fixed to 32 x 32 .* not 40 x 24"):
        convert(plain(), replace(OPTIONS, size=(40, 24)))
    assert converted.model.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
