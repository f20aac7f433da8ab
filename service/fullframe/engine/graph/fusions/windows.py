"""Pools over windows with what comes before them: scale and shift or a convolution's bias, and an activation."""

from typing import Final

from torch import Tensor

from fullframe.engine.graph.fusions.pattern import Pattern, without_bias
from fullframe.engine.graph.fusions.whole import with_prologue
from fullframe.engine.graph.ir import Node
from fullframe.engine.graph.operators.own import OWN
from fullframe.engine.graph.operators.table import operator
from fullframe.engine.graph.operators.windows import symmetric
from fusedpool import pool2d

WINDOW: Final = "fullframe.Window"
"""(x, scale, shift) -> a pool's output, with the pool's own attributes; `activation` comes after scale and shift."""

_KINDS: Final = {"MaxPool": "max", "AveragePool": "avg"}


@operator(WINDOW, table=OWN, exact=True, fresh=True)
def window(node: Node, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """One read of x."""
    found: Tensor = pool2d(
        x,
        node.attributes["kernel_shape"],
        node.get("strides", None) or [1, 1],
        (node.get("pads", None) or [0, 0])[:2],
        node.get("dilations", None) or [1, 1],
        kind=node.attributes["kind"],
        ceil_mode=bool(node.get("ceil_mode", 0)),
        count_include_pad=bool(node.get("count_include_pad", 0)),
        scale=scale,
        shift=shift,
        activation=node.attributes["activation"],
    )
    return found


def fuse_windows(pattern: Pattern) -> list[Node]:
    """Pools by fusedpool, where their padding is one that it takes."""
    found, convolutions = [], []
    for node in pattern.nodes:
        if node.op in _KINDS and _is_taken(node):
            prologue = pattern.prologue(node.inputs[0])
            if prologue.conv is not None:
                convolutions.append(prologue.conv)
            pool = node.having(op=WINDOW, attributes={**node.attributes, "kind": _KINDS[node.op]})
            node = with_prologue(pool, prologue)
        found.append(node)
    return without_bias(found, convolutions)


def _is_taken(node: Node) -> bool:
    kernel = node.attributes["kernel_shape"]
    dilations, pads = node.get("dilations", None) or [1, 1], node.get("pads", None) or [0] * 4
    if not symmetric(node) or (node.get("auto_pad", "NOTSET") == "VALID" and any(pads)):
        return False
    return all(
        pad <= ((size - 1) * dilation + 1) // 2 for pad, size, dilation in zip(pads, kernel, dilations, strict=False)
    )
