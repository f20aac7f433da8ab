"""SqueezeNet, ResNet, DenseNet, Inception, VGG and AlexNet."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.convert.families.parts import CLASSES, DenseSqueezeExcite, conv


class Fire(nn.Module):
    """Squeeze, then expand on two paths (Iandola et al. 2016, arXiv:1602.07360, fig. 1)."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.one = nn.Conv2d(squeeze, expand, 1)
        self.three = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


def squeezenet() -> nn.Module:
    """Pools that round up; class scores pooled, not features."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(16, 4, 8),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(16, 4, 12),
        nn.Dropout(0.5),
        nn.Conv2d(24, CLASSES, 1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class Residual(nn.Module):
    """Two or three convolutions beside a shortcut (He et al. 2015, arXiv:1512.03385, figs. 2, 5); `scale` is theirs."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, bottleneck: bool, scale: nn.Module | None = None
    ) -> None:
        super().__init__()
        inner = outputs // 2 if bottleneck else outputs
        first = [conv(inputs, inner, 1)] if bottleneck else []
        last = (1, 0) if bottleneck else (3, 1)
        self.body = nn.Sequential(
            *first,
            conv(inner if bottleneck else inputs, inner, 3, stride),
            nn.Conv2d(inner, outputs, last[0], padding=last[1], bias=False),
            nn.BatchNorm2d(outputs),
            *([] if scale is None else [scale]),
        )
        plain = stride == 1 and inputs == outputs
        shortcut = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Identity() if plain else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Resnet(nn.Module):
    """Stem, four blocks, and one of the heads that its makers have given it."""

    def __init__(self, bottleneck: bool = False, squeeze_excite: bool = False, fixed_pool: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, 7, 2), nn.MaxPool2d(3, 2, 1))

        def block(inputs: int, outputs: int, stride: int) -> Residual:
            scale = DenseSqueezeExcite(outputs) if squeeze_excite else None
            return Residual(inputs, outputs, stride, bottleneck, scale)

        self.blocks = nn.Sequential(block(8, 8, 1), block(8, 16, 2), block(16, 16, 1), block(16, 24, 2))
        self.pool: nn.Module = nn.AvgPool2d(4) if fixed_pool else nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.blocks(self.stem(x)))
        logits: Tensor = self.fc(x.view(x.size(0), -1))
        return logits


def pooled_globally(net: nn.Module, images: Tensor) -> Tensor:
    """A fixed pool over the whole map is a mean over the whole map."""
    assert isinstance(net, Resnet)
    logits: Tensor = net.fc(net.blocks(net.stem(images)).mean((2, 3)))
    return logits


class DenseLayer(nn.Module):
    """Normalised first; what it makes is added to the channels (Huang et al. 2016, arXiv:1608.06993, fig. 1)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, new], 1)


class Densenet(nn.Module):
    """Dense blocks between average pools; normalised once more before its head."""

    def __init__(self) -> None:
        super().__init__()
        shrink = [nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1, bias=False), nn.AvgPool2d(2, 2)]
        self.features = nn.Sequential(
            conv(3, 8, 7, 2),
            nn.MaxPool2d(3, 2, 1),
            *(DenseLayer(8 + 6 * i, 6) for i in range(2)),
            *shrink,
            *(DenseLayer(10 + 6 * i, 6) for i in range(2)),
            nn.BatchNorm2d(22),
        )
        self.classifier = nn.Linear(22, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.features(x), inplace=True)
        out = F.adaptive_avg_pool2d(out, (1, 1))
        logits: Tensor = self.classifier(torch.flatten(out, 1))
        return logits


class InceptionBlock(nn.Module):
    """Four paths, one of them a pool (Szegedy et al. 2014, arXiv:1409.4842, fig. 2b)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.one = conv(inputs, 4, 1)
        self.three = nn.Sequential(conv(inputs, 4, 1), conv(4, 6, 3))
        self.five = nn.Sequential(conv(inputs, 4, 1), conv(4, 4, 5))
        self.pooled = conv(inputs, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(F.avg_pool2d(x, 3, 1, 1))
        return torch.cat([self.one(x), self.three(x), self.five(x), pooled], 1)


class Reduction(nn.Module):
    """Convolution and pool of stride 2 side by side (Szegedy et al. 2015, arXiv:1512.00567, fig. 10).

    Where they are `padded` in different ways, they give the same size for even sides alone.
    """

    def __init__(self, inputs: int, padded: bool) -> None:
        super().__init__()
        self.conv = conv(inputs, 8, 3, 2, padding=int(padded))
        self.pool = nn.MaxPool2d(2 if padded else 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.pool(x)], 1)


def inception(padded: bool) -> nn.Module:
    return nn.Sequential(
        conv(3, 8, 3, 2),
        InceptionBlock(8),
        Reduction(18, padded),
        InceptionBlock(26),
        Reduction(18, padded),
        InceptionBlock(26),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.4),
        nn.Linear(18, CLASSES),
    )


def vgg(adaptive: bool) -> nn.Module:
    """Three fully connected layers over a flattened 7x7 map (Simonyan and Zisserman 2014, arXiv:1409.1556)."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (8, 12, 16):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2)]
        channels = width
    head = [nn.Linear(16 * 7 * 7, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 32), nn.ReLU(True), nn.Dropout()]
    pool = [nn.AdaptiveAvgPool2d((7, 7))] if adaptive else []
    return nn.Sequential(*layers, *pool, nn.Flatten(), *head, nn.Linear(32, CLASSES))


def alexnet() -> nn.Module:
    """Large stride, pools that round up, response normalisation (Krizhevsky et al. 2012); three layers over 3x3."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 11, stride=4),
        nn.ReLU(),
        nn.LocalResponseNorm(5, alpha=1e-2, beta=0.75, k=2.0),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(12, 16, 5, padding=2, groups=2),
        nn.ReLU(),
        nn.LocalResponseNorm(5, alpha=1e-2, beta=0.75, k=2.0),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(16 * 3 * 3, 24),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(24, 24),
        nn.ReLU(),
        nn.Linear(24, CLASSES),
    )
