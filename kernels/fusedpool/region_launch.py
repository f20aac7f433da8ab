"""Pooling over regions of any size: how work is cut for the kernels, and their launches."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal, Self

import numpy as np
import torch
from torch import Tensor

from fusedpool import operators, region_gradient, region_kernels, runtime
from fusedpool.kinds import KINDS
from fusedpool.operators import Outputs
from fusedpool.runtime import pointer, present

Mode = Literal["whole", "sized", "grid", "packed"]
Levels = tuple[tuple[int, int], ...]

_ELEMENTS: Final = 1024  # of a tile
_STEPS: Final = 32  # tiles of a part: enough that its state weighs little, few enough that many programs have work
_MOST_CHUNKS: Final = 4096  # of one rectangle, which one program merges
_PIXELS: Final = (16, 64, 256, 1024)  # of an NCHW tile: few classes of maps, each is a compilation
_MOST_APART: Final = 64  # of one whose rows have gaps: more channels then share what finding a pixel costs
_MERGED: Final = (32, 32)  # parts x channels of a tile of `merge`

# Which of b, c and i a kind's state has; all have a.
_B: Final = ("lse", "softpool", "stochastic", "stochastic_mean", "std", "mixed")
_C: Final = ("gem", "softpool", "std")


def axis_bounds(size: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """First and end rows (or columns) of adaptive cells, as PyTorch has them: floor(i H / OH), ceil((i + 1) H / OH)."""
    i = np.arange(cells, dtype=np.int64)
    return i * size // cells, -(-(i + 1) * size // cells)


@dataclass(frozen=True)
class Grid:
    """How the cells of all levels cut a map into rectangles that none of them splits.

    Attributes:
        table: int32, see region_kernels.
        rectangles, columns: how many there are, and in each row.
        pixels: of the largest.
        simple: every cell is one rectangle, in order.
    """

    table: Tensor
    rectangles: int
    columns: int
    pixels: int
    simple: bool


@lru_cache(maxsize=256)
def cut(height: int, width: int, levels: Levels, device: torch.device) -> Grid:
    """The rectangles of maps of that size."""
    row_edges, row_cells = _cut_axis(height, tuple(rows for rows, _ in levels))
    column_edges, column_cells = _cut_axis(width, tuple(columns for _, columns in levels))
    cells = [
        np.concatenate(np.broadcast_arrays(rows[:, None], columns[None]), -1).reshape(-1, 4)
        for rows, columns in zip(row_cells, column_cells, strict=True)
    ]
    table = np.concatenate([row_edges, column_edges, *(level.ravel() for level in cells)]).astype(np.int32)
    rows, columns = len(row_edges) - 1, len(column_edges) - 1
    return Grid(
        torch.from_numpy(table).to(device),
        rows * columns,
        columns,
        int(np.diff(row_edges).max() * np.diff(column_edges).max()),
        levels == ((rows, columns),),
    )


def _cut_axis(size: int, levels: tuple[int, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The edges of all cells of an axis, and for each level its cells' [first, count] of the pieces between them."""
    bounds = [axis_bounds(size, cells) for cells in levels]
    edges = np.unique(np.concatenate([edge for pair in bounds for edge in pair]))
    first = [np.searchsorted(edges, start) for start, _ in bounds]
    return edges, [
        np.stack([a, np.searchsorted(edges, end) - a], -1) for a, (_, end) in zip(first, bounds, strict=True)
    ]


