"""Every operator in plain PyTorch: the path on a CPU, the oracle of the kernels, and what second derivatives come from.

All domains are one here: cells that gather taps [..., T] from a map, of which some are valid, pooled over T.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fusedpool import prologue
from fusedpool.arguments import Window
from fusedpool.kinds import GEM_FLOOR, KINDS


class Pooled(NamedTuple):
    """Per output: the value, the winning tap (int64, -1: none) or None, and what kinds.finish_aux says or None."""

    y: Tensor
    winner: Tensor | None
    aux: Tensor | None


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

    def input_shape(self, channels: int) -> tuple[int, int, int]:
        """(C, H, W) for outputs of so many channels."""
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

    def input_shape(self, channels: int) -> tuple[int, int, int]:
        """(C, H, W)."""
        return channels, self.height, self.width

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
    du = dv if u is None else dv * prologue.derivative(u, activation)
    dx = du if scale is None else du * scale.view(1, -1, 1, 1)
    dscale = None if scale is None or x is None else (du * x).sum((0, 2, 3))
    dshift = None if shift is None else du.sum((0, 2, 3))
    dparam = None
    if param is not None and KINDS[kind].learnable and pooled is not None and pooled.aux is not None:
        dparam = (g * pooled.aux).sum().view(param.shape)
    return dx, dscale, dshift, dparam


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


def pool_taps(
    kind: str,
    v: Tensor,
    valid: Tensor,
    divisor: Tensor | None,
    p: float | Tensor,
    e: Tensor | None = None,
    winner: Tensor | None = None,
) -> Pooled:
    """Pool v [..., T] over T where valid (broadcastable); the formulas are those of kinds.py."""
    n = valid.sum(-1).to(v.dtype)
    if divisor is not None and kind in ("avg", "mixed"):
        n = divisor
    low = float("-inf")
    match kind:
        case "max" | "min" | "mixed":
            key = (-v if kind == "min" else v).masked_fill(~valid, low)
            taken = first_best(key.detach(), valid) if winner is None else winner
            y = v.gather(-1, taken.clamp(min=0)[..., None])[..., 0]
            y = torch.where(taken < 0, low if kind != "min" else -low, y) if winner is None else y
            if kind != "mixed":
                return Pooled(y, taken, None)
            mean = torch.where(valid, v, 0).sum(-1) / n
            return Pooled(p * y + (1 - p) * mean, taken, y - mean)
        case "stochastic":
            w = torch.where(valid, v.clamp(min=0), 0)
            if winner is None:
                assert e is not None
                key = w.detach() / e
                winner = torch.where(key.amax(-1) == 0, -1, first_best(key, valid))
            y = w.gather(-1, winner.clamp(min=0)[..., None])[..., 0]
            return Pooled(torch.where(winner < 0, 0, y), winner, None)
        case "stochastic_mean":
            w = torch.where(valid, v.clamp(min=0), 0)
            total = w.sum(-1)
            mean = (w * w).sum(-1) / torch.where(total == 0, 1, total)
            return Pooled(torch.where(total == 0, 0, mean), None, total)
        case "avg" | "sum":
            total = torch.where(valid, v, 0).sum(-1)
            return Pooled(total / n if kind == "avg" else total, None, None)
        case "lp":
            live = valid & (v != 0)  # at 0 a power below 1 has no derivative
            total = torch.where(live, torch.where(live, v, 1).abs().pow(p), 0).sum(-1)
            return Pooled(torch.where(total == 0, 0, torch.where(total == 0, 1, total) ** (1 / p)), None, None)
        case "gem":
            w = torch.where(valid, torch.where(v < GEM_FLOOR, GEM_FLOOR, v), GEM_FLOOR)
            power = torch.where(valid, w**p, 0)
            y = (power.sum(-1) / n) ** (1 / p)
            return Pooled(y, None, y / p * ((power * w.log()).sum(-1) / power.sum(-1) - y.log()))
        case "lse":
            y = (torch.logsumexp((p * v).masked_fill(~valid, low), -1) - n.log()) / p
            return Pooled(y, None, y)
        case "softpool":
            peak = v.detach().masked_fill(~valid, low).amax(-1, keepdim=True)
            # An infinite peak has no difference to itself.
            weight = torch.where(valid, torch.exp(torch.where(valid & ((v != peak) | v.isfinite()), v - peak, 0)), 0)
            total = weight.sum(-1)
            return Pooled(torch.where(weight == 0, 0, weight * v).sum(-1) / total, None, peak[..., 0] + total.log())
        case "std":
            mean = torch.where(valid, v, 0).sum(-1) / n
            variance = torch.where(valid, v - mean[..., None], 0).pow(2).sum(-1) / n
            return Pooled(torch.where(variance == 0, 0, torch.where(variance == 0, 1, variance).sqrt()), None, mean)
    raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")


def grad_taps(
    kind: str,
    g: Tensor,
    v: Tensor | None,
    pooled: Pooled | None,
    winner: Tensor | None,
    valid: Tensor,
    divisor: Tensor | None,
    p: float | Tensor,
) -> Tensor:
    """g dy/dv at every tap [..., T], zero where not valid; v and pooled may be None where kinds.py needs none."""
    n = valid.sum(-1).to(g.dtype)
    if divisor is not None and kind in ("avg", "mixed"):
        n = divisor
    taps = torch.arange(valid.shape[-1], device=g.device)
    won = torch.zeros_like(valid) if winner is None else taps == winner[..., None]
    g = g[..., None]
    n = n[..., None]
    match kind:
        case "max" | "min" | "stochastic":
            return torch.where(won, g, 0)
        case "mixed":
            return torch.where(valid, torch.where(won, g * p, 0) + g * (1 - p) / n, 0)
        case "avg" | "sum":
            return torch.where(valid, g / n if kind == "avg" else g, 0)
    assert v is not None and pooled is not None
    y = pooled.y[..., None]
    match kind:
        case "lp":
            live = valid & (v != 0) & (y != 0)
            ratio = torch.where(live, v.abs(), 1) / torch.where(live, y, 1)
            return torch.where(live, g * ratio ** (p - 1) * v.sign(), 0)
        case "gem":
            live = valid & (v >= GEM_FLOOR)
            return torch.where(live, g * (torch.where(live, v, 1) / y) ** (p - 1) / n, 0)
        case "lse":
            return torch.where(valid, g * torch.exp(p * torch.where(valid, v - y, 0)) / n, 0)
    assert pooled.aux is not None
    aux = pooled.aux[..., None]
    match kind:
        case "softpool":
            weight = torch.exp(torch.where(valid, v - aux, 0))
            return torch.where(valid & (weight != 0), g * weight * (1 + v - y), 0)
        case "stochastic_mean":
            live = valid & (v > 0) & (aux != 0)
            return torch.where(live, g * (2 * v - y) / torch.where(live, aux, 1), 0)
    live = valid & (y != 0)  # std
    return torch.where(live, g * (v - aux) / (n * torch.where(y == 0, 1, y)), 0)


def first_best(key: Tensor, valid: Tensor) -> Tensor:
    """The winning tap of key [..., T]: the last NaN, else the first of the largest, -1 where none is valid."""
    size = key.shape[-1]
    nan = key.isnan() & valid
    best = key.masked_fill(nan, float("-inf")).amax(-1, keepdim=True)
    first = ((key == best) & valid).to(torch.uint8).argmax(-1)
    last_nan = size - 1 - nan.flip(-1).to(torch.uint8).argmax(-1)
    return torch.where(nan.any(-1), last_nan, torch.where(valid.any(-1).expand(first.shape), first, -1))


def exponentials(seed: Tensor, taps: Tensor) -> Tensor:
    """kinds.exponential for every tap [..., T]: counters are the output's index in memory order and the tap."""
    outputs, size = taps[..., 0], taps.shape[-1]
    index = np.arange(outputs.numel(), dtype=np.uint64).reshape(outputs.shape)[..., None]
    tap = np.broadcast_to(np.arange(size, dtype=np.uint64), (*outputs.shape, size))
    return draws(seed, index & 0xFFFFFFFF, index >> 32, tap).to(taps)


def draws(seed: Tensor, low: np.ndarray, high: np.ndarray, tap: np.ndarray) -> Tensor:
    """kinds.exponential of those counters, float32."""
    word = philox(int(seed), low, high, tap)
    signed = word.astype(np.uint32).view(np.int32)
    uniform = np.where(signed < 0, ~signed, signed).astype(np.float32) * np.float32(4.6566127342e-10)
    with np.errstate(divide="ignore"):
        return torch.from_numpy(-np.log(uniform))


def philox(seed: int, c0: np.ndarray, c1: np.ndarray, c2: np.ndarray) -> np.ndarray:
    """The first word of Philox-4x32-10 (Salmon et al. 2011), as uint64 below 2^32."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)
    c0, c1, c2 = np.broadcast_arrays(c0.astype(np.uint64), c1.astype(np.uint64), c2.astype(np.uint64))
    c3 = np.zeros_like(c0)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> half) ^ c1 ^ k0, b & low, (a >> half) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return c0
