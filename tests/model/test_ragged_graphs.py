"""Batches of images of different sizes: each gets what it gets alone, from any graph that can be masked."""

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper
from onnxruntime import InferenceSession

from fullframe.errors import InvalidModel
from fullframe.model.geometry import GraphGeometry
from fullframe.model.ragged import ragged_model
from fullframe.model.repository import BUNDLED
from tests.model.graphs import Branches, Builder, Cut, Resize, Window, cuts, session
from tests.model.graphs import branches as plain_branches
from tests.model.graphs import windows as plain_windows
from tests.ragged import differences, drawn, images_of, padded

PROMISE: Final = 1e-4

GLOBALS: Final = (
    *("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"),
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceLogSumExp"),
    *("ReduceSumSquare", "gem", "rows, then columns", "all channels"),
)


@dataclass(frozen=True)
class Squeeze:
    """Squeeze-and-excite: the map times a sigmoid of its own global mean."""


class Biased(Builder):
    """Builder's graphs with weights of both signs and biases, so that padding is nothing like zero behind them."""

    def __init__(self, pads_count: bool = False, depthwise: bool = False) -> None:
        super().__init__()
        self.pads_count, self.depthwise, self.random = pads_count, depthwise, np.random.default_rng(0)
        mean = self.constant("mean", np.full((3, 1, 1), 60, np.float32))
        self.last = self.node("Sub", [self.last, mean])  # so that black pixels are not zeros

    def conv(self, source: str, outputs: int, kernel: tuple[int, int], **attributes: Any) -> str:
        group = self.channels if self.depthwise and outputs == self.channels else 1
        shape = (outputs, self.channels // group, *kernel)
        values = self.random.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape)
        weights = self.constant(f"w{len(self.weights)}", values.astype(np.float32))
        bias = self.constant(f"b{len(self.weights)}", self.random.normal(0, 20, outputs).astype(np.float32))
        return self.node("Conv", [source, weights, bias], kernel_shape=kernel, group=group, **attributes)

    def window(self, source: str, w: Window) -> str:
        pads: dict[str, Any] = {"auto_pad": w.auto_pad} if w.auto_pad != "NOTSET" else {"pads": w.pads}
        if w.op == "Conv":
            return self.conv(source, self.channels, w.kernel, strides=w.stride, dilations=w.dilation, **pads)
        made = super().window(source, w)
        if w.op == "AveragePool":
            self.nodes[-1].attribute.append(helper.make_attribute("count_include_pad", int(self.pads_count)))
        return made

    def add(self, stage: Any) -> None:
        if not isinstance(stage, Squeeze):
            super().add(stage)
            return
        mean = self.node("GlobalAveragePool", [self.last])
        gate = self.node("Sigmoid", [self.conv(mean, self.channels, (1, 1))])
        self.last = self.node("Mul", [self.last, gate])

    def finish(self, pooling: str) -> onnx.ModelProto:
        """Outputs of a contract model: a relu-less map, features by `pooling`, a linear head."""
        feature_map = self.node("Identity", [self.last], output="feature_map")
        self.node("Flatten", [self.pooled(feature_map, pooling)], output="features")
        self.conv(feature_map, 5, (1, 1))
        self.nodes[-1].output[0] = "class_map"
        self.node("ReduceMean", ["class_map", self.ints(2, 3)], output="logits", keepdims=0)
        return self.model(("features", "logits", "feature_map", "class_map"))

    def pooled(self, source: str, pooling: str) -> str:
        match pooling:
            case "gem":
                positive = self.node("Clip", [source, self.constant("eps", np.array(1e-3, np.float32))])
                cube, root = (self.constant(f"p{p:.1f}", np.array(p, np.float32)) for p in (3, 1 / 3))
                mean = self.node("ReduceMean", [self.node("Pow", [positive, cube]), self.ints(2, 3)])
                return self.node("Pow", [mean, root])
            case "rows, then columns":
                rows = self.node("ReduceMean", [source, self.ints(3)], keepdims=0)
                return self.node("ReduceMax", [rows, self.ints(-1)], keepdims=0)
            case "all channels":
                return self.node("ReduceMean", [source, self.ints(-3, -2, -1)])
            case _ if pooling.startswith("Global"):
                return self.node(pooling, [source])
            case _:
                return self.node(pooling, [source, self.ints(2, 3)])


def build(*stages: Any, pooling: str = "GlobalAveragePool", **kind: bool) -> onnx.ModelProto:
    builder = Biased(**kind)
    for stage in stages:
        builder.add(stage)
    return builder.finish(pooling)


