"""An ONNX file or serialized graph -> ir.Graph, its constants folded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from onnx import defs, helper, numpy_helper
from torch import Tensor

from fullframe.engine.graph.growth import elements
from fullframe.engine.graph.ir import Graph, Node, refused
from fullframe.engine.graph.operators import OPERATORS, QUANTIZING
from fullframe.errors import InvalidModel, first_line
from fullframe.model.contract import TensorInfo
from fullframe.model.graphs import OWN_DOMAINS, WINDOWS, opset_of, title

_LEAST_OPSET: Final = 13
_SAME: Final = frozenset({"Identity", "Dropout"})
_CPU: Final = torch.device("cpu")
_UNFOLDED: Final = frozenset({"Shape", "LRN", *WINDOWS})
"""Of constants no model computes a convolution; what a window would take on the way is not known beforehand."""
_MOST_FOLDED: Final = 1 << 20
"""Elements of what is kept of what constants make: more is made at each run."""
_MANY: Final = 1 << 30
_MOST_MADE: Final = 1 << 28
"""Elements that constants may make at all."""


def read_graph(model: Path | bytes) -> Graph:
    """Read a graph; raises InvalidModel naming the node that can't be run."""
    try:
        proto = onnx.load(model) if isinstance(model, Path) else onnx.load_from_string(model)
    except Exception as error:  # onnx's readers raise what protobuf, the file system and numpy raise
        raise InvalidModel(f"it is no ONNX file: {first_line(error)}") from error
    if (opset := opset_of(proto)) < _LEAST_OPSET:
        raise InvalidModel(
            f"the graph is of opset {opset}; PyTorch runs those from {_LEAST_OPSET} on (onnx.version_converter)"
        )
    try:
        return _read(proto, opset)
    except InvalidModel:
        raise
    except Exception as error:  # of what the file may hold in the place of a value, a type or a shape
        raise InvalidModel(f"its graph can't be read: {first_line(error)}") from error


def _read(proto: onnx.ModelProto, opset: int) -> Graph:
    graph = proto.graph
    constants = {each.name: _tensor(each) for each in graph.initializer}
    inputs = tuple(_info(each) for each in graph.input if each.name not in constants)
    outputs = tuple(_info(each) for each in graph.output)
    folding = _Folding(constants, {each.name for each in inputs}, {each.name for each in outputs}, opset)
    nodes = folding.nodes(graph.node)
    there = {*constants, *(each.name for each in inputs), *(name for node in nodes for name in node.outputs)}
    if missing := [each.name for each in outputs if each.name not in there]:
        raise InvalidModel(f"nothing makes its output {missing[0]!r}")
    metadata = {each.key: each.value for each in proto.metadata_props}
    return Graph(nodes, constants, inputs, outputs, _ranks(proto), metadata)


class _Folding:
    """What is made of constants alone becomes a constant; copies go."""

    def __init__(self, constants: dict[str, Tensor], inputs: set[str], outputs: set[str], opset: int) -> None:
        self._constants, self._outputs, self._opset = constants, outputs, opset
        self._names: dict[str, str] = {}
        self._made = set(inputs)

    def nodes(self, protos: Sequence[onnx.NodeProto]) -> list[Node]:
        """The nodes that are left."""
        kept = []
        for proto in protos:
            if not proto.output:
                raise InvalidModel(f"{proto.op_type} {proto.name!r} makes nothing")
            try:
                kept += self._visit(proto)
            except InvalidModel:
                raise
            except Exception as error:  # of what the file may hold in the place of an attribute or a value
                raise InvalidModel(f"{title(proto)} can't be read: {first_line(error)}") from error
        return kept

    def _visit(self, proto: onnx.NodeProto) -> list[Node]:
        """The node, where there has to be one."""
        for name in filter(None, proto.output):
            if name in self._made or name in self._constants or name in self._names:
                raise InvalidModel(f"{title(proto)} makes {name!r}, which is there already")
        if proto.op_type == "Constant" and proto.domain in OWN_DOMAINS:
            self._constants[proto.output[0]] = _constant(proto)
            return []
        node = self._read(proto)
        if node.op in _SAME and node.outputs[0] not in self._outputs:
            self._names[node.outputs[0]] = node.inputs[0]
            return []
        if self._fold(node):
            return []
        self._made.update(node.outputs)
        return [node]

    def _read(self, proto: onnx.NodeProto) -> Node:
        inputs = tuple(self._names.get(name, name) for name in proto.input)
        node = Node(proto.op_type, inputs, tuple(proto.output), title(proto), {})
        if node.op in QUANTIZING:
            raise refused(
                node, "computes with integers of 8 bits, which PyTorch has none of its own for; serve the float model"
            )
        if proto.domain not in OWN_DOMAINS or node.op not in OPERATORS:
            domain = "" if proto.domain in OWN_DOMAINS else f" of {proto.domain}"
            raise refused(node, f"is an operator{domain} that the PyTorch engine does not have")
        for name in filter(None, inputs):
            if name not in self._made and name not in self._constants:
                raise refused(node, f"reads {name!r}, which nothing that PyTorch runs makes")
        node = node.having(attributes={each.name: _attribute(each) for each in proto.attribute})
        _check_schema(node, proto, self._opset)
        OPERATORS[node.op].check(node)
        return node

    def _fold(self, node: Node) -> bool:
        if node.op in _UNFOLDED or not all(name in self._constants for name in node.inputs if name):
            return False
        values = [self._constants[name] if name else None for name in node.inputs]
        try:
            made = elements(node, values)
            if made > _MOST_MADE:
                raise refused(node, f"makes {made:,} values of constants alone; at most {_MOST_MADE:,} are made so")
            if made > max(_MOST_FOLDED, *(v.numel() for v in values if v is not None), 0):
                return False
            found = OPERATORS[node.op].bound(node, _CPU)(*values)
        except InvalidModel:
            raise
        except Exception as error:  # whatever PyTorch's operators raise
            raise refused(node, f"can't be computed: {first_line(error)}") from error
        self._constants |= dict(zip(node.outputs, found if isinstance(found, tuple) else (found,), strict=False))
        return True


