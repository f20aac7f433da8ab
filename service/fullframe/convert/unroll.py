"""A classifier's head, done on the map cell by cell, so that the scores are pooled last.

A fully connected layer over a map is a convolution with a kernel of the map's size, one over a vector a convolution of
1x1 (Long, Shelhamer and Darrell, arXiv:1411.4038, section 3.1). An average before linear layers may come after them.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx

from fullframe.convert.draft import Array, Draft, attributes, set_attributes
from fullframe.convert.layout import LAYOUT, moved, moves, numbered
from fullframe.errors import InvalidModel
from fullframe.model.graphs import title

POINTWISE: Final = frozenset(
    {"Abs", "Celu", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish"}
) | {"Neg", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Tanh"}
_BINARY: Final = frozenset({"Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "PRelu"})
_LINEAR: Final = frozenset(
    {"Add", "Sub", "Mul", "Div", "BatchNormalization", "Gemm", "MatMul", "Conv", "Gather", *LAYOUT}
)


@dataclass(frozen=True)
class Unrolled:
    """A head on its map.

    Attributes:
        classes: the map of scores [N, K, h, w].
        features: the map that the last layer's weights meet, in the same cells; "" where the head has no weights.
        layers: the fully connected layers, for people.
    """

    classes: str
    features: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class _Cells:
    """A tensor of the head, as a map.

    Attributes:
        name: the map.
        block: channels, height and width of the part of it that is one vector of the head at the source's size.
        places: where in that part each value of the head's tensor is, in the tensor's shape.
    """

    name: str
    block: tuple[int, ...]
    places: Array

    @property
    def plain(self) -> bool:
        """Whether the values are the channels of one cell, in order."""
        return self.block[1:] == (1, 1) and np.array_equal(self.places.ravel(), np.arange(self.block[0]))

    def spread(self, values: Array) -> Array:
        """A constant that meets the head's tensor, [C, height, width] as it lies on the map."""
        found = np.empty(self.block, values.dtype)
        found.reshape(-1)[self.places.ravel()] = np.broadcast_to(values, self.places.shape).ravel()
        return found


class _Stuck(Exception):
    """A node's work can't be done cell by cell; the message follows its name."""


def unroll(draft: Draft, last: str, nodes: Sequence[onnx.NodeProto], pool: onnx.NodeProto | None) -> Unrolled | None:
    """Do a head's work on its map.

    Args:
        draft: where the new nodes are put.
        last: the map.
        nodes: from there to the scores.
        pool: the average over the whole map among them, if there is one.

    Returns:
        None where a node after `pool` is not linear, so that the average can't come last.

    Raises:
        InvalidModel: there is no pool, and a node can't be turned.
    """
    if pool is not None and not all(_is_linear(draft, node) for node in nodes if node is not pool):
        return None
    work = _Unrolling(draft, last, pool)
    for node in nodes:
        try:
            work.visit(node)
        except _Stuck as why:
            if pool is not None:
                return None
            geometry = draft.geometry()
            reason = f"{title(node)} {why}. Its values: {geometry.why(node.output[0])}"
            if node.op_type == "Shape" and geometry.doubts:  # asked for the sake of a node that comes later
                reason = str(geometry.doubts[0])
            raise InvalidModel(f"the head can't be moved over maps of other sizes: {reason}") from why
    return work.finish()


def _is_linear(draft: Draft, node: onnx.NodeProto) -> bool:
    """Affine, to be exact: the mean of what it makes is what it makes of the mean."""
    if node.op_type in ("Mul", "Div") and draft.fed(node) != [node.input[0]]:
        return node.op_type == "Mul" and len(draft.fed(node)) == 1
    return node.op_type in _LINEAR


