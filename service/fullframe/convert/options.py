"""What is said of a classifier beside its graph."""

import math
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fullframe.errors import InvalidInput, quoted

_CONTROL: Final = frozenset({"Cc", "Zl", "Zp"})
"""Unicode's categories of what breaks a line or steers a terminal."""


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
        self._check_scale("mean", self.mean, min(self.mean) >= 0.0 and max(self.mean) <= 1.0)
        self._check_scale("std", self.std, max(self.std) <= 1.0 or self.input_range != 1)

    def _check_scale(self, name: str, values: tuple[float, float, float], possible: bool) -> None:
        if not possible:
            raise InvalidInput(
                f"{name} is {_listed(values)}; it must be of pixels from 0 to 1: divide what is of pixels from 0 to "
                "255 by 255",
                name,
            )


def read_labels(path: Path) -> tuple[str, ...]:
    """The names of a file of UTF-8, one a line.

    Raises InvalidInput where it is not UTF-8, has no names, a blank line before a name or a control character in one.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = error.object.count(b"\n", 0, error.start) + 1
        raise InvalidInput(f"{path.name} is not UTF-8 at line {place}; save it as UTF-8", "labels") from error
    lines = [line.strip(" \t") for line in re.split(r"\r\n?|\n", text.rstrip(" \t\r\n"))]
    if lines == [""]:
        raise InvalidInput(f"{path.name} has no names; it must have one a line", "labels")
    for number, line in enumerate(lines, 1):
        if not line:
            raise InvalidInput(f"line {number} of {path.name} is blank; the names after it would shift", "labels")
        if any(unicodedata.category(character) in _CONTROL for character in line):
            raise InvalidInput(f"line {number} of {path.name} has a control character: {quoted(line)}", "labels")
    return tuple(lines)


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
