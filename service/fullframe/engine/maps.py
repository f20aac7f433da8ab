"""A map put together from pieces: as it is, or reduced to fewer cells of equal area."""

from typing import Final

from fullframe.engine.arrays import Array, namespace, on_host
from fullframe.engine.query import FloatArray
from fullframe.errors import InvalidInput

MAX_MAP_BYTES: Final = 2**28
"""Held of a map that is returned: 4 of each value, 8 while it is reduced."""


def reduced_size(height: int, width: int, most: int) -> tuple[int, int]:
    """A map's height and width with at most `most` cells on the longer side, the other in proportion; 0: its own."""
    longer = max(height, width)
    if not 0 < most < longer:
        return height, width
    rows, columns = ((2 * size * most + longer) // (2 * longer) for size in (height, width))  # rounded
    return max(1, rows), max(1, columns)


class MapState:
    """A map of which pieces have been added; kept, and reduced, where the pieces are.

    Reduced, each cell is the mean of an equal share of the map's area: a cell on the border of two shares counts for
    each with the part that lies there. So the plain mean over the cells is that of the whole map.

    Args:
        name: what it is called in errors.
        channels, height, width: of the map.
        most: cells on the longer side; 0 for all there are.

    Raises:
        InvalidInput: it would take more than MAX_MAP_BYTES.
    """

    def __init__(self, name: str, channels: int, height: int, width: int, most: int) -> None:
        self._size = height, width
        self._cells = reduced_size(height, width, most)
        self._shape = (channels, *self._cells)
        self._reduced = self._cells != self._size
        if (count := (8 if self._reduced else 4) * channels * self._cells[0] * self._cells[1]) > MAX_MAP_BYTES:
            raise InvalidInput(
                f"the {name} of this image is {list(self._shape)} and takes {count} bytes; at most {MAX_MAP_BYTES} are "
                "held: set max_map_side, and it is reduced to so many cells on its longer side, or ask for pooled "
                "embeddings",
                name,
            )
        self._values: Array = None

    def add(self, piece: Array, top: int, left: int) -> None:
        """Count the piece [C, h, w] whose first cell is the map's (top, left); no cell may come twice."""
        xp = namespace(piece)
        if self._values is None:
            dtype = xp.float64 if self._reduced else xp.float32
            self._values = xp.zeros(self._shape, dtype=dtype, device=piece.device)
        bottom, right = top + piece.shape[1], left + piece.shape[2]
        if not self._reduced:
            self._values[:, top:bottom, left:right] = piece
            return
        rows, down = _shares(piece, top, bottom, self._size[0], self._cells[0])
        columns, across = _shares(piece, left, right, self._size[1], self._cells[1])
        self._values[:, rows, columns] += down @ xp.astype(piece, xp.float64) @ across.T

    def finish(self) -> FloatArray:
        """The map, float32 [C, h, w], once every piece is there."""
        xp = namespace(self._values)
        return on_host(xp.astype(self._values, xp.float32, copy=False))


def reduced(name: str, values: FloatArray, most: int) -> FloatArray:
    """A whole map [C, h, w] with at most `most` cells on its longer side, as MapState makes it; 0: the map itself."""
    channels, height, width = values.shape
    if reduced_size(height, width, most) == (height, width):
        return values
    state = MapState(name, channels, height, width, most)
    state.add(values, 0, 0)
    return state.finish()


def _shares(like: Array, first: int, last: int, size: int, cells: int) -> tuple[slice, Array]:
    """Which of `cells` equal parts of an axis positions [first, last) of `size` meet, and float64 [part, position] what
    each position adds to each part's mean; made where `like` is."""
    xp = namespace(like)
    parts = slice(first * cells // size, -(-last * cells // size))
    # In units of which a position has `cells` and a part `size`.
    part = xp.arange(parts.start, parts.stop, device=like.device)[:, None] * size
    position = xp.arange(first, last, device=like.device)[None, :] * cells
    overlap = xp.minimum(part + size, position + cells) - xp.maximum(part, position)
    return parts, xp.astype(xp.maximum(overlap, xp.zeros_like(overlap)), xp.float64) / size
