"""The operators as modules."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fusedpool import arguments
from fusedpool.arguments import IntPair
from fusedpool.batchnorm import batch_norm_act_pool2d
from fusedpool.channel import channel_pool
from fusedpool.conv import conv1x1_global_pool2d
from fusedpool.fractional import fractional_pool2d
from fusedpool.grid import adaptive_pool2d, pyramid_pool2d
from fusedpool.kinds import KINDS
from fusedpool.ragged import ragged_pool
from fusedpool.whole import global_pool2d
from fusedpool.window import pool2d

__all__ = [
    "AdaptivePool2d",
    "BatchNormActPool2d",
    "ChannelPool",
    "Conv1x1GlobalPool2d",
    "FractionalPool2d",
    "GlobalPool2d",
    "Pool2d",
    "PyramidPool2d",
    "RaggedPool",
]

_RANGES: Final = {"gem": (0.1, math.inf), "mixed": (0.0, 1.0)}


class _Module(nn.Module):
    """Shows the arguments that are not the defaults."""

    def extra_repr(self) -> str:
        """For print."""
        shown = []
        for name, argument in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name)
            if not isinstance(value, nn.Module | Tensor) and value != argument.default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)


class _OneKind(_Module):
    """Pools by one kind.

    With learn_p, for gem and mixed, p is a parameter of shape [1]. Forward takes its nearest value in range, p >= 0.1
    for gem and 0 <= p <= 1 for mixed, and hands the gradient through, so that a p that has left the range can return.
    """

    def _set_kind(self, kind: str, p: float | None, learn_p: bool) -> None:
        arguments.check_kind(kind)
        arguments.parameter(kind, p, torch.empty(0))
        self.kind, self.learn_p = kind, learn_p
        self.p: float | nn.Parameter | None = _initial(kind, p) if learn_p else p

    def _number(self) -> Any:
        return _in_range(self.kind, self.p) if isinstance(self.p, Tensor) else self.p


class _ManyKinds(_Module):
    """Pools by several kinds from one read; p: of the kind that takes it, or a mapping from kinds to theirs.

    With learn_p, p holds a parameter for gem and for mixed, whichever there is, as in the modules of one kind.
    """

    def __init__(
        self,
        kinds: Sequence[str] = ("avg",),
        *,
        p: float | Mapping[str, float] | None = None,
        learn_p: bool = False,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self.kinds, self.learn_p, self.activation = tuple(arguments.check_kinds(kinds)), learn_p, activation
        self.p: Any = p
        numbers, _ = arguments.parameters(kinds, p, torch.empty(0))
        if learn_p:
            given = {kind: p for kind, p in zip(kinds, numbers, strict=True) if KINDS[kind].default is not None}
            learnt = [kind for kind in kinds if KINDS[kind].learnable] or kinds[:1]
            self.p = nn.ParameterDict({kind: _initial(kind, given.pop(kind, None)) for kind in learnt})
            self.fixed = given

    def _numbers(self) -> Any:
        if not self.learn_p:
            return self.p
        return {**self.fixed, **{kind: _in_range(kind, value) for kind, value in self.p.items()}}


def _initial(kind: str, p: float | None) -> nn.Parameter:
    """Raises ValueError for a kind whose p is not learnable, and for a p that is not in range."""
    if not KINDS[kind].learnable:
        raise ValueError(f"learn_p is True; only gem and mixed can learn p, not {kind}")
    number, _ = arguments.parameter(kind, p, torch.empty(0))
    return nn.Parameter(torch.tensor([number]))


def _in_range(kind: str, p: Tensor) -> Tensor:
    low, high = _RANGES[kind]
    return p + (p.clamp(low, high) - p).detach()


class Pool2d(_OneKind):
    """`pool2d`; stochastic samples in training."""

    def __init__(
        self,
        kernel_size: IntPair,
        stride: IntPair | None = None,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        *,
        kind: str = "max",
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        p: float | None = None,
        learn_p: bool = False,
        activation: str | None = None,
        return_indices: bool = False,
    ) -> None:
        super().__init__()
        self._set_kind(kind, p, learn_p)
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.ceil_mode, self.count_include_pad, self.divisor_override = ceil_mode, count_include_pad, divisor_override
        self.activation, self.return_indices = activation, return_indices

    def forward(self, x: Tensor) -> Any:
        """[N, C, H, W] -> [N, C, OH, OW], and indices where asked for."""
        return pool2d(
            x, self.kernel_size, self.stride, self.padding, self.dilation, kind=self.kind, ceil_mode=self.ceil_mode,
            count_include_pad=self.count_include_pad, divisor_override=self.divisor_override, p=self._number(),
            activation=self.activation, return_indices=self.return_indices, training=self.training,
        )  # fmt: skip


class FractionalPool2d(_OneKind):
    """`fractional_pool2d`: random windows in training, always the same in evaluation."""

    def __init__(
        self,
        kernel_size: IntPair,
        output_size: IntPair | None = None,
        output_ratio: float | Sequence[float] | None = None,
        kind: str = "max",
        *,
        p: float | None = None,
        learn_p: bool = False,
        activation: str | None = None,
        return_indices: bool = False,
    ) -> None:
        super().__init__()
        self._set_kind(kind, p, learn_p)
        self.kernel_size, self.output_size, self.output_ratio = kernel_size, output_size, output_ratio
        self.activation, self.return_indices = activation, return_indices

    def forward(self, x: Tensor) -> Any:
        """[N, C, H, W] -> [N, C, OH, OW], and indices where asked for."""
        return fractional_pool2d(
            x, self.kernel_size, self.output_size, self.output_ratio, self.kind, p=self._number(),
            activation=self.activation, return_indices=self.return_indices, training=self.training,
        )  # fmt: skip


class AdaptivePool2d(_OneKind):
    """`adaptive_pool2d`; stochastic samples in training."""

    def __init__(
        self,
        output_size: int | Sequence[int | None],
        kind: str = "avg",
        *,
        p: float | None = None,
        learn_p: bool = False,
        activation: str | None = None,
        return_indices: bool = False,
    ) -> None:
        super().__init__()
        self._set_kind(kind, p, learn_p)
        self.output_size, self.activation, self.return_indices = output_size, activation, return_indices

    def forward(self, x: Tensor) -> Any:
        """[N, C, H, W] -> [N, C, OH, OW], and indices where asked for."""
        return adaptive_pool2d(
            x, self.output_size, self.kind, p=self._number(), activation=self.activation,
            return_indices=self.return_indices, training=self.training,
        )  # fmt: skip


class PyramidPool2d(_OneKind):
    """`pyramid_pool2d`; stochastic samples in training."""

    def __init__(
        self,
        levels: Sequence[int] = (1, 2, 4),
        kind: str = "max",
        *,
        p: float | None = None,
        learn_p: bool = False,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self._set_kind(kind, p, learn_p)
        self.levels, self.activation = arguments.check_levels(levels), activation

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, cells of all levels]."""
        return pyramid_pool2d(
            x, self.levels, self.kind, p=self._number(), activation=self.activation, training=self.training
        )


