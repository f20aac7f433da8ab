"""Class scores that nobody asks to see as a map: pooled without it.

Without an activation the mean of a 1x1 convolution is that convolution of the mean, a product of small matrices; with
one, fusedpool computes the map tile by tile and never writes it.
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from fullframe.engine.graph.fusions.pattern import Pattern, activation_of
from fullframe.engine.graph.fusions.whole import WHOLE
from fullframe.engine.graph.ir import Node
from fullframe.engine.graph.operators.own import OWN
from fullframe.engine.graph.operators.table import operator
from fusedpool import conv1x1_global_pool2d

LINEAR: Final = "fullframe.Linear"
"""(pooled [N, C], weight [K, C, 1, 1], bias) -> [N, K], or [N, K, 1, 1] with `keep`."""
CONV_WHOLE: Final = "fullframe.ConvWhole"
"""(x, weight, bias) -> the map's pool of `kind`, by `p`, behind `activation`; [N, K, 1, 1] with `keep`."""


@operator(LINEAR, table=OWN, exact=True)
def linear(node: Node, pooled: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In float32."""
    found = F.linear(pooled, weight.flatten(1), bias)
    return found[..., None, None] if node.attributes["keep"] else found


@operator(CONV_WHOLE, table=OWN)
def conv_whole(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Of the maps' type, summed in float32."""
    kind, p, keep = node.attributes["pick"]
    x = x.to(weight.dtype)
    pooled = conv1x1_global_pool2d(x, weight, bias, node.attributes["activation"], kind, p=p).to(torch.float32)
    return pooled[..., None, None] if keep else pooled


def fuse_heads(pattern: Pattern) -> list[Node]:
    """Pools of 1x1 convolutions without the convolutions' maps."""
    found: list[Node] = []
    for node in pattern.nodes:
        found += _fused(pattern, node) if node.op == WHOLE else [node]
    return found


def _fused(pattern: Pattern, node: Node) -> list[Node]:
    ((kind, p, keep),) = node.attributes["picks"]
    activated = pattern.inner(node.inputs[0], "Relu", "LeakyRelu", "Gelu", "Swish")
    activation = activation_of(activated) if activated else "none"
    conv = pattern.inner(activated.inputs[0] if activated else node.inputs[0], "Conv")
    if conv is None or not activation or not _is_1x1(pattern, conv):
        return [node]
    if activation == "none" and kind == "avg":
        pooled = f"{node.outputs[0]}/pooled"
        mean = node.having(
            inputs=(conv.inputs[0], *node.inputs[1:]), outputs=(pooled,), attributes={"picks": ((kind, p, False),)}
        )
        return [mean, Node(LINEAR, (pooled, *conv.inputs[1:]), node.outputs, conv.title, {"keep": keep})]
    if any(node.inputs[1:3]):  # fusedpool has none for images' own cells
        return [node]
    attributes = {"pick": (kind, p, keep), "activation": activation}
    return [Node(CONV_WHOLE, conv.inputs, node.outputs, conv.title, attributes)]


def _is_1x1(pattern: Pattern, conv: Node) -> bool:
    weight = pattern.constant(conv.inputs[1])
    return (
        weight is not None
        and weight.shape[2:] == (1, 1)
        and conv.get("group", 1) == 1
        and set(conv.get("strides", None) or [1]) == {1}
        and set(conv.get("pads", None) or [0]) == {0}
        and (not conv.input(2) or pattern.constant(conv.input(2)) is not None)
    )
