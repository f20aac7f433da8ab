"""What a graph computes from a batch's own sizes by additions and divisions: all maps' rows and columns in one step."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fullframe.engine.graph.ir import Node, Readers
from fullframe.engine.graph.operators.own import OWN
from fullframe.engine.graph.operators.table import operator

SIZES = "fullframe.Sizes"
"""(sizes [N, 2], axes [K], shifts [K, 1], divisors [K, 1]) -> K times int64 [N]: (size + shift) // divisor."""


@operator(SIZES, table=OWN)
def sizes(node: Node, own: Tensor, axes: Tensor, shifts: Tensor, divisors: Tensor) -> tuple[Tensor, ...]:
    """Each its own piece of one table."""
    table = own.t().index_select(0, axes).add_(shifts).div_(divisors, rounding_mode="floor")
    return table.unbind(0)


class _Size(NamedTuple):
    """(base[:, axis] + shift) // divisor, of sizes that are not below the model's smallest: what is divided is not
    below 0, and so ((size + a) // b + c) // d is (size + a + b c) // (b d)."""

    base: str
    axis: int
    shift: int = 0
    divisor: int = 1


def at_once(nodes: Sequence[Node], constants: dict[str, Tensor], wanted: Sequence[str]) -> list[Node]:
    """The nodes with SIZES in the place of those that it computes; `constants` is added to."""
    found: dict[str, _Size] = {}
    for node in nodes:
        if size := _size(node, found, constants):
            found[node.outputs[0]] = size
    by_base: dict[str, dict[str, _Size]] = {}
    for name, size in found.items():
        by_base.setdefault(size.base, {})[name] = size
    # Gather alone may be of anything: what follows it says that they are integers.
    chosen = {
        base: each
        for base, each in by_base.items()
        if any((size.shift, size.divisor) != (0, 1) for size in each.values())
    }
    replaced = {name for each in chosen.values() for name in each}
    readers = Readers([node for node in nodes if not replaced.intersection(node.outputs)], wanted)
    kept: list[Node] = []
    for node in nodes:
        if node.outputs[0] not in replaced:
            kept.append(node)
        elif table := chosen.pop((size := found[node.outputs[0]]).base, None):
            read = {name: each for name, each in table.items() if name in readers.wanted or readers.of(name)}
            kept.append(_table(node, size.base, read, constants))
    return kept


def _size(node: Node, known: dict[str, _Size], constants: dict[str, Tensor]) -> _Size | None:
    if node.op == "Gather" and node.get("axis", 0) == 1:
        axis = constants.get(node.inputs[1])
        is_number = axis is not None and axis.dim() == 0 and node.inputs[0] not in constants
        return _Size(node.inputs[0], int(axis)) if axis is not None and is_number else None
    if node.op not in ("Add", "Div") or len(node.inputs) != 2:
        return None
    source, other = node.inputs if node.op == "Div" or node.inputs[0] in known else node.inputs[::-1]
    value = constants.get(other)
    if source not in known or value is None or value.dtype is not torch.int64 or value.numel() != 1 or value.dim() > 1:
        return None
    size, number = known[source], int(value.item())
    if node.op == "Add":
        return size._replace(shift=size.shift + number * size.divisor)
    return size._replace(divisor=size.divisor * number) if number > 0 else None


def _table(first: Node, base: str, table: dict[str, _Size], constants: dict[str, Tensor]) -> Node:
    values = {
        "axes": torch.tensor([size.axis for size in table.values()]),
        "shifts": torch.tensor([[size.shift] for size in table.values()]),
        "divisors": torch.tensor([[size.divisor] for size in table.values()]),
    }
    names = {f"{first.outputs[0]}/{name}": value for name, value in values.items()}
    constants.update(names)
    return Node(SIZES, (base, *names), tuple(table), first.title)
