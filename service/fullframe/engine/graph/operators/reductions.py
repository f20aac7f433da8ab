"""Operators that make one value of many."""

import torch
from torch import Tensor

from fullframe.engine.graph.ir import Node
from fullframe.engine.graph.operators.table import Given, accumulator, ints, operator


def axes_of(node: Node, given: Given, rank: int) -> list[int]:
    """A reduction's axes, counted from 0: an input since opset 18, an attribute before; none given: all, or none."""
    axes = node.get("axes", None) or ints(given)
    if not axes:
        return [] if node.get("noop_with_empty_axes", 0) else list(range(rank))
    return sorted(axis % rank for axis in axes)


_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2")
_MORE = ("ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp")


@operator(*_REDUCTIONS, *_MORE, host=(1,))
def reduction(node: Node, x: Tensor, axes: Given = None) -> Tensor:
    """Summed in float32 or wider."""
    dims = axes_of(node, axes, x.dim())
    return reduced(node.op.removeprefix("Reduce"), x, dims, bool(node.get("keepdims", 1))) if dims else x


def reduced(what: str, x: Tensor, dims: list[int], keep: bool) -> Tensor:
    """One kind of reduction along some dimensions."""
    wide = accumulator(x)
    match what:
        case "Mean":
            return torch.mean(x, dims, keep, dtype=wide)
        case "Sum":
            return torch.sum(x, dims, keep, dtype=wide or x.dtype)
        case "Max":
            return torch.amax(x, dims, keep)
        case "Min":
            return torch.amin(x, dims, keep)
        case "L1":
            return torch.sum(x.abs(), dims, keep, dtype=wide or x.dtype)
        case "L2":
            return _norm(x, 2, dims, keep)
        case "SumSquare":
            return torch.sum(x.to(wide or x.dtype).square(), dims, keep, dtype=wide or x.dtype)
        case "LogSum":
            return torch.log(torch.sum(x, dims, keep, dtype=wide))
        case "LogSumExp":
            return torch.logsumexp(x.to(wide or x.dtype), dims, keep)
    for dim in sorted(dims, reverse=True):
        x = torch.prod(x, dim, keep, dtype=wide or x.dtype)
    return x


_GLOBAL = {"GlobalAveragePool": "Mean", "GlobalMaxPool": "Max"}


@operator(*_GLOBAL)
def global_pool(node: Node, x: Tensor) -> Tensor:
    """Of whole maps, whatever their rank."""
    return reduced(_GLOBAL[node.op], x, list(range(2, x.dim())), True)


@operator("GlobalLpPool")
def global_lp_pool(node: Node, x: Tensor) -> Tensor:
    """The p-norm of whole maps."""
    return _norm(x, node.get("p", 2), list(range(2, x.dim())), True)


def _norm(x: Tensor, p: float, dims: list[int], keep: bool) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(x, p, dims, keep, dtype=accumulator(x))
    return found
