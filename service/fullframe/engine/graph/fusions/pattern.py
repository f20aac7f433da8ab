"""What the fusions ask of a graph: who makes and reads a tensor, what a constant holds, what comes before a pool."""

from collections.abc import Sequence
from typing import Final, NamedTuple

from torch import Tensor

from fullframe.engine.graph.ir import Graph, Node, Readers
from fullframe.engine.graph.operators.own import AFFINE


class Prologue(NamedTuple):
    """activation(scale * source + shift): names of tensors, empty where there is none.

    Attributes:
        conv: the convolution that makes the source, where `shift` is its bias, which it then has to leave out.
    """

    source: str
    scale: str = ""
    shift: str = ""
    activation: str = "none"
    conv: Node | None = None


class Pattern(Readers):
    """A graph's nodes, as `Readers`, and its constants."""

    def __init__(self, nodes: Sequence[Node], wanted: Sequence[str], graph: Graph) -> None:
        super().__init__(nodes, wanted)
        self.nodes = list(nodes)
        self.graph = graph

    def rank(self, name: str) -> int | None:
        """A tensor's; None: not known."""
        return self.graph.ranks.get(name)

    def constant(self, name: str) -> Tensor | None:
        """A constant's value."""
        return self.graph.constants.get(name)

    def number(self, name: str) -> float | None:
        """A constant of one element."""
        value = self.constant(name)
        return float(value.item()) if value is not None and value.numel() == 1 else None

    def ints(self, name: str) -> list[int] | None:
        """A small constant's elements."""
        value = self.constant(name)
        return None if value is None else [int(each) for each in value.reshape(-1).tolist()]

    def maker(self, name: str, *ops: str) -> Node | None:
        """The node of one of these operators that makes a tensor."""
        node = self.made_by.get(name)
        return node if node is not None and node.op in ops else None

    def inner(self, name: str, *ops: str) -> Node | None:
        """The same, where nobody else reads the tensor."""
        return self.maker(name, *ops) if self.only(name) else None

    def prologue(self, name: str) -> Prologue:
        """What a pool of a tensor may compute itself, on its way in."""
        found = Prologue(name)
        node = self.inner(name, *_ACTIVATIONS)
        if node is not None and (activation := activation_of(node)):
            found = Prologue(node.inputs[0], activation=activation)
        if affine := self.inner(found.source, AFFINE):
            scale, shift = affine.input(1), affine.input(2)
            if all((value := self.constant(each)) is None or value.numel() > 1 for each in (scale, shift) if each):
                return Prologue(affine.inputs[0], scale, shift, found.activation)
        conv = self.inner(found.source, "Conv")
        if conv is not None and conv.input(2) and self.constant(conv.input(2)) is not None:
            return found._replace(shift=conv.input(2), conv=conv)
        return found


_ACTIVATIONS: Final = ("Relu", "LeakyRelu", "Gelu", "Swish")


def activation_of(node: Node) -> str:
    """fusedpool's name of an activation; empty where it has none."""
    match node.op:
        case "Relu":
            return "relu"
        case "LeakyRelu" if abs(node.get("alpha", 0.01) - 0.01) < 1e-9:
            return "leaky_relu"
        case "Gelu" if node.get("approximate", "none") == "none":
            return "gelu"
        case "Swish" if node.get("alpha", 1.0) == 1.0:
            return "silu"
    return ""


def without_bias(nodes: Sequence[Node], convolutions: Sequence[Node]) -> list[Node]:
    """Nodes whose convolutions leave out what pools behind them now add."""
    chosen = {id(each) for each in convolutions}
    return [node.having(inputs=node.inputs[:2]) if id(node) in chosen else node for node in nodes]
