"""A picture of fewer pixels, of a picture that need not be held whole."""

from math import ceil
from typing import Final

import numpy as np

from fullframe.image.colour import Pixels
from fullframe.image.decode import Picture

_STRIP_ROWS: Final = 256


def reduced(picture: Picture, factor: int) -> Pixels:
    """uint8 [ceil(height / factor), ceil(width / factor), 3]: means of factor x factor pixels, read strip by strip."""
    if factor == 1:
        return picture.pixels()
    rows = factor * ceil(_STRIP_ROWS / factor)
    columns = np.arange(0, picture.width, factor)
    widths = np.diff([*columns, picture.width])
    strips = []
    with picture.regions() as regions:
        for top in range(0, picture.height, rows):
            height = min(rows, picture.height - top)
            strip = regions.read(top, 0, height, picture.width)
            lines = np.arange(0, height, factor)
            sums = np.add.reduceat(strip, lines, axis=0, dtype=np.uint32)
            sums = np.add.reduceat(sums, columns, axis=1)
            counts = np.diff([*lines, height])[:, None, None] * widths[:, None]
            strips.append(np.rint(sums / counts).astype(np.uint8))
    return np.concatenate(strips)
