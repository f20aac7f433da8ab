"""How much memory a graph's run takes for an image, read off the graph."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray

from fullframe.errors import InvalidModel
from fullframe.model.geometry import GraphGeometry, TensorGeometry
from fullframe.model.graphs import ancestors

_IN_PLACE: Final = frozenset(
    {"Add", "BatchNormalization", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity"}
    | {"LeakyRelu", "Mul", "PRelu", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Sum", "Tanh"}
)
"""Operators that write over an input that nobody needs any more, or are computed with the one before."""


@dataclass(frozen=True)
class MapMemory:
    """The maps of a graph that live together, at each moment of a run.

    Attributes:
        jumps: float64 [J, 2], pixels between neighbouring cells of a kind of map, down and across.
        moments: float64 [M, J], bytes of all maps of a kind for one cell; of no moment where nothing is known.
    """

    jumps: NDArray[np.float64]
    moments: NDArray[np.float64]

    @cached_property
    def bytes_per_pixel(self) -> float:
        """The most at any moment, for a pixel of a large image; 0 for a graph of which nothing is known."""
        return float(max(self.moments @ (1 / self.jumps.prod(axis=1)), default=0.0))

    def pixels_for(self, height: int, width: int) -> float:
        """Pixels of a large image whose maps take as much as those of a height x width image: more than its own where
        a side is so short that maps can't shrink with their jumps."""
        if not self.bytes_per_pixel:
            return height * width
        cells = np.ceil((height, width) / self.jumps).prod(axis=1)
        return float((self.moments @ cells).max()) / self.bytes_per_pixel


def map_memory(path: Path) -> MapMemory:
    """Read off a graph which maps live together.

    A map lives from the node that makes it to the last that reads it; maps that can't be followed from the image
    count for nothing.
    """
    model = onnx.load(path)
    try:
        maps = GraphGeometry(model).tensors
    except InvalidModel:
        return MapMemory(np.ones((0, 2)), np.zeros((0, 0)))
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {each.name: each.type.tensor_type.elem_type for each in (*graph.input, *graph.value_info, *graph.output)}
    needed = ancestors(graph, [each.name for each in graph.output])
    nodes = [node for node in graph.node if not needed.isdisjoint(node.output)]
    last = {name: number for number, node in enumerate(nodes) for name in node.input}
    kinds = {jump: number for number, jump in enumerate(dict.fromkeys(each.jump for each in maps.values()))}

    def together(names: Iterable[str]) -> NDArray[np.float64]:
        """A moment."""
        sizes = np.zeros(len(kinds))
        for name in names:
            sizes[kinds[maps[name].jump]] += _cell_bytes(maps[name], types.get(name, 0))
        return sizes

    live = {each.name for each in graph.input if each.name in maps}
    moments = [together(live)]
    for number, node in enumerate(nodes):
        made = {name for name in node.output if name in maps}
        dying = {name for name in node.input if name in live and last[name] == number}
        in_place = node.op_type in _IN_PLACE and dying
        reused = sorted(made, key=lambda name: bytes_of(maps[name], types.get(name, 0)))[-1:] if in_place else []
        moments.append(together(live | made) - together(reused))
        live = {name for name in live | made if last.get(name, -1) > number}
    jumps = [[float(each) for each in jump] for jump in kinds]
    return MapMemory(np.array(jumps), np.unique(moments, axis=0))


def bytes_of(tensor: TensorGeometry, kind: int) -> Fraction:
    """Bytes of a map of ONNX type `kind`, 0 for float32, for each pixel of the image."""
    return Fraction(_cell_bytes(tensor, kind)) / (Fraction(tensor.jump[0]) * Fraction(tensor.jump[1]))


def _cell_bytes(tensor: TensorGeometry, kind: int) -> int:
    width = onnx.helper.tensor_dtype_to_np_dtype(kind or onnx.TensorProto.FLOAT).itemsize
    return int(width) * math.prod(dim for dim in tensor.shape if isinstance(dim, int))