@dataclass(frozen=True)
class Tiles:
    """How a kernel walks over rectangles: tiles of pixels x channels, `steps` of them to a part.

    Depends on the channels, the memory format and the size of a map: an image's result never depends on its batch.
    """

    last: bool
    pixels: int
    channels: int
    steps: int
    chunks: int

    @classmethod
    def over(cls, channels: int, pixels: int, last: bool, flat: bool) -> Self:
        """For rectangles of at most so many pixels, flat or not (see Map)."""
        if last:
            block = min(128, 1 << (channels - 1).bit_length())
            tile = _ELEMENTS // block
        else:
            tile = next((size for size in _PIXELS if pixels <= size), _PIXELS[-1])
            tile = tile if flat else min(tile, _MOST_APART)
            block = max(1, min(_ELEMENTS // tile, 1 << (channels - 1).bit_length()))
        steps = max(_STEPS, runtime.cdiv(pixels, tile * _MOST_CHUNKS))
        return cls(last, tile, block, steps, max(1, runtime.cdiv(pixels, tile * steps)))


def _launch(kernel: Any, work: tuple[int, int, int], *args: Any, **constants: Any) -> None:
    """Run one program for each part and block of channels; work: parts, channels, the channels of a block."""
    parts, channels, block = work
    runtime.launch(kernel, parts * runtime.cdiv(channels, block), *args, **constants, BC=block)


@dataclass(frozen=True)
class Map:
    """A map [N, C, H, W] as the kernels take it: without a gap between rows it is one row of all pixels.

    Attributes:
        height, width: width in units of `unit`, so that rows of whole vectors are known to be such.
    """

    strides: runtime.Strides
    height: int
    width: int
    unit: int
    flat: bool

    @classmethod
    def of(cls, x: Tensor, mode: Mode, last: bool) -> Self:
        """x, flat where the mode and its strides allow it."""
        n, c, h, w = x.shape
        flat = mode in ("whole", "packed") and (h == 1 or x.stride(2) == w * x.stride(3))
        if flat:
            row = h * w * x.stride(3)
            x = x.as_strided((n, c, 1, h * w), (x.stride(0), x.stride(1), row, x.stride(3)))
        unit = 1 if last else runtime.alignment((x.shape[3],))
        return cls(runtime.Strides.of(x, last), x.shape[2], x.shape[3] // unit, unit, flat)

    @property
    def constants(self) -> dict[str, Any]:
        """Of a kernel that reads it."""
        return {"FLAT": self.flat, "UNIT": self.unit, "ALIGN": self.strides.align}


def _wide(*tensors: Tensor | None, pixels: int = 0, cells: int = 1) -> bool:
    """Whether 32 bits hold no offset, place or product of a place's row and a level's cells."""
    numbers = [pixels * cells, *(t.numel() for t in tensors if t is not None)]
    return runtime.wide(*tensors) or max(numbers) >= 2**31 - 2**16


def forward(
    x: Tensor,
    bounds: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    param: Tensor | None,
    seed: Tensor | None,
    mode: Mode,
    levels: Levels,
    kinds: Sequence[str],
    ps: Sequence[float],
    activation: str,
    outputs: Outputs,
) -> None:
    """Fill y, winner, aux and index, dense [kinds, N, C, cells], those that are not empty; see region_kernels."""
    y, winner, aux, index = outputs
    acc, last = runtime.accumulator(x), runtime.channels_last(x)
    (_, samples, channels, cells), (height, width) = y.shape, x.shape[2:]
    scale, shift, param = operators.dense_parameters(x, scale, shift, param, ps)
    grid = cut(height, width, levels, x.device) if mode == "grid" else None
    # How long segments are is not known here, and nothing beside one may change how it is cut.
    pixels = _PIXELS[-1] if mode == "packed" else grid.pixels if grid else height * width
    seen = Map.of(x, mode, last)
    tiles = Tiles.over(channels, pixels, last, seen.flat)
    rectangles, columns = (grid.rectangles, grid.columns) if grid else (1, 1)
    parts = samples * rectangles * tiles.chunks
    if mode == "packed" and samples:
        parts = height * width // (tiles.steps * tiles.pixels) + samples
    finish = tiles.chunks == 1 and mode != "packed" and (grid is None or grid.simple)
    wide = _wide(x, y, pixels=height * width)
    size = 0 if finish else parts
    states = x.new_empty((len(kinds), 3, size, channels), dtype=acc)
    places = x.new_empty((len(kinds), size, channels), dtype=torch.int64 if wide else torch.int32)
    table, bounds = grid.table if grid else y, pointer(bounds, y)
    constants = {
        "MODE": mode,
        "KINDS": tuple(kinds),
        "STATES": tuple((kind in _B, kind in _C, KINDS[kind].winner) for kind in kinds),
        "MASKED": tuple(operators.masked(kind, activation) for kind in kinds),
        **present(param=param),
        "SAVE_WINNER": winner.dim() == 4,
        "SAVE_AUX": aux.dim() == 4,
        "SAVE_INDEX": index.dim() == 4,
        "CHANNELS_LAST": last,
        "WIDE": wide,
        "ACC": runtime.triton_type(acc),
        "BP": tiles.pixels,
    }
    numbers = tuple(float(p) for p in ps)
    _launch(
        region_kernels.partials,
        (parts, channels, tiles.channels),
        *(x, pointer(scale, x), pointer(shift, x), pointer(param, x), pointer(seed, x), bounds, table),
        *(states, places, y, winner, aux, index, samples, channels, seen.height, seen.width),
        *(rectangles, columns, tiles.chunks, tiles.steps, parts, *seen.strides.outer, seen.strides.inner, numbers),
        **constants,
        **seen.constants,
        **present(scale=scale, shift=shift),
        ACTIVATION=activation,
        FINISH=finish,
    )
    if not finish:
        _launch(
            region_kernels.merge,
            (samples * cells, channels, _MERGED[1]),
            *(states, places, pointer(param, x), bounds, table, y, winner, aux, index),
            *(samples, channels, height, width, cells, rectangles, columns, tiles.chunks, tiles.steps, parts, numbers),
            **constants,
            BM=_MERGED[0],
        )


def backward(
    g: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    winner: Tensor,
    aux: Tensor,
    bounds: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    param: Tensor | None,
    mode: Mode,
    levels: Levels,
    last: bool,
    kinds: Sequence[str],
    ps: Sequence[float],
    activation: str,
    outputs: Outputs,
) -> None:
    """Fill dx, dense [images, C, H, W], and those of dscale, dshift and dparam that are not empty."""
    dx, dscale, dshift, dparam = outputs
    acc = runtime.accumulator(g)
    (_, samples, channels, cells), (images, _, height, width) = g.shape, dx.shape
    winner, aux = (runtime.dense(t, last, 2) for t in (winner, aux))
    y = None if y is None else runtime.dense(y, last, 2)
    if param is not None:
        for k, kind in enumerate(kinds):
            dparam[k] = (g[k].to(acc) * aux[k]).sum() if KINDS[kind].learnable else 0
    scale, shift, param = operators.dense_parameters(g, scale, shift, param, ps)
    affine = scale is not None or shift is not None
    if not samples:
        dx.zero_()
    seen = Map.of(dx if x is None else x, mode, last)
    tiles = Tiles.over(channels, height * width, last, seen.flat)
    parts = images * tiles.chunks if samples else 0
    sums = g.new_empty((2, parts, channels) if affine else 0, dtype=acc)
    g_k, g_n, g_c, g_o = (stride if size > 1 else 0 for size, stride in zip(g.shape, g.stride(), strict=True))
    g_align = runtime.alignment((g_k, g_n, g_o) if last else (g_k, g_n, g_c))
    starts = np.cumsum([0, *(rows * columns for rows, columns in levels)])
    most = max((max(level) for level in levels), default=1)
    _launch(
        region_gradient.backward,
        (parts, channels, tiles.channels),
        *(g, pointer(x, g), pointer(y, g), winner, aux),
        *(pointer(scale, g), pointer(shift, g), pointer(param, g), pointer(bounds, g), dx, sums),
        *(samples, channels, seen.height, seen.width, cells, tiles.chunks, tiles.steps, parts, samples.bit_length()),
        *(*seen.strides.outer, seen.strides.inner, g_k // g_align, g_n // g_align),
        *(g_c if last else g_c // g_align, g_o // g_align if last else g_o, tuple(float(p) for p in ps)),
        **seen.constants,
        MODE=mode,
        KINDS=tuple(kinds),
        NEEDS=tuple((KINDS[k].winner, KINDS[k].uses_input, KINDS[k].aux and not KINDS[k].learnable) for k in kinds),
        LEVELS=tuple((*level, int(start)) for level, start in zip(levels, starts[:-1], strict=True)),
        ACTIVATION=activation,
        **present(scale=scale, shift=shift, param=param, x=x),
        AFFINE_GRADIENT=affine,
        G_ALIGN=g_align,
        CHANNELS_LAST=last,
        WIDE=_wide(dx, x, g, pixels=(height * width + height), cells=most),
        ACC=runtime.triton_type(acc),
        BP=tiles.pixels,
    )
    if affine:
        operators.fill((dscale, dshift), sums.sum(1).unbind())
