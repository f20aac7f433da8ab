"""Pools of whole maps, of an image's own cells too: one read of each map for all of them, and for what comes before."""

from typing import Final

import torch
from torch import Tensor

from fullframe.engine.graph.fusions.masks import mask_of
from fullframe.engine.graph.fusions.pattern import Pattern, Prologue, without_bias
from fullframe.engine.graph.ir import Node
from fullframe.engine.graph.operators.own import OWN
from fullframe.engine.graph.operators.table import operator
from fusedpool import global_pool2d
from fusedpool.kinds import GEM_FLOOR

WHOLE: Final = "fullframe.Whole"
"""(x, rows, columns, scale, shift) -> one output for each of `picks`: (kind, p, whether [N, C, 1, 1]).

rows and columns, int64 [N], are the images' own; left out: all. `activation` comes after scale and shift.
"""

_KINDS: Final = {
    **{"ReduceMean": "avg", "ReduceMax": "max", "ReduceMin": "min", "ReduceSum": "sum"},
    **{"GlobalAveragePool": "avg", "GlobalMaxPool": "max"},
}
_IDENTITIES: Final = {"avg": 0.0, "sum": 0.0, "max": -torch.inf, "min": torch.inf}
"""What padding is masked with."""


@operator(WHOLE, table=OWN, exact=True)
def whole(
    node: Node,
    x: Tensor,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """All from one read of x; float32."""
    picks = node.attributes["picks"]
    kinds = list(dict.fromkeys((kind, p) for kind, p, _ in picks))
    found = global_pool2d(
        x,
        [kind for kind, _ in kinds],
        sizes=None if rows is None or columns is None else torch.stack([rows, columns], 1),
        scale=scale,
        shift=shift,
        activation=node.get("activation", "none"),
        p={kind: p for kind, p in kinds if p is not None},
    )
    pooled = dict(zip(kinds, (each.to(torch.float32) for each in found), strict=True))
    return tuple(pooled[kind, p][..., None, None] if keep else pooled[kind, p] for kind, p, keep in picks)


def find_whole(pattern: Pattern) -> list[Node]:
    """Global pools as WHOLE nodes, one for each."""
    found = []
    for node in pattern.nodes:
        made = _gem(pattern, node) or _masked_mean(pattern, node) or _masked(pattern, node) or _plain(pattern, node)
        found.append(made or node)
    return found


def merge_whole(pattern: Pattern) -> list[Node]:
    """WHOLE nodes with what comes before them; those of one map become one."""
    merged: dict[tuple[str, ...], Node] = {}
    for node in pattern.nodes:
        if node.op == WHOLE:
            key = node.inputs
            while key in merged and not _has_room(merged[key], node):
                key = (*key, "")
            first = merged.get(key)
            merged[key] = node if first is None else _joined(first, node)
    at = {node.outputs[0]: node for node in merged.values()}
    nodes = [at.get(node.outputs[0], node) for node in pattern.nodes if node.op != WHOLE or node.outputs[0] in at]
    return _with_prologues(Pattern(nodes, sorted(pattern.wanted), pattern.graph))


def _has_room(first: Node, node: Node) -> bool:
    """Whether a kind is not there yet by another p, of which there can be one."""
    ((kind, p, _),) = node.attributes["picks"]
    return all(other != kind or by == p for other, by, _ in first.attributes["picks"])


def _joined(first: Node, node: Node) -> Node:
    picks = (*first.attributes["picks"], *node.attributes["picks"])
    return first.having(outputs=(*first.outputs, *node.outputs), attributes={"picks": picks})


def _with_prologues(pattern: Pattern) -> list[Node]:
    found, convolutions = [], []
    for node in pattern.nodes:
        if node.op == WHOLE:
            prologue = pattern.prologue(node.inputs[0])
            if prologue.conv is not None:
                convolutions.append(prologue.conv)
            node = with_prologue(node, prologue, node.inputs[1:3])
        found.append(node)
    return without_bias(found, convolutions)


def with_prologue(node: Node, prologue: Prologue, others: tuple[str, ...] = ()) -> Node:
    """A pool that computes what comes before it; `others` are inputs between its map and scale."""
    inputs = (prologue.source, *others, prologue.scale, prologue.shift)
    return node.having(inputs=inputs, attributes={**node.attributes, "activation": prologue.activation})


def _pool(
    node: Node, source: str, kind: str, keep: bool, own: tuple[str, str] = ("", ""), p: float | None = None
) -> Node:
    return Node(WHOLE, (source, *own), node.outputs, node.title, {"picks": ((kind, p, keep),)})


def _reduction(pattern: Pattern, node: Node) -> tuple[str, bool] | None:
    """The kind of a node that pools whole maps, and whether it keeps their axes."""
    if node.op not in _KINDS or pattern.rank(node.inputs[0]) != 4:
        return None
    if node.op.startswith("Global"):
        return _KINDS[node.op], True
    axes = node.get("axes", None) or pattern.ints(node.input(1))
    if axes is None or sorted(axis % 4 for axis in axes) != [2, 3]:
        return None
    return _KINDS[node.op], bool(node.get("keepdims", 1))


def _plain(pattern: Pattern, node: Node) -> Node | None:
    reduction = _reduction(pattern, node)
    return None if reduction is None else _pool(node, node.inputs[0], *reduction)


def _masked(pattern: Pattern, node: Node) -> Node | None:
    """A reduction of a map whose padding is the kind's identity."""
    reduction = _reduction(pattern, node)
    masked = mask_of(pattern, node.inputs[0]) if reduction else None
    if not reduction or not masked or reduction[0] == "avg":  # which would count the padding
        return None
    return _pool(node, masked.source, *reduction, masked.own) if masked.fill == _IDENTITIES[reduction[0]] else None


def _masked_mean(pattern: Pattern, node: Node) -> Node | None:
    """A sum of an image's own cells, divided by how many they are."""
    if node.op != "Div" or (total := pattern.inner(node.inputs[0], "ReduceSum")) is None:
        return None
    pooled = _masked(pattern, total)
    if pooled is None or (sizes := _cells(pattern, node.inputs[1])) != frozenset(pooled.inputs[1:3]):
        return None
    own = (pooled.inputs[1], pooled.inputs[2])
    return _pool(node, pooled.inputs[0], "avg", pooled.attributes["picks"][0][2], own) if sizes else None


def _cells(pattern: Pattern, name: str) -> frozenset[str] | None:
    """The sizes whose product a divisor is, behind Cast and Unsqueeze."""
    if node := pattern.maker(name, "Unsqueeze"):
        name = node.inputs[0]
    cast = pattern.maker(name, "Cast")
    product = cast and pattern.maker(cast.inputs[0], "Mul")
    return frozenset(product.inputs) if product else None


def _gem(pattern: Pattern, node: Node) -> Node | None:
    """(mean of max(x, 1e-6)^p)^(1/p), of whole maps or of own cells."""
    root = pattern.number(node.input(1)) if node.op == "Pow" else None
    mean = pattern.inner(node.inputs[0], "Div", "ReduceMean", "GlobalAveragePool") if root else None
    pooled = mean and (_masked_mean(pattern, mean) or _plain(pattern, mean))
    if not root or not pooled or pooled.attributes["picks"][0][0] != "avg":
        return None
    power = pattern.maker(pooled.inputs[0], "Pow")
    p = pattern.number(power.inputs[1]) if power else None
    clip = pattern.maker(power.inputs[0], "Clip") if power else None
    if clip is None or p is None or abs(p * root - 1) > 1e-6 or clip.input(2) or p <= 0:
        return None
    floor = pattern.number(clip.input(1))
    if floor is None or abs(floor - GEM_FLOOR) > GEM_FLOOR * 1e-3:
        return None
    own = pooled.inputs[1], pooled.inputs[2]
    return _pool(node, clip.inputs[0], "gem", pooled.attributes["picks"][0][2], own, p)
