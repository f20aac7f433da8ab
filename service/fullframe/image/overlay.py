"""A class activation map drawn over its picture."""

import numpy as np
from numpy.typing import NDArray

from fullframe.image.colour import Pixels

# Nine colours at equal steps of matplotlib's "inferno" (CC0): dark for weak cells, bright for strong ones.
_INFERNO = np.array(
    [
        (0, 0, 4),
        (33, 12, 74),
        (87, 16, 110),
        (138, 34, 106),
        (188, 55, 84),
        (228, 90, 49),
        (249, 142, 9),
        (249, 203, 53),
        (252, 255, 164),
    ],
    dtype=np.float32,
)
_STRIP_ROWS = 256


def draw_class_map(
    pixels: Pixels,
    class_map: NDArray[np.float32],
    *,
    stride: tuple[float, float] | None = None,
    start: tuple[float, float] = (0.0, 0.0),
    opacity: float = 0.75,
) -> Pixels:
    """Draw one class's map over the picture, at the picture's own resolution.

    Between cells' centres the map is interpolated bilinearly, beyond the outermost it is held. Colour and opacity
    grow with strength, from the weakest cell (the bare photograph) to the strongest.

    Args:
        pixels: uint8 [H, W, 3].
        class_map: float32 [h, w], finite.
        stride: pixels between neighbouring cells, as (height, width). None: the map is stretched over the picture.
        start: centre of the first cell, in pixels from the first pixel's centre; only with `stride`.
        opacity: of the strongest cell, 0 to 1.

    Returns:
        uint8 [H, W, 3]; the picture itself, copied, if all cells are equal.
    """
    strength = class_map.astype(np.float32) - class_map.min()
    strength = strength / (float(strength.max()) or 1.0) * 255
    rows, columns = (
        _cells(size, cells, stride and stride[axis], start[axis])
        for axis, (size, cells) in enumerate(zip(pixels.shape[:2], class_map.shape, strict=True))
    )
    wide = _blend(strength, columns, axis=1)
    colours, alphas = _table(opacity)
    drawn = pixels.copy()
    for top in range(0, len(drawn), _STRIP_ROWS):
        strip = drawn[top : top + _STRIP_ROWS]
        level = np.rint(_blend(wide, rows[top : top + _STRIP_ROWS], axis=0)).astype(np.uint8)
        strip[:] = np.rint(strip + (colours[level] - strip) * alphas[level, None])
    return drawn


def _cells(size: int, cells: int, stride: float | None, start: float) -> NDArray[np.float64]:
    """The position of each of `size` pixels on an axis of `cells` cells, 0 at the first cell's centre."""
    if stride is None:
        stride = size / cells
        start = (stride - 1) / 2
    return np.clip((np.arange(size) - start) / stride, 0, cells - 1)


def _blend(values: NDArray[np.float32], positions: NDArray[np.float64], axis: int) -> NDArray[np.float32]:
    """Linear interpolation of `values` along `axis` at fractional positions."""
    low = np.floor(positions).astype(int)
    high = np.minimum(low + 1, values.shape[axis] - 1)
    share = (positions - low).astype(np.float32)
    share = share[:, None] if axis == 0 else share[None, :]
    blended: NDArray[np.float32] = values.take(low, axis) * (1 - share) + values.take(high, axis) * share
    return blended


def _table(opacity: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Colour [256, 3] and opacity [256] by strength."""
    levels = np.linspace(0, 1, 256)
    knots = np.linspace(0, 1, len(_INFERNO))
    colours = np.stack([np.interp(levels, knots, channel) for channel in _INFERNO.T], axis=1)
    return colours.astype(np.float32), (opacity * levels).astype(np.float32)
