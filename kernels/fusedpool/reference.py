"""Every operator in plain PyTorch: the path on a CPU, the oracle of the kernels, and what second derivatives come from.

All domains are one here: cells that gather taps [..., T] from a map, of which some are valid, pooled over T.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedpool import prologue
from fusedpool.geometry import Window
from fusedpool.kinds import KINDS
from fusedpool.taps import Pooled, exponentials, grad_taps, pool_taps


class Domain(Protocol):
    """Which taps each output takes in."""

    @property
    def taps(self) -> int:
        """Of each output, valid or not."""
        ...

    @property
    def divisor(self) -> Tensor | None:
        """For avg and mixed, broadcastable to the outputs; None: the number of valid taps."""
        ...

    def output_shape(self, channels: int) -> tuple[int, int, int]:
        """(C, OH, OW) for inputs of so many channels."""
        ...

    def valid(self) -> Tensor:
        """bool, broadcastable to what `gather` returns."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """Inputs [N, C, H, W] -> the taps of each output [N, C, OH, OW, taps]; those not valid repeat another."""
        ...

    def scatter(self, taps: Tensor) -> Tensor:
        """The transpose of `gather`: each valid tap added to where it came from."""
        ...

    def places(self, winner: Tensor) -> Tensor:
        """What return_indices gives for winning taps [N, C, OH, OW]; -1 where there is none."""
        ...


@dataclass(frozen=True)
class Cells:
    """Which rows and columns of a map each output cell takes in.

    Attributes:
        rows, columns: int64 [OH, KH] and [OW, KW]; outside the map: not valid.
        height, width: of the map.
        divisor: [OH, OW] or broadcastable, for avg and mixed; None: the number of valid taps.
        window: the sliding window that they are, if they are one.
    """

    rows: Tensor
    columns: Tensor
    height: int
    width: int
    divisor: Tensor | None = None
    window: Window | None = None

    @property
    def taps(self) -> int:
        """Of each output cell."""
        return self.rows.shape[1] * self.columns.shape[1]

    def output_shape(self, channels: int) -> tuple[int, int, int]:
        """(C, OH, OW)."""
        return channels, self.rows.shape[0], self.columns.shape[0]

    def valid(self) -> Tensor:
        """bool [OH, OW, KH * KW]."""
        rows = (self.rows >= 0) & (self.rows < self.height)
        columns = (self.columns >= 0) & (self.columns < self.width)
        return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2)

    def gather(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, OH, OW, KH * KW]; taps that are not valid repeat another."""
        oh, kh = self.rows.shape
        ow, kw = self.columns.shape
        taps = x.index_select(2, self._flat(self.rows, self.height)).index_select(
            3, self._flat(self.columns, self.width)
        )
        return taps.view(*x.shape[:2], oh, kh, ow, kw).permute(0, 1, 2, 4, 3, 5).flatten(4)

    def scatter(self, taps: Tensor) -> Tensor:
        """The transpose of `gather`: each tap [N, C, OH, OW, KH * KW] added to where it came from."""
        n, c = taps.shape[:2]
        oh, kh = self.rows.shape
        ow, kw = self.columns.shape
        spread = (
            (taps * self.valid()).view(n, c, oh, ow, kh, kw).permute(0, 1, 2, 4, 3, 5).reshape(n, c, oh * kh, ow * kw)
        )
        across = taps.new_zeros(n, c, oh * kh, self.width).index_add(3, self._flat(self.columns, self.width), spread)
        return taps.new_zeros(n, c, self.height, self.width).index_add(2, self._flat(self.rows, self.height), across)

    def places(self, winner: Tensor) -> Tensor:
        """h * W + w of winning taps [N, C, OH, OW], -1 where there is none."""
        kw = self.columns.shape[1]
        tap = winner.clamp(min=0)
        if (w := self.window) is not None:
            first = self.rows[:, :1] * self.width + self.columns[:, 0]
            place = first + tap * w.dilation_w + tap // kw * (w.dilation_h * self.width - kw * w.dilation_w)
            return torch.where(winner < 0, -1, place)
        oh = torch.arange(self.rows.shape[0], device=tap.device)[:, None]
        ow = torch.arange(self.columns.shape[0], device=tap.device)
        place = self.rows[oh, tap // kw] * self.width + self.columns[ow, tap % kw]
        return torch.where(winner < 0, -1, place)

    def taps_at(self, place: Tensor) -> Tensor:
        """The inverse of `places` for a sliding window; where one lies outside the map, -1."""
        w = self.window
        assert w is not None
        if w.dilation_h == w.dilation_w == 1 and w.kernel_w <= self.width:
            steps = (place - (self.rows[:, :1] * self.width + self.columns[:, 0])).int()
            return steps - steps // self.width * (self.width - w.kernel_w)
        i = (place // self.width - self.rows[:, :1]) // w.dilation_h
        tap = i * w.kernel_w + (place % self.width - self.columns[:, 0]) // w.dilation_w
        return torch.where(self.valid().any(-1), tap, -1)

    @staticmethod
    def _flat(indices: Tensor, size: int) -> Tensor:
        return indices.clamp(0, size - 1).flatten()


def window_cells(window: Window, height: int, width: int, device: torch.device) -> Cells:
    """The cells of a sliding window, with PyTorch's divisors (ATen's avg_pool2d)."""
    w = window
    oh, ow = w.output_size(height, width)
    top = torch.arange(oh, device=device) * w.stride_h - w.padding_h
    left = torch.arange(ow, device=device) * w.stride_w - w.padding_w
    rows = top[:, None] + torch.arange(w.kernel_h, device=device) * w.dilation_h
    columns = left[:, None] + torch.arange(w.kernel_w, device=device) * w.dilation_w
    divisor = None
    if w.divisor:
        divisor = torch.tensor(w.divisor, device=device)
    elif w.count_include_pad:
        divisor = (rows < height + w.padding_h).sum(1)[:, None] * (columns < width + w.padding_w).sum(1)
    return Cells(rows, columns, height, width, divisor, w)


def forward(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    param: Tensor | None,
    cells: Domain,
    kind: str,
    p: float,
    activation: str,
    seed: Tensor | None = None,
    winner: Tensor | None = None,
) -> Pooled:
    """Pool activation(scale * x + shift) over the cells; y in the accumulator's dtype.

    Args:
        seed: for stochastic: which samples are drawn.
        winner: the taps to take instead of looking for them.
    """
    v = prologue.apply(x, scale, shift, activation)
    if winner is None and (pooled := _native_forward(kind, v, cells)) is not None:
        return pooled
    v = cells.gather(v)
    e = exponentials(seed, v) if kind == "stochastic" and winner is None and seed is not None else None
    return pool_taps(kind, v, cells.valid(), cells.divisor, p if param is None else param, e, winner)


def backward(
    g: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    param: Tensor | None,
    winner: Tensor | None,
    cells: Domain,
    kind: str,
    p: float,
    activation: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by x, scale, shift and param; differentiable by g, x, scale, shift and param.

    x may be None where no gradient depends on it (KINDS' uses_input, activation none or its mask in the winner).
    """
    q = p if param is None else param
    valid = cells.valid()
    u = None if x is None else prologue.apply(x, scale, shift, "none")
    pooled, dv = None, _native_backward(kind, g, winner, cells)
    if dv is None:
        v = None if u is None else cells.gather(prologue.apply(u, None, None, activation))
        pooled = None if v is None else pool_taps(kind, v, valid, cells.divisor, q, None, winner)
        dv = cells.scatter(grad_taps(kind, g, v, pooled, winner, valid, cells.divisor, q))
    dparam = None
    if param is not None and KINDS[kind].learnable and pooled is not None and pooled.aux is not None:
        dparam = (g * pooled.aux).sum().view(param.shape)
    return *prologue.gradients(dv, u, x, scale, shift, activation), dparam


def _native_forward(kind: str, v: Tensor, cells: Domain) -> Pooled | None:
    """What `pool_taps` says of windows that PyTorch itself pools, without a copy of each tap; else None."""
    if not isinstance(cells, Cells) or cells.window is None:
        return None
    w = cells.window
    # PyTorch's own path refuses padding that only a dilated kernel allows.
    if kind in ("max", "min") and 2 * w.padding_h <= w.kernel_h and 2 * w.padding_w <= w.kernel_w:
        dilation = (w.dilation_h, w.dilation_w)
        y, place = F.max_pool2d(-v if kind == "min" else v, **_arguments(w), dilation=dilation, return_indices=True)
        return Pooled(-y if kind == "min" else y, cells.taps_at(place), None)
    if kind in ("avg", "sum") and w.dilation_h == w.dilation_w == 1:
        return Pooled(F.avg_pool2d(v, **_arguments(w), **_divisor(kind, w)), None, None)
    return None


def _native_backward(kind: str, g: Tensor, winner: Tensor | None, cells: Domain) -> Tensor | None:
    """What `grad_taps` says, scattered, where there is a way without a copy for each tap; else None."""
    if not isinstance(cells, Cells):
        return None
    n, c = g.shape[:2]
    if kind in ("max", "min", "stochastic") and winner is not None:
        place = cells.places(winner).clamp(min=0).flatten(2)
        flat = g.new_zeros(n, c, cells.height * cells.width)
        taken = flat.scatter_add(2, place, torch.where(winner < 0, 0, g).flatten(2))
        return taken.view(n, c, cells.height, cells.width)
    w = cells.window
    if w is None or kind not in ("avg", "sum") or w.dilation_h != 1 or w.dilation_w != 1:
        return None
    like = g.new_empty(n, c, cells.height, cells.width)
    spread: Tensor = torch.ops.aten.avg_pool2d_backward(g, like, **_arguments(w), **_divisor(kind, w))
    return spread


def _arguments(window: Window) -> dict[str, Any]:
    w = window
    return {
        "kernel_size": (w.kernel_h, w.kernel_w),
        "stride": (w.stride_h, w.stride_w),
        "padding": (w.padding_h, w.padding_w),
        "ceil_mode": bool(w.ceil_mode),
    }


def _divisor(kind: str, window: Window) -> dict[str, Any]:
    divisor = 1 if kind == "sum" else window.divisor or None
    return {"count_include_pad": bool(window.count_include_pad), "divisor_override": divisor}
