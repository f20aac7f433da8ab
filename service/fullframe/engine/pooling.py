"""Pooling a feature map to a vector as a state that merges: any pieces, in any order, give one answer."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fullframe.errors import InvalidInput, quoted

FloatArray = NDArray[np.float32]
DoubleArray = NDArray[np.float64]
CountArray = NDArray[np.int64]

MAX_TERMS = 8
MAX_LEVELS = 8
MAX_LEVEL = 64
MAX_VECTORS = 4096
"""Most values per channel in one vector: terms times the cells of all levels."""
GEM_FLOOR = 1e-6
"""Generalised mean pooling lifts smaller values to this one."""

_MIN_P = 1e-3  # below it the root 1/p amplifies float64 rounding past float32
_CHUNK = 1 << 15  # values widened to float64 at a time: 256 KiB stays in cache


class _Kind(ABC):
    """A commutative monoid over float64 states [rows, ..., C], one column per channel."""

    identity: tuple[float, ...]
    """One value per row of the state."""

    @abstractmethod
    def lift(self, block: FloatArray) -> DoubleArray:
        """The state [rows, C] of a block [C, h, w] of at least one cell."""

    @abstractmethod
    def combine(self, a: DoubleArray, b: DoubleArray, n_a: CountArray, n_b: CountArray) -> DoubleArray:
        """The state of both; the counts of values behind them broadcast against one row."""

    @abstractmethod
    def finish(self, state: DoubleArray, n: CountArray) -> DoubleArray:
        """The pooled values [..., C]."""


class _Fold(_Kind):
    """One running value: sum, max, min, and with `mean` the average."""

    def __init__(self, ufunc: np.ufunc, identity: float, mean: bool = False) -> None:
        self.identity = (identity,)
        self._ufunc, self._mean = ufunc, mean
        self._dtype = np.float64 if ufunc is np.add else None  # comparing needs no widening

    def lift(self, block: FloatArray) -> DoubleArray:
        return np.asarray(self._ufunc.reduce(block, axis=(1, 2), dtype=self._dtype), np.float64)[None]

    def combine(self, a: DoubleArray, b: DoubleArray, n_a: CountArray, n_b: CountArray) -> DoubleArray:
        return np.asarray(self._ufunc(a, b), np.float64)

    def finish(self, state: DoubleArray, n: CountArray) -> DoubleArray:
        return np.asarray(state[0] / n if self._mean else state[0], np.float64)


class _PeakSum(_Kind):
    """A sum of weights relative to the peak so far, so that no power or exponential overflows."""

    def lift(self, block: FloatArray) -> DoubleArray:
        state = np.empty((2, len(block)))
        for channels, values in _chunks(block):
            values = self._value(values)
            peak = values.max(axis=1)
            base = self._usable(peak)[:, None]
            state[:, channels] = peak, self._weight(values, base).sum(axis=1)
        return state

    def combine(self, a: DoubleArray, b: DoubleArray, n_a: CountArray, n_b: CountArray) -> DoubleArray:
        peak = np.maximum(a[0], b[0])
        # The equal side keeps its sum: an infinite or zero peak has no ratio or difference to itself.
        total = sum(s[1] * np.where(s[0] == peak, 1.0, self._weight(s[0], peak)) for s in (a, b))
        return np.stack([peak, np.asarray(total)])

    @abstractmethod
    def _value(self, x: DoubleArray) -> DoubleArray:
        """What is compared with the peak."""

    @abstractmethod
    def _weight(self, value: DoubleArray, peak: DoubleArray) -> DoubleArray:
        """At most 1, and 1 where they are equal."""

    @abstractmethod
    def _usable(self, peak: DoubleArray) -> DoubleArray:
        """The peak, replaced where a weight relative to it would be undefined."""


class _PowerSum(_PeakSum):
    """(sum or mean of value^p)^(1/p)."""

    identity = (0.0, 0.0)

    def __init__(self, value: Callable[[DoubleArray], DoubleArray], p: float, mean: bool) -> None:
        self._to_value, self._p, self._mean = value, p, mean

    def finish(self, state: DoubleArray, n: CountArray) -> DoubleArray:
        peak, total = state
        return np.asarray(peak * (total / n if self._mean else total) ** (1 / self._p), np.float64)

    def _value(self, x: DoubleArray) -> DoubleArray:
        return self._to_value(x)

    def _weight(self, value: DoubleArray, peak: DoubleArray) -> DoubleArray:
        return _power(value / peak, self._p)

    def _usable(self, peak: DoubleArray) -> DoubleArray:
        return np.where((peak == 0) | np.isinf(peak), 1.0, peak)


class _LogMeanExp(_PeakSum):
    """log(mean exp(p x)) / p."""

    identity = (-math.inf, 0.0)

    def __init__(self, p: float) -> None:
        self._p = p

    def finish(self, state: DoubleArray, n: CountArray) -> DoubleArray:
        peak, total = state
        return np.asarray(peak + np.log(total / n) / self._p, np.float64)

    def _value(self, x: DoubleArray) -> DoubleArray:
        return x

    def _weight(self, value: DoubleArray, peak: DoubleArray) -> DoubleArray:
        return np.asarray(np.exp(self._p * (value - peak)), np.float64)

    def _usable(self, peak: DoubleArray) -> DoubleArray:
        return np.where(np.isinf(peak), 0.0, peak)


class _Deviation(_Kind):
    """Population standard deviation from (mean, sum of squared differences).

    Merged as in Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979.
    """

    identity = (0.0, 0.0)

    def lift(self, block: FloatArray) -> DoubleArray:
        state = np.empty((2, len(block)))
        for channels, values in _chunks(block):
            mean = values.mean(axis=1)
            values -= mean[:, None]
            state[:, channels] = mean, np.einsum("cn,cn->c", values, values)
        return state

    def combine(self, a: DoubleArray, b: DoubleArray, n_a: CountArray, n_b: CountArray) -> DoubleArray:
        share = n_b / np.maximum(n_a + n_b, 1)
        delta = b[0] - a[0]
        return np.stack([a[0] + delta * share, a[1] + b[1] + delta * delta * n_a * share])

    def finish(self, state: DoubleArray, n: CountArray) -> DoubleArray:
        return np.asarray(np.sqrt(state[1] / n), np.float64)


def _chunks(block: FloatArray) -> Iterator[tuple[slice, DoubleArray]]:
    """Runs of whole channels, each a fresh float64 [c, h * w]."""
    step = max(1, _CHUNK // math.prod(block.shape[1:]))
    for first in range(0, len(block), step):
        channels = slice(first, min(first + step, len(block)))
        wide = block[channels].astype(np.float64, order="C")
        yield channels, wide.reshape(len(wide), -1)


def _power(x: DoubleArray, p: float) -> DoubleArray:
    """x ** p, by multiplication for the small whole p of practice: many times faster than pow."""
    if p in (1, 2, 3, 4):
        result = x
        for _ in range(int(p) - 1):
            result = result * x
        return result
    return np.asarray(x**p, np.float64)


def _at_floor(x: DoubleArray) -> DoubleArray:
    return np.asarray(np.maximum(x, GEM_FLOOR), np.float64)


_KINDS: dict[str, Callable[[float], _Kind]] = {
    "avg": lambda p: _Fold(np.add, 0.0, mean=True),
    "max": lambda p: _Fold(np.maximum, -math.inf),
    "min": lambda p: _Fold(np.minimum, math.inf),
    "sum": lambda p: _Fold(np.add, 0.0),
    "lp": lambda p: _PowerSum(np.abs, p, mean=False),
    "gem": lambda p: _PowerSum(_at_floor, p, mean=True),
    "lse": _LogMeanExp,
    "std": lambda p: _Deviation(),
}
_DEFAULT_P = {"lp": 2.0, "gem": 3.0, "lse": 1.0}
KINDS = tuple(_KINDS)
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
        if self.kind not in _KINDS:
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
    """What is known of one map's pooling from the pieces added so far.

    Sums are kept in float64. Every way to cut a map gives the same max and min bit for bit, and the other
    kinds within float64 rounding. NaN in a piece makes the values of its cells NaN.
    """

    def __init__(self, pooling: Pooling, channels: int, height: int, width: int) -> None:
        if min(channels, height, width) < 1:
            raise ValueError(f"a map [{channels}, {height}, {width}] has nothing to pool")
        self._pooling = pooling
        self._shape = (channels, height, width)
        self._cells = [cell for level in pooling.levels for cell in _grid(level, height, width)]
        self._counts = np.zeros((len(self._cells), 1), np.int64)
        self._kinds = [_KINDS[term.kind](term.p or math.nan) for term in pooling.terms]  # nan: not used
        self._values = [  # per term, [rows, cells, C]
            np.tile(np.array(kind.identity)[:, None, None], (1, len(self._cells), channels)) for kind in self._kinds
        ]

    def add(self, tile: FloatArray, top: int, left: int) -> None:
        """Count the tile [C, th, tw] whose first cell is the map's (top, left).

        Raises:
            ValueError: it does not lie within the map.
        """
        channels, height, width = self._shape
        bottom, right = top + tile.shape[1], left + tile.shape[2]
        if len(tile) != channels or min(top, left) < 0 or bottom > height or right > width:
            raise ValueError(f"tile {tile.shape} at ({top}, {left}) is not within the map {self._shape}")
        with np.errstate(all="ignore"):
            for index, cell in enumerate(self._cells):
                rows = slice(max(cell.top, top) - top, min(cell.bottom, bottom) - top)
                columns = slice(max(cell.left, left) - left, min(cell.right, right) - left)
                if rows.start < rows.stop and columns.start < columns.stop:
                    self._add_block(index, tile[:, rows, columns])

    def _add_block(self, index: int, block: FloatArray) -> None:
        before, count = self._counts[index], np.array([block.shape[1] * block.shape[2]])
        for kind, values in zip(self._kinds, self._values, strict=True):
            values[:, index] = kind.combine(values[:, index], kind.lift(block), before, count)
        self._counts[index] += count

    def merge(self, other: State) -> None:
        """Count what `other` has counted: pieces of the same map that this state has not seen.

        Raises:
            ValueError: it is of another pooling or another map's shape.
        """
        if (self._pooling, self._shape) != (other._pooling, other._shape):
            raise ValueError("states of different poolings or maps do not merge")
        with np.errstate(all="ignore"):
            self._values = [
                kind.combine(a, b, self._counts, other._counts)
                for kind, a, b in zip(self._kinds, self._values, other._values, strict=True)
            ]
        self._counts = self._counts + other._counts

    def finish(self) -> FloatArray:
        """The vector, float32 [pooling.dimension(C)].

        Raises:
            ValueError: the pieces do not add up to the whole map.
        """
        if not np.array_equal(self._counts, [[cell.area] for cell in self._cells]):
            raise ValueError(f"the pieces do not cover the map {self._shape} exactly once")
        with np.errstate(all="ignore"):
            pooled = [kind.finish(values, self._counts) for kind, values in zip(self._kinds, self._values, strict=True)]
            ends = accumulate((level * level for level in self._pooling.levels), initial=0)
            parts = [term[start:end].ravel() for start, end in pairwise(ends) for term in pooled]
            vector = np.concatenate(parts)
            if self._pooling.l2_normalize:
                vector /= np.linalg.norm(vector) or 1.0
            return vector.astype(np.float32)


def pool(feature_map: FloatArray, pooling: Pooling) -> FloatArray:
    """The vector, float32 [pooling.dimension(C)], of a whole feature map, float32 [C, h, w]."""
    channels, height, width = feature_map.shape
    state = pooling.begin(channels, height, width)
    state.add(feature_map, 0, 0)
    return state.finish()


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(f"pooling: {message}", field="pooling")