windows_and_more = st.one_of(
    plain_windows(),
    plain_branches(),
    cuts,
    st.just(Squeeze()),
    st.sampled_from(("Relu", "LeakyRelu", "Sigmoid", "HardSwish")),
    st.builds(Resize, st.tuples(*[st.integers(1, 3)] * 2), st.just("nearest"), st.just("asymmetric"), st.just("floor")),
)
graphs = st.builds(
    lambda stages, pooling, pads_count, depthwise: (
        stages,
        pooling,
        {"pads_count": pads_count, "depthwise": depthwise},
    ),
    st.lists(windows_and_more, min_size=1, max_size=5),
    st.sampled_from(GLOBALS),
    st.booleans(),
    st.booleans(),
)


def unmasked(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same without its masks."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for node in model.graph.node:
        if node.op_type == "Where" and node.output[0] not in ("feature_map", "class_map"):
            values = node.input[1]
            node.CopyFrom(helper.make_node("Identity", [values], [node.output[0]]))
    return model


def hold(stages: list[Any], pooling: str, kind: dict[str, bool], sizes: Any) -> None:
    model = build(*stages, pooling=pooling, **kind)
    try:
        made = ragged_model(model)
    except InvalidModel as refused:
        for reason in ("auto_pad SAME_", "not every image size is known", "closer than the image's pixels", "4096"):
            if reason in str(refused):
                assume(False)
        raise
    least = GraphGeometry(model).smallest_size
    assume(max(least) < 60)
    images = images_of(sizes.draw(drawn(least, 14)))
    try:
        found = differences(session(model), session(made), images)
    except FloatingPointError:
        assume(False)
    assert max(found.values()) <= PROMISE, found


@settings(max_examples=120, deadline=None)
@given(graphs, st.data())
def test_random_graphs_give_each_image_what_it_gets_alone(graph: tuple[Any, str, Any], sizes: Any) -> None:
    hold(*graph, sizes)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=1000, deadline=None)
@given(graphs, st.data())
def test_a_thousand_random_graphs_give_each_image_what_it_gets_alone(graph: tuple[Any, str, Any], sizes: Any) -> None:
    hold(*graph, sizes)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_bundled_model_gives_each_image_what_it_gets_alone(sizes: Any) -> None:
    lone, ragged = bundled()
    found = differences(lone, ragged, images_of(sizes.draw(drawn((1, 1), 60)), seed=sizes.draw(st.integers(0, 99))))
    assert max(found.values()) <= PROMISE, found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_a_thousand_batches_of_the_bundled_model(sizes: Any) -> None:
    lone, ragged = bundled()
    found = differences(lone, ragged, images_of(sizes.draw(drawn((1, 1), 120)), seed=sizes.draw(st.integers(0, 999))))
    assert max(found.values()) <= PROMISE, found


@cache
def bundled() -> tuple[InferenceSession, InferenceSession]:
    model = onnx.load(BUNDLED)
    made = ragged_model(model)
    onnx.checker.check_model(made, full_check=True)
    return session(model), session(made)


BATCH = [(9, 30), (31, 12), (17, 18), (30, 31)]
CONV3 = Window("Conv", (3, 3), pads=(1, 1, 1, 1))
CONV1 = Window("Conv", (1, 1))
MAX3 = Window("MaxPool", (3, 3), (2, 2), pads=(1, 1, 1, 1))
AVERAGE3 = Window("AveragePool", (3, 3), (2, 2), pads=(1, 1, 1, 1))
FIRE = Branches((CONV1, CONV3), "Concat")
CEILED = [Window(op, (3, 3), (2, 2), ceil_mode=True) for op in ("MaxPool", "AveragePool")]
CEILED_PADDED = Window("AveragePool", (5, 5), (3, 3), pads=(2, 2, 2, 2), ceil_mode=True)
TRAPS: dict[str, list[Any]] = {
    "zeros come after normalisation": [CONV3],
    "a bias makes padding": [CONV1, CONV3, "Relu", CONV3],
    "so does an activation": [CONV3, "Sigmoid", CONV3, "HardSwish", CONV3],
    "max pools see negative borders": [CONV3, MAX3, CONV3, MAX3],
    "average pools count cells": [CONV3, AVERAGE3, AVERAGE3],
    "SqueezeNet, ceil_mode": [Window("Conv", (3, 3), (2, 2)), "Relu", CEILED[0], FIRE, "Relu", CEILED[0], FIRE],
    "ceil_mode averages": [CEILED[1], CONV3, CEILED_PADDED],
    "ceil_mode, stride above kernel": [CONV1, Window("MaxPool", (2, 2), (3, 3), ceil_mode=True), CONV3],
    "unpadded pools": [CONV3, Window("MaxPool", (3, 3), (2, 2)), Window("AveragePool", (2, 2), (2, 2))],
    "Inception": [MAX3, Branches((CONV1, CONV3, Window("MaxPool", (3, 3), pads=(1, 1, 1, 1))), "Concat"), CONV3],
    "residual": [Branches((CONV3, CONV1), "Add"), "Relu", Branches((CONV3, CONV1), "Add")],
    "dilated": [Window("Conv", (3, 3), dilation=(2, 3), pads=(2, 3, 2, 3)), CONV3],
    "uneven": [Window("Conv", (4, 3), (3, 2), pads=(1, 0, 2, 1)), Window("MaxPool", (2, 3), pads=(0, 0, 1, 2))],
    "stride above kernel": [Window("Conv", (1, 2), (3, 3), pads=(0, 1, 0, 0)), CONV3],
    "SAME padding without stride": [Window("Conv", (4, 4), auto_pad="SAME_LOWER"), CONV3],
    "squeeze and excite": [CONV3, Squeeze(), CONV3, Squeeze()],
    "padded, then unpadded": [CONV1, Cut((2, 1, 3, 2)), Window("Conv", (3, 3)), CONV3],
    "cropped": [CONV1, Cut((1, 0, 2, 1), 2), CONV3],
    "enlarged": [
        Window("Conv", (3, 3), (2, 3), pads=(1, 1, 1, 1)),
        Resize((2, 3), place="asymmetric", nearest="floor"),
        CONV3,
    ],
}


