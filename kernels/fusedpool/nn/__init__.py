"""The operators as modules."""

from fusedpool.nn.fused import BatchNormActPool2d, Conv1x1GlobalPool2d
from fusedpool.nn.pools import (
    AdaptivePool2d,
    ChannelPool,
    FractionalPool2d,
    GlobalPool2d,
    Pool2d,
    PyramidPool2d,
    RaggedPool,
)

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
