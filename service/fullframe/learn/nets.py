"""The network: Inception-style, fully convolutional, good for every image size from 1x1."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fullframe.errors import InvalidInput

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


@dataclass(frozen=True)
class NetConfig:
    """What a network is made of.

    Attributes:
        classes: number of classes.
        width: channels of the first stage; each further stage has twice as many. A multiple of 16.
        depth: blocks in each stage; before each stage a 3x3 stride-2 pool halves the map.
        stem: channels of the 3x3 convolution at full resolution (what bounds memory on large images).
        activation: relu, leaky_relu (slope 0.1), gelu or silu.
        block_pooling: max or avg, in the blocks' pool branch and between stages.
        global_pooling: avg, max, gem (p = 3) or avg+max. Only avg has a class map.
        dropout: probability, on the features, in training.
    """

    classes: int
    width: int = 64
    depth: tuple[int, ...] = (1, 2, 2)
    stem: int = 16
    activation: str = "relu"
    block_pooling: str = "max"
    global_pooling: str = "avg"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        choices: dict[str, Iterable[str]] = {
            "activation": ACTIVATIONS,
            "block_pooling": BLOCK_POOLINGS,
            "global_pooling": GLOBAL_POOLINGS,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InvalidInput(f"{name} is {value!r}; it must be one of {', '.join(allowed)}", name)
        if self.classes < 1:
            raise InvalidInput(f"classes is {self.classes}; it must be at least 1", "classes")
        if self.width < 16 or self.width % 16:
            raise InvalidInput(f"width is {self.width}; it must be a positive multiple of 16", "width")
        if not self.depth or min(self.depth) < 1 or len(self.depth) > 6:
            raise InvalidInput(f"depth is {self.depth}; it must be 1 to 6 counts of at least 1", "depth")
        if self.stem < 1:
            raise InvalidInput(f"stem is {self.stem}; it must be at least 1", "stem")
        if not 0 <= self.dropout < 1:
            raise InvalidInput(f"dropout is {self.dropout}; it must be in [0, 1)", "dropout")

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self) | {"depth": list(self.depth)}

    def for_classes(self, classes: int) -> "NetConfig":
        """The same network with another number of classes."""
        return replace(self, classes=classes)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "NetConfig":
        """The inverse of `to_json`; InvalidInput names an unknown field."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise InvalidInput(f"unknown network settings: {', '.join(sorted(unknown))}", "net")
        return cls(**values | {"depth": tuple(values.get("depth", cls.depth))})


class NetOutputs(NamedTuple):
    """Everything one pass gives: [N, C, h, w], [N, D], [N, K] and, where pooling is avg, [N, K, h, w]."""

    feature_map: Tensor
    features: Tensor
    logits: Tensor
    class_map: Tensor | None


def _conv(inputs: int, outputs: int, kernel: int, activation: str) -> nn.Sequential:
    """Convolution that keeps the size, batch norm, activation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        ACTIVATIONS[activation](),
    )


class InceptionBlock(nn.Module):
    """Parallel 1x1, 3x3, 5x5 and pool branches, concatenated (Szegedy et al. 2014, arXiv:1409.4842, fig. 2b).

    The shares of the `outputs` channels are those of the paper's block 3a.
    """

    def __init__(self, inputs: int, outputs: int, activation: str, pooling: str) -> None:
        super().__init__()
        share = outputs // 16

        def conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
            return _conv(inputs, outputs, kernel, activation)

        self.point = conv(inputs, 4 * share, 1)
        self.three = nn.Sequential(conv(inputs, 6 * share, 1), conv(6 * share, 8 * share, 3))
        self.five = nn.Sequential(conv(inputs, share, 1), conv(share, 2 * share, 5))
        self.pool = nn.Sequential(BLOCK_POOLINGS[pooling](1), conv(inputs, 2 * share, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, h, w] -> [N, outputs, h, w]."""
        return torch.cat((self.point(x), self.three(x), self.five(x), self.pool(x)), 1)


class Net(nn.Module):
    """Stem, stages of blocks each behind a stride-2 pool, global pooling, a 1x1 convolution as classifier.

    Every pool is padded, so a side of n >= 1 pixels becomes ceil(n / 2) >= 1 and no size is too small.

    Attributes:
        feature_channels: C of the feature map.
    """

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = [_conv(3, config.stem, 3, config.activation)]
        channels = config.stem
        for stage, blocks in enumerate(config.depth):
            layers.append(BLOCK_POOLINGS[config.block_pooling](2))
            outputs = config.width << stage
            for _ in range(blocks):
                layers.append(InceptionBlock(channels, outputs, config.activation, config.block_pooling))
                channels = outputs
        self.body = nn.Sequential(*layers)
        self.feature_channels = channels
        pooled = channels * (1 + config.global_pooling.count("+"))
        self.classifier = nn.Conv2d(pooled, config.classes, 1)
        self._initialise()

    def _initialise(self) -> None:
        """He et al. 2015 (arXiv:1502.01852) for what precedes an activation; a classifier that starts near 0."""
        for module in self.body.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.classifier.weight, std=0.01)
        if self.classifier.bias is not None:
            nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of normalised float images [N, 3, H, W], any H and W from 1."""
        return self._head(self.body(x))[1]

    def outputs(self, x: Tensor) -> NetOutputs:
        """Everything for the images that `forward` takes."""
        feature_map = self.body(x)
        features, logits = self._head(feature_map)
        class_map = self.classifier(feature_map) if self.config.global_pooling == "avg" else None
        return NetOutputs(feature_map, features, logits, class_map)

    def _head(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, D] and logits [N, K]; after average pooling these are the class map's mean too."""
        pooled = GLOBAL_POOLINGS[self.config.global_pooling](feature_map)
        logits = self.classifier(F.dropout(pooled, self.config.dropout, self.training))
        return pooled.flatten(1), logits.flatten(1)


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
