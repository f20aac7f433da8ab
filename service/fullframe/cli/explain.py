"""The picture of `--explain`: where an image looks like its best class; a huge one is drawn reduced."""

from math import ceil, isqrt, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fullframe.image import draw_class_map, encode_png, open_source, own_limits, reduced

if TYPE_CHECKING:
    from fullframe.engine.query import Answer
    from fullframe.model.contract import Contract

_DRAWN_PIXELS: Final = 32_000_000
_MAP_VALUES: Final = 16_000_000  # 64 MB: within what a server may send


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
    pixels = reduced(open_source(file, limits), factor)
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


def _first_centre(contract: "Contract") -> tuple[float, float]:
    """The middle of what the feature map's first cell sees, in pixels from the first pixel's centre."""
    (top, left), (height, width) = contract.start, contract.receptive_field
    return top + (height - 1) / 2, left + (width - 1) / 2
