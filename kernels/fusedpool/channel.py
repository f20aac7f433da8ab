"""Pooling across groups of neighbouring channels: the operator `channel_pool`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedpool import arguments, operators, runtime
from fusedpool import groups as kernels
from fusedpool.window import stochastic, wants_gradient


def channel_pool(
    x: Tensor,
    groups: int,
    kind: str = "max",
    *,
    p: float | Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    return_indices: bool = False,
    generator: torch.Generator | None = None,
    training: bool = True,
) -> Any:
    """Pool activation(scale * x + shift) over each group of C // groups consecutive channels, in one read of x.

    With max it is maxout (Goodfellow et al. 2013, arXiv:1302.4389, eq. 1).

    Args:
        x: [N, C], [N, C, L] or [N, C, H, W], float32, bfloat16, float16 or float64, of any strides.
        groups: a divisor of C.
        return_indices: for max and min.

    Returns:
        [N, groups, ...] in x's dtype and memory format; with return_indices also the winners' channels, int64.

    The other arguments and errors are those of `pool2d`.
    """
    if not 2 <= x.dim() <= 4:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [N, C], [N, C, L] or [N, C, H, W]")
    maps = {2: x[..., None, None], 3: x[:, :, None]}.get(x.dim(), x)
    arguments.check_map(maps)
    arguments.check_groups(maps, groups)
    kind = stochastic(kind, training)
    arguments.check_kind(kind)
    name = arguments.check_prologue(x, scale, shift, activation, 1)
    number, param = arguments.parameter(kind, p, x)
    arguments.check_indices(kind, return_indices)
    seed = arguments.seed_for(x, generator) if kind == "stochastic" else None
    save = wants_gradient(x, scale, shift, param)
    y, _, _, index = _channel(maps, scale, shift, param, seed, groups, kind, number, name, save, return_indices)
    y, index = (t if t.dim() < 4 else t.view(*t.shape[:2], *x.shape[2:]) for t in (y, index))
    return (y, index) if return_indices else y


@dataclass(frozen=True)
class Members:
    """A domain as `reference` knows them: each output takes in the channels of its group."""

    groups: int
    channels: int
    height: int
    width: int
    device: torch.device
    divisor: Tensor | None = None

    @property
    def taps(self) -> int:
        """Channels in a group."""
        return self.channels // self.groups

    def output_shape(self, channels: int) -> tuple[int, int, int]:
        """(groups, H, W)."""
        return self.groups, self.height, self.width

    def input_shape(self, channels: int) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.height, self.width

    def valid(self) -> Tensor:
        """bool [taps]."""
        return torch.ones(self.taps, dtype=torch.bool, device=self.device)

    def gather(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, groups, H, W, taps]."""
        members: Tensor = x.unflatten(1, (self.groups, self.taps)).movedim(2, -1)
        return members

    def scatter(self, taps: Tensor) -> Tensor:
        """The inverse of `gather`."""
        return taps.movedim(-1, 2).flatten(1, 2)

    def places(self, winner: Tensor) -> Tensor:
        """Channels of winning taps [N, groups, H, W]."""
        first = torch.arange(0, self.channels, self.taps, device=winner.device)
        return winner + first.view(-1, 1, 1)


@torch.library.custom_op("fusedpool::channel", mutates_args=())
def _channel(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    param: Tensor | None,
    seed: Tensor | None,
    groups: int,
    kind: str,
    p: float,
    activation: str,
    save: bool,
    indices: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if runtime.use_triton(x):
        return kernels.launch_forward(x, scale, shift, param, seed, groups, kind, p, activation, save, indices)
    members = Members(groups, x.shape[1], x.shape[2], x.shape[3], x.device)
    return operators.reference_forward(x, scale, shift, param, seed, members, kind, p, activation, save, indices)


@_channel.register_fake
def _(x, scale, shift, param, seed, groups, kind, p, activation, save, indices):
    return kernels.empty_outputs(x, groups, kind, save, indices)


@torch.library.custom_op("fusedpool::channel_backward", mutates_args=())
def _channel_backward(
    g: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    winner: Tensor,
    aux: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    param: Tensor | None,
    channels: int,
    last: bool,
    kind: str,
    p: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if runtime.use_triton(g):
        return kernels.launch_backward(g, x, y, winner, aux, scale, shift, param, channels, last, kind, p, activation)
    members = Members(g.shape[1], channels, g.shape[2], g.shape[3], g.device)
    return operators.reference_backward(g, x, winner, scale, shift, param, last, members, kind, p, activation)


@_channel_backward.register_fake
def _(g, x, y, winner, aux, scale, shift, param, channels, last, kind, p, activation):
    return kernels.empty_gradients(g, scale, shift, param, channels, last)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, scale, shift, param, _, _, ctx.kind, ctx.p, ctx.activation, _, _ = inputs
    ctx.channels = x.shape[1]
    operators.save(ctx, x, scale, shift, param, output)


def _gradient(ctx: Any, g: Tensor, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    gradients = _channel_backward(g, *saved, ctx.channels, ctx.last, ctx.kind, ctx.p, ctx.activation)
    return *operators.wanted(gradients, *saved[-3:]), *(None,) * 7


_channel.register_autograd(_gradient, setup_context=_setup)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    g, x, _, winner, _, scale, shift, param, ctx.channels, _, ctx.kind, ctx.p, ctx.activation = inputs
    ctx.save_for_backward(g, x, winner, scale, shift, param)


def _second_gradient(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    g = ctx.saved_tensors[0]
    members = Members(g.shape[1], ctx.channels, g.shape[2], g.shape[3], g.device)
    dg, dx, dscale, dshift, dparam = operators.second_gradient(
        ctx.saved_tensors, gradients, members, ctx.kind, ctx.p, ctx.activation
    )
    return dg, dx, None, None, None, dscale, dshift, dparam, *(None,) * 5


_channel_backward.register_autograd(_second_gradient, setup_context=_setup_backward)
