"""The kinds in plain PyTorch, over taps [..., T] of which some are valid: values, gradients, samples."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedpool.kinds import GEM_FLOOR, KINDS


class Pooled(NamedTuple):
    """Per output: the value, the winning tap (int64, -1: none) or None, and what kinds.finish_aux says or None."""

    y: Tensor
    winner: Tensor | None
    aux: Tensor | None


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
