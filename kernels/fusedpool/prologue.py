"""The prologue of every operator: activation(scale * x + shift), per channel, and its derivative."""

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedpool._triton import tl, triton

_FUNCTIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "none": lambda u: u,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
}
ACTIVATIONS: Final = tuple(_FUNCTIONS)
LEAKY_SLOPE: Final = 0.01  # torch.nn.functional.leaky_relu's default


@triton.jit
def activate(u, ACTIVATION: tl.constexpr):
    """The activation of u; gelu is the exact one. A NaN stays one."""
    v = u
    if ACTIVATION == "relu":
        v = tl.where(u <= 0, 0.0, u)
    elif ACTIVATION == "leaky_relu":
        v = tl.where(u < 0, 0.01 * u, u)
    elif ACTIVATION == "gelu":
        v = 0.5 * u * (1 + tl.erf(u * 0.7071067811865476))
    elif ACTIVATION == "silu":
        v = u / (1 + tl.exp(-u))
    return v


@triton.jit
def activate_derivative(u, ACTIVATION: tl.constexpr):
    """d activate(u) / du; at 0 PyTorch's: 0 for relu, the slope for leaky_relu."""
    one = tl.zeros_like(u) + 1
    d = one
    if ACTIVATION == "relu":
        d = tl.where(u <= 0, 0.0, one)
    elif ACTIVATION == "leaky_relu":
        d = tl.where(u > 0, one, 0.01)
    elif ACTIVATION == "gelu":
        d = 0.5 * (1 + tl.erf(u * 0.7071067811865476)) + u * tl.exp(-0.5 * u * u) * 0.3989422804014327
    elif ACTIVATION == "silu":
        s = 1 / (1 + tl.exp(-u))
        d = s * (1 + u * (1 - s))
    return d


@triton.jit
def load_affine(scale, shift, channels, mask, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, ACC: tl.constexpr):
    """Scale and shift of the channels, 1 and 0 where there are none."""
    s = tl.full(channels.shape, 1, ACC)
    t = tl.full(channels.shape, 0, ACC)
    if HAS_SCALE:
        s = tl.load(scale + channels, mask, 0.0).to(ACC)
    if HAS_SHIFT:
        t = tl.load(shift + channels, mask, 0.0).to(ACC)
    return s, t


def apply(x: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str, channel: int = 1) -> Tensor:
    """activation(scale * x + shift) in plain PyTorch, channels along dimension `channel`."""
    shape = [-1 if dim == channel else 1 for dim in range(x.dim())]
    if scale is not None:
        x = x * scale.view(shape)
    if shift is not None:
        x = x + shift.view(shape)
    return _FUNCTIONS[activation](x)


def gradients(
    dv: Tensor, u: Tensor | None, x: Tensor | None, scale: Tensor | None, shift: Tensor | None, activation: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Those by x, scale and shift of maps [N, C, H, W], from that by v = activation(u), u = scale * x + shift.

    u is None where nothing depends on it: the activation is "none", or its mask is in dv.
    """
    du = dv if u is None else dv * derivative(u, activation)
    dx = du if scale is None else du * scale.view(1, -1, 1, 1)
    dscale = None if scale is None or x is None else (du * x).sum((0, 2, 3))
    return dx, dscale, None if shift is None else du.sum((0, 2, 3))


def derivative(u: Tensor, activation: str) -> Tensor:
    """d activation(u) / du in plain PyTorch, itself differentiable."""
    match activation:
        case "relu":
            return (~(u <= 0)).to(u.dtype)  # of a NaN: 1, as PyTorch's
        case "leaky_relu":
            return torch.where(u > 0, torch.ones_like(u), LEAKY_SLOPE)
        case "gelu":
            density = torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
            return 0.5 * (1 + torch.erf(u / math.sqrt(2))) + u * density
        case "silu":
            s = torch.sigmoid(u)
            return s * (1 + u * (1 - s))
    return torch.ones_like(u)
