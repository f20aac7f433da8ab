"""A huge image, piece by piece: bands across, strips down each of them; memory for a piece, not for the image."""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from fullframe.engine.arrays import Array
from fullframe.engine.base import Engine, Session
from fullframe.engine.query import FloatArray
from fullframe.image import Picture, Pixels, Regions
from fullframe.model.contract import INPUT, LOGITS_FROM_MAP

if TYPE_CHECKING:
    from fullframe.model.strips import Place

BAND_WIDTH: Final = 5120
"""Pixels. Beside a neighbour a band sees about a receptive field's width of its pixels again: of 200 pixels, less than
a twentieth of any image."""

# Pieces launched and maybe not yet computed: one is computed while the next one is read.
_AHEAD: Final = 2

# What a piece takes in times of what its maps do: measured 1.3 to 3, the more the deeper and narrower a model.
_AROUND_PIECE: Final = 2.6
# Bytes that the first image takes for the strips' graphs, opened.
_SESSIONS: Final = 36 * 2**20

Head = Callable[[FloatArray], FloatArray]
"""From features [C] to logits [K]."""


def memory_for_pieces(engine: Engine, picture: Picture) -> int:
    """About how many bytes an image takes in pieces of the usual size: a piece, the rows carried, and what reading
    holds; or opening, if that is more."""
    contract, (field, columns) = engine.contract, engine.contract.receptive_field
    bands = -(-picture.width // max(1, BAND_WIDTH - columns))
    band = min(picture.width, picture.width // bands + columns)
    # The first strip of a band has all rows that its first cell sees, the last one may have a step more than usual.
    step = contract.stride[0]
    first, last = -(-(field + contract.start[0]) // step) * step, engine.piece_pixels // band + step
    strip = min(picture.height, max(first, last))
    piece = _AROUND_PIECE * engine.bytes_for(strip, band) + _SESSIONS
    carried = engine.carried_bytes * (band if picture.random_access else picture.width + bands * columns)
    usual = max(1, engine.piece_pixels // max(band, min(picture.width, BAND_WIDTH)) // step) * step
    if picture.height < usual + step:
        carried = 0.0  # it makes one strip, as in Tiler.rows
    return max(picture.opening_bytes, round(piece + carried) + picture.reading_bytes(strip))


class Band(NamedTuple):
    """Columns that are computed together: pixels [left, right), of whose cells `skip` are left out before the `cells`
    that begin at the map's column `first`."""

    left: int
    right: int
    first: int
    skip: int
    cells: int


@dataclass(frozen=True)
class Piece:
    """Part of an image's maps: each float32 [C, rows, columns], the first cell being the map's (top, left).

    On an engine that computes elsewhere they are there, launched and maybe not yet computed.
    """

    top: int
    left: int
    maps: dict[str, Array]
    read_seconds: float

    @property
    def cells(self) -> int:
        """How many of a map's."""
        return math.prod(next(iter(self.maps.values())).shape[1:])


class Tiler:
    """Runs a model on images of any size in bounded memory; from one thread at a time for each image.

    Within a band nothing is computed twice (model/strips.py).

    Args:
        engine: the model.
        piece_pixels: of a strip of a band; 0 for the engine's own.
        band_width: see BAND_WIDTH. What a model needs at least overrides both.

    Raises:
        InvalidModel: the model's maps can't be computed in pieces; the message names the node that stands against it.
    """

    def __init__(self, engine: Engine, *, piece_pixels: int = 0, band_width: int = BAND_WIDTH) -> None:
        self._engine, self._band_width = engine, band_width
        self._piece_pixels = piece_pixels or engine.piece_pixels
        from fullframe.model.strips import strip_graphs  # the onnx package takes a while, and few images need it

        self._strips = strip_graphs(engine.path)
        self._sessions: dict[Place, Session] = {}

    @cached_property
    def head(self) -> Head | None:
        """What makes logits of an image's features; None where they are the mean of its class map.

        Raises InvalidModel where the graph holds no such part.
        """
        if self._engine.contract.logits == LOGITS_FROM_MAP:
            return None
        from fullframe.model.heads import FEATURES, LOGITS, head_graph

        session = self._engine.open_session(head_graph(self._engine.path))
        return lambda features: session.run([LOGITS], {FEATURES: features[np.newaxis]})[0][0]

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """The feature map's for an image's; raises InvalidInput for an image that is too small."""
        return self._strips.geometry.output_size(height, width)

    def pieces(
        self, regions: Regions, outputs: Sequence[str], is_alone: Callable[[], bool] = lambda: True
    ) -> Iterator[Piece]:
        """Compute "feature_map", "class_map" or both, each cell once, in the order that the source can be read in.

        A device may still be at work on the last two, with all that was asked of it before the next: one is computed
        while another is read.

        Args:
            regions: the image.
            outputs: which maps.
            is_alone: asked before each piece whether it may have all cores; the cells have the same bits either way.

        Raises InvalidInput for an image that is damaged; `map_size` tells whether it is large enough.
        """
        bands = list(self.bands(regions.width))
        rows = self.rows(regions.height, max(band.right - band.left for band in bands))
        strips = list(pairwise(rows))
        carried: dict[Band, list[Any]] = {}
        done: dict[Band, int] = defaultdict(int)
        launched: deque[Callable[[], object]] = deque()
        order = product(bands, strips) if regions.random_access else ((b, s) for s in strips for b in bands)
        for band, (top, bottom) in order:
            started = time.monotonic()
            pixels = regions.read(top, band.left, bottom - top, band.right - band.left)
            read_seconds = time.monotonic() - started
            if len(strips) == 1:
                found: Mapping[str, Array] = self._engine.run(pixels, outputs, held=outputs)
            else:
                place: Place = "first" if top == 0 else "last" if bottom == regions.height else "middle"
                found, carried[band] = self._strip(place, pixels, carried.pop(band, []), outputs, is_alone())
            columns = slice(band.skip, band.skip + band.cells)
            maps = {name: each[:, :, columns] for name, each in found.items()}
            yield Piece(done[band], band.first, maps, read_seconds)
            done[band] += next(iter(maps.values())).shape[1]
            launched.append(self._engine.fence())
            if len(launched) == _AHEAD:
                launched.popleft()()

    def bands(self, width: int) -> Iterator[Band]:
        """The image's columns, each cell in one band, and every band at a pixel that keeps the map's cells in place."""
        contract = self._engine.contract
        (_, stride), (_, start), (_, field) = contract.stride, contract.start, contract.receptive_field
        _, step = self._strips.geometry.graph.alignment("feature_map")
        _, cells = self.map_size(contract.smallest_size[0], width)
        most = max(1, (self._band_width - field - step) // stride)
        count = -(-cells // most)
        for first, end in pairwise(cells * number // count for number in range(count + 1)):
            last = end - 1
            left = max(0, first * stride + start) // step * step
            right = width if last == cells - 1 else min(width, last * stride + start + field)
            yield Band(left, right, first, first - left // stride, last - first + 1)

    def rows(self, height: int, width: int) -> list[int]:
        """Where strips of pieces `width` wide begin, and the image's height; two numbers: it is not cut."""
        step = self._strips.step
        usual = max(1, self._piece_pixels // width // step) * step
        first = max(usual, self._strips.least)
        if first + step > height:
            return [0, height]
        return [0, *range(first, height - step + 1, usual), height]

    def _strip(
        self, place: "Place", pixels: Pixels, carried: Sequence[Any], outputs: Sequence[str], alone: bool
    ) -> tuple[Mapping[str, Array], list[Any]]:
        """The next rows of each output, and what the next strip needs: both stay on the engine's device."""
        rests = [] if place == "last" else [f"rest.{number}" for number in range(self._strips.carries)]
        feeds = {INPUT: pixels[np.newaxis]} | {f"carry.{number}": each for number, each in enumerate(carried)}
        names = [*outputs, *rests]
        results = self._session(place).run(names, feeds, held=names, alone=alone)
        return {name: each[0] for name, each in zip(outputs, results, strict=False)}, results[len(outputs) :]

    def _session(self, place: "Place") -> Session:
        """Opened when first needed; by two threads at once, one of them is kept."""
        if place not in self._sessions:
            self._sessions.setdefault(place, self._engine.open_session(self._strips.graphs[place]))
        return self._sessions[place]
