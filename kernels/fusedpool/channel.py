"""Pooling across groups of neighbouring channels: the operator `channel_pool`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedpool import arguments, channel_launch, geometry, operators, runtime


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
    arguments.check_tensors(x=x)
    if not 2 <= x.dim() <= 4:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [N, C], [N, C, L] or [N, C, H, W]")
    maps = {2: x[..., None, None], 3: x[:, :, None]}.get(x.dim(), x)
    arguments.check_map(maps)
    geometry.check_groups(maps, groups)
    kind = arguments.kind_in(kind, training)
    name = arguments.check_prologue(x, scale, shift, activation, 1)
    number, param = arguments.parameter(kind, p, x)
    arguments.check_indices(kind, return_indices)
    seed = arguments.seed_for(x, generator) if kind == "stochastic" else None
    save = operators.wants_gradient(x, scale, shift, param)
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
        return channel_launch.forward(x, scale, shift, param, seed, groups, kind, p, activation, save, indices)
    members = _members(x.shape, x.device, groups)
    return operators.reference_forward(x, scale, shift, param, seed, members, kind, p, activation, save, indices)


@_channel.register_fake
def _(x, scale, shift, param, seed, groups, kind, p, activation, save, indices):
    return operators.empty_outputs(x, (groups, *x.shape[2:]), x.shape[1] // groups, kind, save, indices)


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
    shape: Sequence[int],
    last: bool,
    groups: int,
    kind: str,
    p: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if runtime.use_triton(g):
        return channel_launch.backward(g, x, y, winner, aux, scale, shift, param, shape, last, kind, p, activation)
    members = _members(shape, g.device, groups)
    return operators.reference_backward(g, x, winner, scale, shift, param, shape, last, members, kind, p, activation)


def _members(shape: Sequence[int], device: torch.device, groups: int) -> Members:
    return Members(groups, shape[1], shape[2], shape[3], device)


operators.register_gradients(_channel, _channel_backward, _members)
