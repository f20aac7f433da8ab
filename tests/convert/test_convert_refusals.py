"""What can't be converted, and what is said of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from fullframe.convert.pipeline import convert
from fullframe.convert.reading import read_onnx
from fullframe.errors import InvalidInput, InvalidModel
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
