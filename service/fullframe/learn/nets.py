"""The network: stages of Inception or residual blocks, fully convolutional, good for every image size from 1x1."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fullframe.errors import InvalidInput
from fullframe.learn.settings import NetConfig

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.1, inplace=True),
    "gelu": nn.GELU,
    "silu": lambda: nn.SiLU(inplace=True),
}
BLOCK_POOLINGS: dict[str, Callable[[int], nn.Module]] = {
    "max": lambda stride: nn.MaxPool2d(3, stride, padding=1),
    "avg": lambda stride: nn.AvgPool2d(3, stride, padding=1, count_include_pad=False),
}
GEM_EPS = 1e-6


def _gem(x: Tensor, p: float = 3.0) -> Tensor:
    """Generalised mean, (mean max(x, eps)^p)^(1/p) (Radenovic et al. 2018, arXiv:1711.02512, eq. 3)."""
    return x.clamp(min=GEM_EPS).pow(p).mean((2, 3), keepdim=True).pow(1 / p)


def _avg(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def _max(x: Tensor) -> Tensor:
    return x.amax((2, 3), keepdim=True)


GLOBAL_POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": _avg,
    "max": _max,
    "gem": _gem,
    "avg+max": lambda x: torch.cat((_avg(x), _max(x)), 1),
}


class NetOutputs(NamedTuple):
    """Everything one pass gives: [N, C, h, w], [N, D], [N, K] and, where pooling is avg, [N, K, h, w]."""

    feature_map: Tensor
    features: Tensor
    logits: Tensor
    class_map: Tensor | None


def _conv(inputs: int, outputs: int, kernel: int, activation: str | None, stride: int = 1) -> nn.Sequential:
    """Convolution that keeps the size up to its stride, batch norm and, unless None, activation."""
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([] if activation is None else [ACTIVATIONS[activation]()]))


class InceptionBlock(nn.Module):
    """Parallel 1x1, 3x3, 5x5 and pool branches, concatenated (Szegedy et al. 2014, arXiv:1409.4842, fig. 2b).

    The shares of the `outputs` channels are those of the paper's block 3a. A stride is a pool before them all.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str, pooling: str) -> None:
        super().__init__()
        share = outputs // 16

        def conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
            return _conv(inputs, outputs, kernel, activation)

        self.shrink = BLOCK_POOLINGS[pooling](stride) if stride > 1 else nn.Identity()
        self.point = conv(inputs, 4 * share, 1)
        self.three = nn.Sequential(conv(inputs, 6 * share, 1), conv(6 * share, 8 * share, 3))
        self.five = nn.Sequential(conv(inputs, share, 1), conv(share, 2 * share, 5))
        self.pool = nn.Sequential(BLOCK_POOLINGS[pooling](1), conv(inputs, 2 * share, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, h, w] -> [N, outputs, ceil(h / stride), ceil(w / stride)]."""
        x = self.shrink(x)
        return torch.cat((self.point(x), self.three(x), self.five(x), self.pool(x)), 1)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2015, arXiv:1512.03385, fig. 2).

    Where the shape changes, the shortcut is a pool and a 1x1 convolution (He et al. 2018, arXiv:1812.01187, fig. 2c).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str, pooling: str) -> None:
        super().__init__()
        self.main = self._main(inputs, outputs, stride, activation)
        shortcut: list[nn.Module] = [BLOCK_POOLINGS[pooling](stride)] if stride > 1 else []
        if inputs != outputs:
            shortcut.append(_conv(inputs, outputs, 1, None))
        self.shortcut = nn.Sequential(*shortcut)
        self.activation = ACTIVATIONS[activation]()

    @staticmethod
    def _main(inputs: int, outputs: int, stride: int, activation: str) -> nn.Sequential:
        return nn.Sequential(_conv(inputs, outputs, 3, activation, stride), _conv(outputs, outputs, 3, None))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, h, w] -> [N, outputs, ceil(h / stride), ceil(w / stride)]."""
        joined: Tensor = self.activation(self.main(x) + self.shortcut(x))
        return joined


class BottleneckBlock(ResidualBlock):
    """A 3x3 convolution on half the channels, between 1x1 convolutions (the same paper, fig. 5)."""

    @staticmethod
    def _main(inputs: int, outputs: int, stride: int, activation: str) -> nn.Sequential:
        half = max(1, outputs // 2)
        return nn.Sequential(
            _conv(inputs, half, 1, activation),
            _conv(half, half, 3, activation, stride),
            _conv(half, outputs, 1, None),
        )


BLOCKS: dict[str, Callable[[int, int, int, str, str], nn.Module]] = {
    "inception": InceptionBlock,
    "residual": ResidualBlock,
    "bottleneck": BottleneckBlock,
}
GATE_FLOOR = 1e-3
"""Least weight of a scale, so that dividing by the weights' sum is harmless."""


class Net(nn.Module):
    """Stem, stages of blocks, global pooling, a 1x1 convolution as classifier.

    Each stage begins with a stride of 2, the first one if asked. All windows are padded, so a side of n >= 1 pixels
    becomes ceil(n / 2) >= 1 and no size is too small.

    With several levels the same stem and stages see the image at full, half, quarter ... size, so that what they
    learnt of small objects holds for large ones. Each level's map gets a weight per cell from a gate; the feature
    map is the weighted mean over the levels and over the finer levels' cells, on the coarsest level's grid.

    Attributes:
        feature_channels: C of the feature map.
    """

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = [_conv(3, config.stem, 3, config.activation)]
        channels = config.stem
        for stage, blocks in enumerate(config.depth):
            outputs = config.width << stage
            for number in range(blocks):
                stride = 1 if number else 2 if stage else config.first_stride
                block = BLOCKS[config.block]
                layers.append(block(channels, outputs, stride, config.activation, config.block_pooling))
                channels = outputs
        self.body = nn.Sequential(*layers)
        self.feature_channels = channels
        if config.levels > 1:
            self.shrink = nn.Conv2d(3, 3, 3, stride=2, padding=1, bias=False)
            self.gate = nn.Conv2d(channels, 1, 1)
        pooled = channels * (1 + config.global_pooling.count("+"))
        self.classifier = nn.Conv2d(pooled, config.classes, 1)
        self.pool = GLOBAL_POOLINGS[config.global_pooling]
        self.to_grid = to_grid
        self._initialise()

    def _initialise(self) -> None:
        """He et al. 2015 (arXiv:1502.01852) for what precedes an activation; a classifier that starts near 0.

        Levels start as a binomial filter and equal weights.
        """
        for module in self.body.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.classifier.weight, std=0.01)
        if self.classifier.bias is not None:
            nn.init.zeros_(self.classifier.bias)
        if self.config.levels > 1:
            tap = torch.tensor([0.25, 0.5, 0.25])
            self.shrink.weight.data.copy_(torch.eye(3).view(3, 3, 1, 1) * torch.outer(tap, tap))
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of normalised float images [N, 3, H, W], any H and W from 1."""
        return self._head(self.feature_map(x))[1]

    def outputs(self, x: Tensor) -> NetOutputs:
        """Everything for the images that `forward` takes."""
        feature_map = self.feature_map(x)
        features, logits = self._head(feature_map)
        class_map = self.classifier(feature_map) if self.config.global_pooling == "avg" else None
        return NetOutputs(feature_map, features, logits, class_map)

    def feature_map(self, x: Tensor) -> Tensor:
        """[N, C, h, w] for the images that `forward` takes."""
        if self.config.levels == 1:
            mapped: Tensor = self.body(x)
            return mapped
        weighted, weights = [], []
        for level in reversed(range(self.config.levels)):
            features = self.body(x)
            weight = torch.sigmoid(self.gate(features)) + GATE_FLOOR
            weighted.append(self.to_grid(features * weight, 1 << level))
            weights.append(self.to_grid(weight, 1 << level))
            if level:
                x = self.shrink(x)
        return sum(weighted[1:], weighted[0]) / sum(weights[1:], weights[0])

    def _head(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, D] and logits [N, K]; after average pooling these are the class map's mean too."""
        pooled = self.pool(feature_map)
        logits = self.classifier(F.dropout(pooled, self.config.dropout, self.training))
        return pooled.flatten(1), logits.flatten(1)


def to_grid(x: Tensor, factor: int) -> Tensor:
    """Means of x around every `factor`-th cell: a side of n becomes ceil(n / factor)."""
    return F.avg_pool2d(x, factor + 1, factor, factor // 2, count_include_pad=False) if factor > 1 else x


def fully_connected_to_conv(linear: nn.Linear, channels: int, height: int, width: int) -> nn.Conv2d:
    """A fully connected layer over flattened [channels, height, width] maps, as the same numbers in a convolution.

    On maps of that size the convolution gives [N, outputs, 1, 1], equal to the layer; on larger ones a map of its
    answers at every place. A layer over pooled features is the case height = width = 1. Raises InvalidInput where
    the layer does not take channels * height * width inputs.
    """
    if linear.in_features != channels * height * width:
        raise InvalidInput(
            f"the layer takes {linear.in_features} inputs; a [{channels}, {height}, {width}] map has "
            f"{channels * height * width}",
            "linear",
        )
    like = linear.weight
    conv = nn.Conv2d(
        channels,
        linear.out_features,
        (height, width),
        bias=linear.bias is not None,
        device=like.device,
        dtype=like.dtype,
    )
    with torch.no_grad():
        conv.weight.copy_(like.view(conv.weight.shape))
        if conv.bias is not None:
            conv.bias.copy_(linear.bias)
    return conv
