"""Small ONNX graphs: built by hand or drawn by hypothesis, run by ONNX Runtime, seen into by lit pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Pair = tuple[int, int]
Maps = dict[str, NDArray[Any]]


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


@dataclass(frozen=True)
class Resize:
    """Enlargement by whole factors of height and width."""

    factors: Pair
    mode: str = "nearest"
    place: str = "half_pixel"
    nearest: str = "round_prefer_floor"


@dataclass(frozen=True)
class Cut:
    """Pad with zeros, in Pad's order; or where `step` is above 0 take every step-th row and column from `pads` on."""

    pads: tuple[int, int, int, int]
    step: int = 0


Stage = Window | Branches | Resize | Cut | str  # a str: an elementwise operator


class Builder:
    """A contract-shaped graph: no bias and weights above 0, so a lit pixel lights all that see it."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        scale = self.constant("scale", np.full(3, 0.5, np.float32))
        floats = self.node("Cast", ["images"], to=TensorProto.FLOAT)
        self.last = self.node("Transpose", [self.node("Mul", [floats, scale])], perm=[0, 3, 1, 2])
        self.channels = 3

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(f"ints{len(self.weights)}", np.array(values, np.int64))

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

    def resize(self, source: str, r: Resize) -> str:
        scales = self.constant(f"scales{len(self.weights)}", np.array([1, 1, *r.factors], np.float32))
        modes = {"mode": r.mode, "coordinate_transformation_mode": r.place, "nearest_mode": r.nearest}
        return self.node("Resize", [source, "", scales], **modes)

    def cut(self, source: str, c: Cut) -> str:
        if not c.step:
            top, left, bottom, right = c.pads
            return self.node("Pad", [source, self.ints(0, 0, top, left, 0, 0, bottom, right)])
        ends = [-after if after else 2**40 for after in c.pads[2:]]
        bounds = [self.ints(*c.pads[:2]), self.ints(*ends), self.ints(2, 3), self.ints(c.step, c.step)]
        return self.node("Slice", [source, *bounds])

    def add(self, stage: Stage) -> None:
        match stage:
            case Window():
                self.last = self.window(self.last, stage)
            case Resize():
                self.last = self.resize(self.last, stage)
            case Cut():
                self.last = self.cut(self.last, stage)
            case Branches():
                outputs = [self.window(self.last, w) for w in stage.windows]
                if stage.join == "Concat":
                    self.last = self.node("Concat", outputs, axis=-3)
                    self.channels *= len(outputs)
                else:
                    self.last = outputs[0]
                    for output in outputs[1:]:
                        self.last = self.node(stage.join, [self.last, output])
            case str():
                self.last = self.node(stage, [self.last])

    def model(self, outputs: Sequence[str] = ("feature_map",)) -> onnx.ModelProto:
        if "feature_map" not in self.made():
            self.node("Identity", [self.last], output="feature_map")
        images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", "H", "W", 3])
        found = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "test", [images], found, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)

    def made(self) -> list[str]:
        """Everything that is computed."""
        return [name for node in self.nodes for name in node.output]


def build(*stages: Stage, everything: bool = False) -> onnx.ModelProto:
    """A graph of these stages; with `everything` each tensor is an output."""
    builder = Builder()
    for stage in stages:
        builder.add(stage)
    builder.node("Identity", [builder.last], output="feature_map")
    return builder.model(builder.made() if everything else ("feature_map",))


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # It hands a pool more padding than the pool takes.
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"], disabled_optimizers=["Pad_Fusion"]
    )


def run(opened: onnxruntime.InferenceSession, images: NDArray[np.uint8]) -> Maps:
    """Every output for uint8 [N, H, W, 3]."""
    names = [output.name for output in opened.get_outputs()]
    return dict(zip(names, opened.run(names, {"images": images}), strict=True))


def seen(opened: onnxruntime.InferenceSession, size: Pair, axis: int) -> Maps:
    """For each output [.., height, width] a bool [pixels, cells]: which rows or columns light which."""
    pixels = size[axis]
    images = np.zeros((pixels, *size, 3), np.uint8)
    for pixel in range(pixels):  # one lit row or column in each image
        images[(pixel, pixel) if axis == 0 else (pixel, slice(None), pixel)] = 255
    return {name: np.any(found > 0, axis=(1, 3 - axis)) for name, found in run(opened, images).items()}


@st.composite
def windows(draw: st.DrawFn) -> Window:
    """Strides above the kernel, dilation, uneven padding, ceil_mode and auto_pad among them."""
    op = draw(st.sampled_from(("Conv", "MaxPool", "AveragePool", "LpPool")))
    kernel = draw(st.tuples(*[st.integers(1, 5)] * 2))
    auto_pad = draw(st.sampled_from(("NOTSET", "NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")))
    stride = draw(st.tuples(*[st.integers(1, 3)] * 2))
    if auto_pad.startswith("SAME"):
        if op != "Conv":  # the runtime pads pools by less than nothing where windows leave gaps
            stride = min(stride[0], kernel[0]), min(stride[1], kernel[1])
        return Window(op, kernel, stride, auto_pad=auto_pad)
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


resizes = st.one_of(
    st.builds(
        Resize,
        st.tuples(*[st.integers(1, 3)] * 2),
        st.just("nearest"),
        st.sampled_from(("half_pixel", "asymmetric")),
        st.sampled_from(("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")),
    ),
    st.builds(
        Resize, st.tuples(*[st.integers(1, 3)] * 2), st.just("linear"), st.sampled_from(("half_pixel", "asymmetric"))
    ),
)
cuts = st.builds(Cut, st.tuples(*[st.integers(0, 2)] * 4), st.integers(0, 2))
chains = st.lists(windows() | branches() | st.sampled_from(("Relu", "LeakyRelu")), min_size=1, max_size=4)
stages = st.lists(windows() | branches() | resizes | cuts, min_size=1, max_size=4)
