"""What follows a convolution in one pass over its map: bias, a shortcut's map, an activation, an image's own border."""

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fullframe.engine.graph.fusions.epilogue_kernel import is_dense, launch
from fullframe.engine.graph.fusions.masks import mask_of, outside
from fullframe.engine.graph.fusions.pattern import Pattern, activation_of, without_bias
from fullframe.engine.graph.ir import Node
from fullframe.engine.graph.operators.own import AFFINE, OWN, per_channel
from fullframe.engine.graph.operators.table import operator
from fusedpool import runtime

EPILOGUE: Final = "fullframe.Epilogue"
"""(x, scale, shift, addend, rows, columns) -> `activation`(x * scale + shift + addend); where an image's own rows and
columns are given, `fill` outside of them."""

FUNCTIONS: Final[dict[str, Any]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu6": F.relu6,
    "hard_swish": F.hardswish,
}
"""By activation, all that the kernel has."""


def _into(node: Node, x: Tensor, *others: Tensor | None) -> Tensor:
    return _computed(node, x, x, *others)


@operator(EPILOGUE, table=OWN, exact=True, fresh=True, into=_into)
def epilogue(node: Node, x: Tensor, *others: Tensor | None) -> Tensor:
    """One read of each map, one write."""
    return _computed(node, None, x, *others)


def _computed(
    node: Node,
    into: Tensor | None,
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    addend: Tensor | None = None,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    activation, fill = node.attributes["activation"], node.attributes["fill"]
    same = addend is None or (addend.shape == x.shape and addend.stride() == x.stride())
    if runtime.use_triton(x) and is_dense(x) and same and all(_fits(each, x) for each in (scale, shift)):
        y = torch.empty_like(x) if into is None else into
        launch(x, y, scale, shift, addend, rows, columns, activation, fill)
        return y
    found: Tensor = x if scale is None else x * per_channel(scale, x)
    found = found if shift is None else found + per_channel(shift, x)
    found = found if addend is None else found + addend.to(x.dtype)
    found = FUNCTIONS[activation](found)
    found = found.clone() if found is x else found
    if rows is not None and columns is not None:
        found.masked_fill_(outside(x, rows, columns), fill)  # another tensor would not lie in memory as x does
    return found


def _fits(values: Tensor | None, x: Tensor) -> bool:
    return values is None or values.numel() == x.shape[1]


class _Chain(NamedTuple):
    """What an EPILOGUE does, as names of tensors.

    Attributes:
        conv: makes the source, and leaves its bias to `shift`.
        inside: the tensors that are not made any more.
    """

    source: str
    scale: str = ""
    shift: str = ""
    addend: str = ""
    own: tuple[str, str] = ("", "")
    activation: str = "none"
    fill: float = 0.0
    conv: Node | None = None
    inside: tuple[str, ...] = ()

    def behind(self, source: str, **changes: Any) -> "_Chain":
        """A chain that begins a step before."""
        return self._replace(source=source, inside=(*self.inside, self.source), **changes)

    @property
    def pays(self) -> bool:
        """Whether it saves a pass over a map, or a mask."""
        return bool(self.own[0]) or len(self.inside) + bool(self.conv) > 1


def fuse_epilogues(pattern: Pattern) -> list[Node]:
    """Chains of two passes or more behind a map, and masks, as EPILOGUE nodes."""
    found: list[Node] = []
    taken: set[str] = set()
    convolutions = []
    for node in reversed(pattern.nodes):
        chain = None if taken.intersection(node.outputs) else _chain(pattern, node)
        if chain is not None:
            taken.update(chain.inside)
            convolutions += [chain.conv] if chain.conv else []
            inputs = (chain.source, chain.scale, chain.shift, chain.addend, *chain.own)
            attributes = {"activation": chain.activation, "fill": chain.fill}
            node = Node(EPILOGUE, inputs, node.outputs, node.title, attributes)
        found.append(node)
    return without_bias(found[::-1], convolutions)


def _chain(pattern: Pattern, end: Node) -> _Chain | None:
    """What ends in a node; None where it is not worth an EPILOGUE."""
    if len(end.outputs) != 1 or pattern.rank(end.outputs[0]) != 4:
        return None
    chain = _Chain(end.outputs[0])
    if masked := mask_of(pattern, chain.source):
        chain = chain.behind(masked.source, own=masked.own, fill=masked.fill)
    for each in (_activated, _added, _scaled):
        chain = each(pattern, chain)
    conv = pattern.inner(chain.source, "Conv")
    if conv and not chain.scale and not chain.shift and conv.input(2) and pattern.constant(conv.input(2)) is not None:
        chain = chain._replace(shift=conv.input(2), conv=conv)
    return chain if chain.pays else None


def _activated(pattern: Pattern, chain: _Chain) -> _Chain:
    node = _next(pattern, chain, "Relu", "LeakyRelu", "Gelu", "Swish", "HardSwish", "Clip")
    if node is None:
        return chain
    name = activation_of(node) or ("hard_swish" if node.op == "HardSwish" else "")
    if node.op == "Clip" and (pattern.number(node.input(1)), pattern.number(node.input(2))) == (0, 6):
        name = "relu6"
    return chain.behind(node.inputs[0], activation=name) if name else chain


def _added(pattern: Pattern, chain: _Chain) -> _Chain:
    """Of two maps that are added, the one that a convolution makes is the source, if there is one."""
    node = _next(pattern, chain, "Add")
    if node is None or any(pattern.rank(name) != 4 or pattern.constant(name) is not None for name in node.inputs):
        return chain
    source, addend = node.inputs if pattern.inner(node.inputs[0], "Conv") else node.inputs[::-1]
    return chain if source == addend else chain.behind(source, addend=addend)


def _scaled(pattern: Pattern, chain: _Chain) -> _Chain:
    node = _next(pattern, chain, AFFINE)
    return chain if node is None else chain.behind(node.inputs[0], scale=node.input(1), shift=node.input(2))


def _next(pattern: Pattern, chain: _Chain, *ops: str) -> Node | None:
    """The node behind which a chain begins, unless others read its tensor; the chain's last one may be read."""
    return pattern.inner(chain.source, *ops) if chain.inside else pattern.maker(chain.source, *ops)
