"""Geometry read off a graph, against ONNX Runtime running it."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from fullframe.errors import InvalidInput, InvalidModel
from fullframe.model.geometry import graph_geometry

LARGEST = 40  # every size up to this one is run
Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """A convolution or pooling; pads are before height and width, then after them."""

    op: str
    kernel: Pair
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    ceil_mode: bool = False
    auto_pad: str = "NOTSET"


@dataclass(frozen=True)
class Branches:
    """Windows over one map, joined."""

    windows: tuple[Window, ...]
    join: str


Stage = Window | Branches | str  # a str: an elementwise operator


class Builder:
    """A contract-shaped graph: no bias and weights above 0, so a lit pixel lights all that see it."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        scale = self.constant("scale", np.full(3, 0.5, np.float32))
        floats = self.node("Cast", ["images"], to=TensorProto.FLOAT)
        self.last = self.node("Transpose", [self.node("Mul", [floats, scale])], perm=[0, 3, 1, 2])
        self.channels = 3

    def constant(self, name: str, value: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def node(self, op: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        output = output or f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], f"node_{output}", **attributes))
        return output

    def window(self, source: str, w: Window) -> str:
        attributes: dict[str, Any] = {"kernel_shape": w.kernel, "strides": w.stride}
        attributes |= {"auto_pad": w.auto_pad} if w.auto_pad != "NOTSET" else {"pads": w.pads}
        inputs = [source]
        if w.op == "Conv":
            shape = (self.channels, self.channels, *w.kernel)
            weights = np.random.default_rng(0).uniform(0.5, 1.5, shape) / np.prod(shape[1:])
            inputs.append(self.constant(f"w{len(self.weights)}", weights.astype(np.float32)))
        else:
            attributes["ceil_mode"] = int(w.ceil_mode)
        if w.op in ("Conv", "MaxPool"):
            attributes["dilations"] = w.dilation
        return self.node(w.op, inputs, **attributes)

    def add(self, stage: Stage) -> None:
        if isinstance(stage, Window):
            self.last = self.window(self.last, stage)
        elif isinstance(stage, Branches):
            outputs = [self.window(self.last, w) for w in stage.windows]
            if stage.join == "Concat":
                self.last = self.node("Concat", outputs, axis=-3)
                self.channels *= len(outputs)
            else:
                self.last = outputs[0]
                for output in outputs[1:]:
                    self.last = self.node(stage.join, [self.last, output])
        else:
            self.last = self.node(stage, [self.last])

    def model(self, outputs: Sequence[str] = ("feature_map",)) -> onnx.ModelProto:
        if "feature_map" not in {name for node in self.nodes for name in node.output}:
            self.node("Identity", [self.last], output="feature_map")
        images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", "H", "W", 3])
        found = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "test", [images], found, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def build(*stages: Stage) -> onnx.ModelProto:
    builder = Builder()
    for stage in stages:
        builder.add(stage)
    return builder.model()


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


@st.composite
def windows(draw: st.DrawFn) -> Window:
    op = draw(st.sampled_from(("Conv", "MaxPool", "AveragePool", "LpPool")))
    kernel = draw(st.tuples(*[st.integers(1, 5)] * 2))
    auto_pad = draw(st.sampled_from(("NOTSET", "NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")))
    if auto_pad.startswith("SAME"):
        return Window(op, kernel, auto_pad=auto_pad)
    stride = draw(st.tuples(*[st.integers(1, 3)] * 2))
    dilation = draw(st.tuples(*[st.integers(1, 3)] * 2)) if op in ("Conv", "MaxPool") else (1, 1)
    # The runtime takes no pooling whose padding could fill a window.
    pads = tuple(draw(st.integers(0, kernel[axis] - 1)) for axis in (0, 1, 0, 1))
    ceil_mode = op in ("MaxPool", "AveragePool") and auto_pad == "NOTSET" and draw(st.booleans())
    return Window(op, kernel, stride, dilation, pads, ceil_mode, auto_pad)  # type: ignore[arg-type]


