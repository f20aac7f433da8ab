"""Operator by operator: what a graph's nodes become in a batch of different sizes, or why they can't be there."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Final, TypeAlias

import onnx
from onnx import helper

from fullframe.errors import InvalidModel
from fullframe.model.contract import MAP_SIZES, MAPS, OUTPUTS, SIZES
from fullframe.model.geometry import OUTPUT, GraphGeometry, graph_geometry
from fullframe.model.geometry.axis import Repeat, Step, Window
from fullframe.model.geometry.nodes import Node
from fullframe.model.geometry.tensors import Side, Tensor, varies
from fullframe.model.graphs import ancestors, opset_of
from fullframe.model.ragged.masks import Fill, Masks, Sight

_LEAST_OPSET: Final = 15

_WINDOWS: Final[dict[str, Fill]] = {"Conv": "zero", "MaxPool": "least", "AveragePool": "zero", "LpPool": "zero"}
_MEANS: Final = frozenset({"ReduceMean", "GlobalAveragePool"})
_REDUCTIONS: Final[dict[str, Fill]] = {
    **dict.fromkeys((*_MEANS, "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum"), "zero"),
    **dict.fromkeys(("ReduceMax", "ReduceLogSumExp", "GlobalMaxPool"), "least"),
    "ReduceMin": "most",
    "ReduceProd": "one",
    "GlobalLpPool": "zero",
}
_TAKE_SHAPES: Final = frozenset({"Reshape", "Expand", "Resize", "Slice"})


def ragged_graph(path: Path) -> bytes:
    """ragged_model of a contract model's file, serialized."""
    return bytes(ragged_model(onnx.load(path)).SerializeToString())


