"""A graph for images that come in strips: its windows and joins keep the rows that the next strip needs.

What a window has not used up of a strip, and what one branch of a join has more than the other, goes out as `rest.N`
and comes in with the next strip as `carry.N`, so that nothing is computed twice. The cells are those of the whole
image: windows see padding at the image's border alone.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fullframe.errors import InvalidModel
from fullframe.model.contract import INPUT, MAPS, Tiles
from fullframe.model.geometry import OUTPUT, Geometry, GraphGeometry, Obstacle, TensorGeometry, graph_geometry
from fullframe.model.graphs import WINDOWS, ancestors, title
from fullframe.model.memory import bytes_of

Place = Literal["first", "middle", "last"]
_PLACES: Final[tuple[Place, ...]] = ("first", "middle", "last")

_END: Final = 2**62


@dataclass(frozen=True)
class StripGraphs:
    """One graph for the first strip of an image, one for those in the middle, one for the last.

    Each takes `images`, uint8 [1, rows, W, 3], and gives `feature_map` and, where the model has one, `class_map`:
    the next rows of each. The first and the middle one also give every `rest`, which the middle and the last one take
    as `carry` of the same number.

    Attributes:
        geometry: of the whole graph.
        graphs: serialized, by place.
        carries: how many tensors are carried.
        step: rows of the first and of every middle strip are multiples of it.
        least: fewest rows of the first strip. Later ones have at least `step`.
    """

    geometry: Geometry
    graphs: dict[Place, bytes]
    carries: int
    step: int
    least: int


def strip_graphs(path: Path) -> StripGraphs:
    """Cut a contract model's graph; raises InvalidModel naming the node that can't be."""
    geometry, tiles, cutters = _cut(onnx.load(path), _PLACES)
    if not tiles.possible:
        raise InvalidModel(tiles.obstacles[0])
    step = tiles.alignment[0]
    return StripGraphs(
        geometry,
        {place: cutter.model().SerializeToString() for place, cutter in cutters.items()},
        cutters["first"].carries,
        step,
        -(-cutters["first"].least // step) * step,
    )


def carried_bytes(path: Path) -> float:
    """What strips of an image carry to the next ones, for each pixel of its width; 0 for a model that can't be cut."""
    try:
        _, _, cutters = _cut(onnx.load(path), ["first"])
    except InvalidModel:
        return 0.0
    return float(cutters["first"].carried) if cutters else 0.0


def tiles_of(model: onnx.ModelProto) -> Tiles:
    """What a model's file says of tiles: that strip_graphs cuts it, or why not. Raises as graph_geometry."""
    return _cut(model, ["first"])[1]


def _cut(model: onnx.ModelProto, places: Sequence[Place]) -> "tuple[Geometry, Tiles, dict[Place, _Cutter]]":
    """Of several obstacles of one kind the first, and how many there are; no graphs where there is any."""
    geometry = graph_geometry(model)
    kinds: dict[str, list[Obstacle]] = {}
    for obstacle in geometry.obstacles:
        kinds.setdefault(obstacle.kind, []).append(obstacle)
    reasons = [str(first) + (f" (and {len(rest)} more such)" if rest else "") for first, *rest in kinds.values()]
    cutters: dict[Place, _Cutter] = {}
    if not reasons:
        outputs = [name for name in MAPS if name in geometry.graph.outputs]
        typed = onnx.shape_inference.infer_shapes(model)
        try:
            cutters = {place: _Cutter(typed, geometry.graph, outputs, place) for place in places}
        except InvalidModel as error:
            reasons = [str(error)]
    return geometry, Tiles(geometry.graph.alignment(OUTPUT), tuple(reasons)), cutters