@st.composite
def branches(draw: st.DrawFn) -> Branches:
    """Windows whose paddings keep their outputs equal at every size."""
    stride = draw(st.tuples(*[st.integers(1, 2)] * 2))
    found = []
    for _ in range(draw(st.integers(2, 3))):
        kernel = draw(st.tuples(*[st.integers(1, 5)] * 2))
        before = [draw(st.integers(0, k - 1)) for k in kernel]
        pads = (*before, kernel[0] - 1 - before[0], kernel[1] - 1 - before[1])
        found.append(Window(draw(st.sampled_from(("Conv", "MaxPool", "AveragePool"))), kernel, stride, pads=pads))
    return Branches(tuple(found), draw(st.sampled_from(("Concat", "Add", "Max"))))


stages = st.lists(windows() | branches() | st.sampled_from(("Relu", "LeakyRelu")), min_size=1, max_size=4)


def counted(window: Window, size: Pair) -> Pair:
    """The window's positions, one by one."""
    result = []
    for axis in (0, 1):
        extent = (window.kernel[axis] - 1) * window.dilation[axis] + 1
        before, after = window.pads[axis], window.pads[axis + 2]
        if window.auto_pad == "VALID":
            before = after = 0
        elif window.auto_pad != "NOTSET":
            before, after = extent - 1, 0
        padded, position, count = before + size[axis] + after, 0, 0
        while position + extent <= padded:
            position, count = position + window.stride[axis], count + 1
        covered = position - window.stride[axis] + extent
        count += window.ceil_mode and covered < padded and position < before + size[axis]
        result.append(count)
    return result[0], result[1]


def fits(path: Sequence[Stage], size: Pair) -> bool:
    """Whether every window has a place."""
    for stage in path:
        if isinstance(stage, str):
            continue
        for window in stage.windows if isinstance(stage, Branches) else (stage,):
            after = counted(window, size)
            if min(after) < 1:
                return False
        size = after
    return True


@settings(max_examples=60, deadline=None)
@example([Window("MaxPool", (2, 2), (2, 2), pads=(0, 0, 1, 1), ceil_mode=True)])  # a window in padding alone
@given(stages)
def test_sizes_are_the_runtimes(path: list[Stage]) -> None:
    model = build(*path)
    geometry, run = graph_geometry(model), session(model)
    height, width = geometry.smallest_size
    for size in range(LARGEST):
        image = np.zeros((1, max(height, size), max(width, LARGEST - size), 3), np.uint8)
        found = run.run(["feature_map"], {"images": image})[0].shape[2:]
        assert geometry.output_size(*image.shape[1:3]) == found, image.shape
    large = 10_000
    assert fits(path, (height, large))
    assert fits(path, (large, width))
    # Never run: a size that is too small can end the process inside the runtime.
    for small in ((height - 1, large), (large, width - 1)):
        assert min(small) == 0 or not fits(path, small)
        with pytest.raises(InvalidInput, match=f"needs at least {height} x {width}"):
            geometry.output_size(*small)


@settings(max_examples=60, deadline=None)
@given(stages)
def test_receptive_field_is_what_the_runtime_sees(path: list[Stage]) -> None:
    model = build(*path)
    geometry, run = graph_geometry(model), session(model)
    size = [
        max(least, field + 3 * stride)
        for least, field, stride in zip(geometry.smallest_size, geometry.receptive_field, geometry.stride, strict=True)
    ]
    assume(max(size) <= 96)
    for axis in (0, 1):
        pixels = size[axis]
        images = np.zeros((pixels, *size, 3), np.uint8)
        for pixel in range(pixels):  # one lit row or column in each image
            images[(pixel, pixel) if axis == 0 else (pixel, slice(None), pixel)] = 255
        # sees[pixel, cell]
        sees = (run.run(["feature_map"], {"images": images})[0] > 0).any(axis=(1, 3 - axis))
        interior = 0
        for cell in range(sees.shape[1]):
            start = geometry.start[axis] + cell * geometry.stride[axis]
            end = start + geometry.receptive_field[axis]
            seen = np.flatnonzero(sees[:, cell])
            assert ((start <= seen) & (seen < end)).all()
            if start >= 0 and end <= pixels:
                interior += 1
                assert (seen[0], seen[-1] + 1) == (start, end), (axis, cell)
        assert interior >= 2


