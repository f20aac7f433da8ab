"""A graph's nodes and constants, read without the onnx package."""

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fullframe.model.geometry.tensors import Tensor
from fullframe.model.graphs import OWN_DOMAINS, title

if TYPE_CHECKING:
    import onnx

_CONTENTS: Final = {
    1: ("<f4", "float_data"),
    6: ("<i4", "int32_data"),
    7: ("<i8", "int64_data"),
    11: ("<f8", "double_data"),
}
"""TensorProto's types of scales, axes and shapes: how they lie in raw_data, and the field that holds them otherwise."""

_MOST: Final = 64
"""Elements of a constant that may be a shape, axes or scales."""


class Node:
    """One node.

    Attributes:
        op: the operator; empty where it is none of ONNX's own.
        title: its operator and name, for people.
        inputs, outputs: names of tensors; an empty one is left out.
        has_graph: it runs a graph of its own, which may read any tensor.
    """

    def __init__(self, proto: "onnx.NodeProto") -> None:
        self.op: str = proto.op_type if proto.domain in OWN_DOMAINS else ""
        self.title = title(proto)
        self.inputs: list[str] = list(proto.input)
        self.outputs: list[str] = list(proto.output)
        self._attributes: dict[str, Any] = {attribute.name: attribute for attribute in proto.attribute}
        self.has_graph = any(each.HasField("g") or each.graphs for each in proto.attribute)

    def number(self, name: str, default: int) -> int:
        """An attribute."""
        return int(self._attributes[name].i) if name in self._attributes else default

    def numbers(self, name: str) -> list[int] | None:
        """An attribute; None where it is absent."""
        return list(self._attributes[name].ints) if name in self._attributes else None

    def text(self, name: str, default: str) -> str:
        """An attribute."""
        return str(self._attributes[name].s.decode()) if name in self._attributes else default

    def constant(self) -> Tensor:
        """What a Constant node makes."""
        for name, attribute in self._attributes.items():
            match name:
                case "value":
                    return constant(attribute.t)
                case "value_int":
                    return Tensor((), (attribute.i,))
                case "value_float":
                    return Tensor((), (attribute.f,))
                case "value_ints":
                    return Tensor((len(attribute.ints),), tuple(attribute.ints))
                case "value_floats":
                    return Tensor((len(attribute.floats),), tuple(attribute.floats))
        return Tensor(None)


def constant(tensor: "onnx.TensorProto") -> Tensor:
    """A constant's dimensions and, where it may be a shape, axes or scales, its contents."""
    dims = tuple(tensor.dims)
    count = int(np.prod(dims, dtype=np.int64))
    if len(dims) > 1 or count > _MOST or tensor.data_type not in _CONTENTS:
        return Tensor(dims)
    kind, field = _CONTENTS[tensor.data_type]
    values = np.frombuffer(tensor.raw_data, kind).tolist() if tensor.raw_data else list(getattr(tensor, field))
    # Contents in a file of their own are not here.
    return Tensor(dims, tuple(values)) if len(values) == count else Tensor(dims)
