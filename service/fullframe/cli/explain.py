"""The picture of `--explain`: where an image looks like its best class; a huge one is drawn reduced."""

from math import ceil, isqrt, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from fullframe.image import Picture, Pixels, draw_class_map, encode_png, open_source, own_limits

if TYPE_CHECKING:
    from fullframe.engine.query import Answer
    from fullframe.model.contract import Contract

_DRAWN_PIXELS: Final = 32_000_000
_MAP_VALUES: Final = 16_000_000  # 64 MB: within what a server may send
_STRIP_ROWS: Final = 256


def longest_map_side(contract: "Contract") -> int:
    """Cells on the longer side of a class map that has to travel."""
    return max(1, isqrt(_MAP_VALUES // len(contract.labels)))


def explain(file: str, answer: "Answer", contract: "Contract", path: Path, megapixels: float) -> str:
    """Draw the best class's map over the picture into `path`; returns what to tell of it.

    Raises InvalidInput where the picture has become unreadable.
    """
    assert answer.class_map is not None
    limits = own_limits(max(round(megapixels * 1e6), answer.height * answer.width))
    best = answer.classes[0]
    cells = answer.class_map[best.index]
    factor = ceil(sqrt(answer.height * answer.width / _DRAWN_PIXELS))
    pixels = _reduced(open_source(file, limits), factor)
    if max(cells.shape) < longest_map_side(contract):
        # In pixels of the reduced picture, whose first is the mean of those from 0 to factor - 1.
        first, second = ((centre - (factor - 1) / 2) / factor for centre in _first_centre(contract))
        height, width = contract.stride
        drawn = draw_class_map(pixels, cells, stride=(height / factor, width / factor), start=(first, second))
    else:  # it may be reduced itself: each cell is an equal share of the picture
        drawn = draw_class_map(pixels, cells)
    path.write_bytes(encode_png(drawn))
    size = f", drawn at 1/{factor} of its size" if factor > 1 else ""
    return f"wrote {path}: where it looks like {best.label}{size}"


def _reduced(picture: Picture, factor: int) -> Pixels:
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


def _first_centre(contract: "Contract") -> tuple[float, float]:
    """The middle of what the feature map's first cell sees, in pixels from the first pixel's centre."""
    (top, left), (height, width) = contract.start, contract.receptive_field
    return top + (height - 1) / 2, left + (width - 1) / 2