@pytest.mark.parametrize("pads_count", [False, True])
@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap(trap: str, pads_count: bool) -> None:
    model = build(*TRAPS[trap], pads_count=pads_count)
    found = differences(session(model), session(ragged_model(model)), images_of(BATCH))
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("trap", TRAPS)
def test_without_masks_every_trap_snaps(trap: str) -> None:
    """The control."""
    model = build(*TRAPS[trap])
    found = differences(session(model), session(unmasked(ragged_model(model))), images_of(BATCH))
    assert max(found.values()) > 10 * PROMISE


@pytest.mark.parametrize("pooling", GLOBALS)
def test_global_pooling_is_of_the_image_alone(pooling: str) -> None:
    model = build(CONV3, CONV1, pooling=pooling)
    made = ragged_model(model)
    assert max(differences(session(model), session(made), images_of(BATCH)).values()) <= 1e-5
    assert differences(session(model), session(unmasked(made)), images_of(BATCH))["features"] > PROMISE, "the control"


def test_divisors_that_are_not_mended_show() -> None:
    """The control."""
    model = build(AVERAGE3)
    made = ragged_model(model)
    for node in made.graph.node:
        if node.op_type == "Div" and any(name.endswith(".pooled") for name in node.input):
            node.CopyFrom(helper.make_node("Identity", [node.input[0]], [node.output[0]]))
    assert differences(session(model), session(made), images_of(BATCH))["feature_map"] > PROMISE


