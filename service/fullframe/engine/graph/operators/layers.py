"""Matrix products, normalisations and softmax."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fullframe.engine.graph.ir import Node, refused
from fullframe.engine.graph.operators.table import accumulator, aligned, operator


@operator("Gemm", exact=True, fresh=True)
def gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """alpha a b + beta c, a and b transposed where told; in float32 where b is."""
    a = (a.t() if node.get("transA", 0) else a).to(b.dtype)
    product = a @ (b.t() if node.get("transB", 0) else b)
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    product = product if alpha == 1.0 else product * alpha
    return product if c is None else product + (c if beta == 1.0 else c * beta).to(b.dtype)


@operator("MatMul", fresh=True)
def matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """As numpy's."""
    a, b = aligned(a, b)
    return torch.matmul(a, b)


def channels(values: Tensor, rank: int) -> Tensor:
    """[C] as it meets [N, C, ...]."""
    return values.reshape(-1, *[1] * (rank - 2))


def _in_evaluation(node: Node) -> None:
    if node.get("training_mode", 0):
        raise refused(node, "takes its statistics from the batch (training_mode), so that answers would depend on it")


@operator("BatchNormalization", check=_in_evaluation, fresh=True)
def batch_normalization(node: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """By running statistics."""
    return F.batch_norm(x, mean, var, scale, bias, eps=node.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def instance_normalization(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Each map by its own mean and variance."""
    wide = x.to(accumulator(x) or x.dtype)
    dims = list(range(2, x.dim()))
    return _normalised(wide, dims, node.get("epsilon", 1e-5), channels(scale, x.dim()), channels(bias, x.dim())).to(
        x.dtype
    )


@operator("GroupNormalization")
def group_normalization(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Scale and bias of each channel, or before opset 21 of each group."""
    groups = node.attributes["num_groups"]
    scale, bias = (each.repeat_interleave(x.shape[1] // each.numel()) for each in (scale, bias))
    return F.group_norm(x, groups, scale.to(x.dtype), bias.to(x.dtype), node.get("epsilon", 1e-5))


@operator("LayerNormalization")
def layer_normalization(node: Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Along the axes from `axis` on."""
    axis = node.get("axis", -1) % x.dim()
    shape = x.shape[axis:]
    if scale.shape == shape and (bias is None or bias.shape == shape):
        bias = None if bias is None else bias.to(x.dtype)
        return F.layer_norm(x, shape, scale.to(x.dtype), bias, node.get("epsilon", 1e-5))
    wide = x.to(accumulator(x) or x.dtype)
    return _normalised(wide, list(range(axis, x.dim())), node.get("epsilon", 1e-5), scale, bias).to(x.dtype)


def _normalised(x: Tensor, dims: list[int], epsilon: float, scale: Tensor, bias: Tensor | None) -> Tensor:
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    found = (x - mean) * torch.rsqrt(variance + epsilon) * scale
    return found if bias is None else found + bias


@operator("MeanVarianceNormalization")
def mean_variance_normalization(node: Node, x: Tensor) -> Tensor:
    """Along `axes`, by ONNX's own epsilon."""
    wide = x.to(accumulator(x) or x.dtype)
    deviation, mean = torch.std_mean(wide, node.get("axes", [0, 2, 3]), correction=0, keepdim=True)
    return ((wide - mean) / (deviation + 1e-9)).to(x.dtype)


@operator("LpNormalization")
def lp_normalization(node: Node, x: Tensor) -> Tensor:
    """By the p-norm along an axis."""
    norm = torch.linalg.vector_norm(x, node.get("p", 2), node.get("axis", -1), True, dtype=accumulator(x))
    return torch.where(norm == 0, 0, x / norm).to(x.dtype)


@operator("Softmax")
def softmax(node: Node, x: Tensor) -> Tensor:
    """Along an axis."""
    return torch.softmax(x, node.get("axis", -1))


@operator("LogSoftmax")
def log_softmax(node: Node, x: Tensor) -> Tensor:
    """Along an axis."""
    return torch.log_softmax(x, node.get("axis", -1))
