"""What the tests of sliding windows share: maps in many layouts, geometries, and the formulas' outputs."""

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fusedpool.kinds import KINDS
from tests.kernels import formulas

MEANINGFUL = tuple(kind for kind in KINDS if kind != "stochastic")  # the same result whatever the seed

LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "cropped", "expanded")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers [N, C, H, W], lying in memory in that way."""
    n, c, h, w = x.shape
    match layout:
        case "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        case "sliced":  # every other channel of a channels_last map, every other row
            wide = x.new_full((n, 2 * c, 2 * h, w), math.nan).contiguous(memory_format=torch.channels_last)
            wide[:, ::2, ::2] = x
            return wide[:, ::2, ::2]
        case "transposed":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        case "cropped":
            wide = x.new_full((n, c, h + 3, w + 5), math.nan).contiguous(memory_format=torch.channels_last)
            wide[:, :, 1 : h + 1, 2 : w + 2] = x
            return wide[:, :, 1 : h + 1, 2 : w + 2]
        case "expanded":  # the caller's x has equal images
            return x[:1].expand(x.shape) if n else x
    return x.contiguous()


def random_map(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


CASES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": (2, 3), "stride": (2, 3)},
    "overlapping": {"kernel_size": (3, 3), "stride": (2, 1), "padding": (1, 1)},
    "dilated": {"kernel_size": (2, 3), "stride": (3, 2), "padding": (1, 2), "dilation": (2, 2), "ceil_mode": True},
    "overhanging": {"kernel_size": (3, 2), "stride": (3, 2), "padding": (1, 0), "ceil_mode": True},
    "uncounted": {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1), "count_include_pad": False},
    "overridden": {"kernel_size": (3, 2), "stride": (1, 2), "divisor_override": 7},
    "larger": {"kernel_size": (9, 3), "stride": (2, 2), "padding": (4, 1), "ceil_mode": True},
}


@st.composite
def geometries(draw: st.DrawFn, dilated: bool = True) -> dict[str, Any]:
    """Legal arguments of a window, whether or not it fits."""
    kernel = draw(st.tuples(*[st.integers(1, 4)] * 2))
    dilation = draw(st.tuples(*[st.integers(1, 3)] * 2)) if dilated else (1, 1)
    padding = tuple(draw(st.integers(0, ((k - 1) * d + 1) // 2)) for k, d in zip(kernel, dilation, strict=True))
    stride = draw(st.none() | st.tuples(*[st.integers(1, 4)] * 2))
    return {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "ceil_mode": draw(st.booleans()),
    }


def fits(x: Tensor, **geometry: Any) -> bool:
    """PyTorch's opinion."""
    try:
        F.max_pool2d(x, **geometry)
    except RuntimeError:
        return False
    return True


def expected_of(x: Tensor, kind: str, geometry: dict[str, Any], activation: str, tensors: dict[str, Tensor]) -> Tensor:
    """The formula's outputs; tensors: scale, shift and p, or none."""
    channels = (1, -1, 1, 1)
    u = x * tensors["scale"].view(channels) + tensors["shift"].view(channels) if "scale" in tensors else x
    names = {"kernel_size": "kernel"}
    arguments = {names.get(name, name): value for name, value in geometry.items()}
    return formulas.windows(formulas.ACTIVATIONS[activation](u), kind, p=tensors.get("p"), **arguments)


def tensors_for(kind: str, channels: int, affine: bool) -> dict[str, Tensor]:
    tensors = {}
    if affine:
        tensors = {"scale": random_map(channels, seed=1) + 0.2, "shift": random_map(channels, seed=2)}
    if KINDS[kind].learnable:
        tensors["p"] = torch.tensor([2.5 if kind == "gem" else 0.3], dtype=torch.float64)
    return tensors


class Keep:
    """A hook that remembers which tensors autograd saves."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor)
        return tensor
