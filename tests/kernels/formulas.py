"""Each kind and each activation as its textbook formula in float64, differentiable, written without fusedpool."""

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

Formula = Callable[[Tensor, float | Tensor, float], Tensor]


def _gem(v: Tensor, p: float | Tensor, n: float) -> Tensor:
    w = v.clamp(min=1e-6)
    result: Tensor = ((w**p).sum(-1) / v.shape[-1]) ** (1 / p)
    return result


def _softpool(v: Tensor, p: float | Tensor, n: float) -> Tensor:
    weight = (v - v.amax(-1, keepdim=True)).exp()
    return (weight * v).sum(-1) / weight.sum(-1)


def _stochastic_mean(v: Tensor, p: float | Tensor, n: float) -> Tensor:
    w = v.clamp(min=0)
    return (w**2).sum(-1) / w.sum(-1) if (w.sum(-1) > 0).all() else (w**2).sum(-1) / w.sum(-1).clamp(min=1e-300)


FORMULAS: Final[dict[str, Formula]] = {
    "max": lambda v, p, n: v.amax(-1),
    "min": lambda v, p, n: v.amin(-1),
    "avg": lambda v, p, n: v.sum(-1) / n,
    "sum": lambda v, p, n: v.sum(-1),
    "lp": lambda v, p, n: (v.abs() ** p).sum(-1) ** (1 / p),
    "gem": _gem,
    "lse": lambda v, p, n: (torch.logsumexp(p * v, -1) - math.log(v.shape[-1])) / p,
    "softpool": _softpool,
    "stochastic_mean": _stochastic_mean,
    "std": lambda v, p, n: v.std(-1, correction=0),
    "mixed": lambda v, p, n: p * v.amax(-1) + (1 - p) * v.sum(-1) / n,
}
"""kind -> f(values [..., T], p, divisor of avg and mixed) -> [...]."""

PARAMETERS: Final = {"lp": 2.0, "gem": 3.0, "lse": 1.0, "mixed": 0.5}

ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "none": lambda u: u,
    "relu": lambda u: u.clamp(min=0),
    "leaky_relu": lambda u: torch.where(u > 0, u, 0.01 * u),
    "gelu": lambda u: u * 0.5 * (1 + torch.erf(u / math.sqrt(2))),
    "silu": lambda u: u * torch.sigmoid(u),
}


def windows(
    x: Tensor,
    kind: str,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    p: float | Tensor | None = None,
) -> Tensor:
    """Pool x [N, C, H, W] window by window; an output whose window lies outside the map is NaN."""
    starts = [
        _starts(size, k, s, pad, d, ceil_mode)
        for size, k, s, pad, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    parameter = PARAMETERS.get(kind, 0.0) if p is None else p
    lines = []
    for top in starts[0]:
        line = []
        for left in starts[1]:
            taps = [
                [start + i * d for i in range(k)] for start, k, d in zip((top, left), kernel, dilation, strict=True)
            ]
            rows, columns = ([t for t in axis if 0 <= t < size] for axis, size in zip(taps, x.shape[2:], strict=True))
            counted = [
                sum(t < size + pad for t in axis) for axis, size, pad in zip(taps, x.shape[2:], padding, strict=True)
            ]
            n = divisor_override or (math.prod(counted) if count_include_pad else len(rows) * len(columns))
            v = x[:, :, rows][:, :, :, columns].flatten(2)
            line.append(FORMULAS[kind](v, parameter, n) if v.shape[2] else x.new_full(x.shape[:2], math.nan))
        lines.append(torch.stack(line, -1))
    return torch.stack(lines, -2)


def _starts(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> list[int]:
    """Where windows start: all that fit; with ceil_mode also one that overhangs, unless it starts past the map."""
    effective = (kernel - 1) * dilation + 1
    starts = list(range(-padding, size + padding - effective + 1, stride))
    following = starts[-1] + stride if starts else -padding
    overhangs = following + effective > size + padding
    fits_with_ceil = following + effective - (size + padding) < stride
    if ceil_mode and overhangs and fits_with_ceil and following < size:
        starts.append(following)
    return starts
