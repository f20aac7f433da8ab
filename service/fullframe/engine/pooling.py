"""Pooling a feature map to a vector as a state that merges: any pieces, in any order, give one answer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fullframe.engine.arrays import Array, namespace, on_host
from fullframe.engine.kinds import MAKERS
from fullframe.errors import InvalidInput, quoted

FloatArray = NDArray[np.float32]

MAX_TERMS = 8
MAX_LEVELS = 8
MAX_LEVEL = 64
MAX_VECTORS = 4096
"""Most values per channel in one vector: terms times the cells of all levels."""

_MIN_P = 1e-3  # below it the root 1/p amplifies float64 rounding past float32
_DEFAULT_P = {"lp": 2.0, "gem": 3.0, "lse": 1.0}
KINDS = tuple(MAKERS)
"""The names of all kinds."""


@dataclass(frozen=True)
class Term:
    """One kind of pooling.

    Attributes:
        kind: avg, max, min, sum, lp, gem, lse or std.
        p: the exponent of lp (2 if None) and gem (3), the sharpness of lse (1); None for the others.

    Raises:
        InvalidInput: no such kind, or a p that the kind does not take.
    """

    kind: str
    p: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in MAKERS:
            raise _invalid(f"unknown kind {quoted(self.kind)}; the kinds are {', '.join(KINDS)}")
        if self.kind not in _DEFAULT_P:
            if self.p is not None:
                raise _invalid(f"{self.kind} takes no p; only {', '.join(_DEFAULT_P)} do")
            return
        p = float(_DEFAULT_P[self.kind] if self.p is None else self.p)
        least = 1.0 if self.kind == "lp" else _MIN_P
        if not (math.isfinite(p) and p >= least):
            raise _invalid(f"the p of {self.kind} must be finite and at least {least:g}, not {p:g}")
        object.__setattr__(self, "p", p)

    def __str__(self) -> str:
        # No "e+20" in it: plus separates terms.
        p = "" if self.p is None else repr(self.p).removesuffix(".0").replace("e+", "e")
        return f"{self.kind}({p})" if p else self.kind


@dataclass(frozen=True)
class Pooling:
    """How a feature map [C, h, w] becomes a vector.

    Its order is level-major, then term, then cell (row-major), then channel.

    Attributes:
        terms: concatenated in this order.
        levels: a spatial pyramid; level n pools an n x n grid of cells, level 1 the whole map. A cell spans
            rows floor(i h / n) to ceil((i + 1) h / n), as in torch.nn.functional.adaptive_avg_pool2d, so
            cells may overlap and a map smaller than the grid still fills it.
        l2_normalize: divide the vector by its Euclidean length (a zero vector stays zero).

    Raises:
        InvalidInput: no or too many terms or levels, or a level out of range.
    """

    terms: tuple[Term, ...] = (Term("avg"),)
    levels: tuple[int, ...] = (1,)
    l2_normalize: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.terms) <= MAX_TERMS:
            raise _invalid(f"{len(self.terms)} terms given; 1 to {MAX_TERMS} are possible")
        if not 1 <= len(self.levels) <= MAX_LEVELS:
            raise _invalid(f"{len(self.levels)} levels given; 1 to {MAX_LEVELS} are possible")
        for level in self.levels:
            if not 1 <= level <= MAX_LEVEL:
                raise _invalid(f"level {level} is out of range; levels are 1 to {MAX_LEVEL}")
        if self.dimension(1) > MAX_VECTORS:
            raise _invalid(f"{self.dimension(1)} values per channel (terms times grid cells); at most {MAX_VECTORS}")

    @classmethod
    def parse(cls, text: str, l2_normalize: bool = False) -> Pooling:
        """The pooling that `text` names: "avg", "gem(3)", "avg+max", "max@1,2,4", "avg+gem(4)@1,2".

        Terms are joined by "+", a term's p stands in brackets, the levels follow "@".

        Raises:
            InvalidInput: it reads otherwise, or names a pooling that cannot be.
        """
        terms, at, levels = text.lower().partition("@")
        matches = [_TERM.fullmatch(term) for term in terms.split("+")]
        numbers = [_LEVEL.fullmatch(level) for level in levels.split(",")] if at else []
        if not (all(matches) and all(numbers)):
            raise _invalid(
                f'cannot read {quoted(text)}; write terms joined by "+" and, for a spatial pyramid, levels: '
                '"avg", "gem(3)", "avg+max", "max@1,2,4"'
            )
        return cls(
            tuple(Term(m[1], None if m[2] is None else float(m[2])) for m in matches if m),
            tuple(int(m[1]) for m in numbers if m) or (1,),
            l2_normalize,
        )

    def __str__(self) -> str:
        """What `parse` reads; l2_normalize is not part of it."""
        terms = "+".join(map(str, self.terms))
        return terms if self.levels == (1,) else f"{terms}@{','.join(map(str, self.levels))}"

    def dimension(self, channels: int) -> int:
        """The length of the vector of a map of that many channels."""
        return channels * len(self.terms) * sum(level * level for level in self.levels)

    def begin(self, channels: int, height: int, width: int) -> State:
        """The empty state of a feature map [channels, height, width]; each side at least 1."""
        return State(self, channels, height, width)


_TERM = re.compile(r"\s*([a-z]+)\s*(?:\(\s*(-?(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?)\s*\))?\s*")
_LEVEL = re.compile(r"\s*(\d{1,9})\s*")


class _Cell(NamedTuple):
    """One cell of a grid: rows top to bottom, columns left to right, ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


