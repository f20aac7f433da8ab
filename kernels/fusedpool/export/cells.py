"""What pooling needs of a domain, as ONNX nodes: the largest value of each cell, sums, and the way back to values."""

from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import onnx_ir as ir
from onnxscript import opset18

from fusedpool.geometry import Window

op: Final[Any] = opset18  # its annotations are those of eager evaluation

Value: TypeAlias = Any
"""A tensor in the graph that is being built; numbers beside it become constants of its type."""

_LOW: Final = float("-inf")


def number(value: float, dtype: ir.DataType) -> Value:
    """A constant scalar."""
    return op.Constant(value=ir.tensor(np.array(value, dtype.numpy())))


def side(x: Value, axis: int) -> Value:
    """int64 [1]: the length of an axis, whatever it will be."""
    return op.Shape(x, start=axis, end=axis + 1) if axis != -1 else op.Shape(x, start=-1)


def count_up(n: Value) -> Value:
    """int64 [n]: 0 to n - 1; n: [1]."""
    return op.Range(op.Constant(value_int=0), op.Squeeze(n), op.Constant(value_int=1))


def column(x: Value) -> Value:
    """[n] -> [n, 1]."""
    return op.Unsqueeze(x, ints(1))


def ints(*values: int) -> Value:
    """int64 [len(values)]."""
    return op.Constant(value_ints=list(values))


class Domain(Protocol):
    """Values that meet in cells; a method's argument has the shape of the values, its result that of the cells."""

    @property
    def dtype(self) -> ir.DataType:
        """What sums are kept in."""

    def peak(self, v: Value) -> Value:
        """The largest of each cell."""

    def total(self, v: Value) -> Value:
        """The sum of each."""

    def mean(self, v: Value) -> Value:
        """The sum over the number of values."""

    def average(self, v: Value) -> Value:
        """The sum over the divisor that the kind avg has."""


@dataclass(frozen=True)
class Taps:
    """Cells whose values lie along axes of their own.

    Attributes:
        axes: counted from the end, of values and of `valid`.
        valid: bool, broadcastable to the values; None: all are.
        divisor: for `average`, broadcastable to the cells; None: the number of values.
    """

    dtype: ir.DataType
    axes: tuple[int, ...]
    valid: Value | None = None
    divisor: Value | None = None

    def peak(self, v: Value) -> Value:
        """The largest of each cell."""
        return op.ReduceMax(self._masked(v, _LOW), ints(*self.axes), keepdims=0)

    def total(self, v: Value) -> Value:
        """The sum of each."""
        return op.ReduceSum(self._masked(v, 0), ints(*self.axes), keepdims=0)

    def mean(self, v: Value) -> Value:
        """The sum over the number of values."""
        if self.valid is None:
            return op.ReduceMean(v, ints(*self.axes), keepdims=0)
        return op.Div(self.total(v), self.count())

    def average(self, v: Value) -> Value:
        """The sum over `divisor`."""
        return self.mean(v) if self.divisor is None else op.Div(self.total(v), self.divisor)

    def count(self) -> Value:
        """How many values are valid."""
        assert self.valid is not None
        return op.ReduceSum(op.Cast(self.valid, to=self.dtype), ints(*self.axes), keepdims=0)

    def spread(self, y: Value) -> Value:
        """Each cell's number, to stand beside its values."""
        return op.Unsqueeze(y, ints(*self.axes))

    def first(self, v: Value) -> Value:
        """Which of a cell's values is the first of the largest, for the axes (-3, -1): int64."""
        values = op.Transpose(self._masked(v, _LOW), perm=[0, 1, 2, 4, 3, 5])
        return op.ArgMax(op.Reshape(values, ints(0, 0, 0, 0, -1)), axis=4, keepdims=0)

    def _masked(self, v: Value, fill: float) -> Value:
        return v if self.valid is None else op.Where(self.valid, v, number(fill, self.dtype))


