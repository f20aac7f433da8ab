"""What operators of several domains share: what backward keeps, shapes for tracing, the CPU path, second derivatives.

An operator returns (y, winner, aux, index) and its backward (dx, dscale, dshift, dparam); what is not wanted is empty,
since an operator's schema has no optional results.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from fusedpool import reference, runtime
from fusedpool.kinds import KINDS
from fusedpool.reference import Domain

NO_WINNER: Final = 255
"""In uint8 winners: no gradient goes through this output; -1 in wider ones (windows of more than 255 cells)."""

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


_WINNERS: Final = ("max", "min", "stochastic")
"""Kinds whose output is nothing but a winner: where it is active, the activation's derivative there is known."""


def masked(kind: str, activation: str) -> bool:
    """Whether the winner also says where relu's derivative is 0: an output of 0 has none."""
    return activation == "relu" and kind in _WINNERS


def sentinel(winner: Tensor) -> int:
    """What stands for no winner in winners of that dtype."""
    return NO_WINNER if winner.dtype is torch.uint8 else -1


def empty_outputs(
    x: Tensor, size: tuple[int, int], taps: int, kind: str, save: bool, indices: bool, channels: int | None = None
) -> Outputs:
    """Uninitialised (y, winner, aux, index) for [N, channels or C, *size] over at most `taps` cells each."""
    known, acc = KINDS[kind], runtime.accumulator(x)
    winner = torch.uint8 if taps <= NO_WINNER else torch.int32
    wanted = ((True, x.dtype), (save and known.winner, winner), (save and known.aux, acc), (indices, torch.int64))
    y, winners, aux, index = (
        runtime.empty_map(x, *size, dtype, channels) if want else x.new_empty(0, dtype=dtype) for want, dtype in wanted
    )
    return y, winners, aux, index


def empty_gradients(
    g: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    param: Tensor | None,
    size: Sequence[int],
    last: bool,
    channels: int | None = None,
) -> Outputs:
    """Uninitialised (dx, dscale, dshift, dparam); dx [N, channels or C, *size] with g's dtype, channels_last or not."""
    format = torch.channels_last if last else torch.contiguous_format
    dx = torch.empty((g.shape[0], channels or g.shape[1], *size), dtype=g.dtype, device=g.device, memory_format=format)
    return dx, *(g.new_empty(0) if t is None else torch.empty_like(t) for t in (scale, shift, param))  # type: ignore[return-value]


def needs_input(kind: str, activation: str, scale: Tensor | None, param: Tensor | None) -> bool:
    """Whether backward needs x; relu's mask is in the winner, where the output is nothing but a winner."""
    linear = activation == "none" or masked(kind, activation)
    return KINDS[kind].uses_input or not linear or scale is not None or param is not None


def save(
    ctx: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None, param: Tensor | None, output: Sequence[Tensor]
) -> None:
    """Keep for backward what it needs, and no more: (x, y, winner, aux, scale, shift, param)."""
    y, winner, aux, index = output
    ctx.mark_non_differentiable(winner, aux, index)
    ctx.size, ctx.last = x.shape[2:], runtime.channels_last(x)
    keep = needs_input(ctx.kind, ctx.activation, scale, param)
    ctx.save_for_backward(
        x if keep else None, y if KINDS[ctx.kind].uses_input else None, winner, aux, scale, shift, param
    )


def wanted(gradients: Outputs, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients by x and by those of scale, shift and param that are there."""
    dx, *others = gradients
    return dx, *(g if t is not None else None for g, t in zip(others, inputs, strict=True))


def reference_forward(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    param: Tensor | None,
    seed: Tensor | None,
    cells: Domain,
    kind: str,
    p: float,
    activation: str,
    save: bool,
    indices: bool,
) -> Outputs:
    """The outputs in plain PyTorch."""
    acc = runtime.accumulator(x)
    channels, *size = cells.output_shape(x.shape[1])
    outputs = empty_outputs(x, (size[0], size[1]), cells.taps, kind, save, indices, channels)
    y, winner, aux, index = outputs
    pooled = reference.forward(x.to(acc), scale, shift, param, cells, kind, p, activation, seed)
    y.copy_(pooled.y)
    if winner.dim() == 4 and pooled.winner is not None:
        kept = torch.where(pooled.y <= 0, -1, pooled.winner) if masked(kind, activation) else pooled.winner
        winner.copy_(torch.where(kept < 0, sentinel(winner), kept))
    if aux.dim() == 4 and pooled.aux is not None:
        aux.copy_(pooled.aux)
    if indices and pooled.winner is not None:
        index.copy_(cells.places(pooled.winner))
    return outputs


def reference_backward(
    g: Tensor,
    x: Tensor | None,
    winner: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    param: Tensor | None,
    last: bool,
    cells: Domain,
    kind: str,
    p: float,
    activation: str,
) -> Outputs:
    """The gradients in plain PyTorch."""
    channels, *size = cells.input_shape(g.shape[1])
    outputs = empty_gradients(g, scale, shift, param, size, last, channels)
    acc = runtime.accumulator(g)
    x = None if x is None else x.to(acc)
    results = reference.backward(g.to(acc), x, scale, shift, param, taps(winner, kind), cells, kind, p, activation)
    for output, result in zip(outputs, results, strict=True):
        if result is not None:
            output.copy_(result)
    return outputs


def second_gradient(
    saved: Sequence[Tensor | None], upstream: Sequence[Tensor], cells: Domain, kind: str, p: float, activation: str
) -> tuple[Tensor | None, ...]:
    """Gradients by (g, x, scale, shift, param) of a backward's results, through reference.backward.

    Args:
        saved: g, x, winner, scale, shift, param.
        upstream: by dx, dscale, dshift, dparam.
    """
    winner = saved[2]
    assert winner is not None

    def backward(
        g: Tensor, x: Tensor | None, scale: Tensor | None, shift: Tensor | None, param: Tensor | None
    ) -> Sequence[Tensor | None]:
        return reference.backward(g, x, scale, shift, param, taps(winner, kind), cells, kind, p, activation)

    return differentiate(backward, (*saved[:2], *saved[3:]), upstream)


def differentiate(
    backward: Callable[..., Sequence[Tensor | None]], saved: Sequence[Tensor | None], upstream: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients by `saved`, g and x first, of the results of backward(*saved); upstream: by each result."""
    assert saved[0] is not None
    acc = runtime.accumulator(saved[0])
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: one tensor may be several of the inputs.
        inputs = [None if t is None else t.view_as(t) for t in saved]
        results = backward(*(None if t is None else t.to(acc) for t in inputs[:2]), *inputs[2:])
        pairs = [(r, u) for r, u in zip(results, upstream, strict=True) if r is not None and r.requires_grad]
        if not pairs:
            return (None,) * len(inputs)
        first, weights = [r for r, _ in pairs], [u.to(r.dtype) for r, u in pairs]
        present = [t for t in inputs if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(first, present, weights, allow_unused=True, create_graph=create_graph))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in inputs)


def taps(winner: Tensor, kind: str) -> Tensor | None:
    """Saved winners as reference takes them, None for a kind that has none."""
    if not KINDS[kind].winner:
        return None
    kept = winner.to(torch.int64)
    return torch.where(kept == sentinel(winner), -1, kept)
