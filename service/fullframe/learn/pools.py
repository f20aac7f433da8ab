"""A network's pools by fusedpool, in place of torch.nn: the same weights, names and, up to rounding, numbers."""

from typing import Final

from torch import Tensor, nn

import fusedpool
from fullframe.learn.nets import Net
from fusedpool.nn import Pool2d

_KINDS: Final = {"avg": ("avg",), "max": ("max",), "gem": ("gem",), "avg+max": ("avg", "max")}
"""What the global poolings are made of."""


def fuse_pools(net: Net) -> None:
    """Replace every pool of the net, in place. GeM's exponent and floor are those of nets.py."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.MaxPool2d | nn.AvgPool2d):
                setattr(module, name, _fused(child))
    net.pool = _Whole(_KINDS[net.config.global_pooling])
    net.to_grid = _to_grid


def _fused(pool: nn.MaxPool2d | nn.AvgPool2d) -> Pool2d:
    if isinstance(pool, nn.MaxPool2d):
        return Pool2d(pool.kernel_size, pool.stride, pool.padding, pool.dilation, ceil_mode=pool.ceil_mode)
    return Pool2d(
        pool.kernel_size,
        pool.stride,
        pool.padding,
        kind="avg",
        ceil_mode=pool.ceil_mode,
        count_include_pad=pool.count_include_pad,
        divisor_override=pool.divisor_override,
    )


class _Whole(nn.Module):
    """One of nets.GLOBAL_POOLINGS, all kinds from one read."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.pool = fusedpool.nn.GlobalPool2d(kinds)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.pool(x)
        return pooled[..., None, None]


def _to_grid(x: Tensor, factor: int) -> Tensor:
    """As nets.to_grid."""
    if factor == 1:
        return x
    pooled: Tensor = fusedpool.pool2d(x, factor + 1, factor, factor // 2, kind="avg", count_include_pad=False)
    return pooled
