"""Modules of the operators that pool alone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedpool import geometry
from fusedpool.channel import channel_pool
from fusedpool.fractional import fractional_pool2d
from fusedpool.geometry import IntPair
from fusedpool.grid import adaptive_pool2d, pyramid_pool2d
from fusedpool.nn.base import ManyKinds, OneKind
from fusedpool.ragged import ragged_pool
from fusedpool.whole import global_pool2d
from fusedpool.window import pool2d


class Pool2d(OneKind):
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
        self._set_kind(kind, p, learn_p, activation)
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.ceil_mode, self.count_include_pad, self.divisor_override = ceil_mode, count_include_pad, divisor_override
        self.return_indices = return_indices

    def forward(self, x: Tensor) -> Any:
        """[N, C, H, W] -> [N, C, OH, OW], and indices where asked for."""
        return pool2d(
            x, self.kernel_size, self.stride, self.padding, self.dilation, **self._options(), ceil_mode=self.ceil_mode,
            count_include_pad=self.count_include_pad, divisor_override=self.divisor_override,
            return_indices=self.return_indices,
        )  # fmt: skip


class FractionalPool2d(OneKind):
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
        self._set_kind(kind, p, learn_p, activation)
        self.kernel_size, self.output_size, self.output_ratio = kernel_size, output_size, output_ratio
        self.return_indices = return_indices

    def forward(self, x: Tensor) -> Any:
        """[N, C, H, W] -> [N, C, OH, OW], and indices where asked for."""
        sizes = (self.kernel_size, self.output_size, self.output_ratio)
        return fractional_pool2d(x, *sizes, **self._options(), return_indices=self.return_indices)


class AdaptivePool2d(OneKind):
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
        self._set_kind(kind, p, learn_p, activation)
        self.output_size, self.return_indices = output_size, return_indices

    def forward(self, x: Tensor) -> Any:
        """[N, C, H, W] -> [N, C, OH, OW], and indices where asked for."""
        return adaptive_pool2d(x, self.output_size, **self._options(), return_indices=self.return_indices)


class PyramidPool2d(OneKind):
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
        self._set_kind(kind, p, learn_p, activation)
        self.levels = geometry.check_levels(levels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, cells of all levels]."""
        return pyramid_pool2d(x, self.levels, **self._options())


class ChannelPool(OneKind):
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
        self._set_kind(kind, p, learn_p, activation)
        self.groups, self.return_indices = groups, return_indices

    def forward(self, x: Tensor) -> Any:
        """[N, C, ...] -> [N, groups, ...], and indices where asked for."""
        return channel_pool(x, self.groups, **self._options(), return_indices=self.return_indices)


class GlobalPool2d(ManyKinds):
    """`global_pool2d`, the kinds' results one after another in one tensor; stochastic samples in training."""

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """[N, C, H, W], and sizes [N, 2] of padded images -> [N, kinds * C]."""
        return torch.cat(global_pool2d(x, sizes=sizes, **self._options()), 1)


class RaggedPool(ManyKinds):
    """`ragged_pool`, the kinds' results one after another in one tensor; stochastic samples in training."""

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """[P, C] and int64 [N + 1] -> [N, kinds * C]."""
        return torch.cat(ragged_pool(x, offsets, **self._options()), 1)
