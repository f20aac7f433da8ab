"""What every reader of an ONNX graph asks: which operators it has, a node's title, what a tensor is computed from."""

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:  # serving loads the onnx package only when it must
    import onnx

OWN_DOMAINS: Final = ("", "ai.onnx")
"""Of ONNX's own operators."""
WINDOWS: Final = frozenset({"Conv", "MaxPool", "AveragePool", "LpPool"})
"""Operators that see a map window by window."""


def opset_of(model: "onnx.ModelProto") -> int:
    """The version of ONNX's own operators."""
    return max((each.version for each in model.opset_import if each.domain in OWN_DOMAINS), default=1)


def title(node: "onnx.NodeProto") -> str:
    """Its operator and name, for people."""
    return f"{node.op_type} {node.name or node.output[0]!r}"


def ancestors(graph: "onnx.GraphProto", names: Iterable[str], given: Collection[str] = ()) -> set[str]:
    """The tensors and all those that they are computed from; what is before those `given` counts for nothing."""
    found = set(names)
    for node in reversed(graph.node):
        if any(name in found and name not in given for name in node.output):
            found.update(filter(None, node.input))  # "" is an input left out
    return found
