"""How much memory a graph's run takes for each pixel of its image, read off the graph."""

from fractions import Fraction
from pathlib import Path
from typing import Final

import onnx

from fullframe.errors import InvalidModel
from fullframe.model.geometry import GraphGeometry, TensorGeometry
from fullframe.model.graphs import ancestors

_IN_PLACE: Final = frozenset(
    {"Add", "BatchNormalization", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity"}
    | {"LeakyRelu", "Mul", "PRelu", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Sum", "Tanh"}
)
"""Operators that write over an input that nobody needs any more, or are computed with the one before."""


def bytes_per_pixel(path: Path) -> float:
    """The most bytes that the maps of a graph take together at any moment of a run, for a pixel of a large image.

    A map lives from the node that makes it to the last that reads it; maps that can't be followed from the image
    count for nothing, so that a graph of which nothing is known makes 0.
    """
    model = onnx.load(path)
    try:
        maps = GraphGeometry(model).tensors
    except InvalidModel:
        return 0.0
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {each.name: each.type.tensor_type.elem_type for each in (*graph.input, *graph.value_info, *graph.output)}
    needed = ancestors(graph, [each.name for each in graph.output])
    nodes = [node for node in graph.node if not needed.isdisjoint(node.output)]
    last = {name: number for number, node in enumerate(nodes) for name in node.input}
    live = {each.name: bytes_of(maps[each.name], types[each.name]) for each in graph.input if each.name in maps}
    most = sum(live.values())
    for number, node in enumerate(nodes):
        made = {name: bytes_of(maps[name], types.get(name, 0)) for name in node.output if name in maps}
        dying = {name: live[name] for name in node.input if name in live and last[name] == number}
        reused = max(made.values(), default=Fraction(0)) if node.op_type in _IN_PLACE and dying else Fraction(0)
        most = max(most, sum(live.values()) + sum(made.values()) - reused)
        live = {name: size for name, size in (live | made).items() if last.get(name, -1) > number}
    return float(most)


def bytes_of(tensor: TensorGeometry, kind: int) -> Fraction:
    """Bytes of a map of ONNX type `kind`, 0 for float32, for each pixel of the image."""
    width = onnx.helper.tensor_dtype_to_np_dtype(kind or onnx.TensorProto.FLOAT).itemsize
    size = Fraction(width) / (Fraction(tensor.jump[0]) * Fraction(tensor.jump[1]))
    for dim in tensor.shape:
        size *= dim if isinstance(dim, int) else 1
    return size