def test_what_lies_beside_an_image_is_of_no_account() -> None:
    opened = session(ragged_model(build(CONV1, CONV3, MAX3, CONV3, AVERAGE3)))
    names = [output.name for output in opened.get_outputs()]
    found = []
    for garbage in (1, 2):
        feeds = padded(images_of(BATCH), garbage)
        found.append(b"".join(each.tobytes() for each in opened.run(names, feeds)))
    more = {"images": np.pad(feeds["images"], ((0, 0), (0, 5), (0, 9), (0, 0))), "sizes": feeds["sizes"]}
    assert found[0] == found[1]
    wide = dict(zip(names, opened.run(names, more), strict=True))
    same = dict(zip(names, opened.run(names, feeds), strict=True))
    np.testing.assert_allclose(wide["logits"], same["logits"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(wide["map_sizes"], same["map_sizes"])


def test_nothing_is_masked_in_vain() -> None:
    """Only the outputs and what is pooled over whole maps."""
    made = ragged_model(build(CONV1, "Relu", Window("Conv", (3, 3)), Window("MaxPool", (2, 2), (2, 2)), CONV1))
    assert sum(node.op_type == "Where" for node in made.graph.node) == 2
    three = ragged_model(build(CONV3, CONV1, CONV3, FIRE))
    assert sum(node.op_type == "Where" for node in three.graph.node) == 2 + 3


def shaped(builder: Biased, what: str) -> None:
    """Add an operator that no mask can help."""
    last, node, ints = builder.last, builder.node, builder.ints
    match what:
        case "InstanceNormalization":
            ones = builder.constant("ones", np.ones(3, np.float32))
            builder.last = node(what, [last, ones, ones])
        case "LayerNormalization":
            builder.last = node(what, [last, builder.constant("ones", np.ones(1, np.float32))], axis=1)
        case "BatchNormalization":
            statistics = [builder.constant(f"ones{number}", np.ones(3, np.float32)) for number in range(4)]
            builder.last = node(what, [last, *statistics], training_mode=1)
        case "Softmax":
            builder.last = node(what, [last], axis=-1)
        case "MatMul":
            flat = node("Reshape", [last, ints(0, 3, -1)])
            scores = node("MatMul", [node("Transpose", [flat], perm=[0, 2, 1]), flat])
            whole = node("MatMul", [flat, node("Softmax", [scores])])
            builder.last = node("Reshape", [whole, node("Shape", [last])])
        case "Resize":
            small = node("AveragePool", [last], kernel_shape=[2, 2], strides=[2, 2])
            builder.last = node("Resize", [small, "", "", node("Shape", [last])], mode="nearest")
        case "Div":
            cells = node("Cast", [node("ReduceProd", [node("Shape", [last], start=2), ints(0)])], to=1)
            builder.last = node("Div", [last, cells])
        case "Conv":
            builder.window = Builder.window.__get__(builder)  # type: ignore[method-assign]
            builder.last = builder.window(last, Window("Conv", (3, 3), (2, 2), auto_pad="SAME_UPPER"))
        case "Pad":
            builder.last = node("Pad", [last, ints(0, 0, 1, 1, 0, 0, 1, 1)], mode="edge")
        case "Reshape":
            rows = node("Reshape", [node("ReduceMean", [last, ints(3)], keepdims=0), ints(0, 3, -1)])
            builder.last = node("Mul", [last, node("Unsqueeze", [rows, ints(3)])])
        case "MaxPool":
            builder.last = node(what, [last], kernel_shape=[3, 3], pads=[1] * 4)
            builder.nodes[-1].output.append("places")
            builder.last = node("Add", [builder.last, node("Cast", ["places"], to=1)])
        case "QuantizeLinear":
            step = [builder.constant("step", np.full(1, 0.1, "f4")), builder.constant("zero", np.zeros(1, np.uint8))]
            builder.last = node("DequantizeLinear", [node(what, [last, *step]), *step])
        case "Concat":
            other = builder.window(last, Window("Conv", (3, 3)))
            builder.last = node(what, [last, other], axis=1)
            builder.channels *= 2


REFUSED = {
    "InstanceNormalization": "computes every cell from all of the image's",
    "LayerNormalization": "works along a side of the map",
    "BatchNormalization": "takes its statistics from the whole batch",
    "Softmax": "works along a side of the map",
    "MatMul": "multiplies by what is no constant matrix",
    "Resize": "scales",
    "Div": "computes with the image's size, which in a batch is the padded one",
    "Conv": "auto_pad SAME_UPPER with a stride of 2",
    "Pad": "fills its padding with the map's own cells",
    "Reshape": "rearranges what is left of the map",
    "MaxPool": "takes a value whose shape can't be followed",
    "QuantizeLinear": "rounds to integers",
    "Concat": "joins branches of different sizes",
}

NAMED = {"MaxPool": "Cast"}  # of its places


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_mask_can_help_is_named(what: str) -> None:
    builder = Biased()
    shaped(builder, what)
    with pytest.raises(InvalidModel, match=f"{NAMED.get(what, what)} 'node_.*{REFUSED[what]}"):
        ragged_model(builder.finish("GlobalAveragePool"))


def test_shapes_that_keep_every_cell_in_its_place_are_no_obstacle() -> None:
    """A channel shuffle whose sizes come from the map itself."""
    builder = Biased()
    builder.add(CONV3)
    grouped = [builder.ints(0, 1, 3), builder.node("Shape", [builder.last], start=2)]
    five = builder.node("Reshape", [builder.last, builder.node("Concat", grouped, axis=0)])
    swapped = builder.node("Transpose", [five], perm=[0, 2, 1, 3, 4])
    builder.last = builder.node("Reshape", [swapped, builder.node("Shape", [builder.last])])
    builder.add(CONV3)
    model = builder.finish("GlobalAveragePool")
    assert max(differences(session(model), session(ragged_model(model)), images_of(BATCH)).values()) <= 1e-5


def test_maps_of_different_cells_are_refused() -> None:
    model = build(CONV3)
    [head] = [node for node in model.graph.node if node.output[0] == "class_map"]
    head.attribute.append(helper.make_attribute("strides", [2, 2]))
    with pytest.raises(InvalidModel, match="'class_map' has other cells than 'feature_map'"):
        ragged_model(model)


def test_an_old_opset_is_refused() -> None:
    model = build(CONV3)
    model.opset_import[0].version = 13
    with pytest.raises(InvalidModel, match=r"opset 13; onnx\.version_converter"):
        ragged_model(model)