class ChannelPool(_OneKind):
    """`channel_pool`; stochastic samples in training."""

    def __init__(
        self,
        groups: int,
        kind: str = "max",
        *,
        p: float | None = None,
        learn_p: bool = False,
        activation: str | None = None,
        return_indices: bool = False,
    ) -> None:
        super().__init__()
        self._set_kind(kind, p, learn_p)
        self.groups, self.activation, self.return_indices = groups, activation, return_indices

    def forward(self, x: Tensor) -> Any:
        """[N, C, ...] -> [N, groups, ...], and indices where asked for."""
        return channel_pool(
            x, self.groups, self.kind, p=self._number(), activation=self.activation,
            return_indices=self.return_indices, training=self.training,
        )  # fmt: skip


class GlobalPool2d(_ManyKinds):
    """`global_pool2d`, the kinds' results one after another in one tensor; stochastic samples in training."""

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """[N, C, H, W], and sizes [N, 2] of padded images -> [N, kinds * C]."""
        pooled = global_pool2d(
            x, self.kinds, sizes=sizes, p=self._numbers(), activation=self.activation, training=self.training
        )
        return torch.cat(pooled, 1)


class RaggedPool(_ManyKinds):
    """`ragged_pool`, the kinds' results one after another in one tensor; stochastic samples in training."""

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """[P, C] and int64 [N + 1] -> [N, kinds * C]."""
        pooled = ragged_pool(
            x, offsets, self.kinds, p=self._numbers(), activation=self.activation, training=self.training
        )
        return torch.cat(pooled, 1)


class BatchNormActPool2d(_OneKind, _NormBase):
    """`batch_norm_act_pool2d`, with torch.nn.BatchNorm2d's parameters and buffers, whose state it loads."""

    def __init__(
        self,
        num_features: int,
        kernel_size: IntPair,
        stride: IntPair | None = None,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        *,
        kind: str = "max",
        activation: str | None = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        p: float | None = None,
        learn_p: bool = False,
        return_indices: bool = False,
    ) -> None:
        _NormBase.__init__(self, num_features, eps, momentum, affine, track_running_stats)
        self._set_kind(kind, p, learn_p)
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.ceil_mode, self.count_include_pad, self.divisor_override = ceil_mode, count_include_pad, divisor_override
        self.activation, self.return_indices = activation, return_indices

    def forward(self, x: Tensor) -> Any:
        """[N, C, H, W] -> [N, C, OH, OW], and indices where asked for."""
        momentum = self.momentum or 0.0
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        return batch_norm_act_pool2d(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.kernel_size, self.stride,
            self.padding, self.dilation, kind=self.kind, activation=self.activation,
            training=self.training or self.running_mean is None, momentum=momentum, eps=self.eps,
            ceil_mode=self.ceil_mode, count_include_pad=self.count_include_pad,
            divisor_override=self.divisor_override, p=self._number(), return_indices=self.return_indices,
        )  # fmt: skip


class Conv1x1GlobalPool2d(_OneKind):
    """`conv1x1_global_pool2d`, with torch.nn.Conv2d's parameters, whose state it loads."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bias: bool = True,
        activation: str | None = "relu",
        kind: str = "avg",
        p: float | None = None,
        learn_p: bool = False,
    ) -> None:
        super().__init__()
        self._set_kind(kind, p, learn_p)
        self.in_channels, self.out_channels, self.activation = in_channels, out_channels, activation
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch.nn.Conv2d's."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_channels)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """[N, Cin, H, W] -> [N, Cout]."""
        return conv1x1_global_pool2d(x, self.weight, self.bias, self.activation, self.kind, p=self._number())
