"""What a graph's tensors are computed from."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # serving loads the onnx package only when it must
    import onnx


def ancestors(graph: "onnx.GraphProto", names: Iterable[str]) -> set[str]:
    """The tensors and all those that they are computed from."""
    found = set(names)
    for node in reversed(graph.node):
        if not found.isdisjoint(node.output):
            found.update(filter(None, node.input))  # "" is an input left out
    return found
