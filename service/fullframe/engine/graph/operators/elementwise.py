"""Operators that work on each element, or on elements that meet by broadcasting."""

from functools import reduce
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from fullframe.engine.graph.ir import Node, refused
from fullframe.engine.graph.operators.table import Given, aligned, largest, number, operator

_UNARY: Final[dict[str, Any]] = {
    "Abs": torch.abs,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,  # half to even, as ONNX says
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tanh": torch.tanh,
}
_IN_PLACE: Final[dict[str, Any]] = {"Relu": torch.relu_, "Sigmoid": torch.sigmoid_, "Tanh": torch.tanh_}
_BINARY: Final[dict[str, Any]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Pow": torch.pow,
    "Sub": torch.sub,
    "Sum": torch.add,
    "Xor": torch.logical_xor,
}
MAP_TYPE: Final = "map_type"
"""Attribute of our own: the torch.dtype of maps, of a Cast that makes them."""
_TYPES: Final = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
"""TensorProto's types."""


def unary_into(node: Node, x: Tensor) -> Tensor:
    """`unary`, where PyTorch has a function that does so in place."""
    found: Tensor = _IN_PLACE.get(node.op, _UNARY[node.op])(x)
    return found


@operator(*_UNARY, fresh=True, into=unary_into)
def unary(node: Node, x: Tensor) -> Tensor:
    """One function of each element."""
    found: Tensor = _UNARY[node.op](x)
    return found


def _combined(node: Node, *values: Tensor) -> Tensor:
    tensors = aligned(*values)
    if node.op == "Pow":  # whose result is of the base's type
        return torch.pow(tensors[0], tensors[1]).to(tensors[0].dtype)
    if node.op in ("Max", "Min"):
        like = largest(tensors)
        tensors = [_beside(each, like) if each.dim() == 0 else each for each in tensors]
    return reduce(_BINARY[node.op], tensors) if len(tensors) > 1 else tensors[0].clone()


def _beside(number_: Tensor, like: Tensor) -> Tensor:
    """A number as a tensor on another's device, by a kernel's argument: a copy from the CPU would be waited for."""
    if number_.device == like.device:
        return number_.to(like.dtype)
    return torch.full((), number_.item(), dtype=like.dtype, device=like.device)


def binary_into(node: Node, x: Tensor, *others: Tensor) -> Tensor:
    """`binary`: a sum or product of x and what reaches no further than x."""
    if len(others) == 1 and node.op in ("Add", "Mul"):
        same, other = aligned(x, others[0])
        reached = dict(zip(range(-other.dim(), 0), other.shape, strict=True))
        if same is x and other.dim() <= x.dim() and all(size in (1, x.shape[axis]) for axis, size in reached.items()):
            return x.add_(other) if node.op == "Add" else x.mul_(other)
    return _combined(node, x, *others)


@operator(*_BINARY, broadcasts=True, fresh=True, into=binary_into)
def binary(node: Node, *values: Tensor) -> Tensor:
    """Two values that meet; of Max, Min and Sum as many as there are."""
    return _combined(node, *values)


@operator("Mean", broadcasts=True)
def mean(node: Node, *values: Tensor) -> Tensor:
    """The mean of tensors."""
    total: Tensor = reduce(torch.add, aligned(*values))
    return total / len(values)


@operator("Div", broadcasts=True)
def div(node: Node, x: Tensor, y: Tensor) -> Tensor:
    """Of integers, rounded towards 0."""
    x, y = aligned(x, y)
    return torch.div(x, y) if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


@operator("Mod", broadcasts=True)
def mod(node: Node, x: Tensor, y: Tensor) -> Tensor:
    """The divisor's sign, or with `fmod` the dividend's."""
    x, y = aligned(x, y)
    return torch.fmod(x, y) if node.get("fmod", 0) else torch.remainder(x, y)


@operator("PRelu", broadcasts=True)
def prelu(node: Node, x: Tensor, slope: Tensor) -> Tensor:
    """Slopes that broadcast to x."""
    x, slope = aligned(x, slope)
    return torch.where(x < 0, x * slope, x)


