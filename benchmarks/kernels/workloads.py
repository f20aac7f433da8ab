"""What is measured: operators with their bytes, beside plain PyTorch for the same work, at sizes of known networks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedpool

Run = Callable[..., Any]  # x and the other inputs -> a tensor, or several


@dataclass(frozen=True)
class Operation:
    """One operator and its plain PyTorch.

    Attributes:
        forward, backward: the bytes that must move, each input read once and each output written once: s bytes per
            element, e elements of x, o of all outputs. What forward keeps for backward counts.
        inputs: x -> what the operator takes besides; those that require gradients get them.
        exact: what to check against instead of `plain`, where that shares a gradient among equal maxima.
    """

    name: str
    fused: Run
    plain: Run
    forward: str
    backward: str
    inputs: Callable[[Tensor], tuple[Tensor, ...]] = field(default=lambda x: ())
    exact: Run | None = None

    def bytes(self, direction: str, s: int, e: int, o: int) -> int:
        """The formula's value."""
        return int(eval(getattr(self, direction), {"s": s, "e": e, "o": o}))


@dataclass(frozen=True)
class Workload:
    """An operation at a network's sizes; shape: of x, [N, C, H, W], or [pixels, C] for packed images."""

    name: str
    operation: Operation
    shape: tuple[int, ...]
    quick: bool = False

    def tiny(self) -> "Workload":
        """The same work in miniature, to try the script."""
        n, c, *size = self.shape
        shape = (2, min(c, 8), *(min(length, 16) for length in size)) if size else (n // 256, min(c, 8))
        return Workload(self.name, self.operation, shape, self.quick)


def _affine(x: Tensor) -> tuple[Tensor, ...]:
    """scale and shift [C]: multiples of 1/8, so that float32 and float64 agree about ties."""
    c = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
    return ((c % 7 + 4) / 8).requires_grad_(), ((c % 5 - 2) / 8).requires_grad_()


def _norm(x: Tensor) -> tuple[Tensor, ...]:
    c = x.shape[1]
    return *_affine(x), torch.zeros(c, device=x.device), torch.ones(c, device=x.device)


def _filters(x: Tensor) -> tuple[Tensor, ...]:
    """weight [512, C] and bias [512], of x's type: few bits, and sums that float32 holds and that are never zero."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-8, 9, (512, x.shape[1]), generator=generator) / 16
    bias = (torch.randint(-100, 100, (512,), generator=generator) * 2 + 1) / 2048
    return tuple(t.to(x.device, x.dtype).requires_grad_() for t in (weight, bias))


def _lengths(pixels: int) -> list[int]:
    """Of 64 images, the largest three times the smallest."""
    weights = [64 + 2 * image for image in range(64)]
    ends = [pixels * sum(weights[: image + 1]) // sum(weights) for image in range(64)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _offsets(x: Tensor) -> tuple[Tensor, ...]:
    return (torch.tensor([0, *_lengths(x.shape[0])]).cumsum(0).to(x.device),)


def _scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * x + shift per channel in one kernel, as a frozen BatchNorm does it."""
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    return F.batch_norm(x, zero, one, scale, shift, training=False, eps=0.0)


def _gem(x: Tensor) -> Tensor:
    return x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)


def _pyramid(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(F.adaptive_avg_pool2d(x, level) for level in (1, 2, 4))


def _per_image(x: Tensor, offsets: Tensor) -> Tensor:
    return torch.stack([part.mean(0) for part in torch.split(x, _lengths(x.shape[0]))])


def _max(name: str, kernel: int, stride: int, padding: int = 0, ceil_mode: bool = False) -> Operation:
    return Operation(
        f"max {name}",
        lambda x: fusedpool.pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode),
        lambda x: F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode),
        "s*e + (s + 1)*o",
        "s*e + (s + 1)*o",
    )


_AVERAGE: Final = Operation(
    "avg 3x3",
    lambda x: fusedpool.pool2d(x, 3, 1, 1, kind="avg"),
    lambda x: F.avg_pool2d(x, 3, 1, 1),
    "s*e + s*o",
    "s*e + s*o",
)

_GEM_WINDOW: Final = Operation(
    "gem 3x3/2",
    lambda x: fusedpool.pool2d(x, 3, 2, kind="gem", p=3.0),
    lambda x: F.avg_pool2d(x.clamp(min=1e-6).pow(3), 3, 2).pow(1 / 3),
    "s*e + s*o",
    "2*s*e + 2*s*o",
)

_SCALED_MAX: Final = Operation(
    "scale + relu + max 3x3/2",
    lambda x, scale, shift: fusedpool.pool2d(x, 3, 2, 1, scale=scale, shift=shift, activation="relu"),
    lambda x, scale, shift: F.max_pool2d(F.relu(_scaled(x, scale, shift)), 3, 2, 1),
    "s*e + (s + 1)*o",
    "2*s*e + (s + 1)*o",
    _affine,
)

