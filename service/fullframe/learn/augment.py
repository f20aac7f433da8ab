"""How training images vary: random crops at the size their batch wants, mixed with one another."""

from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fullframe.learn.settings import Augmentation

Pixels = NDArray[np.uint8]


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


def cut_mix(images: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images with a rectangle of another in each (Yun et al. 2019, arXiv:1905.04899, section 3.1, lambda uniform).

    Args:
        images: [N, C, H, W].

    Returns:
        The mixed images; whose rectangle each got, int64 [N]; the share of it that is still its own, float32 [N].
    """
    count, _, height, width = images.shape
    other = torch.from_numpy(rng.permutation(count))
    scale = np.sqrt(rng.uniform(size=count))
    rows, columns = _cut(height, scale, rng), _cut(width, scale, rng)
    mixed = torch.where(rows[:, None, :, None] & columns[:, None, None, :], images[other], images)
    cut = rows.sum(1) * columns.sum(1) / (height * width)
    return mixed, other, 1 - cut


def _span(side: int, crop: float, reach: float, rng: np.random.Generator) -> NDArray[np.intp]:
    """Indices of `crop` pixels in a row, up to `reach` of them past an end, where they reflect without the edge."""
    length = max(1, round(crop))
    slack = round(reach * length)
    first = rng.integers(-slack, side - length + slack + 1)
    period = max(1, 2 * (side - 1))
    index = np.arange(first, first + length) % period
    return np.minimum(index, period - index)


def _cut(side: int, scale: NDArray[np.float64], rng: np.random.Generator) -> Tensor:
    """Which of `side` pixels lie in `scale` of them around a random one, bool [N, side]; ends may stick out."""
    centre, half = rng.uniform(0, side, len(scale)), side * scale / 2
    pixel = np.arange(side)[None] + 0.5
    return torch.from_numpy(np.abs(pixel - centre[:, None]) < half[:, None])
