"""Images for benchmarks of throughput: of mixed sizes, of one size with as many pixels, of a familiar size's class."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tarfile import TarError
from typing import Final

import numpy as np

from fullframe.errors import InvalidInput, first_line
from fullframe.image import Limits, Pixels, open_encoded

SIDES: Final = (96, 512)
"""Of mixed images, in pixels."""
CLASS_SIDES: Final = (192, 256)
"""Of images of the class of 224 pixels."""
TINY_SIDES: Final = (8, 24)

MIXED: Final = "mixed sizes"
SAME: Final = "same size"
CLASS: Final = "around 224 pixels"

Size = tuple[int, int]


@dataclass(frozen=True)
class Workload:
    """Images, and what they are."""

    name: str
    images: list[Pixels]

    @property
    def megapixels(self) -> float:
        return float(sum(image.shape[0] * image.shape[1] for image in self.images)) / 1e6


def workloads(count: int, photos: Path | None = None, tiny: bool = False) -> list[Workload]:
    """The same size, mixed sizes and those around 224 pixels, `count` images each.

    Args:
        photos: a folder or tar whose images' sizes the mixed ones have; none: evenly drawn sides.
        tiny: of a few pixels.

    Raises:
        InvalidInput: there are no photographs, or one that can't be read.
    """
    mixed = native_sizes(photos, count) if photos else drawn_sizes(TINY_SIDES if tiny else SIDES, count, 0)
    side = round((sum(height * width for height, width in mixed) / count) ** 0.5)
    around = drawn_sizes(TINY_SIDES if tiny else CLASS_SIDES, count, 5)
    sizes = {SAME: [(side, side)] * count, MIXED: mixed, CLASS: around}
    return [Workload(name, noise(each, seed)) for seed, (name, each) in enumerate(sizes.items())]


def noise(sizes: Sequence[Size], seed: int) -> list[Pixels]:
    """uint8 [H, W, 3] each."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (height, width, 3), np.uint8) for height, width in sizes]


def drawn_sizes(sides: tuple[int, int], count: int, seed: int) -> list[Size]:
    """With sides evenly drawn from the first to the last."""
    drawn = np.random.default_rng(seed).integers(sides[0], sides[1] + 1, (count, 2)).tolist()
    return [(height, width) for height, width in drawn]


def native_sizes(photos: Path, count: int) -> list[Size]:
    """Those of photographs in a folder or tar, again from the first where there are too few."""
    from benchmarks.serve import photographs

    try:
        opened = [open_encoded(data, Limits()) for data in photographs(photos)]
    except (OSError, TarError) as error:
        raise InvalidInput(f"{photos} can't be read as a folder or tar of photographs: {first_line(error)}") from error
    if not opened:
        raise InvalidInput(f"{photos} has no photographs")
    sizes = [(picture.height, picture.width) for picture in opened]
    return [sizes[number % len(sizes)] for number in range(count)]
