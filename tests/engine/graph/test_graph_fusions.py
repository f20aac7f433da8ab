"""What is folded and fused: that it is found, that it computes the same, and that it is left alone where it may not."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper, parser

from fullframe.engine.graph.fusions import fuse
from fullframe.engine.graph.fusions.epilogues import EPILOGUE
from fullframe.engine.graph.fusions.heads import CONV_WHOLE, LINEAR
from fullframe.engine.graph.fusions.whole import WHOLE
from fullframe.engine.graph.fusions.windows import WINDOW
from fullframe.engine.graph.ir import Node
from fullframe.engine.graph.operators.own import AFFINE, PIXELS
from fullframe.engine.graph.reader import read_graph
from fullframe.engine.graph.simplify import simplify
from fullframe.model.ragged import ragged_model
from fullframe.model.repository import BUNDLED
from tests.engine.graph.parity import FUSED, PROMISE, differences, serialized
from tests.model.test_ragged_graphs import CONV1, CONV3, GLOBALS, MAX3, build
from tests.ragged import images_of, padded

CHANNELS = 6
WEIGHTS = {
    "w3": (CHANNELS, 3, 3, 3),
    "w1": (5, CHANNELS, 1, 1),
    **dict.fromkeys(("b3", "bias", "mean"), (CHANNELS,)),
    "b1": (5,),
    "square": (CHANNELS, CHANNELS, 1, 1),
    **dict.fromkeys(("times", "plus"), (1, CHANNELS, 1, 1)),
}
STEM = "a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w3, b3)"
POOL = "kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]"


def model(text: str, *outputs: str, opset: int = 20) -> onnx.ModelProto:
    """From x, float [N, 3, h, w], by the stem to `a`, float [N, CHANNELS, h, w], and on by the text."""
    random = np.random.default_rng(0)
    values: dict[str, Any] = {name: random.normal(0, 0.5, shape) for name, shape in WEIGHTS.items()}
    values |= {"scale": np.linspace(0.5, 2, CHANNELS), "var": np.linspace(0.1, 1, CHANNELS)}
    values |= {
        "half": 0.5,
        "one": 1.0,
        "root2": np.sqrt(2),
        "p": 3.0,
        "third": 1 / 3,
        "zero": 0.0,
        "six": 6.0,
        "sixth": 1 / 6,
        "floor": 1e-6,
    }
    weights = {name: np.asarray(value, np.float32) for name, value in values.items()} | {"hw": np.array([2, 3])}
    made = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}]> net (float[N, 3, h, w] x) => '
        f"({', '.join(f'float {name}' for name in outputs)}) {{ {STEM} \n {text} }}"
    )
    for each in made.graph.output:
        each.type.tensor_type.ClearField("shape")
    used = {name for node in made.graph.node for name in node.input}
    made.graph.initializer.extend(numpy_helper.from_array(each, name) for name, each in weights.items() if name in used)
    return made


def fused(graph: onnx.ModelProto, *outputs: str) -> list[Node]:
    read = simplify(read_graph(serialized(graph)))
    return fuse(read, outputs or [each.name for each in read.outputs])


def check(graph: onnx.ModelProto, device: torch.device, expected: Sequence[str], *outputs: str) -> list[Node]:
    """The operators that are left behind the stem's convolution, and numbers as ONNX Runtime's."""
    nodes = fused(graph, *outputs)
    assert Counter(node.op for node in nodes) == Counter(("Conv", *expected))
    x = np.random.default_rng(1).normal(0, 1, (2, 3, 9, 8)).astype(np.float32)
    for on in FUSED:
        found = differences(graph, {"x": x}, [outputs] if outputs else [], device=device, fused=on)
        assert max(found.values()) <= PROMISE, found
    return nodes


JOINED = "j = Concat <axis = 1> (a) \n n = BatchNormalization (j, scale, bias, mean, var)"
NORM = "n = BatchNormalization (a, scale, bias, mean, var)"
GELU = "e = Div (a, root2) \n f = Erf (e) \n g = Add (f, one) \n h = Mul (a, half) \n r = Mul (h, g)"


@pytest.mark.parametrize("pool", ["MaxPool", "AveragePool", "AveragePool <count_include_pad = 1>"])
@pytest.mark.parametrize(
    ("text", "activation"),
    [
        ("r = Relu (a)", "relu"),
        (f"{NORM} \n r = Relu (n)", "relu"),
        ("r = LeakyRelu <alpha = 0.01> (a)", "leaky_relu"),
        ("r = Gelu (a)", "gelu"),
        (GELU, "gelu"),
        ("s = Sigmoid (a) \n r = Mul (a, s)", "silu"),
        (f"{NORM} \n s = Sigmoid (n) \n r = Mul (s, n)", "silu"),
        ("r = Mul (a, times)", "none"),
    ],
)
def test_pools_take_bias_and_activation(device: torch.device, text: str, activation: str, pool: str) -> None:
    op, _, options = pool.partition(" <")
    options = f", {options.removesuffix('>')}" if options else ""
    nodes = check(model(f"{text} \n y = {op} <{POOL}{options}> (r)", "y"), device, [WINDOW])
    conv, window = nodes
    assert window.attributes["activation"] == activation
    assert len(conv.inputs) == 2 and window.inputs[2], "the bias is the pool's"


def test_pools_take_scale_and_shift_of_maps_that_are_no_convolutions(device: torch.device) -> None:
    text = f"{JOINED} \n r = Relu (n) \n y = MaxPool <{POOL}> (r)"
    nodes = check(model(text, "y"), device, ["Concat", WINDOW])
    assert all(nodes[-1].inputs[1:]), "scale and shift"
    check(model(text, "y", "n"), device, ["Concat", AFFINE, WINDOW])


def test_what_others_read_stays(device: torch.device) -> None:
    graph = model(f"r = Relu (a) \n y = MaxPool <{POOL}> (r) \n z = Neg (r)", "y", "z")
    nodes = check(graph, device, [EPILOGUE, WINDOW, "Neg"])
    assert next(node for node in nodes if node.op == WINDOW).attributes["activation"] == "none"
    assert Counter(node.op for node in fused(graph, "y")) == Counter(["Conv", WINDOW]), "not asked for, not there"
    check(model(f"r = Relu (a) \n y = MaxPool <{POOL}> (r)", "y", "a"), device, ["Relu", WINDOW][1:])


def test_activations_of_other_numbers_stay(device: torch.device) -> None:
    for text in ("r = LeakyRelu <alpha = 0.2> (a)", "r = Elu (a)", 'r = Gelu <approximate = "tanh"> (a)'):
        check(model(f"{text} \n y = MaxPool <{POOL}> (r)", "y"), device, [text.split()[2], WINDOW])


@pytest.mark.parametrize("pads", ["[0, 0, 1, 1]", "[2, 2, 2, 2]"])
def test_padding_that_fusedpool_does_not_take_stays(device: torch.device, pads: str) -> None:
    text = f"r = Relu (a) \n y = AveragePool <kernel_shape = [3, 3], pads = {pads}> (r)"
    check(model(text, "y"), device, [EPILOGUE, "AveragePool"])


@pytest.mark.parametrize(
    "text", [f"{NORM} \n y = Identity (n)", "m = Mul (times, a) \n n = Sub (m, plus) \n y = Div (n, p)"]
)
def test_what_is_linear_in_each_channel_goes_into_the_convolution(device: torch.device, text: str) -> None:
    assert "Mul" not in {
        node.op for node in check(model(text, "y"), device, ["Identity"] if "Identity" in text else [])
    }


def test_no_convolution_is_changed_whose_map_others_read(device: torch.device) -> None:
    check(model(f"{NORM} \n y = Neg (n) \n z = Neg (a)", "y", "z"), device, [AFFINE, "Neg", "Neg"])


SHORTCUT = "q = Conv (a, square, bias) \n e = Add (q, a)"


@pytest.mark.parametrize(
    ("text", "activation", "addend", "left"),
    [
        ("y = Relu (a)", "relu", "", []),
        (f"{NORM} \n y = LeakyRelu <alpha = 0.01> (n)", "leaky_relu", "", []),
        ("s = Sigmoid (a) \n y = Mul (a, s)", "silu", "", []),
        (GELU.replace("r = ", "y = "), "gelu", "", []),
        ("y = HardSwish (a)", "hard_swish", "", []),
        ("y = Clip (a, zero, six)", "relu6", "", []),
        (f"{SHORTCUT} \n y = Relu (e)", "relu", "a", ["Conv"]),
        ("q = Conv (a, square, bias) \n y = Add (a, q)", "none", "a", ["Conv"]),
        (f"{JOINED} \n y = Relu (n)", "relu", "", ["Concat"]),
        ("t = Tanh (a) \n e = Add (a, t) \n y = Relu (e)", "relu", "a", ["Tanh"]),
    ],
)
def test_what_follows_a_convolution_is_one_pass(
    device: torch.device, text: str, activation: str, addend: str, left: list[str]
) -> None:
    nodes = check(model(text, "y"), device, [EPILOGUE, *left])
    last = nodes[-1]
    assert (last.attributes["activation"], last.inputs[3]) == (activation, addend)
    assert (addend == "a" and "Tanh" in left) or last.inputs[2], "the bias, or the norm's shift"


def test_one_pass_stays_what_it_is(device: torch.device) -> None:
    check(model("q = Concat <axis = 1> (a) \n y = Relu (q)", "y"), device, ["Concat", "Relu"])
    check(model("y = Clip (a, zero, one)", "y"), device, ["Clip"])
    both = model(f"{SHORTCUT} \n y = Relu (e)", "y", "e", "q")
    assert EPILOGUE not in {node.op for node in check(both, device, ["Conv", "Add", "Relu"])}


GEM = "c = Clip (a, floor) \n q = Pow (c, p) \n m = ReduceMean (q, hw) \n z = Pow (m, third)"


def test_global_pools_of_one_map_are_one(device: torch.device) -> None:
    reductions = (
        "t = ReduceMax <keepdims = 0> (a, hw) \n u = ReduceMin (a, hw) \n v = ReduceMean <keepdims = 0> (a, hw)"
    )
    text = f"y = GlobalAveragePool (a) \n {GEM} \n {reductions}"
    nodes = check(model(text, "y", "t", "u", "z", "v"), device, [WHOLE])
    kinds = [(kind, p) for kind, p, _ in nodes[-1].attributes["picks"]]
    assert sorted(kinds, key=str) == sorted(
        [("avg", None), ("max", None), ("min", None), ("gem", 3.0), ("avg", None)], key=str
    )


def test_one_kind_by_two_numbers_is_two(device: torch.device) -> None:
    other = "d = Clip (a, floor) \n k = Pow (d, six) \n o = ReduceMean (k, hw) \n y = Pow (o, sixth)"
    check(model(f"{GEM} \n {other} \n v = ReduceMean (a, hw)", "z", "y", "v"), device, [WHOLE, WHOLE])


def test_global_pools_take_what_comes_before_them(device: torch.device) -> None:
    nodes = check(
        model("r = Relu (a) \n y = GlobalAveragePool (r) \n z = GlobalMaxPool (r)", "y", "z"),
        device,
        ["Relu", WHOLE][1:],
    )
    assert nodes[-1].attributes["activation"] == "relu" and nodes[-1].inputs[4] == "b3"


HEAD = "s = Conv (a, w1, b1) \n {} \n y = ReduceMean <keepdims = {}> ({}, hw)"


@pytest.mark.parametrize("keep", [0, 1])
def test_scores_are_pooled_without_their_map(device: torch.device, keep: int) -> None:
    linear = model(HEAD.format("m = Neg (a)", keep, "s") + "\n f = GlobalAveragePool (a)", "y", "f", "s")
    check(linear, device, [WHOLE, LINEAR], "y", "f")
    assert Counter(node.op for node in fused(linear, "y", "s")) == Counter(["Conv", "Conv", WHOLE])
    activated = model(HEAD.format("r = Relu (s)", keep, "r"), "y", "r")
    check(activated, device, [CONV_WHOLE], "y")
    assert CONV_WHOLE not in {node.op for node in fused(activated, "y", "r")}


@pytest.mark.parametrize("pooling", GLOBALS)
def test_own_cells_are_pooled_without_a_mask(device: torch.device, pooling: str) -> None:
    graph = ragged_model(build(CONV3, CONV1, pooling=pooling))
    feeds = padded(images_of([(9, 14), (12, 7), (8, 8)]))
    for on in FUSED:
        found = differences(graph, feeds, [["features"], ["logits", "features"]], device=device, fused=on)
        assert max(found.values()) <= PROMISE, found
    nodes = fused(graph, "logits")
    assert not {"Where", "And", "Less"} & {node.op for node in nodes}, "no mask is made"
    assert [node.op for node in nodes].count(EPILOGUE) == 1, "only before the convolution that sees padding"
    assert next(node for node in nodes if node.op == WHOLE).inputs[1]
    if pooling in ("GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "gem"):
        assert [node.op for node in fused(graph, "features")].count(EPILOGUE) == 1


def test_the_bundled_model_is_pixels_convolutions_and_pools() -> None:
    found = Counter(node.op for node in fused(onnx.load(BUNDLED), "features", "logits"))
    assert found[PIXELS] == 1 and found[WINDOW] == 13 and found[WHOLE] == 1
    assert not {"Cast", "Sub", "AveragePool", "ReduceMean"} & set(found)
    in_batches = Counter(node.op for node in fused(ragged_model(onnx.load(BUNDLED)), "features", "logits"))
    assert in_batches[WINDOW] == found[WINDOW] and in_batches[WHOLE] == 1 and in_batches["ReduceSum"] == 0


def test_pixels_become_numbers_in_one_step(device: torch.device) -> None:
    graph = build(CONV3, MAX3)
    assert PIXELS not in {node.op for node in fused(graph)}, "normalised where channels come last"
    feeds: dict[str, Any] = {"images": images_of([(9, 7)])[0][np.newaxis]}
    assert max(differences(graph, feeds, device=device).values()) <= PROMISE
    assert max(differences(BUNDLED, feeds, device=device).values()) <= PROMISE
