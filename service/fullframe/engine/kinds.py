"""The kinds of pooling: what becomes of a block of values, how two such states make one, and the vector at the end."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fullframe.engine.arrays import Array, namespace

DoubleArray = NDArray[np.float64]
CountArray = NDArray[np.int64]

GEM_FLOOR = 1e-6
"""Generalised mean pooling lifts smaller values to this one."""

# Values widened to float64 at a time: 256 KiB stays in a CPU's cache; a device is kept busy by 32 MiB.
_CHUNK: Final = 1 << 15
_CHUNK_ON_DEVICE: Final = 1 << 22


class Kind(ABC):
    """A commutative monoid over float64 states [rows, C], one column per channel; its identity is no state.

    States are where the values are. `lift` and `combine` wait for no device.
    """

    @abstractmethod
    def lift(self, block: Array) -> Array:
        """The state of a block [C, h, w] of at least one cell."""

    @abstractmethod
    def combine(self, a: Array, b: Array, n_a: int, n_b: int) -> Array:
        """The state of both, of which so many values are behind each; at least one."""

    @abstractmethod
    def finish(self, states: DoubleArray, n: CountArray) -> DoubleArray:
        """The pooled values [cells, C] of states [rows, cells, C], with the counts of values behind them [cells, 1]."""


class _Sum(Kind):
    """The sum, or the average."""

    def __init__(self, mean: bool) -> None:
        self._mean = mean

    def lift(self, block: Array) -> Array:
        xp = namespace(block)
        return xp.sum(block, axis=(1, 2), dtype=xp.float64)[None, :]

    def combine(self, a: Array, b: Array, n_a: int, n_b: int) -> Array:
        return a + b

    def finish(self, states: DoubleArray, n: CountArray) -> DoubleArray:
        return np.asarray(states[0] / n if self._mean else states[0], np.float64)


class _Extreme(Kind):
    """The largest value or the smallest."""

    def __init__(self, largest: bool) -> None:
        self._reduce, self._choose = ("max", "maximum") if largest else ("min", "minimum")

    def lift(self, block: Array) -> Array:
        xp = namespace(block)
        return xp.astype(getattr(xp, self._reduce)(block, axis=(1, 2)), xp.float64)[None, :]

    def combine(self, a: Array, b: Array, n_a: int, n_b: int) -> Array:
        return getattr(namespace(a), self._choose)(a, b)

    def finish(self, states: DoubleArray, n: CountArray) -> DoubleArray:
        return np.asarray(states[0], np.float64)


class _PeakSum(Kind):
    """A sum of weights relative to the peak so far, so that no power or exponential overflows."""

    def lift(self, block: Array) -> Array:
        xp = namespace(block)
        peaks, totals = [], []
        for values in _chunks(block):
            values = self._value(values)
            peak = xp.max(values, axis=1)
            base = self._usable(peak)[:, None]
            peaks.append(peak)
            totals.append(xp.sum(self._weight(values, base), axis=1))
        return xp.stack([xp.concat(peaks), xp.concat(totals)])

    def combine(self, a: Array, b: Array, n_a: int, n_b: int) -> Array:
        xp = namespace(a)
        peak = xp.maximum(a[0], b[0])
        # The equal side keeps its sum: an infinite or zero peak has no ratio or difference to itself.
        one = xp.ones_like(peak)
        total = sum(s[1] * xp.where(s[0] == peak, one, self._weight(s[0], peak)) for s in (a, b))
        return xp.stack([peak, total])

    @abstractmethod
    def _value(self, x: Array) -> Array:
        """What is compared with the peak."""

    @abstractmethod
    def _weight(self, value: Array, peak: Array) -> Array:
        """At most 1, and 1 where they are equal."""

    @abstractmethod
    def _usable(self, peak: Array) -> Array:
        """The peak, replaced where a weight relative to it would be undefined."""


class _PowerSum(_PeakSum):
    """(sum or mean of value^p)^(1/p)."""

    def __init__(self, value: Callable[[Array], Array], p: float, mean: bool) -> None:
        self._to_value, self._p, self._mean = value, p, mean

    def finish(self, states: DoubleArray, n: CountArray) -> DoubleArray:
        peak, total = states
        return np.asarray(peak * (total / n if self._mean else total) ** (1 / self._p), np.float64)

    def _value(self, x: Array) -> Array:
        return self._to_value(x)

    def _weight(self, value: Array, peak: Array) -> Array:
        return _power(value / peak, self._p)

    def _usable(self, peak: Array) -> Array:
        xp = namespace(peak)
        return xp.where((peak == 0) | xp.isinf(peak), xp.ones_like(peak), peak)


class _LogMeanExp(_PeakSum):
    """log(mean exp(p x)) / p."""

    def __init__(self, p: float) -> None:
        self._p = p

    def finish(self, states: DoubleArray, n: CountArray) -> DoubleArray:
        peak, total = states
        return np.asarray(peak + np.log(total / n) / self._p, np.float64)

    def _value(self, x: Array) -> Array:
        return x

    def _weight(self, value: Array, peak: Array) -> Array:
        return namespace(peak).exp(self._p * (value - peak))

    def _usable(self, peak: Array) -> Array:
        xp = namespace(peak)
        return xp.where(xp.isinf(peak), xp.zeros_like(peak), peak)


class _Deviation(Kind):
    """Population standard deviation from (mean, sum of squared differences).

    Merged as in Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979.
    """

    def lift(self, block: Array) -> Array:
        xp = namespace(block)
        means, squares = [], []
        for values in _chunks(block):
            mean = xp.mean(values, axis=1)
            values -= mean[:, None]
            values *= values
            means.append(mean)
            squares.append(xp.sum(values, axis=1))
        return xp.stack([xp.concat(means), xp.concat(squares)])

    def combine(self, a: Array, b: Array, n_a: int, n_b: int) -> Array:
        share = n_b / (n_a + n_b)
        delta = b[0] - a[0]
        return namespace(a).stack([a[0] + delta * share, a[1] + b[1] + delta * delta * n_a * share])

    def finish(self, states: DoubleArray, n: CountArray) -> DoubleArray:
        return np.asarray(np.sqrt(states[1] / n), np.float64)


def _chunks(block: Array) -> Iterator[Array]:
    """Runs of whole channels, each a fresh float64 [c, h * w]."""
    xp = namespace(block)
    channels, height, width = block.shape
    most = _CHUNK if str(block.device) == "cpu" else _CHUNK_ON_DEVICE
    step = max(1, most // (height * width))
    for first in range(0, channels, step):
        wide = xp.astype(block[first : first + step], xp.float64)
        yield xp.reshape(wide, (-1, height * width))


def _power(x: Array, p: float) -> Array:
    """x ** p, by multiplication for the small whole p of practice: many times faster than pow."""
    if p in (1, 2, 3, 4):
        result = x
        for _ in range(int(p) - 1):
            result = result * x
        return result
    return x**p


def _size(x: Array) -> Array:
    return namespace(x).abs(x)


def _at_floor(x: Array) -> Array:
    xp = namespace(x)
    return xp.maximum(x, xp.full((), GEM_FLOOR, dtype=x.dtype, device=x.device))


MAKERS: Final[dict[str, Callable[[float], Kind]]] = {
    "avg": lambda p: _Sum(mean=True),
    "max": lambda p: _Extreme(largest=True),
    "min": lambda p: _Extreme(largest=False),
    "sum": lambda p: _Sum(mean=False),
    "lp": lambda p: _PowerSum(_size, p, mean=False),
    "gem": lambda p: _PowerSum(_at_floor, p, mean=True),
    "lse": _LogMeanExp,
    "std": lambda p: _Deviation(),
}
"""By name, what makes one; p is nan for those that take none."""
