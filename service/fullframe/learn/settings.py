"""Every setting that decides a trained network, with its default, its meaning and its limits."""

from dataclasses import asdict, dataclass, field, fields, replace
from math import cos, pi
from typing import Any

import numpy as np

from fullframe.errors import InvalidInput

ACTIVATIONS = ("relu", "leaky_relu", "gelu", "silu")
BLOCKS = ("inception", "residual", "bottleneck")
BLOCK_POOLINGS = ("max", "avg")
GLOBAL_POOLINGS = ("avg", "max", "gem", "avg+max")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "constant")
PRECISIONS = ("float32", "bfloat16")
POOLINGS = ("torch", "fused")
"""Whose pools a network trains with; the weights are the same."""


def _setting(default: Any, about: str) -> Any:
    """A field whose meaning is at hand for --help too."""
    return field(default=default, metadata={"about": about})


def _one_of(names: tuple[str, ...]) -> str:
    return f"one of {', '.join(names)}"


def _choice(default: str, names: tuple[str, ...], more: str = "") -> Any:
    return _setting(default, f"{_one_of(names).capitalize()}{more}.")


def _require(settings: Any, rules: dict[str, tuple[bool, str]]) -> None:
    """Raise InvalidInput for the first rule (name: holds, what would be right) that does not hold."""
    for name, (holds, wanted) in rules.items():
        if not holds:
            raise InvalidInput(f"{name} is {getattr(settings, name)!r}; it must be {wanted}", name)


@dataclass(frozen=True)
class NetConfig:
    """What a network is made of."""

    classes: int
    width: int = _setting(64, "Channels of the first stage; each next has twice as many.")
    depth: tuple[int, ...] = _setting((1, 2, 2), "Blocks in each stage.")
    stem: int = _setting(16, "Channels at full resolution, which bound the memory that large images take.")
    activation: str = _choice("relu", ACTIVATIONS, "; leaky_relu's slope is 0.1")
    block_pooling: str = _choice("max", BLOCK_POOLINGS)
    global_pooling: str = _choice("avg", GLOBAL_POOLINGS, "; only avg has a class map")
    dropout: float = _setting(0.0, "Probability, on the features, in training.")
    block: str = _choice("inception", BLOCKS)
    levels: int = _setting(1, "Sizes at which the same layers see an image: its own, half, quarter ...")
    first_stride: int = _setting(2, "Stride of the first stage, the others' being 2.")

    def __post_init__(self) -> None:
        step = 16 if self.block == "inception" else 1
        rules = {
            "classes": (self.classes >= 1, "at least 1"),
            "block": (self.block in BLOCKS, _one_of(BLOCKS)),
            "width": (self.width >= step and self.width % step == 0, f"a positive multiple of {step}"),
            "depth": (0 < len(self.depth) <= 6 and min(self.depth) >= 1, "1 to 6 counts of at least 1"),
            "first_stride": (self.first_stride in (1, 2), "1 or 2"),
            "stem": (self.stem >= 1, "at least 1"),
            "activation": (self.activation in ACTIVATIONS, _one_of(ACTIVATIONS)),
            "block_pooling": (self.block_pooling in BLOCK_POOLINGS, _one_of(BLOCK_POOLINGS)),
            "global_pooling": (self.global_pooling in GLOBAL_POOLINGS, _one_of(GLOBAL_POOLINGS)),
            "dropout": (0 <= self.dropout < 1, "in [0, 1)"),
            "levels": (1 <= self.levels <= 4, "1 to 4"),
        }
        _require(self, rules)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    def for_classes(self, classes: int) -> "NetConfig":
        """The same network with another number of classes."""
        return replace(self, classes=classes)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "NetConfig":
        """The inverse of `to_json`; InvalidInput names an unknown field."""
        return cls(**_known(cls, values))