class _Unrolling:
    """One pass over a head."""

    def __init__(self, draft: Draft, last: str, pool: onnx.NodeProto | None) -> None:
        self._draft, self._last, self._pool = draft, last, pool
        self._cells: dict[str, _Cells] = {}
        if pool is None:
            self._cells[last] = _Cells(last, draft.shape(last)[1:], numbered(draft, last))
        self._nodes: list[onnx.NodeProto] = []
        self._layers: list[str] = []
        self._features = ""

    def visit(self, node: onnx.NodeProto) -> None:
        """Do one node's work; raises _Stuck."""
        if node is self._pool:
            shape = self._draft.shape(node.output[0])
            self._cells[node.output[0]] = _Cells(self._last, shape[1:], np.arange(shape[1]).reshape(shape))
            return
        sources = [self._cells[name] for name in self._draft.fed(node)]
        op = node.op_type
        if moves(self._draft, node):
            (source,) = sources[:1]
            cells = _Cells(source.name, source.block, moved(self._draft, node, source.places))
        elif op in POINTWISE and len(sources) == 1:
            cells = self._with(sources[0], node)
        elif op in _BINARY:
            cells = self._binary(node, sources)
        elif op in ("Gemm", "MatMul") or (op == "Conv" and attributes(node).get("group", 1) == 1):
            cells = self._layer(node, sources)
        elif op == "LayerNormalization" and sources[0].plain and attributes(node).get("axis", -1) in (-1, 1):
            cells = self._normalized(node, sources[0])
        elif op == "BatchNormalization" and len(sources) == 1 and sources[0].plain:
            cells = self._with(sources[0], node)
        else:
            raise _Stuck("is not known to work cell by cell")
        self._cells[node.output[0]] = cells

    def finish(self) -> Unrolled:
        """Put the new nodes into the graph; raises InvalidModel where the scores are no channels."""
        scores = self._cells[self._draft.scores]
        if scores.block[1:] != (1, 1):
            raise InvalidModel(
                "the scores {!r} are a map of {} x {} cells at the source's size; a classifier pools them, to one for "
                "each class".format(self._draft.scores, *scores.block[1:])
            )
        self._draft.insert(self._nodes)
        name = scores.name
        if not scores.plain:
            order = self._draft.add_constant(scores.places.ravel().astype(np.int64))
            self._draft.insert([gather := self._draft.make("Gather", [name, order], axis=1)])
            name = gather.output[0]
        pooled_first = self._pool is not None and self._layers
        return Unrolled(name, self._last if pooled_first else self._features, tuple(self._layers))

    def _with(self, source: _Cells, node: onnx.NodeProto, inputs: Sequence[str] = ()) -> _Cells:
        """The same operator on the map."""
        new = deepcopy(node)
        new.input[:] = inputs or [source.name, *list(node.input)[1:]]
        new.output[0] = new.name = self._draft.fresh(node.output[0])
        self._nodes.append(new)
        return _Cells(new.output[0], source.block, source.places)

    def _normalized(self, node: onnx.NodeProto, source: _Cells) -> _Cells:
        """LayerNormalization over the channels of each cell."""
        last = self._draft.make("Transpose", [source.name], perm=[0, 2, 3, 1])
        self._nodes.append(last)
        cells = self._with(source, node, [last.output[0], *list(node.input)[1:]])
        set_attributes(self._nodes[-1], axis=-1)
        first = self._draft.make("Transpose", [cells.name], perm=[0, 3, 1, 2])
        self._nodes.append(first)
        return _Cells(first.output[0], source.block, source.places)

    def _binary(self, node: onnx.NodeProto, sources: Sequence[_Cells]) -> _Cells:
        inputs = []
        first = sources[0]
        for position, name in enumerate(node.input):
            if name in self._cells:
                met = self._cells[name]
                if met.block != first.block or not np.array_equal(met.places, first.places):
                    raise _Stuck("joins values that lie differently on the map")
                inputs.append(met.name)
            else:
                value = self._draft.constant(node, position)
                if value is None or np.broadcast_shapes(value.shape, first.places.shape) != first.places.shape:
                    raise _Stuck("joins a value of another shape")
                spread = first.spread(value)
                if (spread != spread[:, :1, :1]).any():
                    raise _Stuck("has a constant with a value for each pixel")
                inputs.append(self._draft.add_constant(spread[:, :1, :1]))
        return self._with(first, node, inputs)

    def _layer(self, node: onnx.NodeProto, sources: Sequence[_Cells]) -> _Cells:
        """Gemm, MatMul, or a convolution of 1x1 over one cell."""
        matrix, bias = self._matrix(node)
        source = sources[0]
        if len(sources) > 1 or matrix.shape[1] != source.places.size or node.input[0] not in self._cells:
            raise _Stuck("is no layer with constant weights over all features")
        kernel = np.empty((len(matrix), *source.block), matrix.dtype)
        kernel.reshape(len(matrix), -1)[:, source.places.ravel()] = matrix
        sides = list(source.block[1:])
        inputs = [source.name, self._draft.add_constant(kernel, "weights"), self._draft.add_constant(bias, "bias")]
        conv = self._draft.make("Conv", inputs, kernel_shape=sides)
        self._features = source.name
        if sides != [1, 1]:
            # So that features and scores lie in the same cells.
            pooled = self._draft.make("AveragePool", [source.name], kernel_shape=sides)
            self._nodes.append(pooled)
            self._features = pooled.output[0]
        self._nodes.append(conv)
        self._layers.append(f"{title(node)} -> convolution of {sides[0]}x{sides[1]}")
        shape = self._draft.shape(node.output[0])
        return _Cells(conv.output[0], (len(matrix), 1, 1), np.arange(len(matrix)).reshape(shape))

    def _matrix(self, node: onnx.NodeProto) -> tuple[Array, Array]:
        """Weights [K, D] and bias [K]."""
        weights, given = self._draft.constant(node, 1), attributes(node)
        bias = self._draft.constant(node, 2)
        if weights is None or (len(node.input) > 2 and bias is None) or given.get("transA"):
            raise _Stuck("has weights that are no constants")
        if node.op_type == "Conv":
            if set(weights.shape[2:]) != {1} or any(given.get("pads", ())):
                raise _Stuck("is a convolution over a padded vector")
            weights = weights[:, :, 0, 0]
        elif weights.ndim != 2:
            raise _Stuck("has weights that are no matrix")
        elif node.op_type == "MatMul" or not given.get("transB"):
            weights = weights.T
        alpha, beta = (np.float32(given.get(name, 1)) for name in ("alpha", "beta"))
        if bias is not None and bias.size not in (1, len(weights)):
            raise InvalidModel(f"{title(node)} has {bias.size} values of bias for {len(weights)} outputs")
        bias = np.broadcast_to(np.float32(0) if bias is None else bias.ravel() * beta, len(weights))
        return weights if alpha == 1 else weights * alpha, bias
