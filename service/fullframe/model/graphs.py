"""What a graph's tensors are computed from."""

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # serving loads the onnx package only when it must
    import onnx


def ancestors(graph: "onnx.GraphProto", names: Iterable[str], given: Collection[str] = ()) -> set[str]:
    """The tensors and all those that they are computed from; what is before those `given` counts for nothing."""
    found = set(names)
    for node in reversed(graph.node):
        if any(name in found and name not in given for name in node.output):
            found.update(filter(None, node.input))  # "" is an input left out
    return found