@operator("Where", broadcasts=True)
def where(node: Node, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """By broadcasting."""
    x, y = aligned(x, y)
    # Lone numbers on the CPU meet a condition on the device as arguments of its kernel.
    devices = {each.device for each in (condition, x, y)} - {torch.device("cpu")}
    condition = condition.to(devices.pop()) if devices else condition
    first, second = (each if each.device == condition.device else number(each) for each in (x, y))
    found: Tensor = torch.where(condition, first, second)
    return found.to((x if x.dim() else y).dtype)


def clip_into(node: Node, x: Tensor, least: Given = None, most: Given = None) -> Tensor:
    """`clip`."""
    return x if least is None and most is None else x.clamp_(number(least), number(most))


@operator("Clip", host=(1, 2), into=clip_into)
def clip(node: Node, x: Tensor, least: Given = None, most: Given = None) -> Tensor:
    """Between two numbers, of which either may be left out."""
    if least is None and most is None:
        return x
    return torch.clamp(x, number(least), number(most))


@operator("LeakyRelu", fresh=True, into=lambda node, x: F.leaky_relu(x, node.get("alpha", 0.01), inplace=True))
def leaky_relu(node: Node, x: Tensor) -> Tensor:
    """Slope `alpha` below 0."""
    return F.leaky_relu(x, node.get("alpha", 0.01))


@operator("Elu")
def elu(node: Node, x: Tensor) -> Tensor:
    """`alpha` (e^x - 1) below 0."""
    return F.elu(x, node.get("alpha", 1.0))


@operator("Celu")
def celu(node: Node, x: Tensor) -> Tensor:
    """`alpha` (e^(x / alpha) - 1) below 0."""
    return F.celu(x, node.get("alpha", 1.0))


@operator("Selu")
def selu(node: Node, x: Tensor) -> Tensor:
    """`gamma` `alpha` (e^x - 1) below 0, `gamma` x above."""
    alpha, gamma = node.get("alpha", 1.6732632423543772), node.get("gamma", 1.0507009873554805)
    found: Tensor = gamma * F.elu(x, alpha)
    return found


@operator("ThresholdedRelu")
def thresholded_relu(node: Node, x: Tensor) -> Tensor:
    """0 up to `alpha`."""
    return torch.where(x > node.get("alpha", 1.0), x, 0)


@operator("HardSigmoid")
def hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    """`alpha` x + `beta` between 0 and 1."""
    return torch.clamp(x * node.get("alpha", 0.2) + node.get("beta", 0.5), 0, 1)


@operator("HardSwish", fresh=True, into=lambda node, x: F.hardswish(x, inplace=True))
def hard_swish(node: Node, x: Tensor) -> Tensor:
    """The product of x and x / 6 + 1 / 2 between 0 and 1."""
    return F.hardswish(x)


@operator("Gelu")
def gelu(node: Node, x: Tensor) -> Tensor:
    """Exact, or `approximate` by tanh."""
    return F.gelu(x, approximate=node.get("approximate", "none"))


@operator("Swish")
def swish(node: Node, x: Tensor) -> Tensor:
    """The product of x and the sigmoid of `alpha` x."""
    alpha = node.get("alpha", 1.0)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@operator("Identity", "Dropout")
def identity(node: Node, x: Tensor, *options: Tensor) -> Tensor:
    """What it is given: Dropout is of training."""
    return x


def _known_type(node: Node) -> None:
    if node.get("to", 1) not in _TYPES:
        raise refused(
            node, f"casts to type {node.attributes['to']} of TensorProto, which PyTorch does not compute with"
        )


@operator("Cast", check=_known_type)
def cast(node: Node, x: Tensor) -> Tensor:
    """Floating-point numbers are cut off towards 0 on their way to integers; float32 maps are of the session's type."""
    dtype = _TYPES[node.attributes["to"]]
    if dtype is torch.float32 and (x.dtype is torch.uint8 or x.is_floating_point()):
        dtype = node.get(MAP_TYPE, dtype)
    return x.to(dtype)
