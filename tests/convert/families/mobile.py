"""ShuffleNets and MobileNets."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.convert.families.parts import CLASSES, SqueezeExcite, conv, depthwise, shuffle


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