_NORM_MAX: Final = Operation(
    "batch norm + relu + max 3x3/2",
    lambda x, weight, bias, mean, var: fusedpool.batch_norm_act_pool2d(x, weight, bias, mean, var, 3, 2, 1),
    lambda x, weight, bias, mean, var: F.max_pool2d(F.relu(F.batch_norm(x, mean, var, weight, bias, True)), 3, 2, 1),
    "2*s*e + (s + 1)*o",
    "2*s*e + 2*(s + 1)*o + s*o",
    _norm,
)

_HEAD: Final = Operation(
    "global avg",
    lambda x: fusedpool.global_pool2d(x, ("avg",)),
    lambda x: x.mean((2, 3)),
    "s*e + s*o",
    "s*e + s*o",
)

_HEADS: Final = Operation(
    "global avg + max + gem",
    lambda x: fusedpool.global_pool2d(x, ("avg", "max", "gem")),
    lambda x: (x.mean((2, 3)), x.amax((2, 3)), _gem(x)),
    "s*e + s*o",
    "2*s*e + 2*s*o",
    exact=lambda x: (x.mean((2, 3)), x.flatten(2).max(2).values, _gem(x)),
)

_PYRAMID: Final = Operation(
    "pyramid avg 1 + 2 + 4",
    lambda x: fusedpool.pyramid_pool2d(x, (1, 2, 4), kind="avg"),
    lambda x: torch.cat([y.flatten(2) for y in _pyramid(x)], 2),
    "s*e + s*o",
    "s*e + s*o",
)

_ADAPTIVE: Final = Operation(
    "adaptive avg 6x6",
    lambda x: fusedpool.adaptive_pool2d(x, 6, kind="avg"),
    lambda x: F.adaptive_avg_pool2d(x, 6),
    "s*e + s*o",
    "s*e + s*o",
)

_RAGGED: Final = Operation(
    "ragged avg",
    lambda x, offsets: fusedpool.ragged_pool(x, offsets, ("avg",)),
    _per_image,
    "s*e + s*o",
    "s*e + s*o",
    _offsets,
)

_CHANNELS: Final = Operation(
    "maxout of 4 channels",
    lambda x: fusedpool.channel_pool(x, x.shape[1] // 4),
    lambda x: x.unflatten(1, (-1, 4)).amax(2),
    "s*e + (s + 1)*o",
    "s*e + (s + 1)*o",
    exact=lambda x: x.unflatten(1, (-1, 4)).max(2).values,
)

_FRACTIONAL: Final = Operation(
    "fractional max 2x2 to 0.71",
    lambda x: fusedpool.fractional_pool2d(x, 2, output_ratio=0.71, training=False),
    lambda x: F.fractional_max_pool2d(
        x, 2, output_ratio=(0.71, 0.71), _random_samples=x.new_full((*x.shape[:2], 2), 0.5)
    ),
    "s*e + (s + 1)*o",
    "s*e + (s + 1)*o",
)

_CONVOLUTION: Final = Operation(
    "conv 1x1 to 512 + relu + global avg",
    lambda x, weight, bias: fusedpool.conv1x1_global_pool2d(x, weight, bias, activation="relu"),
    lambda x, weight, bias: F.relu(F.conv2d(x, weight[:, :, None, None], bias)).mean((2, 3)),
    "s*e + s*o",
    "3*s*e + s*o",
    _filters,
)

WORKLOADS: Final = (
    Workload("resnet50 stem", _max("3x3/2", 3, 2, 1), (64, 64, 112, 112), quick=True),
    Workload("resnet50 stem", _SCALED_MAX, (64, 64, 112, 112), quick=True),
    Workload("resnet50 stem", _NORM_MAX, (64, 64, 112, 112), quick=True),
    Workload("resnet50 stem", _GEM_WINDOW, (64, 64, 112, 112)),
    Workload("vgg16 pool 1", _max("2x2/2", 2, 2), (32, 64, 224, 224), quick=True),
    Workload("vgg16 pool 5", _max("2x2/2", 2, 2), (64, 512, 14, 14)),
    Workload("squeezenet pool 1", _max("3x3/2 ceil", 3, 2, ceil_mode=True), (64, 64, 111, 111)),
    Workload("inception branch", _max("3x3", 3, 1, 1), (64, 288, 35, 35)),
    Workload("inception branch", _AVERAGE, (64, 288, 35, 35)),
    Workload("head 7x7", _HEAD, (256, 2048, 7, 7), quick=True),
    Workload("head 7x7", _HEADS, (256, 2048, 7, 7)),
    Workload("head 32x32", _HEADS, (64, 1024, 32, 32), quick=True),
    Workload("head 32x32", _PYRAMID, (64, 1024, 32, 32)),
    Workload("alexnet head 13x13", _ADAPTIVE, (256, 256, 13, 13)),
    Workload("64 images packed", _RAGGED, (262144, 256), quick=True),
    Workload("maxout 56x56", _CHANNELS, (64, 256, 56, 56)),
    Workload("fractional 112x112", _FRACTIONAL, (64, 64, 112, 112)),
    Workload("head 112x112", _CONVOLUTION, (32, 64, 112, 112), quick=True),
)
