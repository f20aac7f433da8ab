"""One random crop of an image, at the size its batch wants."""

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fullframe.errors import InvalidInput

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Augmentation:
    """How training images vary.

    Attributes:
        sizes: sides in pixels; each batch draws one.
        size_weights: how often each is drawn (relative); empty: all alike.
        area: the crop's share of the image's area, drawn between these.
        aspect: the crop's width over height is drawn, log-uniformly, between 1/aspect and aspect.
        reach: how far a crop may pass the border, as a share of the side; filled by reflection.
        whole: share of the images that keep their scale (the largest square, moved by whole pixels), so that
            images already of the batch's size are also seen unresampled.
        flip: share of the images mirrored left to right.
    """

    sizes: tuple[int, ...] = (24, 32, 40, 48, 64)
    size_weights: tuple[float, ...] = ()
    area: tuple[float, float] = (0.5, 1.0)
    aspect: float = 1.25
    reach: float = 0.125
    whole: float = 0.5
    flip: float = 0.5

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise InvalidInput(f"sizes is {self.sizes}; it must be one or more sides of at least 1", "sizes")
        if self.size_weights and (
            len(self.size_weights) != len(self.sizes) or min(self.size_weights) < 0 or not sum(self.size_weights)
        ):
            raise InvalidInput(
                f"size_weights is {self.size_weights}; it must hold one weight of at least 0 per size "
                f"({len(self.sizes)}), not all 0",
                "size_weights",
            )
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise InvalidInput(f"area is {self.area}; it must be 0 < low <= high <= 1", "area")
        if self.aspect < 1:
            raise InvalidInput(f"aspect is {self.aspect}; it must be at least 1", "aspect")
        for name in ("reach", "whole", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}; it must be between 0 and 1", name)

    def draw_size(self, rng: np.random.Generator) -> int:
        """The side of one batch's images."""
        if not self.size_weights:
            return int(rng.choice(self.sizes))
        weights = np.asarray(self.size_weights)
        return int(rng.choice(self.sizes, p=weights / weights.sum()))


def random_crop(pixels: Pixels, size: int, how: Augmentation, rng: np.random.Generator) -> Tensor:
    """A random crop of `pixels` uint8 [H, W, 3] resized to uint8 [3, size, size]."""
    height, width = pixels.shape[:2]
    if rng.random() < how.whole:
        crop_h = crop_w = float(min(height, width))
    else:
        area = rng.uniform(*how.area) * height * width
        aspect = how.aspect ** rng.uniform(-1, 1)
        crop_h, crop_w = sqrt(area / aspect), sqrt(area * aspect)
        fit = min(1.0, height / crop_h, width / crop_w)
        crop_h, crop_w = crop_h * fit, crop_w * fit
    rows = _span(height, crop_h, how.reach, rng)
    columns = _span(width, crop_w, how.reach, rng)
    if rng.random() < how.flip:
        columns = columns[::-1]
    crop = torch.from_numpy(pixels[rows[:, None], columns]).permute(2, 0, 1)
    if crop.shape[1:] == (size, size):
        return crop
    mode = ("bilinear", "bicubic")[rng.integers(2)]
    return F.interpolate(crop[None], (size, size), mode=mode, antialias=True)[0]


def _span(side: int, crop: float, reach: float, rng: np.random.Generator) -> NDArray[np.intp]:
    """Indices of `crop` pixels in a row, up to `reach` of them past an end, where they reflect without the edge."""
    length = max(1, round(crop))
    slack = round(reach * length)
    first = rng.integers(-slack, side - length + slack + 1)
    period = max(1, 2 * (side - 1))
    index = np.arange(first, first + length) % period
    return np.minimum(index, period - index)
