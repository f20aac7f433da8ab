"""A graph while it is rewritten: what makes and takes each tensor, its constants, its shapes at the source's size."""

from collections import Counter
from collections.abc import Iterable, Sequence
from copy import deepcopy
from functools import cached_property
from itertools import count
from typing import Any, Final

import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fullframe.errors import InvalidModel
from fullframe.model.contract import INPUT, OUTPUTS
from fullframe.model.geometry import GraphGeometry
from fullframe.model.graphs import opset_of, title

Array = NDArray[Any]
Shape = tuple[int | None, ...]

_SMALL: Final = 64
"""Elements of a constant that may be a shape, axes or scales; the values of larger ones change no shape."""

_LEAST_IR: Final = 8  # of opset 18
_MOST_IR: Final = 10  # what ONNX Runtime has read for long


class Draft:
    """From float32 images [N, 3, H, W] to scores, and in the end from pixels to the contract's outputs.

    Attributes:
        nodes: in topological order.
        constants: by name.
        image: the input's name.
        outputs: their names; one, the scores, until the head has been found.
        takes_pixels: the image is uint8 [N, H, W, 3].
        size: height and width of the source's image.
        opset: of ONNX's own operators.
        report: what has been done, a line for each step.
    """

    def __init__(self, model: onnx.ModelProto, size: tuple[int, int]) -> None:
        graph = model.graph
        self.constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        self.nodes = [_copied(node) for node in graph.node]
        self.image: str = next(each.name for each in graph.input if each.name not in self.constants)
        self.outputs: list[str] = [graph.output[0].name]
        self.takes_pixels = False
        self.size, self.report = size, list[str]()
        self.opset = opset_of(model)
        self._ir_version = min(max(model.ir_version, _LEAST_IR), _MOST_IR)
        self._numbers = count(1)
        self._name_nodes()
        for name in (INPUT, *OUTPUTS):
            if name in self.names():
                self.rename(name, self.fresh(name))

    # What there is.

    @property
    def scores(self) -> str:
        """The output's name, while there is one."""
        (name,) = self.outputs
        return name

    def names(self) -> set[str]:
        """Every tensor's."""
        used = {name for node in self.nodes for name in (*node.input, *node.output)}
        return used | set(self.constants) | {self.image}

    def producer(self, name: str) -> onnx.NodeProto | None:
        """The node that makes a tensor; None for the image and constants."""
        return self._producers.get(name)

    def consumers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that take a tensor."""
        return list(self._consumers.get(name, ()))

    def constant(self, node: onnx.NodeProto, position: int) -> Array | None:
        """An input that is constant; None where it is computed or left out."""
        return self.constants.get(node.input[position]) if position < len(node.input) else None

    def fed(self, node: onnx.NodeProto) -> list[str]:
        """Those of a node's inputs that are computed from the image."""
        return [name for name in node.input if name in self._fed]

    def shape(self, name: str) -> tuple[int, ...]:
        """At the source's size, for one image; raises InvalidModel where it can't be inferred."""
        found = self.source_shape(name)
        if found is None or None in found:
            node = self.producer(name)
            made = f"what {title(node)} makes" if node is not None else repr(name)
            raise InvalidModel(f"the shape of {made} can't be inferred at {words(self.size)}")
        return tuple(each for each in found if each is not None)

    def source_shape(self, name: str) -> Shape | None:
        """At the source's size, for one image: None for what can't be inferred."""
        return self._shapes.get(name)

    def free_shape(self, name: str) -> Shape | None:
        """For any image: None for a dimension that may change, or for a shape that is not known at all."""
        return self._free_shapes.get(name)

    def geometry(self) -> GraphGeometry:
        """Of the graph as it is."""
        return GraphGeometry(self.model(weights=False))

    # Changes.

    def note(self, line: str) -> None:
        """Add to the report."""
        self.report.append(line)

    def add_constant(self, value: Array, hint: str = "constant") -> str:
        """Returns its name."""
        name = self.fresh(hint)
        self.constants[name] = value
        return name

    def make(self, op: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> onnx.NodeProto:
        """A node that is not yet in the graph."""
        output = output or self.fresh(op.lower())
        return helper.make_node(op, list(inputs), [output], output, **attributes)

    def insert(self, nodes: Iterable[onnx.NodeProto], before: onnx.NodeProto | None = None) -> None:
        """Put nodes before another, or at the end."""
        place = len(self.nodes) if before is None else self._place(before)
        self.nodes[place:place] = nodes
        self.touch()

    def replace(self, node: onnx.NodeProto, nodes: Sequence[onnx.NodeProto]) -> None:
        """Put nodes in the place of one; whoever takes its first output then takes the last one's."""
        place = self._place(node)
        self.nodes[place : place + 1] = nodes
        self.rename_uses(node.output[0], nodes[-1].output[0])

    def remove(self, node: onnx.NodeProto) -> None:
        """Whoever takes its first output then takes its first input."""
        self.nodes.pop(self._place(node))
        self.rename_uses(node.output[0], node.input[0])

    def rename_uses(self, old: str, new: str) -> None:
        """Whoever takes one tensor then takes another."""
        for node in self.nodes:
            for position, name in enumerate(node.input):
                if name == old:
                    node.input[position] = new
        self.outputs = [new if name == old else name for name in self.outputs]
        self.touch()

    def rename(self, old: str, new: str) -> None:
        """Give a tensor another name."""
        for node in self.nodes:
            for position, name in enumerate(node.output):
                if name == old:
                    node.output[position] = new
        if old in self.constants:
            self.constants[new] = self.constants.pop(old)
        if self.image == old:
            self.image = new
        self.rename_uses(old, new)

    def sweep(self) -> None:
        """Drop what the outputs are not computed from."""
        kept, wanted = [], set(self.outputs)
        for node in reversed(self.nodes):
            if not wanted.isdisjoint(node.output):
                kept.append(node)
                wanted.update(taken(node))
        self.nodes = kept[::-1]
        self.constants = {name: value for name, value in self.constants.items() if name in wanted}
        self.touch()

    def touch(self) -> None:
        """To be called after a change to a node: what was found out about the graph no longer holds."""
        for name in ("_producers", "_consumers", "_fed", "_shapes", "_free_shapes"):
            self.__dict__.pop(name, None)

    def fresh(self, hint: str) -> str:
        """A name that no tensor has."""
        used = self.names()
        return next(name for number in self._numbers if (name := f"{hint}.{number}") not in used)

    # As ONNX.

    def model(
        self, *, weights: bool = True, images: int | str = "N", size: Sequence[int | str] = ("H", "W")
    ) -> onnx.ModelProto:
        """The graph; without weights, large constants have their dimensions alone."""
        kind, dims = TensorProto.FLOAT, [images, 3, *size]
        if self.takes_pixels:
            kind, dims = TensorProto.UINT8, [images, *size, 3]
        graph = helper.make_graph(
            self.nodes,
            "fullframe",
            [helper.make_tensor_value_info(self.image, kind, dims)],
            [helper.make_empty_tensor_value_info(name) for name in self.outputs],
            [self.as_tensor(name, weights=weights) for name in self.constants],
        )
        opset = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opset, ir_version=self._ir_version)

    def take(self, model: onnx.ModelProto) -> None:
        """Go on with the nodes of a model that was made of `model(weights=False)`."""
        self.nodes = [_copied(node) for node in model.graph.node]
        new = [each for each in model.graph.initializer if each.name not in self.constants]
        self.constants |= {each.name: numpy_helper.to_array(each) for each in new}
        self.opset = opset_of(model)
        self._name_nodes()
        self.touch()

    def as_tensor(self, name: str, *, weights: bool = True) -> TensorProto:
        """A constant; without weights, a large one has its dimensions alone."""
        value = self.constants[name]
        if weights or value.size <= _SMALL:
            return numpy_helper.from_array(value, name)
        return TensorProto(name=name, dims=value.shape, data_type=helper.np_dtype_to_tensor_dtype(value.dtype))

    def _place(self, node: onnx.NodeProto) -> int:
        return next(place for place, each in enumerate(self.nodes) if each is node)

    def _name_nodes(self) -> None:
        """Names tell nodes apart in messages and in the geometry."""
        counts = Counter(node.name for node in self.nodes)
        for node in self.nodes:
            if counts[node.name] > 1:
                node.name = next(name for name in node.output if name)

    @cached_property
    def _producers(self) -> dict[str, onnx.NodeProto]:
        return {name: node for node in self.nodes for name in node.output if name}

    @cached_property
    def _consumers(self) -> dict[str, list[onnx.NodeProto]]:
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def _fed(self) -> set[str]:
        found = {self.image}
        for node in self.nodes:
            if not found.isdisjoint(taken(node)):
                found.update(name for name in node.output if name)
        return found

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        return self._inferred(self.model(weights=False, images=1, size=self.size))

    @cached_property
    def _free_shapes(self) -> dict[str, Shape]:
        return self._inferred(self.model(weights=False))

    def _inferred(self, model: onnx.ModelProto) -> dict[str, Shape]:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        known = [*graph.value_info, *graph.input, *graph.output]
        shapes = {each.name: _dims(each) for each in known if each.type.tensor_type.HasField("shape")}
        return {**shapes, **{name: value.shape for name, value in self.constants.items()}}


def _dims(value: onnx.ValueInfoProto) -> Shape:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)


def _copied(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = deepcopy(node)
    copy.ClearField("doc_string")
    del copy.metadata_props[:]
    return copy


def taken(node: onnx.NodeProto) -> set[str]:
    """The tensors that a node takes, those that the graphs inside it take too."""
    inner = (each for attribute in node.attribute for each in attribute.g.node)
    return set(node.input).union(*map(taken, inner))


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """By name; texts as str."""
    found = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def set_attributes(node: onnx.NodeProto, **values: Any) -> None:
    """Replace attributes; None takes one away."""
    kept = [each for each in node.attribute if each.name not in values]
    new = [helper.make_attribute(name, value) for name, value in values.items() if value is not None]
    del node.attribute[:]
    node.attribute.extend([*kept, *new])


def words(size: tuple[int, int]) -> str:
    """Height and width for people."""
    return f"{size[0]} x {size[1]} pixels (height x width)"


def counted(number: int, what: str) -> str:
    """`3 convolutions`, `1 convolution`."""
    return f"{number} {what}{'' if number == 1 else 's'}"
