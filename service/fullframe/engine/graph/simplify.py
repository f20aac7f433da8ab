"""A graph in fewer steps, whatever is asked of it: folded batch norms, pixels to numbers at once, whole activations.

Sums are taken in another order than the file's, which is within the promise.
"""

from math import isclose, sqrt
from typing import Final, NamedTuple

import torch
from torch import Tensor

from fullframe.engine.graph.ir import Graph, Node, Readers, needed, refused
from fullframe.engine.graph.operators.own import AFFINE, PIXELS
from fullframe.engine.graph.sizes import at_once
from fullframe.errors import first_line

_FLOAT: Final = 1  # of TensorProto
_TO_CHANNELS_FIRST: Final = [0, 3, 1, 2]


def simplify(graph: Graph) -> Graph:
    """The same outputs from fewer nodes."""
    wanted = [each.name for each in graph.outputs]
    constants = dict(graph.constants)
    nodes = at_once(needed(graph.nodes, wanted), constants, wanted)
    nodes = _with_activations(nodes, constants, wanted)
    images = {each.name for each in graph.inputs if each.dtype == "tensor(uint8)"}
    nodes = needed(_Affines(constants, images, graph.ranks).nodes(nodes, wanted), wanted)
    used = {name for node in nodes for name in node.inputs} | set(wanted)
    kept = {name: value for name, value in constants.items() if name in used}
    return Graph(nodes, kept, graph.inputs, graph.outputs, graph.ranks, graph.metadata)


class _Affine(NamedTuple):
    """source * scale + shift, float64 [C] or [1]; None: 1 and 0."""

    source: str
    scale: Tensor | None
    shift: Tensor | None

    def after(self, other: "_Affine") -> "_Affine":
        """Both in one: the other's source, by the other and then by this one."""
        scale = other.scale if self.scale is None else self.scale if other.scale is None else other.scale * self.scale
        shift = other.shift if self.scale is None or other.shift is None else other.shift * self.scale
        if self.shift is not None:
            shift = self.shift if shift is None else shift + self.shift
        return _Affine(other.source, scale, shift)


class _Affines:
    """What is linear in each channel goes into what comes before it: a convolution, another of its kind, the pixels."""

    def __init__(self, constants: dict[str, Tensor], images: set[str], ranks: dict[str, int]) -> None:
        """`constants` is added to; `images` are the uint8 inputs."""
        self._constants, self._images, self._ranks = constants, images, ranks
        self._made: dict[str, Node] = {}
        self._affines: dict[str, _Affine] = {}

    def nodes(self, nodes: list[Node], wanted: list[str]) -> list[Node]:
        """What becomes of them; those that are no longer read are still there."""
        self._readers = Readers(nodes, wanted)
        found: list[Node] = []
        for node in nodes:
            try:
                node = self._visit(node)
            except Exception as error:  # of constants that don't fit each other
                raise refused(node, f"can't be computed: {first_line(error)}") from error
            found.append(node)
            self._made |= dict.fromkeys(node.outputs, node)
        return found

    def _visit(self, node: Node) -> Node:
        affine = self._form(node)
        if affine is None:
            return node
        output = node.outputs[0]
        if (before := self._affines.get(affine.source)) is not None and self._readers.only(affine.source):
            affine = affine.after(before)
        self._affines[output] = affine
        conv = self._made.get(affine.source) if self._readers.only(affine.source) else None
        weights = self._weights(conv, affine) if conv and conv.op == "Conv" else None
        if conv and weights:
            return conv.having(inputs=(conv.inputs[0], *self._keep(output, *weights)), outputs=node.outputs)
        if image := self._image(affine.source):
            return Node(
                PIXELS,
                (image[0], *self._keep(output, affine.scale, affine.shift)),
                node.outputs,
                node.title,
                {"last": int(image[1])},
            )
        numbers = [each for each in (affine.scale, affine.shift) if each is not None]
        if before is None and all(each.numel() == 1 for each in numbers):
            return node  # which takes its number as an argument
        return Node(AFFINE, (affine.source, *self._keep(output, affine.scale, affine.shift)), node.outputs, node.title)

    def _form(self, node: Node) -> _Affine | None:
        """What a node is to a map."""
        if node.op == "BatchNormalization":
            values = [self._constants.get(name) for name in node.inputs[1:5]]
            if self._ranks.get(node.inputs[0]) != 4 or any(each is None for each in values):
                return None
            scale, bias, mean, var = (each.double() for each in values if each is not None)
            factor = scale / (var + node.get("epsilon", 1e-5)).sqrt()
            return _Affine(node.inputs[0], factor, bias - mean * factor)
        if node.op not in ("Add", "Sub", "Mul", "Div") or len(node.inputs) != 2:
            return None
        source, other = node.inputs
        if source in self._constants and node.op in ("Add", "Mul"):
            source, other = other, source
        value = self._per_channel(other)
        if value is None or source in self._constants or self._ranks.get(source) != 4:
            return None
        match node.op:
            case "Add":
                return _Affine(source, None, value)
            case "Sub":
                return _Affine(source, None, -value)
            case "Mul":
                return _Affine(source, value, None)
        return _Affine(source, 1 / value, None)

    def _per_channel(self, name: str) -> Tensor | None:
        """A constant [C, 1, 1], [1, C, 1, 1] or of one element."""
        value = self._constants.get(name)
        if value is None or not value.is_floating_point() or value.dim() > 4:
            return None
        if value.numel() == 1:
            return value.double().reshape(1)
        channels = value.shape[-3] if value.dim() >= 3 else 0
        return value.double().reshape(-1) if channels == value.numel() else None

    def _weights(self, conv: Node, affine: _Affine) -> tuple[Tensor, Tensor | None] | None:
        """A convolution's weights and bias with what comes after it."""
        weight, bias = self._constants.get(conv.inputs[1]), self._constants.get(conv.input(2))
        if weight is None or (conv.input(2) and bias is None) or weight.dim() != 4:
            return None
        outputs = len(weight)
        if any(each is not None and each.numel() not in (1, outputs) for each in (affine.scale, affine.shift)):
            return None
        own = None if bias is None else bias.double()
        folded = affine.after(_Affine("", None, own))
        scale, shift = folded.scale, folded.shift
        weight = weight.double() if scale is None else weight.double() * scale.reshape(-1, 1, 1, 1)
        return weight, None if shift is None else shift.expand(outputs)

    def _image(self, name: str) -> tuple[str, bool] | None:
        """The uint8 input that a map is a Cast of, and whether its channels come last."""
        cast = last = False
        while name not in self._images:
            node = self._made.get(name)
            if node is None or not self._readers.only(name):
                return None
            if node.op == "Cast" and node.attributes["to"] == _FLOAT and not cast:
                cast = True
            elif node.op == "Transpose" and node.get("perm", None) == _TO_CHANNELS_FIRST and not last:
                last = True
            else:
                return None
            name = node.inputs[0]
        return (name, last) if cast else None

    def _keep(self, output: str, *values: Tensor | None) -> tuple[str, ...]:
        """The names of new constants; empty for None."""
        names = []
        for number, value in enumerate(values):
            name = "" if value is None else f"{output}/folded.{number}"
            names.append(name)
            if value is not None:
                self._constants[name] = value.to(torch.float32).contiguous()
        return tuple(names)