@dataclass(frozen=True)
class Sliding:
    """Windows as ONNX has them, without dilation but for `peak`; only for float32, which runtimes have kernels for.

    ONNX's own ceil_mode is not used: runtimes differ in what they make of windows that overhang.
    """

    x: Value
    window: Window
    dtype: ir.DataType = ir.DataType.FLOAT

    def peak(self, v: Value) -> Value:
        """The largest of each cell."""
        padded, attributes = self._placed(v, _LOW)
        w = self.window
        return op.MaxPool(padded, **attributes, dilations=[w.dilation_h, w.dilation_w])[0]

    def total(self, v: Value) -> Value:
        """The sum of each."""
        padded, attributes = self._placed(v, 0)
        mean = op.AveragePool(padded, **attributes, count_include_pad=1)
        return op.Mul(mean, number(self.window.taps, self.dtype))

    def mean(self, v: Value) -> Value:
        """The sum over the number of values."""
        if self.window.ceil_mode:
            return op.Div(self.total(v), op.Cast(_counts(self.x, self.window, inside=True), to=self.dtype))
        return op.AveragePool(v, **self._placed(v, 0)[1], count_include_pad=0)

    def average(self, v: Value) -> Value:
        """The sum over what the window says."""
        w = self.window
        if not w.divisor and not w.ceil_mode:
            return op.AveragePool(v, **self._placed(v, 0)[1], count_include_pad=w.count_include_pad)
        divisor = window_divisor(self.x, w, self.dtype)
        return self.mean(v) if divisor is None else op.Div(self.total(v), divisor)

    def norm(self, v: Value, p: int) -> Value:
        """ONNX's LpPool."""
        padded, attributes = self._placed(v, 0)
        return op.LpPool(padded, **attributes, p=p)

    def _placed(self, v: Value, fill: float) -> tuple[Value, dict[str, Any]]:
        """v, padded or cropped to what the windows take in, where padding by attributes does not do."""
        w = self.window
        attributes = {"kernel_shape": [w.kernel_h, w.kernel_w], "strides": [w.stride_h, w.stride_w]}
        if not w.ceil_mode:
            return v, attributes | {"pads": [w.padding_h, w.padding_w] * 2}
        after = []
        for axis, geometry in enumerate(_axes(w)):
            taken = op.Add(
                op.Mul(op.Sub(geometry.outputs(self.x, axis), ints(1)), ints(geometry.stride)), ints(geometry.span)
            )
            after.append(op.Sub(op.Sub(taken, side(self.x, axis + 2)), ints(geometry.padding)))
        pads = op.Concat(ints(0, 0, w.padding_h, w.padding_w, 0, 0), *after, axis=0)
        return op.Pad(v, pads, number(fill, self.dtype)), attributes


@dataclass(frozen=True)
class _Axis:
    """A window along one axis."""

    kernel: int
    stride: int
    padding: int
    dilation: int
    ceil_mode: int

    @property
    def span(self) -> int:
        """Rows from its first to its last, both counted."""
        return (self.kernel - 1) * self.dilation + 1

    def outputs(self, x: Value, axis: int) -> Value:
        """int64 [1]: how many windows there are, as Window.output_size says."""
        size = side(x, axis + 2)
        reach = op.Add(size, ints(2 * self.padding - self.span))
        if not self.ceil_mode:
            return op.Add(op.Div(reach, ints(self.stride)), ints(1))
        windows = op.Div(op.Add(reach, ints(self.stride - 1)), ints(self.stride))
        started = op.Div(op.Add(size, ints(self.padding - 1)), ints(self.stride))
        return op.Add(op.Min(windows, started), ints(1))

    def starts(self, x: Value, axis: int) -> Value:
        """int64 [outputs]: the first row of each window."""
        return op.Sub(op.Mul(count_up(self.outputs(x, axis)), ints(self.stride)), ints(self.padding))


def _axes(w: Window) -> tuple[_Axis, _Axis]:
    return (
        _Axis(w.kernel_h, w.stride_h, w.padding_h, w.dilation_h, w.ceil_mode),
        _Axis(w.kernel_w, w.stride_w, w.padding_w, w.dilation_w, w.ceil_mode),
    )


