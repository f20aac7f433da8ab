"""Modules of the operators that normalise or convolve before they pool, with the parameters of torch.nn's."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fusedpool.batchnorm import batch_norm_act_pool2d
from fusedpool.conv import conv1x1_global_pool2d
from fusedpool.geometry import IntPair
from fusedpool.nn.base import OneKind


class BatchNormActPool2d(OneKind, _NormBase):
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
        self._set_kind(kind, p, learn_p, activation)
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.ceil_mode, self.count_include_pad, self.divisor_override = ceil_mode, count_include_pad, divisor_override
        self.return_indices = return_indices

    def forward(self, x: Tensor) -> Any:
        """[N, C, H, W] -> [N, C, OH, OW], and indices where asked for."""
        momentum: float | Tensor = self.momentum or 0.0
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a cumulative average
                momentum = 1.0 / self.num_batches_tracked
        return batch_norm_act_pool2d(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.kernel_size, self.stride,
            self.padding, self.dilation, kind=self.kind, activation=self.activation,
            training=self.training or self.running_mean is None, momentum=momentum, eps=self.eps,
            ceil_mode=self.ceil_mode, count_include_pad=self.count_include_pad,
            divisor_override=self.divisor_override, p=self._number(), return_indices=self.return_indices,
        )  # fmt: skip


class Conv1x1GlobalPool2d(OneKind):
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
        self._set_kind(kind, p, learn_p, activation)
        self.in_channels, self.out_channels = in_channels, out_channels
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
