"""What each operator of fusedpool is in standard ONNX operators.

A translation takes what it needs of its operator's arguments, by the names in the schema, and gives y and, where it was
asked for, index; what the operator keeps for backward has no place in a graph.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import onnx_ir as ir
import torch

import fusedpool.batchnorm
import fusedpool.channel
import fusedpool.conv
import fusedpool.fractional
import fusedpool.regions
import fusedpool.window  # noqa: F401 they register the operators
from fusedpool.export import cells
from fusedpool.export.cells import Sliding, Taps, Value, ints, number, op
from fusedpool.export.formulas import AROUND_A_VALUE, mapped, pooled
from fusedpool.geometry import Window

Translated: TypeAlias = tuple[Value, Value | None]

_FLOAT: Final = ir.DataType.FLOAT


def _sums_in(x: Value) -> ir.DataType:
    return ir.DataType.DOUBLE if x.dtype is ir.DataType.DOUBLE else _FLOAT


def _parameter(p: float, param: Value | None, dtype: ir.DataType) -> Value:
    """A constant [], or the input as [1]."""
    return number(p or 1, dtype) if param is None else op.Reshape(op.Cast(param, to=dtype), ints(-1))


def _window(
    x: Value, scale: Value, shift: Value, param: Value, window: Sequence[int], kind: str, p: float, activation: str,
    indices: bool, **_: Any,
) -> Translated:  # fmt: skip
    w, dtype = Window.from_ints(window), _sums_in(x)
    v = mapped(x, scale, shift, activation, dtype)
    parameter = _parameter(p, param, dtype)
    dilated = (w.dilation_h, w.dilation_w) != (1, 1) and kind not in ("max", "min")
    if dtype is _FLOAT and not dilated and kind not in AROUND_A_VALUE and not indices:
        return pooled(Sliding(x, w), v, kind, parameter, p if param is None else None), None
    taps = Taps(dtype, (), None, cells.window_divisor(x, w, dtype))
    return _gathered(v, *cells.window_taps(x, w), taps, kind, parameter, indices)


def _gathered(v: Value, rows: Value, columns: Value, taps: Taps, kind: str, p: Value, indices: bool) -> Translated:
    """A kind over cells of rows x columns, and where its winners lie."""
    values, taps = cells.gathered(v, rows, columns, taps)
    y = pooled(taps, values, kind, p)
    if not indices:
        return y, None
    first = taps.first(op.Neg(values) if kind == "min" else values)
    return y, cells.places(first, rows, columns, cells.side(v, 3))


def _fractional(
    x: Value, scale: Value, shift: Value, param: Value, top: Value, left: Value, kernel: Sequence[int], kind: str,
    p: float, activation: str, indices: bool, **_: Any,
) -> Translated:  # fmt: skip
    dtype = _sums_in(x)
    rows, columns = (
        op.Add(cells.column(op.Cast(start, to=ir.DataType.INT64)), ints(*range(size)))
        for start, size in zip((top, left), kernel, strict=True)
    )
    v = mapped(x, scale, shift, activation, dtype)
    return _gathered(v, rows, columns, Taps(dtype, ()), kind, _parameter(p, param, dtype), indices)


def _channel(
    x: Value, scale: Value, shift: Value, param: Value, groups: int, kind: str, p: float, activation: str,
    indices: bool, **_: Any,
) -> Translated:  # fmt: skip
    dtype, axis = _sums_in(x), -3
    v = mapped(x, scale, shift, activation, dtype)
    values = op.Reshape(v, op.Concat(cells.side(v, 0), ints(groups, -1), op.Shape(v, start=2), axis=0))
    y = pooled(Taps(dtype, (axis,)), values, kind, _parameter(p, param, dtype))
    if not indices:
        return y, None
    first = op.ArgMax(op.Neg(values) if kind == "min" else values, axis=axis, keepdims=0)
    begin = op.Mul(ints(*range(groups)), op.Div(cells.side(v, 1), ints(groups)))
    return y, op.Add(first, op.Reshape(begin, ints(-1, 1, 1)))


def _conv1x1_global(
    x: Value, weight: Value, bias: Value, param: Value, kind: str, p: float, activation: str, **_: Any
) -> Translated:
    dtype = _sums_in(x)
    kernel = op.Unsqueeze(op.Cast(weight, to=dtype), ints(2, 3))
    v = mapped(op.Conv(op.Cast(x, to=dtype), kernel), None, bias, activation, dtype)
    return pooled(Taps(dtype, (-2, -1)), v, kind, _parameter(p, param, dtype)), None


def _regions(
    x: Value, bounds: Value, scale: Value, shift: Value, param: Value, mode: str, levels: Sequence[int], kinds: str,
    ps: Sequence[float], activation: str, indices: bool, **_: Any,
) -> Translated:  # fmt: skip
    dtype = _sums_in(x)
    v = mapped(x, scale, shift, activation, dtype)
    results, index = [], None
    for k, kind in enumerate(kinds.split(",")):
        p = _parameter(ps[k], None if param is None else op.Gather(param, ints(k)), dtype)
        if mode == "grid":
            y, index = _grid(v, levels, kind, p, dtype, indices)
        else:
            values, taps = {"whole": _whole, "sized": _sized, "packed": _packed}[mode](v, bounds, dtype)
            y = _or_nothing(taps, pooled(taps, values, kind, p))
            y = op.Transpose(op.Squeeze(y, ints(0, 2)), perm=[1, 0]) if mode == "packed" else y
            y = op.Unsqueeze(y, ints(-1))
        results.append(op.Unsqueeze(y, ints(0)))
    return op.Concat(*results, axis=0), None if index is None else op.Unsqueeze(index, ints(0))


def _grid(v: Value, levels: Sequence[int], kind: str, p: Value, dtype: ir.DataType, indices: bool) -> Translated:
    """The cells of all levels: [N, C, cells]."""
    parts = []
    for height, width in zip(levels[::2], levels[1::2], strict=True):
        rows, columns = cells.adaptive_taps(v, 2, height), cells.adaptive_taps(v, 3, width)
        level = _gathered(v, rows, columns, Taps(dtype, ()), kind, p, indices)
        parts.append([None if t is None else op.Reshape(t, ints(0, 0, height * width)) for t in level])
    y, index = (list(part) for part in zip(*parts, strict=True))
    return op.Concat(*y, axis=2), op.Concat(*index, axis=2) if indices else None


def _whole(v: Value, bounds: Value, dtype: ir.DataType) -> tuple[Value, Taps]:
    return v, Taps(dtype, (-2, -1))


def _sized(v: Value, bounds: Value, dtype: ir.DataType) -> tuple[Value, Taps]:
    """Of each image, its own rows and columns."""
    inside = [
        op.Less(cells.count_up(cells.side(v, axis + 2)), op.Slice(bounds, ints(axis), ints(axis + 1), ints(1)))
        for axis in range(2)
    ]
    valid = op.And(op.Unsqueeze(inside[0], ints(1, 3)), op.Unsqueeze(inside[1], ints(1, 2)))
    return v, Taps(dtype, (-2, -1), valid)


def _packed(v: Value, bounds: Value, dtype: ir.DataType) -> tuple[Value, Taps]:
    """[1, C, 1, P] -> [1, C, 1, N, most]: each segment's pixels side by side."""
    start, end = op.Slice(bounds, ints(0), ints(-1)), op.Slice(bounds, ints(1), ints(2**62))
    most = op.Max(op.ReduceMax(op.Sub(end, start), ints(0), keepdims=1), ints(1))
    pixel = op.Add(cells.column(start), cells.count_up(most))
    last = op.Sub(cells.side(v, 3), ints(1))
    return op.Gather(v, op.Min(pixel, last), axis=3), Taps(dtype, (-1,), op.Less(pixel, cells.column(end)))


