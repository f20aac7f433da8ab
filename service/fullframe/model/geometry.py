"""What each cell of a model's feature map sees of the image, and the map's size, read off the ONNX graph.

Along each axis a tensor's cell c sees pixels start + c * jump to end + c * jump, following Araujo, Norris and
Sim, "Computing receptive fields of convolutional neural networks", Distill, 2019.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from fullframe.errors import InvalidInput, InvalidModel
from fullframe.model.contract import INPUT

if TYPE_CHECKING:  # serving has no onnx package
    import onnx

OUTPUT: Final = "feature_map"
LARGEST: Final = 4096
"""A model that needs larger images than this, or has a larger stride, is taken for a mistake."""

_NHWC: Final = (1, 2)  # where height and width are
_NCHW: Final = (2, 3)
_WINDOWS: Final = frozenset({"Conv", "MaxPool", "AveragePool", "LpPool"})
_BROADCASTING: Final = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "PRelu", "Where"})
_POINTWISE: Final = (
    frozenset({"Cast", "DequantizeLinear", "Dropout", "Identity", "QuantizeLinear"})
    | {"Abs", "Ceil", "Erf", "Exp", "Floor", "Log", "Neg", "Reciprocal", "Round", "Sqrt"}
    | {"Celu", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Relu", "Selu"}
    | {"Sigmoid", "Softplus", "Softsign", "Tanh", "ThresholdedRelu"}
)
_CHANNELWISE: Final = frozenset({"BatchNormalization", "LRN"})  # pointwise where axis 1 is the channels


class _Window(NamedTuple):
    """A convolution or pooling along one axis; `extent` is the dilated kernel's, (k - 1) * dilation + 1."""

    source: int
    extent: int
    stride: int
    before: int
    after: int
    ceil_mode: bool

    def output(self, size: int) -> int:
        """floor((size + padding - extent) / stride) + 1; below 1 where the window does not fit.

        With ceil_mode the division rounds up, less the window that would start in the end padding, as in
        torch.nn.MaxPool2d and ONNX Runtime.
        """
        slack = size + self.before + self.after - self.extent
        if not self.ceil_mode:
            return slack // self.stride + 1
        count = -(-slack // self.stride) + 1
        return count - ((count - 1) * self.stride >= size + self.before)


class _Join(NamedTuple):
    """Tensors that meet cell by cell."""

    sources: tuple[int, ...]


class _Reach(NamedTuple):
    """The pixels that cell 0 sees, end excluded, and how far on cell 1 is."""

    jump: int
    start: int
    end: int


class _Axis:
    """The tensors of a graph along one axis, as a program on sizes: tensor 0 is the image."""

    def __init__(self) -> None:
        self._steps: list[_Window | _Join] = []
        self._nodes: list[str] = []
        self._numbers: dict[_Window | _Join, int] = {}
        self.reaches = [_Reach(1, 0, 1)]

    def window(self, window: _Window, node: str) -> int:
        """The number of the window's output."""
        if window[1:] == (1, 1, 0, 0, False):
            return window.source
        jump, start, end = self.reaches[window.source]
        start -= window.before * jump
        reach = _Reach(jump * window.stride, start, end - window.before * jump + (window.extent - 1) * jump)
        return self._add(window, reach, node)

    def join(self, sources: Iterable[int], node: str) -> int:
        """The number of the tensor that sees what all of the sources see; raises InvalidModel."""
        numbers = tuple(sorted(set(sources)))
        if len(numbers) == 1:
            return numbers[0]
        jumps, starts, ends = zip(*(self.reaches[number] for number in numbers), strict=True)
        if len(set(jumps)) > 1:
            raise InvalidModel(f"{node} joins branches of strides {' and '.join(map(str, sorted(set(jumps))))}")
        return self._add(_Join(numbers), _Reach(jumps[0], min(starts), max(ends)), node)

    def _add(self, step: _Window | _Join, reach: _Reach, node: str) -> int:
        if step not in self._numbers:
            self._numbers[step] = len(self.reaches)
            self._steps.append(step)
            self._nodes.append(node)
            self.reaches.append(reach)
        return self._numbers[step]

    def sizes(self, pixels: int) -> list[int]:
        """Every tensor's size; below 1 from where the image is too small. A join has its first source's."""
        sizes = [pixels]
        for step in self._steps:
            sizes.append(step.output(sizes[step.source]) if isinstance(step, _Window) else sizes[step.sources[0]])
        return sizes

    def smallest(self) -> int:
        """The least size from which on every tensor has a cell and joined tensors agree.

        Raises:
            InvalidModel: there is none up to LARGEST.
        """
        # A larger image never makes a tensor smaller, so bisection finds the least that fits.
        smallest = 1 + bisect_left(range(1, LARGEST + 1), True, key=lambda n: min(self.sizes(n)) >= 1)
        period = math.lcm(*(reach.jump for reach in self.reaches))
        if max(smallest, period) > LARGEST:
            raise InvalidModel(f"the graph's smallest size or stride is more than {LARGEST} pixels")
        # With one period more of pixels each tensor grows by period / jump, so one period stands for all.
        for pixels in range(smallest, smallest + period):
            self._check_joins(pixels)
        return smallest

    def _check_joins(self, pixels: int) -> None:
        sizes = self.sizes(pixels)
        for step, node in zip(self._steps, self._nodes, strict=True):
            met = sorted({sizes[source] for source in step.sources}) if isinstance(step, _Join) else []
            if len(met) > 1:
                raise InvalidModel(
                    f"{node} joins branches of different sizes: {' and '.join(map(str, met))} cells from "
                    f"{pixels} pixels; their paddings must make them equal at every size"
                )


class _Tensor(NamedTuple):
    """A tensor [4 axes] with an image's height and width: where they are, and its number on each axis."""

    axes: tuple[int, int]
    height: int
    width: int


@dataclass(frozen=True)
class Geometry:
    """Sizes and receptive fields of a graph's feature map; pairs are (height, width).

    Attributes:
        stride: pixels between neighbouring cells.
        receptive_field: pixels that one cell sees.
        start: the first pixel that cell 0 sees; negative where it sees padding.
        smallest_size: the smallest image. Every larger one works.
    """

    stride: tuple[int, int]
    receptive_field: tuple[int, int]
    start: tuple[int, int]
    smallest_size: tuple[int, int]
    _axes: tuple[_Axis, _Axis] = field(repr=False, compare=False)
    _output: tuple[int, int] = field(repr=False, compare=False)
    _convolutions: tuple[tuple[_Tensor, int], ...] = field(repr=False, compare=False)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """The feature map's size for an image's; raises InvalidInput where the image is too small."""
        heights, widths = self._sizes(height, width)
        return heights[self._output[0]], widths[self._output[1]]

    def multiply_adds(self, height: int, width: int) -> int:
        """Of the convolutions between the image and the feature map; raises InvalidInput as output_size."""
        heights, widths = self._sizes(height, width)
        return sum(heights[out.height] * widths[out.width] * weights for out, weights in self._convolutions)

    def _sizes(self, height: int, width: int) -> tuple[list[int], list[int]]:
        if height < self.smallest_size[0] or width < self.smallest_size[1]:
            least = "{} x {}".format(*self.smallest_size)
            raise InvalidInput(
                f"the image is {height} x {width} pixels (height x width); this model needs at least {least}",
                field="images",
            )
        return self._axes[0].sizes(height), self._axes[1].sizes(width)


def graph_geometry(model: onnx.ModelProto) -> Geometry:
    """The geometry of a graph from `images`, uint8 [N, H, W, 3], to `feature_map`, float32 [N, C, h, w].

    Convolutions and poolings reach the other outputs too; those count for the smallest size.

    Raises:
        InvalidModel: a node on the way is not known to keep a cell's view bounded and the same everywhere, or
            branches that meet differ in stride or size; the message names the node.
    """
    return _Walk(model.graph).geometry()


class _Walk:
    """One pass over a graph, in its topological order."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._axes = (_Axis(), _Axis())
        self._tensors = {INPUT: _Tensor(_NHWC, 0, 0)}
        self._constants: dict[str, tuple[int, ...] | None] = {t.name: tuple(t.dims) for t in graph.initializer}
        self._convolutions: list[tuple[_Tensor, int]] = []

    def geometry(self) -> Geometry:
        """Walk, then sum up what arrived at the output."""
        path = _ancestors(self._graph, OUTPUT)
        for node in self._graph.node:
            if path.isdisjoint(node.output):
                with suppress(InvalidModel):  # a head: followed as long as it stays a map
                    self._visit(node, on_path=False)
            else:
                self._visit(node, on_path=True)
        output = self._tensors.get(OUTPUT)
        if output is None or output.axes != _NCHW:
            raise InvalidModel(f"the graph has no output {OUTPUT!r} [N, C, h, w] computed from {INPUT!r}")
        height, width = (
            axis.reaches[number] for axis, number in zip(self._axes, (output.height, output.width), strict=True)
        )
        return Geometry(
            stride=(height.jump, width.jump),
            receptive_field=(height.end - height.start, width.end - width.start),
            start=(height.start, width.start),
            smallest_size=(self._axes[0].smallest(), self._axes[1].smallest()),
            _axes=self._axes,
            _output=(output.height, output.width),
            _convolutions=tuple(self._convolutions),
        )

    def _visit(self, node: onnx.NodeProto, on_path: bool) -> None:
        inputs = [name for name in node.input if name]
        if all(name in self._constants for name in inputs):
            self._constants.update(dict.fromkeys(node.output, self._constant_shape(node, inputs)))
            return
        maps = [self._tensors[name] for name in inputs if name in self._tensors]
        constants = [self._constants[name] for name in inputs if name in self._constants]
        if len(maps) + len(constants) < len(inputs):
            raise _unsupported(node)
        output = self._output(node, maps, constants)
        self._tensors[node.output[0]] = output
        if on_path and node.op_type == "Conv":
            self._convolutions.append((output, math.prod(self._weights(node))))

    def _output(
        self, node: onnx.NodeProto, maps: list[_Tensor], constants: Sequence[tuple[int, ...] | None]
    ) -> _Tensor:
        """The first output's tensor; raises InvalidModel where it is none of a known kind."""
        op, first = node.op_type if node.domain in ("", "ai.onnx") else "", maps[0]
        data_first = node.input[0] in self._tensors and len(maps) == 1
        if op in _POINTWISE and data_first:
            return first
        if op in _CHANNELWISE and data_first and first.axes == _NCHW:
            return first
        if op in _WINDOWS and data_first and first.axes == _NCHW:
            return self._window(node, first)
        if op == "Transpose":
            perm = _ints(node, "perm", [3, 2, 1, 0])
            return first._replace(axes=(perm.index(first.axes[0]), perm.index(first.axes[1])))
        if op == "Concat" and not constants and _attributes(node)["axis"].i % 4 not in first.axes:
            return self._join(node, maps)
        if op in _BROADCASTING and all(_same_everywhere(shape, first.axes) for shape in constants):
            return self._join(node, maps)
        raise _unsupported(node)

    def _join(self, node: onnx.NodeProto, maps: list[_Tensor]) -> _Tensor:
        if len({tensor.axes for tensor in maps}) > 1:
            raise _unsupported(node)
        height, width = self._axes
        name = _name(node)
        return maps[0]._replace(
            height=height.join((tensor.height for tensor in maps), name),
            width=width.join((tensor.width for tensor in maps), name),
        )

    def _window(self, node: onnx.NodeProto, source: _Tensor) -> _Tensor:
        kernel = _ints(node, "kernel_shape", [])
        if not kernel and node.op_type == "Conv":
            kernel = list(self._weights(node)[2:])
        strides, dilations = _ints(node, "strides", [1, 1]), _ints(node, "dilations", [1, 1])
        if not len(kernel) == len(strides) == len(dilations) == 2 or min(kernel + strides + dilations) < 1:
            raise InvalidModel(f"{_name(node)} has no two-dimensional kernel, strides and dilations")
        extents = [(k - 1) * dilation + 1 for k, dilation in zip(kernel, dilations, strict=True)]
        pads = _pads(node, extents, strides, dilations)
        attributes = _attributes(node)
        ceil_mode = "ceil_mode" in attributes and bool(attributes["ceil_mode"].i)
        numbers = [
            axis.window(_Window(number, extents[i], strides[i], pads[i], pads[i + 2], ceil_mode), _name(node))
            for i, (axis, number) in enumerate(zip(self._axes, (source.height, source.width), strict=True))
        ]
        return _Tensor(_NCHW, numbers[0], numbers[1])

    def _weights(self, node: onnx.NodeProto) -> tuple[int, ...]:
        shape = self._constants.get(node.input[1])
        if shape is None:
            raise InvalidModel(f"{_name(node)} has weights of unknown shape; they must be constant")
        return shape

    def _constant_shape(self, node: onnx.NodeProto, inputs: list[str]) -> tuple[int, ...] | None:
        """None: not known."""
        if node.op_type in _POINTWISE:
            return self._constants[inputs[0]]
        if node.op_type != "Constant":
            return None
        value = node.attribute[0]
        if value.name == "value":
            return tuple(value.t.dims)
        return () if value.name in ("value_float", "value_int") else None


def _pads(node: onnx.NodeProto, extents: list[int], strides: list[int], dilations: list[int]) -> list[int]:
    """Padding before height and width, then after them."""
    attributes = _attributes(node)
    auto_pad = attributes["auto_pad"].s.decode() if "auto_pad" in attributes else "NOTSET"
    if auto_pad == "VALID":
        return [0, 0, 0, 0]
    if auto_pad == "NOTSET":
        pads = _ints(node, "pads", [0, 0, 0, 0])
        if len(pads) != 4 or min(pads) < 0:
            raise InvalidModel(f"{_name(node)} has pads {pads}; they must be four, none below 0")
        return pads
    if max(strides + dilations) > 1:
        raise InvalidModel(
            f"{_name(node)} has auto_pad {auto_pad} with a stride or dilation, so its padding depends on the "
            "image's size; write the pads out"
        )
    less, more = [(extent - 1) // 2 for extent in extents], [extent // 2 for extent in extents]
    return less + more if auto_pad == "SAME_UPPER" else more + less


def _ancestors(graph: onnx.GraphProto, name: str) -> set[str]:
    """The tensor and all those it is computed from."""
    found = {name}
    for node in reversed(graph.node):
        if not found.isdisjoint(node.output):
            found.update(filter(None, node.input))  # "" is an input left out
    return found


def _same_everywhere(shape: tuple[int, ...] | None, axes: tuple[int, int]) -> bool:
    """Whether a constant, broadcast against four axes, has one value along height and width."""
    if shape is None or len(shape) > 4:
        return False
    padded = (1,) * (4 - len(shape)) + shape
    return all(padded[axis] == 1 for axis in axes)


def _attributes(node: onnx.NodeProto) -> dict[str, onnx.AttributeProto]:
    return {attribute.name: attribute for attribute in node.attribute}


def _ints(node: onnx.NodeProto, name: str, default: list[int]) -> list[int]:
    attributes = _attributes(node)
    return list(attributes[name].ints) if name in attributes else default


def _name(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name or node.output[0]!r}"


def _unsupported(node: onnx.NodeProto) -> InvalidModel:
    return InvalidModel(
        f"{_name(node)} cannot stand between {INPUT!r} and {OUTPUT!r} as it is used: only convolution, pooling "
        "windows, elementwise operators, constants without height and width, and joins along channels can"
    )
