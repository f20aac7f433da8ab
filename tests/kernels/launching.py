"""Public calls which, between them, launch every kernel of fusedpool: by name, each forward and backward."""

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from fusedpool._triton import tl, triton
from fusedpool.batchnorm import batch_norm_act_pool2d
from fusedpool.channel import channel_pool
from fusedpool.conv import CONV_KINDS, conv1x1_global_pool2d
from fusedpool.fractional import fractional_pool2d
from fusedpool.grid import adaptive_pool2d, pyramid_pool2d
from fusedpool.kinds import KINDS
from fusedpool.ragged import ragged_pool
from fusedpool.whole import global_pool2d
from fusedpool.window import pool2d

CHANNELS: Final = 64
LAYOUTS: Final = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}

Call = Callable[[Tensor], Any]
"""x [N, CHANNELS, H, W] -> a tensor, or several."""


def launch(call: Call, layout: str, size: tuple[int, int], dtype: torch.dtype = torch.float16) -> None:
    """Call it on a map of that size, and go back from all that it returns."""
    x = torch.zeros((2, CHANNELS, *size), dtype=dtype).to(memory_format=LAYOUTS[layout]).requires_grad_()
    returned = call(x)
    outputs = [t for t in ([returned] if isinstance(returned, Tensor) else returned) if t.requires_grad]
    torch.autograd.backward(outputs, [torch.zeros_like(t) for t in outputs])


def _vector(size: int = CHANNELS, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(size, dtype=dtype, requires_grad=True)


def _scaled() -> dict[str, Any]:
    """A prologue that gets gradients."""
    return {"scale": _vector(), "shift": _vector(), "activation": "relu"}


def _norm(x: Tensor, **options: Any) -> Any:
    running = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    return batch_norm_act_pool2d(x, _vector(), _vector(), *running, 3, 2, 1, **options)


def _packed(x: Tensor, kinds: tuple[str, ...]) -> Any:
    pixels = x.permute(0, 2, 3, 1).reshape(-1, CHANNELS)
    return ragged_pool(pixels, torch.tensor([0, 50, len(pixels)]), kinds, **_scaled())


def _convolution(x: Tensor, kind: str = "avg") -> Any:
    weight = torch.ones((512, CHANNELS), dtype=x.dtype, requires_grad=True)
    return conv1x1_global_pool2d(x, weight, _vector(512, x.dtype), kind=kind)


@triton.jit  # type: ignore[untyped-decorator]
def _careless_kernel(x, y, step, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Everything that a kernel should not do: narrow loads, more values than registers, atomics."""
    i = tl.arange(0, SIZE)
    v = tl.load(x + i * step).to(tl.float32)
    tl.atomic_add(y + i, v * tl.sum(v))


def _careless(x: Tensor) -> Tensor:
    _careless_kernel[(1,)](x, torch.zeros(8192), 3, 8192, num_warps=1)
    return x * 1


def _learnable() -> Tensor:
    return torch.tensor(3.0, requires_grad=True)


CALLS: Final[dict[str, Call]] = {
    "window max": lambda x: pool2d(x, 3, 2, 1, return_indices=True, **_scaled()),
    "window avg": lambda x: pool2d(x, 3, 2, 1, kind="avg"),
    "window gem": lambda x: pool2d(x, 3, 2, 1, kind="gem", p=_learnable()),
    "window stochastic": lambda x: pool2d(x, 3, 2, 1, kind="stochastic"),
    "window of stride 1 avg": lambda x: pool2d(x, 3, 1, 1, kind="avg", activation="silu"),
    "window of 49 max": lambda x: pool2d(x, 7, 1, 3),
    "fractional max": lambda x: fractional_pool2d(x, 2, output_ratio=0.7),
    "batch norm max": _norm,
    "batch norm avg": lambda x: _norm(x, kind="avg"),
    "whole avg max gem": lambda x: global_pool2d(x, ("avg", "max", "gem"), p=_learnable(), **_scaled()),
    "sized avg": lambda x: global_pool2d(x, ("avg",), sizes=torch.tensor([[7, 5], [9, 9]])),
    "grid avg": lambda x: adaptive_pool2d(x, 6, "avg"),
    "pyramid max": lambda x: pyramid_pool2d(x, (1, 2, 4), "max"),
    "ragged avg max": lambda x: _packed(x, ("avg", "max")),
    "channels max": lambda x: channel_pool(x, CHANNELS // 4, "max"),
    "convolution avg": _convolution,
    "convolution max": lambda x: _convolution(x, "max"),
}
"""What is compiled by default."""

CONTROL: Final[dict[str, Call]] = {"careless": _careless}
"""What must not pass."""

_OF_EACH_KIND: Final[dict[str, Callable[..., Any]]] = {
    "window": lambda x, kind: pool2d(x, 3, 2, 1, kind=kind, **_scaled()),
    "whole": lambda x, kind: global_pool2d(x, (kind,), **_scaled()),
    "grid": lambda x, kind: adaptive_pool2d(x, 6, kind),
    "channels": lambda x, kind: channel_pool(x, CHANNELS // 4, kind),
    "batch norm": lambda x, kind: _norm(x, kind=kind),
    "ragged": lambda x, kind: _packed(x, (kind,)),
    "convolution": lambda x, kind: _convolution(x, kind=kind),
}

MORE: Final[dict[str, Call]] = {
    f"{domain}, {kind}": functools.partial(call, kind=kind)
    for domain, call in _OF_EACH_KIND.items()
    for kind in KINDS
    if domain != "convolution" or kind in CONV_KINDS
}
"""What is compiled besides, when there is time."""
