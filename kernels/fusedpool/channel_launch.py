"""Pooling over groups of neighbouring channels: the launch of channel_kernels."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from torch import Tensor

from fusedpool import channel_kernels, operators, runtime
from fusedpool.kinds import KINDS
from fusedpool.operators import Outputs
from fusedpool.runtime import pointer, present

_ELEMENTS: Final = 1024  # of a tile


def _flat(*maps: Tensor) -> tuple[Tensor, ...]:
    """The maps as [N, C, 1, H * W] where all of them can be without a copy: longer lines, fewer divisions."""
    n, _, height, width = maps[0].shape
    if height == 1 or any(t.stride(2) != width * t.stride(3) for t in maps):
        return maps
    return tuple(t.as_strided((n, t.shape[1], 1, height * width), (*t.stride()[:2], 0, t.stride(3))) for t in maps)


def _tiles(like: Tensor, groups: int, taps: int, last: bool) -> tuple[runtime.Tile, int]:
    """How programs share an output [N, groups, H, W] for maps of like's size, in units of inputs; and BK."""
    n, _, height, width = like.shape
    if last:
        members = min(128, 1 << (taps - 1).bit_length())
        block = members * min(128 // members, 1 << (groups - 1).bit_length())
        return runtime.Tile(
            True, groups * taps, n, n * height * width, groups * members, max(1, _ELEMENTS // block), block
        ), members
    block = runtime.line_block(width)
    return runtime.Tile(False, groups * taps, n, n * groups * height, width, max(1, _ELEMENTS // block), block), 1


def forward(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    param: Tensor | None,
    seed: Tensor | None,
    groups: int,
    kind: str,
    p: float,
    activation: str,
    save: bool,
    indices: bool,
) -> Outputs:
    """y, winner, aux, index, each dense [N, groups, H, W]; those not wanted are empty."""
    taps = x.shape[1] // groups
    y, winner, aux, index = outputs = operators.empty_outputs(x, (groups, *x.shape[2:]), taps, kind, save, indices)
    scale, shift, param = operators.dense_parameters(x, scale, shift, param, p)
    last = runtime.channels_last(x) or (x.shape[2] * x.shape[3] == 1 and x.stride(1) == 1)
    (x,) = _flat(x)
    tile, members = _tiles(x, groups, taps, last)
    strides = runtime.Strides.of(x, last)
    tile.launch(
        channel_kernels.forward,
        *(x, pointer(scale, x), pointer(shift, x), pointer(param, x), pointer(seed, x), y, winner, aux, index),
        *(tile.rows, *x.shape[1:3], x.shape[3] // tile.align, *strides.outer, strides.inner, p),
        **operators.forward_constants(kind, activation, outputs),
        **present(scale=scale, shift=shift, param=param),
        K=taps,
        WIDE=runtime.wide(x, y),
        ALIGN=strides.align,
        W_ALIGN=tile.align,
        BK=members,
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
    shape: Sequence[int],
    last: bool,
    kind: str,
    p: float,
    activation: str,
) -> Outputs:
    """Gradients by x [*shape], dense, channels_last or not, and by scale, shift and param."""
    acc = runtime.accumulator(g)
    dx, dscale, dshift, dparam = outputs = operators.empty_gradients(g, scale, shift, param, shape, last)
    affine = scale is not None or shift is not None
    if param is not None and KINDS[kind].learnable:
        dparam.copy_((g.to(acc) * aux).sum().view(param.shape))
    scale, shift, param = operators.dense_parameters(g, scale, shift, param, p)
    winner, aux = (runtime.dense(t, last) for t in (winner, aux))
    y = None if y is None else runtime.dense(y, last)
    last = last or dx.shape[2] * dx.shape[3] == 1
    g, dx, *inputs = _flat(g, dx, *(() if x is None else (x,)))
    taps = dx.shape[1] // g.shape[1]
    tile, members = _tiles(g, g.shape[1], taps, last)
    sums = replace(tile, rows=tile.rows if last else tile.rows * taps, columns=dx.shape[1] if last else tile.columns)
    partials = g.new_empty((2, *sums.partials) if affine else 0, dtype=acc)
    x_strides, g_strides = runtime.Strides.of(inputs[0] if inputs else dx, last), runtime.Strides.of(g, last)
    tile.launch(
        channel_kernels.backward,
        *(g, pointer(x, g), pointer(y, g), winner, aux),
        *(pointer(scale, g), pointer(shift, g), pointer(param, g), dx, partials),
        *(tile.rows, *dx.shape[1:3], dx.shape[3] // tile.align),
        *(*x_strides.outer, x_strides.inner, *g_strides.outer, g_strides.inner, p),
        **operators.backward_constants(kind, activation, g, winner),
        **present(scale=scale, shift=shift, param=param, x=x, y=y),
        AFFINE_GRADIENT=affine,
        K=taps,
        WIDE=runtime.wide(dx, g, x),
        ALIGN=x_strides.align,
        G_ALIGN=g_strides.align,
        W_ALIGN=tile.align,
        BK=members,
    )
    if affine:
        operators.fill((dscale, dshift), sums.per_channel(partials))
    return outputs
