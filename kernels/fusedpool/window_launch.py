"""Pooling over windows of one shape, whatever places them: the launch of window_kernels."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fusedpool import operators, runtime, window_kernels
from fusedpool.geometry import Window
from fusedpool.kinds import KINDS
from fusedpool.operators import Outputs
from fusedpool.runtime import pointer, present


class Norm(NamedTuple):
    """What the gradient through training-mode batch normalisation adds to `backward`; each is [C].

    The gradient by scale is that by the factor of x - mean. Without offset and slope, dx is not computed; with them, it
    is all that is, and offset + slope (x - mean) is taken from it.
    """

    mean: Tensor
    offset: Tensor | None = None
    slope: Tensor | None = None


def _constants(window: Window) -> dict[str, int]:
    w = window
    return {
        "KH": w.kernel_h, "KW": w.kernel_w, "SH": w.stride_h, "SW": w.stride_w, "PH": w.padding_h, "PW": w.padding_w,
        "DH": w.dilation_h, "DW": w.dilation_w, "INCLUDE_PAD": w.count_include_pad, "DIVISOR": w.divisor,
    }  # fmt: skip


def forward(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    param: Tensor | None,
    seed: Tensor | None,
    tables: Sequence[Tensor],
    window: Window,
    size: tuple[int, int],
    kind: str,
    p: float,
    activation: str,
    save: bool,
    indices: bool,
) -> Outputs:
    """y, winner, aux, index of maps x, each dense [N, C, *size]; those not wanted are empty.

    Args:
        tables: int32 [OH] and [OW], where each window starts, instead of the window's strides and padding; or none.
    """
    y, winner, aux, index = outputs = operators.empty_outputs(x, (x.shape[1], *size), window.taps, kind, save, indices)
    scale, shift, param = operators.dense_parameters(x, scale, shift, param, p)
    tile = runtime.Tile.over(x, *size)
    # Neighbouring outputs read neighbours of x.
    vectors = tile.last or (window.stride_w == 1 and not tables and x.shape[1] > 1)
    strides = runtime.Strides.of(x, tile.last, vectors)
    align = runtime.alignment((x.shape[3],)) if vectors and not tile.last else 1
    top, left = tables or (y, y)
    tile.launch(
        window_kernels.forward,
        *(x, pointer(scale, x), pointer(shift, x), pointer(param, x), pointer(seed, x), top, left),
        *(y, winner, aux, index),
        *(tile.rows, *x.shape[1:3], x.shape[3] // align, size[0], size[1] // tile.align),
        *(*strides.outer, strides.inner, p),
        **operators.forward_constants(kind, activation, outputs),
        **present(scale=scale, shift=shift, param=param),
        **_constants(window),
        TABLE=bool(tables),
        WIDE=runtime.wide(x, y),
        ALIGN=strides.align,
        W_ALIGN=align,
        OW_ALIGN=tile.align,
        UNROLL=window.taps <= 25 and kind != "stochastic",
    )
    return outputs


def backward(
    g: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    winner: Tensor,
    aux: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    param: Tensor | None,
    tables: Sequence[Tensor],
    window: Window,
    overlap: tuple[int, int],
    shape: Sequence[int],
    last: bool,
    kind: str,
    p: float,
    activation: str,
    norm: Norm | None = None,
) -> Outputs:
    """Gradients by x [*shape], dense, channels_last or not, and by scale, shift and param; see window_kernels.

    Args:
        tables: those of forward, and int32 [H] and [W]: the first window that each row or column lies in.
        overlap: the most windows that a row, and a column, can lie in.
    """
    acc = runtime.accumulator(g)
    dx, dscale, dshift, dparam = outputs = operators.empty_gradients(g, scale, shift, param, shape, last)
    mode = "" if norm is None else "sums" if norm.offset is None else "dx"
    affine = mode != "dx" and (scale is not None or shift is not None)
    if mode != "sums" and param is not None and KINDS[kind].learnable:
        dparam.copy_((g.to(acc) * aux).sum().view(param.shape))
    scale, shift, param = operators.dense_parameters(g, scale, shift, param, p)
    winner, aux = (runtime.dense(t, last) for t in (winner, aux))
    y = None if y is None else runtime.dense(y, last)
    tile = runtime.Tile.over(dx, shape[2], shape[3], last)
    partials = g.new_empty((2, *tile.partials) if affine else 0, dtype=acc)
    x_strides = runtime.Strides.of(dx if x is None else x, tile.last)
    g_strides = runtime.Strides.of(g, tile.last, vectors=tile.last)
    top, left, first_h, first_w = tables or (dx,) * 4
    tile.launch(
        window_kernels.backward,
        *(g, pointer(x, g), pointer(y, g), winner, aux, pointer(scale, g), pointer(shift, g), pointer(param, g)),
        *(top, left, first_h, first_w, dx, partials, *(pointer(t, g) for t in norm or (None,) * 3)),
        *(tile.rows, *shape[1:3], shape[3] // tile.align, g.shape[2], g.shape[3]),
        *(*x_strides.outer, x_strides.inner, *g_strides.outer, g_strides.inner, p),
        **operators.backward_constants(kind, activation, g, winner),
        **present(scale=scale, shift=shift, param=param, x=x, y=y),
        **_constants(window),
        TABLE=bool(tables),
        AFFINE_GRADIENT=affine,
        NORM=mode,
        WIDE=runtime.wide(dx, g, x, y, winner, aux),
        ALIGN=x_strides.align,
        G_ALIGN=g_strides.align,
        W_ALIGN=tile.align,
        TH=overlap[0],
        TW=overlap[1],
    )
    if affine:
        operators.fill((dscale, dshift), tile.per_channel(partials))
    return outputs
