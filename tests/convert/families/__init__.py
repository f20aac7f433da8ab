"""Families of classifiers in plain PyTorch, narrow and with random weights, and what each is at other sizes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from tests.convert.families.classic import Densenet, Resnet, alexnet, inception, pooled_globally, squeezenet, vgg
from tests.convert.families.mobile import MobilenetV2, Shufflenet, mobilenet_v1, mobilenet_v3, shufflenet_groups
from tests.convert.families.modern import Vit, convnext


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