def _counts(x: Value, window: Window, inside: bool) -> Value:
    """int64 [OH, OW]: each window's cells before the far padding ends; inside: those inside the map, undilated."""
    counts = []
    for axis, geometry in enumerate(_axes(window)):
        start = geometry.starts(x, axis)
        end = op.Add(side(x, axis + 2), ints(0 if inside else geometry.padding))
        steps = op.Div(op.Add(op.Sub(end, start), ints(geometry.dilation - 1)), ints(geometry.dilation))
        count = op.Min(steps, ints(geometry.kernel))
        counts.append(op.Add(count, op.Min(start, ints(0))) if inside else count)
    return op.Mul(column(counts[0]), counts[1])


def window_divisor(x: Value, window: Window, dtype: ir.DataType) -> Value | None:
    """What avg divides a window's sum by; None: the number of cells inside the map."""
    if window.divisor:
        return number(window.divisor, dtype)
    if not window.count_include_pad:
        return None
    if not window.ceil_mode:
        return number(window.taps, dtype)
    return op.Cast(_counts(x, window, inside=False), to=dtype)


def gathered(v: Value, rows: Value, columns: Value, taps: Taps) -> tuple[Value, Taps]:
    """Cells of rows x columns: [N, C, H, W] -> values [N, C, OH, KH, OW, KW], and what they are to `taps`.

    Args:
        rows, columns: int64 [OH, KH] and [OW, KW]; outside the map: not valid.
    """
    height, width = side(v, 2), side(v, 3)
    values = op.Gather(op.Gather(v, _inside(rows, height), axis=2), _inside(columns, width), axis=4)
    valid = op.And(op.Unsqueeze(_is_inside(rows, height), ints(2, 3)), _is_inside(columns, width))
    return values, replace(taps, axes=(-3, -1), valid=valid)


def _inside(indices: Value, size: Value) -> Value:
    return op.Max(op.Min(indices, op.Sub(size, ints(1))), ints(0))


def _is_inside(indices: Value, size: Value) -> Value:
    return op.And(op.GreaterOrEqual(indices, ints(0)), op.Less(indices, size))


def window_taps(x: Value, window: Window) -> tuple[Value, Value]:
    """int64 [OH, KH] and [OW, KW]: the rows and columns that each window takes in."""
    rows, columns = (
        op.Add(column(geometry.starts(x, axis)), ints(*(i * geometry.dilation for i in range(geometry.kernel))))
        for axis, geometry in enumerate(_axes(window))
    )
    return rows, columns


def adaptive_taps(x: Value, axis: int, cells: int) -> Value:
    """int64 [cells, most]: the rows of adaptive cells, floor(i H / n) up to ceil((i + 1) H / n), then -1."""
    size, number = side(x, axis), ints(cells)
    start = op.Div(op.Mul(ints(*range(cells)), size), number)
    end = op.Div(op.Add(op.Mul(ints(*range(1, cells + 1)), size), ints(cells - 1)), number)
    most = op.ReduceMax(op.Sub(end, start), ints(0), keepdims=1)
    taps = op.Add(column(start), count_up(most))
    return op.Where(op.Less(taps, column(end)), taps, ints(-1))


def places(first: Value, rows: Value, columns: Value, width: Value) -> Value:
    """int64 h * W + w of taps `first` [N, C, OH, OW] of gathered cells."""
    across = side(columns, 1)
    row = _pick(op.Unsqueeze(rows, ints(1)), op.Div(first, across))
    return op.Add(op.Mul(row, width), _pick(columns, op.Mod(first, across)))


def _pick(table: Value, tap: Value) -> Value:
    """table [..., K] at [..., tap]."""
    chosen = op.OneHot(tap, side(table, -1), ints(0, 1), axis=-1)
    return op.ReduceSum(op.Mul(chosen, table), ints(-1), keepdims=0)
