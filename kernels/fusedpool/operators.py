"""What operators of several domains share: shapes, arguments of kernels, the CPU path, first and second derivatives.

An operator returns (y, winner, aux, index) and its backward (dx, dscale, dshift, dparam); what is not wanted is empty,
since an operator's schema has no optional results.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import CustomOpDef  # type: ignore[attr-defined]

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


def empty_outputs(x: Tensor, shape: Sequence[int], taps: int, kind: str, save: bool, indices: bool) -> Outputs:
    """Uninitialised (y, winner, aux, index) [N, *shape] for maps x, over at most `taps` cells each."""
    known, acc = KINDS[kind], runtime.accumulator(x)
    winner = torch.uint8 if taps <= NO_WINNER else torch.int32
    wanted = ((True, x.dtype), (save and known.winner, winner), (save and known.aux, acc), (indices, torch.int64))
    y, winners, aux, index = (
        runtime.empty_map(x, shape, dtype) if want else x.new_empty(0, dtype=dtype) for want, dtype in wanted
    )
    return y, winners, aux, index


def empty_gradients(
    g: Tensor, scale: Tensor | None, shift: Tensor | None, param: Tensor | None, shape: Sequence[int], last: bool
) -> Outputs:
    """Uninitialised (dx, dscale, dshift, dparam); dx [*shape] with g's dtype, channels_last or not."""
    format = torch.channels_last if last else torch.contiguous_format
    dx = torch.empty(tuple(shape), dtype=g.dtype, device=g.device, memory_format=format)
    dscale, dshift, dparam = (g.new_empty(0) if t is None else torch.empty_like(t) for t in (scale, shift, param))
    return dx, dscale, dshift, dparam


def fill(outputs: Iterable[Tensor], results: Iterable[Tensor | None]) -> None:
    """Copy results into the outputs that are wanted."""
    for output, result in zip(outputs, results, strict=True):
        if result is not None and output.numel():
            output.copy_(result)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether backward may be asked for.

    Raises NotImplementedError for forward-mode differentiation, where PyTorch's custom operators lose the tangents
    without a word.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    if not torch.compiler.is_compiling() and any(forward_ad.unpack_dual(t).tangent is not None for t in present):
        raise NotImplementedError("an input has a tangent; pooling has no forward-mode derivatives, only backward")
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present)


def needs_input(kind: str, activation: str, scale: Tensor | None, param: Tensor | None) -> bool:
    """Whether backward needs x; relu's mask is in the winner, where the output is nothing but a winner."""
    linear = activation == "none" or masked(kind, activation)
    return KINDS[kind].uses_input or not linear or scale is not None or param is not None


def dense_parameters(
    like: Tensor, scale: Tensor | None, shift: Tensor | None, param: Tensor | None, p: float | Sequence[float]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """scale, shift and param as kernels take them: without gaps; for float64, p as a tensor, not rounded to float32."""
    scale, shift = (None if t is None else t.contiguous() for t in (scale, shift))
    if param is None and like.dtype is torch.float64:
        param = like.new_tensor(p)
    return scale, shift, param


def forward_constants(kind: str, activation: str, outputs: Outputs) -> dict[str, Any]:
    """Constants of a kernel that fills outputs: what they are of, and which are wanted."""
    y, winner, aux, index = outputs
    return {
        "KIND": kind,
        "ACTIVATION": activation,
        "SAVE_WINNER": winner.dim() == 4,
        "SAVE_AUX": aux.dim() == 4,
        "SAVE_INDEX": index.dim() == 4,
        "SENTINEL": sentinel(winner),
        "ACC": runtime.triton_type(runtime.accumulator(y)),
    }


def backward_constants(kind: str, activation: str, g: Tensor, winner: Tensor) -> dict[str, Any]:
    """Constants of a kernel that goes back from g: what it is the gradient of, and what the kind has kept."""
    known = KINDS[kind]
    return {
        "KIND": kind,
        "ACTIVATION": activation,
        "HAS_WINNER": known.winner,
        "HAS_AUX": known.aux and not known.learnable,
        "SENTINEL": sentinel(winner),
        "ACC": runtime.triton_type(runtime.accumulator(g)),
    }


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
    y, winner, aux, index = outputs = empty_outputs(x, cells.output_shape(x.shape[1]), cells.taps, kind, save, indices)
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
    shape: Sequence[int],
    last: bool,
    cells: Domain,
    kind: str,
    p: float,
    activation: str,
) -> Outputs:
    """The gradients in plain PyTorch."""
    outputs = empty_gradients(g, scale, shift, param, shape, last)
    acc, won = runtime.accumulator(g), winning_taps(winner, kind)
    x = None if x is None else x.to(acc)
    fill(outputs, reference.backward(g.to(acc), x, scale, shift, param, won, cells, kind, p, activation))
    return outputs


def register_gradients(forward: CustomOpDef, backward: CustomOpDef, domain: Callable[..., Domain]) -> None:
    """Make one operator the gradient of another, and give it its own, and shapes for tracing.

    Args:
        forward: (x, scale, shift, param, seed, *where, kind, p, activation, save, indices) -> Outputs.
        backward: (g, x, y, winner, aux, scale, shift, param, x's shape, whether x is channels_last, *where, kind, p,
            activation) -> those of `empty_gradients`; its tensors are what is kept, None where it is not needed.
        domain: (x's shape, device, *where) -> the cells, for second derivatives.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        x, scale, shift, param, _, *ctx.where, ctx.kind, ctx.p, ctx.activation, _, _ = inputs
        y, winner, aux, index = output
        ctx.mark_non_differentiable(winner, aux, index)
        ctx.shape, ctx.last = x.shape, runtime.channels_last(x)
        x = x if needs_input(ctx.kind, ctx.activation, scale, param) else None
        ctx.save_for_backward(x, y if KINDS[ctx.kind].uses_input else None, winner, aux, scale, shift, param)

    def gradient(ctx: Any, g: Tensor, *_: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        gradients = backward(g, *saved, ctx.shape, ctx.last, *ctx.where, ctx.kind, ctx.p, ctx.activation)
        return *wanted(gradients, *saved[-3:]), *(None,) * (len(ctx.where) + 6)

    def setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        g, x, _, winner, _, scale, shift, param, ctx.shape, _, *ctx.where, ctx.kind, ctx.p, ctx.activation = inputs
        ctx.save_for_backward(winner, g, x, scale, shift, param)

    def second_gradient(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        winner, *inputs = ctx.saved_tensors
        cells = domain(ctx.shape, winner.device, *ctx.where)

        def first(g: Tensor, *others: Tensor | None) -> Sequence[Tensor | None]:
            x, scale, shift, param = others
            won = winning_taps(winner, ctx.kind)
            return reference.backward(g, x, scale, shift, param, won, cells, ctx.kind, ctx.p, ctx.activation)

        dg, dx, *others = differentiate(first, inputs, upstream)
        return dg, dx, None, None, None, *others, *(None,) * (len(ctx.where) + 5)

    @backward.register_fake
    def _(g, x, y, winner, aux, scale, shift, param, shape, last, *_):
        return empty_gradients(g, scale, shift, param, shape, last)

    forward.register_autograd(gradient, setup_context=setup)
    backward.register_autograd(second_gradient, setup_context=setup_backward)


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


def winning_taps(winner: Tensor, kind: str) -> Tensor | None:
    """Saved winners as reference takes them, None for a kind that has none."""
    if not KINDS[kind].winner:
        return None
    kept = winner.to(torch.int64)
    return torch.where(kept == sentinel(winner), -1, kept)