@dataclass(frozen=True)
class Augmentation:
    """How training images vary."""

    sizes: tuple[int, ...] = _setting(
        (24, 32, 40, 48, 64), "Sides of the training images, one drawn per batch; SIDE:WEIGHT to prefer some."
    )
    size_weights: tuple[float, ...] = ()
    area: tuple[float, float] = _setting((0.5, 1.0), "Least and largest share of the image that a crop shows.")
    aspect: float = _setting(1.25, "Most that a crop is stretched.")
    reach: float = _setting(0.125, "Share of its side that a crop may pass the border, filled by reflection.")
    whole: float = _setting(0.5, "Share of the images that keep their scale and are only moved by whole pixels.")
    flip: float = _setting(0.5, "Share of the images mirrored left to right.")
    cut_mix: float = _setting(0.0, "Share of the batches whose images each get a rectangle of another image.")

    def __post_init__(self) -> None:
        weights = self.size_weights
        rules = {
            "sizes": (bool(self.sizes) and min(self.sizes, default=0) >= 1, "one or more sides of at least 1"),
            "size_weights": (
                not weights or (len(weights) == len(self.sizes) and min(weights) >= 0 and sum(weights) > 0),
                f"one weight of at least 0 per size ({len(self.sizes)}), not all 0",
            ),
            "area": (
                len(self.area) == 2 and 0 < self.area[0] <= self.area[-1] <= 1,
                "two numbers, 0 < low <= high <= 1",
            ),
            "aspect": (self.aspect >= 1, "at least 1"),
            "reach": (0 <= self.reach <= 1, "between 0 and 1"),
            "whole": (0 <= self.whole <= 1, "between 0 and 1"),
            "flip": (0 <= self.flip <= 1, "between 0 and 1"),
            "cut_mix": (0 <= self.cut_mix <= 1, "between 0 and 1"),
        }
        _require(self, rules)

    def draw_size(self, rng: np.random.Generator) -> int:
        """The side of one batch's images."""
        if not self.size_weights:
            return int(rng.choice(self.sizes))
        weights = np.asarray(self.size_weights)
        return int(rng.choice(self.sizes, p=weights / weights.sum()))


@dataclass(frozen=True)
class Recipe:
    """How it is trained."""

    epochs: int = _setting(30, "Passes over the images.")
    batch_size: int = _setting(128, "Images per step; all, where there are fewer.")
    batch_pixels: int = _setting(0, "Most pixels per step, so that large images come in smaller batches; 0: any.")
    optimizer: str = _choice("sgd", OPTIMIZERS, "; sgd has Nesterov momentum 0.9")
    learning_rate: float = _setting(0.1, "Its peak; around 0.1 for sgd, 0.002 for adamw.")
    schedule: str = _choice("cosine", SCHEDULES, ": how it goes on, down to 0 or not at all")
    weight_decay: float = _setting(5e-4, "On convolution weights.")
    warmup_epochs: float = _setting(2.0, "Epochs until that peak, at most half of all.")
    label_smoothing: float = _setting(0.1, "Probability spread over all classes.")
    ema: float = _setting(0.999, "Decay per step of the averaged weights, the ones exported; 0: none.")
    clip: float = _setting(0.0, "Largest gradient norm; 0: any.")
    frozen_norm_epochs: int = _setting(
        0, "Last epochs with batch norm's averaged statistics, as when served; for widely differing sizes."
    )
    frozen_body: bool = _setting(False, "Train the classifier and the levels' gate alone; the rest stays as it is.")
    precision: str = _choice("float32", PRECISIONS, " (GPUs, CPUs with AVX-512 BF16)")
    seed: int = _setting(0, "Decides the held-out images, first weights, order and augmentation.")
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        rules = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 2, "at least 2 (batch norm)"),
            "batch_pixels": (self.batch_pixels >= 0, "at least 0"),
            "optimizer": (self.optimizer in OPTIMIZERS, _one_of(OPTIMIZERS)),
            "learning_rate": (self.learning_rate > 0, "above 0"),
            "schedule": (self.schedule in SCHEDULES, _one_of(SCHEDULES)),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "warmup_epochs": (self.warmup_epochs >= 0, "at least 0"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "ema": (0 <= self.ema < 1, "in [0, 1)"),
            "clip": (self.clip >= 0, "at least 0"),
            "frozen_norm_epochs": (0 <= self.frozen_norm_epochs <= self.epochs, "at least 0 and at most epochs"),
            "precision": (self.precision in PRECISIONS, _one_of(PRECISIONS)),
            "seed": (self.seed >= 0, "at least 0"),
            "std": (len(self.std) == 3 and min(self.std) > 0, "three numbers above 0"),
        }
        _require(self, rules)

    def learning_rate_at(self, epochs_done: float) -> float:
        """Linear warm-up, then half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts).

        A constant one instead is for a run whose length is not known and that another begins with.
        """
        warmup = min(self.warmup_epochs, self.epochs / 2)
        if epochs_done < warmup:
            return self.learning_rate * epochs_done / warmup
        if self.schedule == "constant":
            return self.learning_rate
        progress = (epochs_done - warmup) / (self.epochs - warmup)
        return self.learning_rate * (1 + cos(pi * progress)) / 2

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Recipe":
        """The inverse of `to_json`; InvalidInput names an unknown field."""
        augmentation = Augmentation(**_known(Augmentation, values.get("augmentation", {})))
        return cls(**_known(cls, values) | {"augmentation": augmentation})


def _known(cls: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """JSON lists as the tuples the dataclass holds; raises InvalidInput for a setting it doesn't know."""
    unknown = set(values) - {f.name for f in fields(cls)}
    if unknown:
        raise InvalidInput(f"unknown settings: {', '.join(sorted(unknown))}", "run")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