def ragged_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model's graph for batches of images of different sizes.

    It takes `images`, uint8 [N, H, W, 3], whose pixels outside an image are of no account, and `sizes`, int64 [N, 2]:
    each image's height and width, none below the model's smallest size. It gives the model's outputs; a map's cells
    outside an image's own are 0, and `map_sizes`, int64 [N, 2], says how many rows and columns are its own.

    Raises:
        InvalidModel: the graph can't be followed from its image; not every size is known to work; or a node mixes an
            image's cells with its padding in a way that no mask undoes. The message names the node.
    """
    geometry = graph_geometry(model).graph
    geometry.check_sizes()
    if (opset := opset_of(model)) < _LEAST_OPSET:
        raise InvalidModel(f"the graph is of opset {opset}; onnx.version_converter makes it one of {_LEAST_OPSET}")
    return _Rewriter(model, geometry).model()


class _Rewriter:
    """One pass over a graph, in its topological order.

    `_sized` are the tensors that hold a map's size, which in a batch is the padded one.
    """

    def __init__(self, model: onnx.ModelProto, geometry: GraphGeometry) -> None:
        self._source, self._geometry = model, geometry
        typed = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        values = (*typed.value_info, *typed.input, *typed.output)
        types = {each.name: each.type.tensor_type.elem_type for each in values}
        self._masks = Masks(geometry, types)
        self._sized: set[str] = set()

    def model(self) -> onnx.ModelProto:
        """The graph that it becomes."""
        graph = self._source.graph
        outputs = [each for each in graph.output if each.name in OUTPUTS]
        names = [each.name for each in outputs]
        needed = ancestors(graph, names)
        for node in deepcopy(graph).node:
            if not needed.isdisjoint(node.output):
                self._visit(node)
        if sized := self._sized.intersection(names):
            raise _refused(f"output {min(sized)!r}", "holds the image's size, which in a batch is the padded one")
        maps = [name for name in MAPS if name in names]
        if len({self._masks.map_sizes(name) for name in maps}) > 1:
            raise _refused(f"output {maps[1]!r}", f"has other cells than {maps[0]!r}")
        renamed = {self._masks.map_sizes(OUTPUT): MAP_SIZES}
        for name in maps:
            renamed |= {self._masks.masked(name, "zero"): name, name: f"{name}.padded"}
        for node in self._masks.nodes:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [renamed.get(name, name) for name in node.output]
        return self._assembled(outputs)

    def _assembled(self, outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
        source, int64 = self._source, onnx.TensorProto.INT64
        used = {name for node in self._masks.nodes for name in node.input}
        graph = helper.make_graph(
            self._masks.nodes,
            source.graph.name,
            [*source.graph.input, helper.make_tensor_value_info(SIZES, int64, ["N", 2])],
            [*outputs, helper.make_tensor_value_info(MAP_SIZES, int64, ["N", 2])],
            [each for each in source.graph.initializer if each.name in used] + list(self._masks.constants.values()),
        )
        return helper.make_model(graph, opset_imports=source.opset_import, ir_version=source.ir_version)

    def _visit(self, proto: onnx.NodeProto) -> None:
        node = Node(proto)
        inputs = [self._known(name) for name in node.inputs if name]
        if node.op == "BatchNormalization" and node.number("training_mode", 0):
            raise _refused(node.title, "takes its statistics from the whole batch (training_mode)")
        if not any(each.varies for each in inputs):
            self._masks.nodes.append(proto)
        elif self._is_of_sizes(node):
            self._masks.nodes.append(proto)
            self._sized |= {name for name in node.outputs if any(map(varies, self._known(name).data or (None,)))}
        else:
            try:
                _RULES.get(node.op, _Rewriter._in_place)(self, node, proto)
            except InvalidModel as reason:
                raise _refused(node.title, str(reason)) from reason

    def _is_of_sizes(self, node: Node) -> bool:
        """Whether a node computes with maps' sizes alone; raises InvalidModel where it mixes them with their cells."""
        if node.op == "Shape":
            return True
        sized = self._sized.intersection(node.inputs)
        if not sized or (node.op in _TAKE_SHAPES and node.inputs[0] not in sized):
            return False
        if any(self._known(name).fed for name in node.inputs if name and name not in sized):
            raise _refused(node.title, "computes with the image's size, which in a batch is the padded one")
        return True

    def _in_place(self, node: Node, proto: onnx.NodeProto) -> None:
        """What it makes of a cell depends on that cell alone, or the geometry says why not."""
        self._check(node)
        self._masks.nodes.append(proto)

    def _reshape(self, node: Node, proto: onnx.NodeProto) -> None:
        if not self._known(node.inputs[0]).is_map:
            raise InvalidModel("rearranges what is left of the map")
        self._in_place(node, proto)

    def _window(self, node: Node, proto: onnx.NodeProto) -> None:
        self._check(node)
        sights = self._sights(node)
        if not any(sight.window.after > 0 or sight.window.ceil_mode for sight in sights):
            self._masks.nodes.append(proto)
            return
        proto.input[0] = self._masks.masked(node.inputs[0], _WINDOWS[node.op])
        self._masks.nodes.append(proto)
        if node.op == "AveragePool":
            self._mend_average(node, proto, sights)

    def _mend_average(self, node: Node, proto: onnx.NodeProto, sights: Sequence[Sight]) -> None:
        """Where a window hangs over an image's border it counts fewer cells than where it hangs over its padding."""
        output = node.outputs[0]
        pads = bool(node.number("count_include_pad", 0))
        wrong = [each for each in sights if each.window.ceil_mode or (each.window.after > 0 and not pads)]
        if not wrong:
            return
        proto.output[0] = pooled = product = f"{output}.pooled"
        if not pads and all(isinstance(dim, Side) for dim in (self._known(node.inputs[0]).dims or ())[2:]):
            self._masks.add("Div", [pooled, self._masks.shares(node.inputs[0], proto)], output)
            return
        for sight in wrong:
            ratio = self._masks.divisors(node.inputs[0], sight, pads, pooled)
            product = self._masks.add("Mul", [product, ratio], output if sight is wrong[-1] else "")

    def _sights(self, node: Node) -> list[Sight]:
        """How a window sees its source, but along sides where it sees one cell alone."""
        before, after = (self._known(name).dims or () for name in (node.inputs[0], node.outputs[0]))
        kernel, dilations = node.numbers("kernel_shape") or [1, 1], node.numbers("dilations") or [1, 1]
        found = []
        for position, (old, new) in enumerate(zip(before, after, strict=True)):
            if isinstance(old, Side) and isinstance(new, Side) and old != new:
                window = self._geometry.step(new)
                assert isinstance(window, Window)
                found.append(Sight(position, old, window, kernel[position - 2], dilations[position - 2]))
        return found

    def _pad(self, node: Node, proto: onnx.NodeProto) -> None:
        """The constant meets each image's own border: its padding becomes the same first."""
        self._check(node)
        if any(isinstance(step, Window) and step.after > 0 for step in self._steps(node)):
            value = node.inputs[2] if len(node.inputs) > 2 else ""
            proto.input[0] = self._masks.masked(node.inputs[0], "zero", value)
        self._masks.nodes.append(proto)

    def _quantize(self, node: Node, proto: onnx.NodeProto) -> None:
        raise InvalidModel(
            "rounds to integers, and the last bit of a sum, which others in a batch can change, decides how"
        )

    def _slice(self, node: Node, proto: onnx.NodeProto) -> None:
        """Counted from either end, it leaves an image its own cells first; the geometry doubts all others."""
        self._masks.nodes.append(proto)

    def _resize(self, node: Node, proto: onnx.NodeProto) -> None:
        self._check(node)
        if any(isinstance(step, Repeat) and max(last for _, last in step.taps) > 0 for step in self._steps(node)):
            raise InvalidModel("repeats the last cells of the map at its border, which in a batch is padding's")
        self._masks.nodes.append(proto)

    def _reduction(self, node: Node, proto: onnx.NodeProto) -> None:
        source = node.inputs[0]
        dims = self._known(source).dims or ()
        axes = self._axes(node, len(dims))
        if not any(varies(dims[axis]) for axis in axes):
            self._masks.nodes.append(proto)
            return
        masked = self._masks.masked(source, _REDUCTIONS[node.op])
        if node.op not in _MEANS:
            proto.input[0] = masked
            self._masks.nodes.append(proto)
            return
        keep = node.op.startswith("Global") or node.number("keepdims", 1)
        total = self._masks.add("ReduceSum", [masked, self._masks.ints(*axes)], keepdims=int(keep))
        divisor = self._masks.add("Cast", [self._masks.cells(source, axes)], to=self._masks.kind(source))
        if further := range(1, len(dims) - (0 if keep else len(axes))):
            divisor = self._masks.add("Unsqueeze", [divisor, self._masks.ints(*further)])
        self._masks.add("Div", [total, divisor], node.outputs[0])

    def _axes(self, node: Node, rank: int) -> list[int]:
        if node.op.startswith("Global"):
            return list(range(2, rank))
        given = self._known(node.inputs[1]).data if any(node.inputs[1:]) else None
        axes = node.numbers("axes") or [each for each in given or () if isinstance(each, int)]
        whole = [] if node.number("noop_with_empty_axes", 0) else list(range(rank))
        return sorted(axis % rank for axis in axes) or whole

    def _steps(self, node: Node) -> list[Step | None]:
        """How each side of the map that a node makes comes of its source's."""
        return [self._geometry.step(dim) for dim in self._known(node.outputs[0]).dims or () if isinstance(dim, Side)]

    def _known(self, name: str) -> Tensor:
        return self._geometry.known(name)

    def _check(self, node: Node) -> None:
        """Raise InvalidModel for what the geometry says against this very node."""
        for tensor in (self._known(name) for name in node.outputs if name):
            for obstacle in (*tensor.obstacles, tensor.latent):
                if obstacle is not None and obstacle.node == node.title:
                    raise InvalidModel(obstacle.reason)
            if tensor.dims is None or None in tensor.dims:
                raise InvalidModel("has a shape that can't be followed")


_Rule: TypeAlias = Callable[[_Rewriter, Node, onnx.NodeProto], None]
_RULES: Final[dict[str, _Rule]] = {
    **dict.fromkeys(_WINDOWS, _Rewriter._window),
    **dict.fromkeys(_REDUCTIONS, _Rewriter._reduction),
    "Pad": _Rewriter._pad,
    "Slice": _Rewriter._slice,
    "QuantizeLinear": _Rewriter._quantize,
    "Resize": _Rewriter._resize,
    "Reshape": _Rewriter._reshape,
    "Flatten": _Rewriter._reshape,
}


def _refused(where: str, reason: str) -> InvalidModel:
    return InvalidModel(f"can't run on batches of images of different sizes: {where} {reason}")
