"""What several families are built of."""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES: Final = 7


def conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int | None = None, groups: int = 1
) -> nn.Sequential:
    """Convolution, batch norm, ReLU; padded so that stride 1 keeps the size, unless told."""
    padding = kernel // 2 if padding is None else padding
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def depthwise(channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False), nn.BatchNorm2d(channels)
    )


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channels of all groups in turn."""
    n, c, h, w = x.size()
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class SqueezeExcite(nn.Module):
    """Channels scaled by what the whole map says (Hu et al. 2017, arXiv:1709.01507, fig. 2)."""

    def __init__(self, channels: int, gate: nn.Module) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // 2, 1), nn.Conv2d(channels // 2, channels, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.gate(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return x * scale


class DenseSqueezeExcite(nn.Module):
    """The same, with fully connected layers and views."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, channels // 2), nn.Linear(channels // 2, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, _, _ = x.size()
        scale = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return x * scale.view(n, c, 1, 1)