def _check_schema(node: Node, proto: onnx.NodeProto, opset: int) -> None:
    """Raise InvalidModel where inputs or attributes are missing that ONNX asks for, or are of another kind."""
    try:
        schema = defs.get_schema(node.op, opset, "")
    except defs.SchemaError:  # of a later opset than the graph's
        return
    if not schema.min_input <= len(node.inputs) <= schema.max_input or not all(node.inputs[: schema.min_input]):
        more = f" to {schema.max_input}" if schema.max_input < _MANY else " or more"
        wanted = str(schema.min_input) + (more if schema.max_input != schema.min_input else "")
        raise refused(node, f"has {len([*filter(None, node.inputs)])} inputs; ONNX asks for {wanted}")
    for name, attribute in schema.attributes.items():
        if attribute.required and name not in node.attributes:
            raise refused(node, f"has no attribute {name!r}, which ONNX asks for")
    kinds = {name: attribute.type.value for name, attribute in schema.attributes.items()}  # type: ignore[attr-defined]
    for each in proto.attribute:
        if each.type != kinds.get(each.name, each.type):
            raise refused(node, f"has an attribute {each.name!r} of another type than ONNX's")


def _attribute(proto: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(proto)
    if isinstance(value, onnx.TensorProto):
        return _tensor(value)
    return value.decode() if isinstance(value, bytes) else value


def _constant(proto: onnx.NodeProto) -> Tensor:
    (attribute,) = proto.attribute
    if attribute.name == "value":
        return _tensor(attribute.t)
    value = helper.get_attribute_value(attribute)
    if attribute.name not in ("value_int", "value_ints", "value_float", "value_floats"):
        raise InvalidModel(f"{title(proto)} holds a {attribute.name}, which the PyTorch engine does not read")
    return torch.tensor(value, dtype=torch.float32 if "float" in attribute.name else torch.int64)


def _tensor(proto: onnx.TensorProto) -> Tensor:
    value = np.array(numpy_helper.to_array(proto))
    try:
        return torch.from_numpy(value)
    except TypeError:
        raise InvalidModel(
            f"constant {proto.name!r} is of type {value.dtype}, which the PyTorch engine does not read"
        ) from None


def _ranks(proto: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(proto).graph
    types = {each.name: each.type.tensor_type for each in (*graph.value_info, *graph.input, *graph.output)}
    return {name: len(kind.shape.dim) for name, kind in types.items() if kind.HasField("shape")}


def _info(proto: onnx.ValueInfoProto) -> TensorInfo:
    kind = proto.type.tensor_type
    name = helper.tensor_dtype_to_np_dtype(kind.elem_type).name if kind.elem_type else "undefined"
    shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in kind.shape.dim]
    return TensorInfo(proto.name, f"tensor({'float' if name == 'float32' else name})", shape)