def _or_nothing(taps: Taps, y: Value) -> Value:
    """0 for a cell without values."""
    if taps.valid is None:
        return y
    zero = number(0, taps.dtype)
    return op.Where(op.Equal(taps.count(), zero), zero, y)


def _norm_window(**_: Any) -> Translated:
    raise NotImplementedError(
        "normalisation by the batch's own statistics does not export; use training=False (a module in eval mode)"
    )


_TRANSLATIONS: Final[Mapping[str, Callable[..., Translated]]] = {
    "window": _window,
    "fractional": _fractional,
    "channel": _channel,
    "conv1x1_global": _conv1x1_global,
    "regions": _regions,
    "norm_window": _norm_window,
}


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator -> what torch.onnx.export calls with its arguments for the nodes of its results."""
    return {
        getattr(torch.ops.fusedpool, name).default: _by_schema(getattr(torch.ops.fusedpool, name).default, translate)
        for name, translate in _TRANSLATIONS.items()
    }


def _by_schema(operator: Any, translate: Callable[..., Translated]) -> Callable[..., Any]:
    schema = operator._schema
    names = [argument.name for argument in schema.arguments]

    def translated(*values, **named):  # annotations would be taken for ONNX's
        arguments = {**dict(zip(names, values, strict=False)), **named}
        y, index = translate(**arguments)
        kept = [op.Constant(value=ir.tensor(np.empty(0, np.int64))) for _ in schema.returns[1:]]
        if index is not None:
            kept[-1] = index
        return op.Cast(y, to=arguments["x"].dtype), *kept

    return translated
