"""What is said of a classifier beside its graph."""

import math
from dataclasses import dataclass

from fullframe.errors import InvalidInput


@dataclass(frozen=True)
class Options:
    """What the graph does not say of itself.

    Attributes:
        name: what the model calls itself.
        labels: one per class, in the order of the scores; none: the classes' numbers.
        mean, std: red, green, blue of pixels from 0 to 1; the source takes (pixels - mean) / std * input_range.
        input_range: 1, or 255 where the source takes raw pixels.
        bgr: the source takes blue first.
        license: of the weights, for people.
        source: where they are from, for people.
        size: height and width that the source was made for; None: as its input says.

    Raises:
        InvalidInput: a value can't be.
    """

    name: str
    labels: tuple[str, ...] = ()
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    input_range: int = 1
    bgr: bool = False
    license: str = ""
    source: str = ""
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(map(math.isfinite, values)):
                raise InvalidInput(f"{name} is {_listed(values)}; it must be three numbers: red, green, blue", name)
        if min(self.std) <= 0:
            raise InvalidInput(f"std is {_listed(self.std)}; each must be above 0", "std")
        if self.input_range not in (1, 255):
            raise InvalidInput(f"input_range is {self.input_range}; it must be 1 or 255", "input_range")


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
