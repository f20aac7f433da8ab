"""Families of classifiers in plain PyTorch, narrow and with random weights, and what each is at other sizes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES: Final = 7


@dataclass(frozen=True)
class Family:
    """One network and what may be expected of it.

    Attributes:
        make: the module; logits [N, CLASSES] of float [N, 3, side, side].
        side: the image size that it was made for.
        elsewhere: what it is at other sizes, given the module and images: itself, unless its head fits one size alone.
        tiles: whether it can be served in strips.
        class_map: whether its logits are a mean over places.
    """

    make: Callable[[], nn.Module]
    side: int = 64
    elsewhere: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__
    tiles: bool = True
    class_map: bool = True


def head_everywhere(net: nn.Module, images: Tensor) -> Tensor:
    """The mean of what the layers from Flatten on say of every place where they fit, one place after the other."""
    layers = list(net.children())
    (cut,) = (number for number, layer in enumerate(layers) if isinstance(layer, nn.Flatten))
    body = nn.Sequential(*(layer for layer in layers[:cut] if not isinstance(layer, nn.AdaptiveAvgPool2d)))
    head = nn.Sequential(*layers[cut:])
    first = next(layer for layer in layers[cut:] if isinstance(layer, nn.Linear))
    mapped = body(images)
    side = round((first.in_features / mapped.shape[1]) ** 0.5)
    places = [
        head(mapped[:, :, top : top + side, left : left + side])
        for top in range(mapped.shape[2] - side + 1)
        for left in range(mapped.shape[3] - side + 1)
    ]
    return torch.stack(places).mean(0)


def pooled_globally(net: nn.Module, images: Tensor) -> Tensor:
    """A fixed pool over the whole map is a mean over the whole map."""
    assert isinstance(net, Resnet)
    logits: Tensor = net.fc(net.blocks(net.stem(images)).mean((2, 3)))
    return logits


def made(family: Family) -> nn.Module:
    """The family's network in evaluation mode, with weights and statistics that keep values near 1 and matter."""
    torch.manual_seed(0)
    net = family.make()
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.uniform_(module.bias, -0.2, 0.2)
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.bias, -0.3, 0.3)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.7, 1.5)  # type: ignore[arg-type]
    return net.eval()


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


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channels of all groups in turn."""
    n, c, h, w = x.size()
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class ShuffleUnit(nn.Module):
    """Half the channels pass by (Ma et al. 2018, arXiv:1807.11164, fig. 3c, d)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.stride = stride
        self.left = nn.Sequential(depthwise(inputs, stride), conv(inputs, half, 1)) if stride > 1 else nn.Identity()
        self.right = nn.Sequential(
            conv(inputs if stride > 1 else half, half, 1), depthwise(half, stride), conv(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = (x, x) if self.stride > 1 else x.chunk(2, dim=1)
        return shuffle(torch.cat((self.left(left), self.right(right)), 1), 2)


def depthwise(channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False), nn.BatchNorm2d(channels)
    )


class Shufflenet(nn.Module):
    """Mean over height and width, then one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(3, 8, 3, 2), nn.MaxPool2d(3, 2, 1), ShuffleUnit(8, 16, 2), ShuffleUnit(16, 16, 1), conv(16, 32, 1)
        )
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.body(x).mean([2, 3]))
        return logits


class GroupShuffleUnit(nn.Module):
    """Grouped 1x1 convolutions, their channels shuffled (Zhang et al. 2017, arXiv:1707.01083, fig. 2b, c)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        new = outputs - inputs if stride > 1 else outputs
        self.first, self.middle = conv(inputs, 6, 1, groups=3), depthwise(6, stride)
        self.last = nn.Sequential(nn.Conv2d(6, new, 1, groups=3, bias=False), nn.BatchNorm2d(new))

    def forward(self, x: Tensor) -> Tensor:
        new = self.last(self.middle(shuffle(self.first(x), 3)))
        return F.relu(torch.cat((F.avg_pool2d(x, 3, 2, 1), new), 1) if self.stride > 1 else x + new)


def shufflenet_groups() -> nn.Module:
    return nn.Sequential(
        conv(3, 12, 3, 2),
        GroupShuffleUnit(12, 24, 2),
        GroupShuffleUnit(24, 24, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
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


def mobilenet_v1() -> nn.Module:
    """Depthwise and 1x1 convolutions in turn (Howard et al. 2017, arXiv:1704.04861, table 1)."""

    def separable(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [conv(inputs, inputs, 3, stride, groups=inputs), conv(inputs, outputs, 1)]

    layers = [conv(3, 8, 3, 2), *separable(8, 12, 1), *separable(12, 16, 2), *separable(16, 24, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES))


class Inverted(nn.Module):
    """Widened, filtered, narrowed (Sandler et al. 2018, arXiv:1801.04381, fig. 4), `excite` before narrowing."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, activation: Callable[[], nn.Module], excite: bool = False
    ) -> None:
        super().__init__()
        inner = 3 * inputs
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), activation()),
            *(depthwise(inner, stride), activation()),
            *([SqueezeExcite(inner, nn.Hardsigmoid())] if excite else []),
            *(nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.joined = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.joined else y


class MobilenetV2(nn.Module):
    """ReLU6; its pool by function, then a view."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
            *(Inverted(8, 12, 2, nn.ReLU6), Inverted(12, 12, 1, nn.ReLU6), Inverted(12, 16, 2, nn.ReLU6)),
            *(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), (1, 1)).reshape(x.shape[0], -1)
        logits: Tensor = self.classifier(x)
        return logits


def mobilenet_v3(excite: bool) -> nn.Module:
    """Hard swish; a head that is not linear (Howard et al. 2019, arXiv:1905.02244, table 2)."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish()),
        Inverted(8, 12, 2, nn.ReLU, excite),
        Inverted(12, 12, 1, nn.Hardswish, excite),
        *(nn.Conv2d(12, 32, 1, bias=False), nn.BatchNorm2d(32), nn.Hardswish()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(32, 40), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(40, CLASSES)),
    )


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


FAMILIES: Final = {
    "squeezenet": Family(squeezenet),
    "resnet": Family(Resnet),
    "resnet-bottleneck": Family(lambda: Resnet(bottleneck=True)),
    "resnet-fixed-pool": Family(lambda: Resnet(fixed_pool=True), elsewhere=pooled_globally),
    "resnet-squeeze-excite": Family(lambda: Resnet(squeeze_excite=True), tiles=False),
    "densenet": Family(Densenet),
    "inception": Family(lambda: inception(padded=False), side=75),
    "inception-disagreeing": Family(lambda: inception(padded=True)),
    "shufflenet": Family(Shufflenet),
    "shufflenet-groups": Family(shufflenet_groups),
    "vgg": Family(lambda: vgg(adaptive=False), side=56, elsewhere=head_everywhere),
    "vgg-adaptive": Family(lambda: vgg(adaptive=True), side=56, elsewhere=head_everywhere),
    "alexnet": Family(alexnet, side=127, elsewhere=head_everywhere),
    "mobilenet-v1": Family(mobilenet_v1),
    "mobilenet-v2": Family(MobilenetV2),
    "mobilenet-v3": Family(lambda: mobilenet_v3(excite=True), tiles=False, class_map=False),
    "mobilenet-v3-plain": Family(lambda: mobilenet_v3(excite=False), class_map=False),
    "convnext": Family(lambda: convnext(formula=False), class_map=False),
    "convnext-formula": Family(lambda: convnext(formula=True), class_map=False),
}
"""What must convert."""

VIT: Final = Family(Vit)
"""What must not."""