def _with_activations(nodes: list[Node], constants: dict[str, Tensor], wanted: list[str]) -> list[Node]:
    """Swish, HardSwish and GELU in the place of the formulas that exporters write out."""
    readers = Readers(nodes, wanted)
    found = []
    for node in nodes:
        if node.op == "Mul" and (whole := _activation(node, readers, constants)) is not None:
            node = node.having(op=whole[0], inputs=(whole[1],), attributes={})
        found.append(node)
    return found


def _activation(node: Node, readers: Readers, constants: dict[str, Tensor]) -> tuple[str, str] | None:
    """The operator that a product is, and its argument."""
    factors = _factors(node, readers)
    number = 1.0
    for name in [name for name in factors if name in constants and constants[name].numel() == 1]:
        number *= constants[name].item()
        factors.remove(name)
    if len(factors) != 2:
        return None
    for x, gate in (factors, factors[::-1]):
        made = readers.made_by.get(gate)
        if made is None or not readers.only(gate):
            continue
        if made.op == "Sigmoid" and made.inputs[0] == x and number == 1.0:
            return "Swish", x
        sixth = isclose(made.get("alpha", 0.2), 1 / 6, rel_tol=1e-6) and made.get("beta", 0.5) == 0.5
        if made.op == "HardSigmoid" and made.inputs[0] == x and sixth and number == 1.0:
            return "HardSwish", x
        if number == 0.5 and _is_gaussian(made, x, readers, constants):
            return "Gelu", x
    return None


def _factors(node: Node, readers: Readers, depth: int = 3) -> list[str]:
    """What a product of products multiplies, as far as formulas go."""
    found = []
    for name in node.inputs:
        made = readers.made_by.get(name)
        further = made is not None and made.op == "Mul" and depth > 0 and readers.only(name)
        found += _factors(made, readers, depth - 1) if made and further else [name]
    return found


def _is_gaussian(node: Node, x: str, readers: Readers, constants: dict[str, Tensor]) -> bool:
    """Whether it is 1 + erf(x / sqrt(2))."""

    def split(node: Node) -> tuple[str, float] | None:
        """The argument of a node whose other one is a number."""
        numbers = [name for name in node.inputs if name in constants and constants[name].numel() == 1]
        others = [name for name in node.inputs if name not in numbers]
        return (others[0], constants[numbers[0]].item()) if len(numbers) == len(others) == 1 else None

    if node.op != "Add" or (sum_ := split(node)) is None or sum_[1] != 1.0:
        return False
    erf = readers.made_by.get(sum_[0])
    if erf is None or erf.op != "Erf":
        return False
    scaled = readers.made_by.get(erf.inputs[0])
    if scaled is None or scaled.op not in ("Div", "Mul") or (quotient := split(scaled)) is None:
        return False
    by = 1 / quotient[1] if scaled.op == "Div" else quotient[1]
    ordered = scaled.op == "Mul" or scaled.inputs[0] == x
    return quotient[0] == x and ordered and isclose(by, 1 / sqrt(2), rel_tol=1e-6)