@pytest.mark.parametrize(
    ("stage", "stride", "field", "start", "smallest"),
    [
        (Window("Conv", (3, 3), pads=(1, 1, 1, 1)), (1, 1), (3, 3), (-1, -1), (1, 1)),
        (Window("Conv", (3, 3), (2, 2)), (2, 2), (3, 3), (0, 0), (3, 3)),
        (Window("Conv", (3, 1), dilation=(2, 1)), (1, 1), (5, 1), (0, 0), (5, 1)),
        (Window("MaxPool", (3, 3), (2, 2), ceil_mode=True), (2, 2), (3, 3), (0, 0), (2, 2)),
    ],
)
def test_known_values(stage: Stage, stride: Pair, field: Pair, start: Pair, smallest: Pair) -> None:
    geometry = graph_geometry(build(stage))
    assert geometry.stride == stride
    assert geometry.receptive_field == field
    assert geometry.start == start
    assert geometry.smallest_size == smallest


class Residual(nn.Module):
    """What torch exports of the usual parts: strided convolution, batch norm, activations, Add, pools, heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.deep = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.BatchNorm2d(8),
            nn.GELU(),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2),
            nn.LeakyReLU(0.1),
        )
        self.down = nn.AvgPool2d(2, 2, ceil_mode=True)
        self.head = nn.Linear(16, 5)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = (images.permute(0, 3, 1, 2).float() - 120) / torch.tensor([60.0, 61, 62]).view(3, 1, 1)
        x = self.pool(self.stem(x))
        x = self.down(torch.cat((x + self.deep(x), x), 1))
        features = x.mean((2, 3))
        return features, self.head(features), x


def test_what_torch_exports() -> None:
    net = Residual().eval()
    names = ("N", "H", "W")
    program = torch.onnx.export(
        net,
        (torch.zeros(8, 61, 67, 3, dtype=torch.uint8),),
        dynamo=True,
        opset_version=18,
        input_names=["images"],
        output_names=["features", "logits", "feature_map"],
        # The pool without padding makes torch ask for a least size.
        dynamic_shapes={"images": {axis: torch.export.Dim(name, min=5) for axis, name in enumerate(names)}},
        verbose=False,
    )
    assert program is not None
    geometry = graph_geometry(program.model_proto)
    assert geometry.stride == (8, 8)
    # 7x7 stride 2; 3x3 pool stride 2; then a 3x3 and a dilated 3x3 at jump 4; a 2x2 pool at jump 4.
    assert geometry.receptive_field == (7 + 4 + 2 * 4 + 4 * 4 + 4,) * 2
    assert geometry.start == (-3 - 2 - 4 - 8,) * 2
    assert geometry.smallest_size == (1, 1)
    for height, width in ((1, 1), (1, 50), (7, 5), (31, 33), (64, 65)):
        with torch.no_grad():
            expected = net(torch.zeros(1, height, width, 3, dtype=torch.uint8))[2].shape[2:]
        assert geometry.output_size(height, width) == tuple(expected)
    stem, pooled = (32 * 33, 16 * 17)
    assert geometry.multiply_adds(63, 66) == stem * 8 * 3 * 49 + pooled * (8 * 9 + 8 * 8 * 9)


def test_heads_count_for_the_smallest_size_alone() -> None:
    builder = Builder()
    builder.add(Window("Conv", (3, 3), pads=(1, 1, 1, 1)))
    builder.node("Identity", [builder.last], output="feature_map")
    alone = graph_geometry(builder.model())
    pooled = builder.window("feature_map", Window("MaxPool", (5, 4)))
    convolved = builder.window(pooled, Window("Conv", (1, 1)))
    builder.node("ReduceMean", [convolved], output="logits")
    geometry = graph_geometry(builder.model())
    assert alone.smallest_size == (1, 1)
    assert geometry.smallest_size == (5, 4)
    assert geometry.output_size(9, 9) == (9, 9)
    assert geometry.receptive_field == alone.receptive_field
    assert geometry.multiply_adds(9, 9) == alone.multiply_adds(9, 9) == 9 * 9 * 3 * 3 * 9


def refused(*add: Callable[[Builder], str]) -> str:
    """The message for a graph that ends in what `add` makes."""
    builder = Builder()
    for step in add:
        builder.last = step(builder)
    with pytest.raises(InvalidModel) as error:
        graph_geometry(builder.model())
    return str(error.value)


def test_what_breaks_the_view_is_refused_by_name() -> None:
    def node(op: str, *constants: np.ndarray, **attributes: Any) -> Callable[[Builder], str]:
        def step(b: Builder) -> str:
            names = [b.constant(f"c{len(b.weights)}_{i}", value) for i, value in enumerate(constants)]
            return b.node(op, [b.last, *names], **attributes)

        return step

    cases = {
        "GlobalAveragePool": node("GlobalAveragePool"),
        "ReduceMean": node("ReduceMean", np.array([2, 3])),
        "Reshape": node("Reshape", np.array([0, 0, 7, 7])),
        "Flatten": node("Flatten"),
        "InstanceNormalization": node("InstanceNormalization", np.ones(3, "f"), np.zeros(3, "f")),
        "Resize": node("Resize", np.ones(0, "f"), np.array([1, 1, 2, 2], "f")),
        "Shape": node("Shape"),
        "Add": node("Add", np.zeros((1, 3, 7, 7), "f")),
        "Mul": node("Mul", np.zeros(5, "f")),
        "Softmax": node("Softmax", axis=3),
        "Whatever": node("Whatever"),
        "Relu": node("Relu", domain="com.example"),
        "Concat": lambda b: b.node("Concat", [b.last, b.last], axis=-2),
        "MaxPool": lambda b: b.window(b.node("Transpose", [b.last], perm=[0, 2, 3, 1]), Window("MaxPool", (3, 3))),
    }
    for op, step in cases.items():
        message = refused(step)
        assert f"{op} 'node_{op.lower()}_" in message, message
        assert "cannot stand between 'images' and 'feature_map'" in message


def test_a_value_of_the_whole_image_is_refused_where_it_is_made() -> None:
    """Squeeze and excite."""
    message = refused(lambda b: b.node("Mul", [b.last, b.node("GlobalAveragePool", [b.last])]))
    assert message.startswith("GlobalAveragePool 'node_")


def test_padding_that_depends_on_the_size_is_refused() -> None:
    message = refused(lambda b: b.window(b.last, Window("Conv", (3, 3), (2, 2), auto_pad="SAME_UPPER")))
    assert message.startswith("Conv 'node_conv_")
    assert "write the pads out" in message


def test_branches_must_agree() -> None:
    """Inception v2's reduction: equal on even sizes, not on odd ones."""

    def join(*windows: Window) -> Callable[[Builder], str]:
        return lambda b: b.node("Concat", [b.window(b.last, w) for w in windows], axis=1)

    conv = Window("Conv", (3, 3), (2, 2), pads=(1, 1, 1, 1))
    message = refused(join(conv, Window("MaxPool", (3, 3), (2, 2), pads=(0, 0, 1, 1))))
    assert message.startswith("Concat 'node_concat_")
    assert "different sizes: 0 and 1 cells from 1 pixels" in message or "cells from 3 pixels" in message
    message = refused(join(conv, Window("Conv", (1, 1))))
    assert "joins branches of strides 1 and 2" in message
    # Padded as the reference says, they agree.
    graph_geometry(build(Branches((conv, Window("MaxPool", (3, 3), (2, 2), pads=(0, 0, 2, 2))), "Concat")))


def test_what_is_no_model_of_ours_is_refused() -> None:
    assert "no output 'feature_map'" in refused(lambda b: b.node("Transpose", [b.last], perm=[0, 2, 3, 1]))
    assert "no output 'feature_map'" in refused(lambda b: b.constant("fixed", np.zeros((1, 3, 2, 2), "f")))
    builder = Builder()
    builder.node("Relu", [builder.last], output="elsewhere")
    model = builder.model(["elsewhere"])
    del model.graph.node[-1]
    with pytest.raises(InvalidModel, match="no output 'feature_map'"):
        graph_geometry(model)
    for window in (Window("Conv", (1, 1), (5000, 1)), Window("MaxPool", (1, 5000))):
        assert "more than 4096 pixels" in refused(lambda b, w=window: b.window(b.last, w))  # type: ignore[misc]


def test_serving_needs_no_onnx() -> None:
    code = "import sys, fullframe.model.geometry; sys.exit('onnx' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
