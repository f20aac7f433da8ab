"""Pooling operators for PyTorch, fused and exact: every kind over every domain, forward and backward."""

from fusedpool.batchnorm import batch_norm_act_pool2d
from fusedpool.channel import channel_pool
from fusedpool.conv import conv1x1_global_pool2d
from fusedpool.fractional import fractional_pool2d
from fusedpool.grid import adaptive_pool2d, pyramid_pool2d
from fusedpool.ragged import ragged_pool
from fusedpool.whole import global_pool2d
from fusedpool.window import pool2d

__all__ = [
    "adaptive_pool2d",
    "batch_norm_act_pool2d",
    "channel_pool",
    "conv1x1_global_pool2d",
    "fractional_pool2d",
    "global_pool2d",
    "pool2d",
    "pyramid_pool2d",
    "ragged_pool",
]