class _Cutter:
    """One pass over a graph, in its topological order, for one place; raises InvalidModel at a node that can't be cut.

    Attributes:
        lags: how many rows each map is behind the image's rows that have come, counted in its own.
        least: rows of an image that let every window so far begin below the padding on top.
        carries: tensors carried so far.
        carried: their bytes for a pixel of the image's width.
    """

    def __init__(self, model: onnx.ModelProto, geometry: GraphGeometry, outputs: Sequence[str], place: Place) -> None:
        self._source, self._maps, self._outputs, self._place = model, geometry.tensors, outputs, place
        self._types = {each.name: each.type.tensor_type.elem_type for each in model.graph.value_info}
        self._weights = {each.name: tuple(each.dims) for each in model.graph.initializer}
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._rests: list[onnx.ValueInfoProto] = []
        self._numbers: dict[str, int] = {}
        self._dequantized: dict[str, onnx.NodeProto] = {}
        self.lags = {INPUT: 0}
        self.carries, self.least, self.carried = 0, 1, Fraction(0)
        needed = ancestors(model.graph, outputs)
        for node in model.graph.node:
            if not needed.isdisjoint(node.output):
                self._visit(deepcopy(node))

    def model(self) -> onnx.ModelProto:
        """The graph that was cut."""
        used = {name for node in self._nodes for name in node.input}
        weights = [each for each in self._source.graph.initializer if each.name in used]
        numbers = [numpy_helper.from_array(np.array([value]), name) for name, value in self._numbers.items()]
        graph = helper.make_graph(
            self._nodes,
            f"{self._place} strip",
            [each for each in self._source.graph.input if each.name == INPUT] + self._inputs,
            [each for each in self._source.graph.output if each.name in self._outputs] + self._rests,
            weights + numbers,
            # A slice hides channels from ONNX Runtime, which would choose another kernel there than in the next strip.
            value_info=[self._value(name, name) for name in self.lags if name in self._types],
        )
        return helper.make_model(graph, opset_imports=self._source.opset_import, ir_version=self._source.ir_version)

    def _visit(self, node: onnx.NodeProto) -> None:
        maps = [name for name in dict.fromkeys(node.input) if name in self.lags]
        if not maps:
            self._nodes.append(node)
            return
        rows = {self._maps[name].numbers[0] for name in maps}
        made = [self._maps.get(name) for name in node.output if name]
        if node.op_type in WINDOWS and made[0] is not None and made[0].numbers[0] not in rows:
            lag = self._window(node, maps[0])
        elif len(maps) > 1:
            lag = self._join(node, maps)
        elif all(each is not None and each.numbers[0] in rows for each in made):
            lag = self.lags[maps[0]]
            self._nodes.append(node)
        else:
            raise InvalidModel(f"{title(node)} changes the rows of its map")
        if node.op_type == "DequantizeLinear":
            self._dequantized[node.output[0]] = node
        self.lags |= dict.fromkeys(node.output, lag)

    def _window(self, node: onnx.NodeProto, source: str) -> int:
        """A window sees its padding at the image's border only; returns the lag of what it makes."""
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        kernel = attributes.get("kernel_shape") or self._weights[node.input[1]][2:]
        stride, dilation = (attributes.get(name, [1, 1])[0] for name in ("strides", "dilations"))
        if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            raise InvalidModel(f"{title(node)} has auto_pad; write its padding out")
        pads = list(attributes.get("pads", [0, 0, 0, 0]))
        extent = (kernel[0] - 1) * dilation + 1
        # A window shorter than its stride waits for all the rows that it steps over.
        reach = max(extent, stride)
        lag: int = -((pads[0] - self.lags[source] - reach) // stride) - 1
        jump = int(self._maps[node.output[0]].jump[0])
        self.least = max(self.least, jump * (lag + max(1, -(-pads[0] // stride))))
        self._count(self._stored(source), pads[0] - self.lags[source] + stride * lag)
        before = pads[0] if self._place == "first" else 0
        behind = pads[2] if self._place == "last" else 0
        _set(node, "pads", [before, pads[1], behind, pads[3]])
        stored = self._stored(source)
        axis = _row_axis(self._maps[stored])
        rows = self._with_carry(stored, axis)
        if self._place != "last":
            used = self._used(rows, axis, before, reach, stride)
            self._rest(rows, stored, axis, used)
            if extent < stride or attributes.get("ceil_mode"):  # no row that would begin one more window
                seen = self._add("Add", [used, self._number(extent - stride)])
                rows = self._add("Slice", [rows, self._number(0), seen, self._number(axis)])
        node.input[0] = self._restored(rows, source)
        self._nodes.append(node)
        return lag

    def _count(self, carried: str, rows: int) -> None:
        """Hear of so many rows of a map that are carried."""
        tensor = self._maps[carried]
        self.carried += rows * bytes_of(tensor, self._types[carried]) * Fraction(tensor.jump[0])

    def _used(self, rows: str, axis: int, before: int, reach: int, stride: int) -> str:
        """How many of the rows no later window sees: those that as many windows as fit step over."""
        windows = self._add("Shape", [rows], start=axis, end=axis + 1)
        if slack := reach - before - stride:
            windows = self._add("Sub", [windows, self._number(slack)])
        windows = self._add("Div", [windows, self._number(stride)])
        used = self._add("Mul", [windows, self._number(stride)])
        return self._add("Sub", [used, self._number(before)]) if before else used

    def _join(self, node: onnx.NodeProto, maps: Sequence[str]) -> int:
        """Branches wait for the slowest one; returns its lag."""
        lag = max(self.lags[name] for name in maps)
        slowest = next(name for name in maps if self.lags[name] == lag)
        behind = [name for name in maps if self.lags[name] < lag]
        if behind and self._place != "last":
            axis = _row_axis(self._maps[slowest])
            there = self._add("Shape", [slowest], start=axis, end=axis + 1)
        for name in behind:
            stored = self._stored(name)
            self._count(stored, lag - self.lags[name])
            axis = _row_axis(self._maps[stored])
            rows = self._with_carry(stored, axis)
            if self._place != "last":
                self._rest(rows, stored, axis, there)
                rows = self._add("Slice", [rows, self._number(0), there, self._number(axis)])
            restored = self._restored(rows, name)
            for position, given in enumerate(node.input):
                if given == name:
                    node.input[position] = restored
        self._nodes.append(node)
        return lag

    def _stored(self, name: str) -> str:
        """The quantised map behind a map, if there is one: integers are what is carried and cut, so that the operator
        that takes them stays next to its DequantizeLinear."""
        made_by = self._dequantized.get(name)
        return name if made_by is None else str(made_by.input[0])

    def _restored(self, rows: str, name: str) -> str:
        """Rows of `_stored(name)` as rows of the map itself."""
        made_by = self._dequantized.get(name)
        if made_by is None:
            return rows
        if rows == made_by.input[0]:
            return name
        again = deepcopy(made_by)
        again.input[0], again.output[0], again.name = rows, f"{rows}.floats", ""
        self._nodes.append(again)
        return str(again.output[0])

    def _with_carry(self, source: str, axis: int) -> str:
        """A map's new rows behind those carried from the strip before."""
        number = self.carries
        self.carries += 1
        if self._place == "first":
            return source
        carry = f"carry.{number}"
        self._inputs.append(self._value(carry, source))
        return self._add("Concat", [carry, source], axis=axis)

    def _rest(self, rows: str, source: str, axis: int, used: str) -> None:
        """Rows from the first that is not used on, for the next strip."""
        name = f"rest.{self.carries - 1}"
        self._add("Slice", [rows, used, self._number(_END), self._number(axis)], output=name)
        self._rests.append(self._value(name, source))

    def _value(self, name: str, like: str) -> onnx.ValueInfoProto:
        shape = [each if isinstance(each, int) else None for each in self._maps[like].shape]
        return helper.make_tensor_value_info(name, self._types[like], shape)

    def _number(self, value: int) -> str:
        """An int64 [1] constant."""
        name = f"number.{value}"
        self._numbers[name] = value
        return name

    def _add(self, op: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        output = output or f"cut.{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output


def _row_axis(tensor: TensorGeometry) -> int:
    return tensor.shape.index("h")


def _set(node: onnx.NodeProto, name: str, value: int | list[int]) -> None:
    """Replace an attribute."""
    kept = [each for each in node.attribute if each.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])
