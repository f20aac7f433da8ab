"""How a network is trained: every setting that decides the result."""

from dataclasses import asdict, dataclass, field, fields
from math import cos, pi
from typing import Any

from fullframe.errors import InvalidInput
from fullframe.learn.augment import Augmentation

OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """Training settings.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per step.
        optimizer: sgd (Nesterov momentum 0.9) or adamw.
        learning_rate: its peak, reached after `warmup_epochs`, then a cosine down to 0.
        weight_decay: on convolution weights only.
        label_smoothing: probability spread over all classes.
        ema: decay per step of the averaged weights, which are the ones validated and exported; 0 for none.
        clip: largest gradient norm; 0 for no clipping.
        frozen_norm_epochs: last epochs in which batch norms use their averaged statistics, as when served. Before,
            each batch is normalised by itself, so the network never met an image of one size under the statistics
            of all sizes.
        precision: of convolutions: float32, or bfloat16 (autocast; GPUs, and CPUs with AVX-512 BF16).
        seed: decides the split, the first weights, the order and the augmentation.
        mean, std: of the normalisation (pixel / 255 - mean) / std, per channel.
    """

    epochs: int = 30
    batch_size: int = 128
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    warmup_epochs: float = 2.0
    label_smoothing: float = 0.1
    ema: float = 0.999
    clip: float = 0.0
    frozen_norm_epochs: int = 0
    precision: str = "float32"
    seed: int = 0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        rules = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 2, "at least 2 (batch norm)"),
            "optimizer": (self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            "learning_rate": (self.learning_rate > 0, "above 0"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "warmup_epochs": (0 <= self.warmup_epochs < self.epochs, "at least 0 and less than epochs"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "ema": (0 <= self.ema < 1, "in [0, 1)"),
            "frozen_norm_epochs": (0 <= self.frozen_norm_epochs <= self.epochs, "at least 0 and at most epochs"),
            "clip": (self.clip >= 0, "at least 0"),
            "precision": (self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
            "seed": (self.seed >= 0, "at least 0"),
            "std": (len(self.std) == 3 and min(self.std) > 0, "three numbers above 0"),
        }
        for name, (holds, wanted) in rules.items():
            if not holds:
                raise InvalidInput(f"{name} is {getattr(self, name)!r}; it must be {wanted}", name)

    def learning_rate_at(self, epochs_done: float) -> float:
        """Linear warm-up, then half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts)."""
        if epochs_done < self.warmup_epochs:
            return self.learning_rate * epochs_done / self.warmup_epochs
        progress = (epochs_done - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return self.learning_rate * (1 + cos(pi * progress)) / 2

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Recipe":
        """The inverse of `to_json`."""
        augmentation = Augmentation(**_tuples(Augmentation, values.get("augmentation", {})))
        return cls(**_tuples(cls, values) | {"augmentation": augmentation})


def _tuples(cls: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """JSON lists as the tuples the dataclass holds; raises InvalidInput for a setting it doesn't know."""
    unknown = set(values) - {f.name for f in fields(cls)}
    if unknown:
        raise InvalidInput(f"unknown settings: {', '.join(sorted(unknown))}", "run")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