def _grid(level: int, height: int, width: int) -> Iterator[_Cell]:
    """The cells of a level x level grid, row-major."""
    for top, bottom in _spans(level, height):
        for left, right in _spans(level, width):
            yield _Cell(top, bottom, left, right)


def _spans(level: int, size: int) -> list[tuple[int, int]]:
    return [(i * size // level, -(-(i + 1) * size // level)) for i in range(level)]


class State:
    """What is known of one map's pooling from the pieces added so far; kept where the pieces are.

    Sums are kept in float64. Every way to cut a map gives the same max and min bit for bit, and the other
    kinds within float64 rounding. NaN in a piece makes the values of its cells NaN.
    """

    def __init__(self, pooling: Pooling, channels: int, height: int, width: int) -> None:
        if min(channels, height, width) < 1:
            raise ValueError(f"a map [{channels}, {height}, {width}] has nothing to pool")
        self._pooling = pooling
        self._shape = (channels, height, width)
        self._cells = [cell for level in pooling.levels for cell in _grid(level, height, width)]
        self._counts = [0] * len(self._cells)
        self._kinds = [MAKERS[term.kind](term.p or math.nan) for term in pooling.terms]  # nan: not used
        self._values: list[list[Array]] = [[None] * len(self._cells) for _ in self._kinds]
        """Per term and cell a state [rows, C]; None before any value."""

    def add(self, tile: Array, top: int, left: int) -> None:
        """Count the tile [C, th, tw] whose first cell is the map's (top, left), all of them in one device's memory.

        Raises:
            ValueError: it does not lie within the map.
        """
        channels, height, width = self._shape
        bottom, right = top + tile.shape[1], left + tile.shape[2]
        if len(tile) != channels or min(top, left) < 0 or bottom > height or right > width:
            raise ValueError(f"tile {tuple(tile.shape)} at ({top}, {left}) is not within the map {self._shape}")
        with np.errstate(all="ignore"):
            for index, cell in enumerate(self._cells):
                rows = slice(max(cell.top, top) - top, min(cell.bottom, bottom) - top)
                columns = slice(max(cell.left, left) - left, min(cell.right, right) - left)
                if rows.start < rows.stop and columns.start < columns.stop:
                    block = tile[:, rows, columns]
                    states = [kind.lift(block) for kind in self._kinds]
                    self._count(index, states, block.shape[1] * block.shape[2])

    def _count(self, index: int, states: Sequence[Array], count: int) -> None:
        """A state for each term of `count` values more in a cell."""
        before = self._counts[index]
        for kind, values, state in zip(self._kinds, self._values, states, strict=True):
            values[index] = kind.combine(values[index], state, before, count) if before else state
        self._counts[index] = before + count

    def merge(self, other: State) -> None:
        """Count what `other` has counted: pieces of the same map that this state has not seen.

        Raises:
            ValueError: it is of another pooling or another map's shape.
        """
        if (self._pooling, self._shape) != (other._pooling, other._shape):
            raise ValueError("states of different poolings or maps do not merge")
        with np.errstate(all="ignore"):
            for index, count in enumerate(other._counts):
                if count:
                    self._count(index, [values[index] for values in other._values], count)

    def finish(self) -> FloatArray:
        """The vector, float32 [pooling.dimension(C)], once the pieces are computed.

        Raises:
            ValueError: the pieces do not add up to the whole map.
        """
        if self._counts != [cell.area for cell in self._cells]:
            raise ValueError(f"the pieces do not cover the map {self._shape} exactly once")
        counts = np.array(self._counts)[:, None]
        states = [on_host(namespace(values[0]).stack(values, axis=1)) for values in self._values]
        with np.errstate(all="ignore"):
            pooled = [kind.finish(each, counts) for kind, each in zip(self._kinds, states, strict=True)]
            ends = accumulate((level * level for level in self._pooling.levels), initial=0)
            parts = [term[start:end].ravel() for start, end in pairwise(ends) for term in pooled]
            vector = np.concatenate(parts)
            if self._pooling.l2_normalize:
                vector /= np.linalg.norm(vector) or 1.0
            return vector.astype(np.float32)


def pool(feature_map: Array, pooling: Pooling) -> FloatArray:
    """The vector, float32 [pooling.dimension(C)], of a whole feature map, float32 [C, h, w]."""
    channels, height, width = feature_map.shape
    state = pooling.begin(channels, height, width)
    state.add(feature_map, 0, 0)
    return state.finish()


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(f"pooling: {message}", field="pooling")
