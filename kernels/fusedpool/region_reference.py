"""Pooling over regions of any size in plain PyTorch: the path on a CPU, and what second derivatives come from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fusedpool import operators, prologue
from fusedpool.kinds import KINDS
from fusedpool.operators import Outputs
from fusedpool.reference import Cells
from fusedpool.region_launch import Levels, Mode, axis_bounds
from fusedpool.taps import Pooled, draws, grad_taps, pool_taps


@dataclass(frozen=True)
class Crop:
    """One cell: a rectangle of some images, by slices alone.

    Attributes:
        samples: whose outputs these are.
        images: of the map.
        left, height, width: of the rectangle, whose top is 0.
        padding: (right, below) of it, what a gradient of whole images lacks.
    """

    samples: slice
    images: slice
    left: int
    height: int
    width: int
    map_width: int
    padding: tuple[int, int] = (0, 0)
    cells: slice = field(default_factory=lambda: slice(0, 1))

    def gather(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> taps [n, C, 1, T]."""
        return x[self.images, :, : self.height, self.left : self.left + self.width].flatten(2).unsqueeze(2)

    def scatter(self, taps: Tensor) -> Tensor:
        """The gradient of the images, or of a packed segment's pixels."""
        right, below = self.padding
        crop = taps.reshape(*taps.shape[:2], self.height, self.width)
        return F.pad(crop, (0, right, 0, below)) if right or below else crop

    def valid(self, device: torch.device) -> Tensor:
        """bool [T]: all."""
        return torch.ones(self.height * self.width, dtype=torch.bool, device=device)

    def places(self, taps: Tensor) -> Tensor:
        """h * map_width + w of taps, -1 where negative."""
        return torch.where(taps < 0, -1, taps // self.width * self.map_width + self.left + taps % self.width)

    def taps(self, places: Tensor) -> Tensor:
        """The inverse."""
        row, column = places // self.map_width, places % self.map_width - self.left
        return torch.where(places < 0, -1, row * self.width + column)

    def own(self) -> np.ndarray:
        """[1, T]: what the samples of a stochastic kind are drawn by."""
        return np.arange(self.height * self.width)[None]


@dataclass(frozen=True)
class Level:
    """The cells of one level of a grid."""

    grid: Cells
    cells: slice
    samples: slice = field(default_factory=lambda: slice(None))

    @classmethod
    def of(cls, height: int, width: int, level: tuple[int, int], first: int, device: torch.device) -> "Level":
        """Adaptive cells, those from number `first` on."""
        rows, columns = (_taps_of(size, cells, device) for size, cells in zip((height, width), level, strict=True))
        return cls(Cells(rows, columns, height, width), slice(first, first + level[0] * level[1]))

    def gather(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> taps [N, C, OH * OW, T]."""
        return self.grid.gather(x).flatten(2, 3)

    def scatter(self, taps: Tensor) -> Tensor:
        """The gradient of the map."""
        return self.grid.scatter(self._apart(taps, 2))

    def valid(self, device: torch.device) -> Tensor:
        """bool [OH * OW, T]."""
        return self.grid.valid().flatten(0, 1)

    def places(self, taps: Tensor) -> Tensor:
        """h * W + w of taps [N, C, OH * OW], -1 where negative."""
        return self.grid.places(self._apart(taps, 2)).flatten(2)

    def taps(self, places: Tensor) -> Tensor:
        """The inverse."""
        spread, width = self._apart(places, 2), self.grid.width
        row, column = spread // width - self.grid.rows[:, :1], spread % width - self.grid.columns[:, 0]
        return torch.where(spread < 0, -1, row * self.grid.columns.shape[1] + column).flatten(2)

    def own(self) -> np.ndarray:
        """[OH * OW, T]: what the samples of a stochastic kind are drawn by."""
        rows, columns = self.grid.rows.cpu().numpy(), self.grid.columns.cpu().numpy()
        place: np.ndarray = rows[:, None, :, None] * self.grid.width + columns[None, :, None, :]
        place = place.reshape(-1, rows.shape[1] * columns.shape[1])
        return np.where(place < 0, 0, place)  # of no tap: any number

    def _apart(self, t: Tensor, dim: int) -> Tensor:
        apart: Tensor = t.unflatten(dim, (self.grid.rows.shape[0], self.grid.columns.shape[0]))
        return apart


def _taps_of(size: int, cells: int, device: torch.device) -> Tensor:
    """int64 [cells, most]: the rows (or columns) of adaptive cells, then -1."""
    start, end = axis_bounds(size, cells)
    taps = start[:, None] + np.arange((end - start).max())
    return torch.from_numpy(np.where(taps < end[:, None], taps, -1)).to(device)


@dataclass(frozen=True)
class Regions:
    """Which pixels of maps meet in which outputs: by mode, as region_kernels has them."""

    mode: Mode
    levels: Levels
    bounds: Tensor | None
    images: int
    height: int
    width: int
    device: torch.device

    def __iter__(self) -> Iterator[Crop | Level]:
        """The parts whose gradients `join` puts together."""
        everything = slice(0, self.images)
        if self.mode == "grid":
            first = 0
            for level in self.levels:
                yield Level.of(self.height, self.width, level, first, self.device)
                first += level[0] * level[1]
        elif self.mode == "whole":
            yield Crop(everything, everything, 0, self.height, self.width, self.width)
        elif self.bounds is not None and self.mode == "sized":
            for n, (height, width) in enumerate(self.bounds.tolist()):
                one, padding = slice(n, n + 1), (self.width - width, self.height - height)
                yield Crop(one, one, 0, height, width, self.width, padding)
        elif self.bounds is not None:
            offsets = self.bounds.tolist()
            for n, (start, end) in enumerate(pairwise(offsets)):
                yield Crop(slice(n, n + 1), everything, start, 1, end - start, self.width)

    def outside(self) -> Tensor | None:
        """bool [N, 1, H, W]: what belongs to no image; None: nothing."""
        if self.mode != "sized" or self.bounds is None:
            return None
        rows, columns = (torch.arange(size, device=self.device) for size in (self.height, self.width))
        heights, widths = self.bounds[:, :1, None, None], self.bounds[:, 1:, None, None]
        return (rows[:, None] >= heights) | (columns >= widths)

    def join(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """The gradient of the maps from those that `scatter` gives."""
        if not parts:
            return like.new_zeros(self.images, like.shape[2], self.height, self.width)
        if self.mode == "grid":
            return torch.stack(list(parts)).sum(0) if len(parts) > 1 else parts[0]
        return torch.cat(list(parts), 3 if self.mode == "packed" else 0) if len(parts) > 1 else parts[0]


def _pool(
    part: Crop | Level, kind: str, taps: Tensor, p: float | Tensor, seed: Tensor | None, winner: Tensor | None
) -> Pooled:
    """One kind over one part; [n, C, o], and taps for winners."""
    if isinstance(part, Crop) and kind in ("avg", "sum"):
        return Pooled(taps.mean(-1) if kind == "avg" else taps.sum(-1), None, None)
    if isinstance(part, Crop) and kind in ("max", "min") and winner is None:
        y, first = taps.max(-1) if kind == "max" else taps.min(-1)
        if not y.isnan().any():  # of those, the last wins
            return Pooled(y, first, None)
    e = None
    if kind == "stochastic" and seed is not None:
        n, c = taps.shape[:2]
        plane = ((part.samples.start or 0) * c + np.arange(n * c)).reshape(n, c, 1, 1)
        own = part.own()
        e = draws(seed, plane, own >> 32, own).to(taps)
    return pool_taps(kind, taps, part.valid(taps.device), None, p, e, winner)


def _grad(
    part: Crop | Level, kind: str, g: Tensor, taps: Tensor | None, pooled: Pooled | None, winner: Tensor | None,
    p: float | Tensor,
) -> Tensor:  # fmt: skip
    """g dy/dv of one kind at every tap of a part."""
    if isinstance(part, Crop) and kind in ("avg", "sum"):
        size = part.height * part.width
        return (g / size if kind == "avg" else g)[..., None].expand(*g.shape, size)
    if isinstance(part, Crop) and winner is not None and kind != "mixed":
        nothing = g.new_zeros((*g.shape, part.height * part.width))
        return nothing.scatter(-1, winner.clamp(min=0)[..., None], torch.where(winner < 0, 0, g)[..., None])
    return grad_taps(kind, g, taps, pooled, winner, part.valid(g.device), None, p)


def forward(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    param: Tensor | None,
    seed: Tensor | None,
    regions: Regions,
    kinds: Sequence[str],
    ps: Sequence[float],
    activation: str,
    outputs: Outputs,
) -> None:
    """Fill y, winner, aux and index [kinds, N, C, cells], those that are not empty."""
    for output in outputs:
        output.zero_()  # what a region without pixels gives
    y, winner, aux, index = outputs
    mapped = prologue.apply(x, scale, shift, activation)
    for part in regions:
        taps = part.gather(mapped)
        if not taps.shape[-1]:
            continue
        for k, kind in enumerate(kinds):
            here = (k, part.samples, slice(None), part.cells)
            pooled = _pool(part, kind, taps, ps[k] if param is None else param[k], seed, None)
            y[here] = pooled.y.to(y.dtype)
            if pooled.winner is not None:
                places = part.places(pooled.winner)
                if winner.dim() == 4:
                    winner[here] = (
                        torch.where(pooled.y <= 0, -1, places) if operators.masked(kind, activation) else places
                    )
                if index.dim() == 4:
                    index[here] = places
            if aux.dim() == 4 and pooled.aux is not None:
                aux[here] = pooled.aux


def backward(
    g: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    param: Tensor | None,
    winner: Tensor,
    regions: Regions,
    kinds: Sequence[str],
    ps: Sequence[float],
    activation: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by x, scale, shift and param; differentiable by g, x, scale, shift and param."""
    if x is not None and (outside := regions.outside()) is not None:
        x = x.masked_fill(outside, 0)
    u = None if x is None else prologue.apply(x, scale, shift, "none")
    v = None if u is None else prologue.apply(u, None, None, activation)
    parts = []
    by_param = [g.new_zeros(()) for _ in kinds]
    for part in regions:
        taps = None if v is None else part.gather(v)
        if isinstance(part, Crop) and not part.height * part.width:
            parts.append(part.scatter(g[0, part.samples].new_zeros(g[0, part.samples].shape[0], g.shape[2], 0)))
            continue
        total = None
        for k, kind in enumerate(kinds):
            here = (k, part.samples, slice(None), part.cells)
            p = ps[k] if param is None else param[k]
            taken = part.taps(winner[here].long()) if KINDS[kind].winner else None
            known = KINDS[kind]
            needed = known.uses_input or (known.learnable and param is not None)
            pooled = _pool(part, kind, taps, p, None, taken) if taps is not None and needed else None
            change = _grad(part, kind, g[here], taps, pooled, taken, p)
            total = change if total is None else total + change
            if known.learnable and pooled is not None and pooled.aux is not None:
                by_param[k] = by_param[k] + (g[here] * pooled.aux).sum()
        assert total is not None
        parts.append(part.scatter(total))
    dv = regions.join(parts, g)
    dparam = None if param is None else torch.stack(by_param)
    return *prologue.gradients(dv, u, x, scale, shift, activation), dparam
