"""ConvNeXt, which normalises over channels, and a vision transformer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.convert.families.parts import CLASSES


class PermutedNorm(nn.Module):
    """Layer norm over channels, which are moved to the end for it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


class FormulaNorm(nn.Module):
    """The same, written out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.rand(channels) - 0.5)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return self.weight[:, None, None] * ((x - mean) / torch.sqrt(variance + 1e-6)) + self.bias[:, None, None]


class ConvnextBlock(nn.Module):
    """7x7 depthwise convolution, norm, two layers per place, scaled (Liu et al. 2022, arXiv:2201.03545, fig. 4)."""

    def __init__(self, channels: int, formula: bool) -> None:
        super().__init__()
        self.filter = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.formula = formula
        self.norm = FormulaNorm(channels) if formula else nn.LayerNorm(channels, eps=1e-6)
        layer = (lambda i, o: nn.Conv2d(i, o, 1)) if formula else nn.Linear
        self.wide, self.narrow = layer(channels, 4 * channels), layer(4 * channels, channels)
        self.scale = nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.filter(x)
        y = y if self.formula else y.permute(0, 2, 3, 1)
        y = self.narrow(F.gelu(self.wide(self.norm(y))))
        scaled: Tensor = self.scale[:, None, None] * y if self.formula else (self.scale * y).permute(0, 3, 1, 2)
        return x + scaled


def convnext(formula: bool) -> nn.Module:
    """Its head normalises what it has pooled, so it is not linear."""
    norm = FormulaNorm if formula else PermutedNorm
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 4, 4), norm(8), ConvnextBlock(8, formula)),
        *(norm(8), nn.Conv2d(8, 16, 2, 2), ConvnextBlock(16, formula)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(16, eps=1e-6), nn.Linear(16, CLASSES)),
    )


class Vit(nn.Module):
    """Patches with one learnt position each, attention (Dosovitskiy et al. 2020, arXiv:2010.11929, fig. 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 16, 16)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 4 * 4 + 1, 16))
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), patches], 1) + self.positions
        logits: Tensor = self.head(self.encoder(x)[:, 0])
        return logits
