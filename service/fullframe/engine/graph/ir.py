"""A graph as it is worked on: nodes, constants as tensors, and who reads what."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fullframe.errors import InvalidModel
from fullframe.model.contract import TensorInfo


@dataclass(frozen=True)
class Node:
    """One operator; an empty name among its inputs or outputs is one left out.

    Attributes:
        op: ONNX's, or one of our own (OWN in operators).
        title: operator and name in the file, for people.
        attributes: ints, floats, strings and lists of them.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    title: str
    attributes: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any) -> Any:
        """An attribute."""
        return self.attributes.get(name, default)

    def input(self, position: int) -> str:
        """A name, empty where there is none."""
        return self.inputs[position] if position < len(self.inputs) else ""

    def having(self, **changes: Any) -> "Node":
        """A copy with other fields."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Graph:
    """Nodes in topological order.

    Attributes:
        constants: weights and folded values, on the CPU, as the file has them.
        inputs, outputs: what is fed and what may be asked for.
        ranks: of tensors, where they are known.
        metadata: the file's `metadata_props`.
    """

    nodes: list[Node]
    constants: dict[str, Tensor]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    ranks: dict[str, int]
    metadata: dict[str, str]


class Readers:
    """Who reads each tensor of a list of nodes, and who makes it."""

    def __init__(self, nodes: Sequence[Node], wanted: Iterable[str]) -> None:
        """`wanted` are read from outside."""
        self.wanted = frozenset(wanted)
        self.made_by = {name: node for node in nodes for name in node.outputs if name}
        self._of: dict[str, list[Node]] = {}
        for node in nodes:
            for name in dict.fromkeys(filter(None, node.inputs)):
                self._of.setdefault(name, []).append(node)

    def of(self, name: str) -> list[Node]:
        """The nodes that read a tensor."""
        return self._of.get(name, [])

    def only(self, name: str) -> Node | None:
        """The one node that reads a tensor; None where there are others, or it is wanted outside."""
        readers = self.of(name)
        return readers[0] if len(readers) == 1 and name not in self.wanted else None


def needed(nodes: Sequence[Node], outputs: Iterable[str]) -> list[Node]:
    """The nodes that the outputs are computed from, in their order."""
    names, found = set(outputs), []
    for node in reversed(nodes):
        if not names.isdisjoint(node.outputs):
            names.update(filter(None, node.inputs))
            found.append(node)
    return found[::-1]


def refused(node: Node, reason: str) -> InvalidModel:
    """That a node can't be run in PyTorch, and why."""
    return InvalidModel(f"{node.title} {reason}")
