"""The launch of batchnorm_kernels: how programs share a map, and the passes of forward and backward."""

from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

from torch import Tensor

from fusedpool import batchnorm_kernels, operators, runtime, window_launch
from fusedpool.geometry import Window
from fusedpool.kinds import KINDS
from fusedpool.operators import Outputs
from fusedpool.runtime import pointer, present

_UNROLL: Final = 4  # loads of 16 bytes that each thread has under way
_PROGRAMS: Final = 1024  # about so many, where there is enough to do
_LINES: Final = 256  # of partial sums, and channels, of a merging program's step
_CHANNELS: Final = 4


class Statistics(NamedTuple):
    """[C] each: mean, biased variance, 1 / sqrt(variance + eps), and scale x + shift = weight xhat + bias."""

    mean: Tensor
    variance: Tensor
    factor: Tensor
    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class _Sweep:
    """How programs share the sums over each channel of a map.

    Attributes:
        rows: that each column is summed over.
        programs: of one group; each has a tile's columns.
        groups: among which blocks of rows are dealt out.
        lines: of partial sums.
    """

    tile: runtime.Tile
    rows: int
    programs: int
    groups: int
    lines: int

    @classmethod
    def over(cls, like: Tensor, height: int, width: int, last: bool) -> Self:
        """For a map of that size with the images and channels of `like`, channels_last or not."""
        tile = runtime.Tile.over(like, height, width, last)
        blocks = runtime.cdiv(tile.columns, tile.block_columns)
        rows, programs = (tile.rows, blocks) if last else (tile.rows // tile.channels, blocks * tile.channels)
        steps = runtime.cdiv(rows, tile.block_rows * _UNROLL)
        groups = max(1, min(_PROGRAMS // programs, steps))
        return cls(tile, rows, programs, groups, groups * (1 if last else blocks))

    @property
    def elements(self) -> int:
        """That programs go through, those past an edge included."""
        return runtime.cdiv(self.rows, self.tile.block_rows) * self.tile.block_rows * self.programs

    def launch(self, kernel: Any, *args: Any, **constants: Any) -> None:
        """Run the programs of all groups."""
        constants |= {**self.tile.constants, "W_ALIGN": self.tile.align, "UNROLL": _UNROLL}
        runtime.launch(kernel, self.groups * self.programs, *args, **constants)


def _merge(kernel: Any, channels: int, *args: Any, **constants: Any) -> None:
    programs = runtime.cdiv(channels, _CHANNELS)
    runtime.launch(kernel, programs, *args, **constants, C=channels, BL=_LINES, BC=_CHANNELS)


def _flatten(x: Tensor, last: bool) -> tuple[Tensor, bool]:
    """x as [1, C, 1, N * H * W] for channels_last, else [N, C, 1, H * W], if its memory allows; whether it does."""
    n, _, h, w = x.shape
    s_n, _, s_h, s_w = x.stride()
    lines = h == 1 or s_h == w * s_w
    if last:
        images = n == 1 or s_n == h * w * s_w
        return (x.permute(1, 0, 2, 3).flatten(1)[None, :, None], True) if lines and images else (x, False)
    # Short lines leave part of a tile idle, but long ones make for fewer partial sums.
    fewer = _Sweep.over(x, 1, h * w, last).elements < 0.9 * _Sweep.over(x, h, w, last).elements
    return (x.flatten(2)[:, :, None], True) if lines and fewer else (x, False)


def statistics(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Those of x [N, C, H, W], N not 0: [5, C], the rows of `Statistics`, in the accumulator's dtype."""
    acc = runtime.accumulator(x)
    count, channels, last = x.numel() // x.shape[1], x.shape[1], runtime.channels_last(x)
    x, flat = _flatten(x, last)
    sweep, strides = _Sweep.over(x, x.shape[2], x.shape[3], last), runtime.Strides.of(x, last)
    partials = x.new_empty((3, sweep.lines, channels), dtype=acc)
    sweep.launch(
        batchnorm_kernels.moments,
        *(x, partials, sweep.rows, sweep.groups, channels, x.shape[2], x.shape[3] // sweep.tile.align),
        *(*strides.outer, strides.inner),
        FLAT=flat,
        WIDE=runtime.wide(x),
        ALIGN=strides.align,
        ACC=runtime.triton_type(acc),
    )
    result = partials.new_empty((len(Statistics._fields), channels))
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    _merge(
        batchnorm_kernels.merge_moments,
        channels,
        *(partials, x, pointer(weight, x), pointer(bias, x), result, x.stride(1), sweep.lines, count),
        EPS=eps,
        **present(weight=weight, bias=bias),
        ACC=runtime.triton_type(acc),
    )
    return result


def _winner_sums(
    g: Tensor, x: Tensor, winner: Tensor, known: Statistics, window: Window, activation: str
) -> tuple[Tensor, Tensor]:
    """Partial sums [lines, C] of the gradients by the factor of x - mean and by shift, from winners alone."""
    acc, last = runtime.accumulator(g), runtime.channels_last(x)
    winner = runtime.dense(winner, last)
    sweep = _Sweep.over(g, g.shape[2], g.shape[3], last)
    strides, g_strides = runtime.Strides.of(x, last, vectors=False), runtime.Strides.of(g, last)
    partials = g.new_empty((2, sweep.lines, g.shape[1]), dtype=acc)
    sweep.launch(
        batchnorm_kernels.winner_sums,
        *(g, x, winner, known.mean, known.scale, known.shift, partials, sweep.rows, sweep.groups),
        *(*g.shape[1:3], g.shape[3] // sweep.tile.align),
        *(*strides.outer, strides.inner, *g_strides.outer, g_strides.inner),
        ACTIVATION=activation,
        SENTINEL=operators.sentinel(winner),
        KW=window.kernel_w,
        SH=window.stride_h,
        SW=window.stride_w,
        PH=window.padding_h,
        PW=window.padding_w,
        DH=window.dilation_h,
        DW=window.dilation_w,
        WIDE=runtime.wide(g, x, winner),
        ALIGN=strides.align,
        G_ALIGN=g_strides.align,
        ACC=runtime.triton_type(acc),
    )
    return partials[0], partials[1]


def backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    param: Tensor | None,
    winner: Tensor,
    y: Tensor | None,
    aux: Tensor,
    known: Statistics,
    window: Window,
    kind: str,
    p: float,
    activation: str,
) -> Outputs:
    """Gradients by x [N, C, H, W], N not 0, laid out like it, and by weight, bias and param, in two passes."""
    last = runtime.channels_last(x)
    if operators.masked(kind, activation):
        activation = "none"  # its mask is in the winner

    def gather(norm: window_launch.Norm) -> Outputs:
        saved = (g, x, y, winner, aux, known.scale, known.shift, param)
        return window_launch.backward(*saved, (), window, window.overlap, x.shape, last, kind, p, activation, norm)

    if KINDS[kind].winner and not KINDS[kind].aux:
        by_scale, by_shift = _winner_sums(g, x, winner, known, window, activation)
    else:
        _, by_scale, by_shift, _ = gather(window_launch.Norm(known.mean))
    dweight, dbias = (g.new_empty(0) if t is None else t.new_empty(t.shape) for t in (weight, bias))
    correction = known.mean.new_empty((2, x.shape[1]))
    _merge(
        batchnorm_kernels.merge_sums,
        x.shape[1],
        *(by_scale, by_shift, known.factor, known.scale, dweight, dbias, correction),
        *(by_scale.numel() // x.shape[1], x.numel() // x.shape[1]),
        **present(weight=weight, bias=bias),
        ACC=runtime.triton_type(known.mean.dtype),
    )
    dx, _, _, dparam = gather(window_launch.Norm(known.mean, *correction))
    return dx, dweight, dbias, dparam
