"""Pooling over sliding windows: the operator `pool2d`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedpool import arguments, cells, operators, reference, runtime
from fusedpool.arguments import IntPair, Window


def pool2d(
    x: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    *,
    kind: str = "max",
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    p: float | Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    return_indices: bool = False,
    generator: torch.Generator | None = None,
    training: bool = True,
) -> Any:
    """Pool activation(scale * x + shift) over sliding windows, in one read of x.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, of any strides.
        kernel_size, stride, padding, dilation, ceil_mode: as in torch.nn.functional.max_pool2d, for every kind.
        kind: see kinds.py for the formulas.
        count_include_pad, divisor_override: as in torch.nn.functional.avg_pool2d, for avg and mixed; the other kinds
            take in only what lies inside the map.
        p: of lp (2), gem (3), lse (1) and mixed (0.5); a tensor of one number gets a gradient with gem and mixed.
        scale, shift: [C].
        activation: none, relu, leaky_relu (slope 0.01), gelu (exact) or silu.
        return_indices: for max and min.
        generator, training: for stochastic: samples in training, their expectation otherwise.

    Returns:
        [N, C, OH, OW] in x's dtype and memory format; with return_indices also int64 places h * W + w (-1: the window
        lies outside the map).

    Raises:
        ValueError: an argument is wrong; the message names it.
    """
    arguments.check_map(x)
    kind = stochastic(kind, training)
    arguments.check_kind(kind)
    window = arguments.window(x, kernel_size, stride, padding, dilation, ceil_mode, count_include_pad, divisor_override)
    name = arguments.check_prologue(x, scale, shift, activation, 1)
    number, param = arguments.parameter(kind, p, x)
    if return_indices and kind not in ("max", "min"):
        raise ValueError(f"return_indices is True; only max and min have indices, not {kind}")
    seed = arguments.seed_for(x, generator) if kind == "stochastic" else None
    save = wants_gradient(x, scale, shift, param)
    y, _, _, index = _window(x, scale, shift, param, seed, window.to_ints(), kind, number, name, save, return_indices)
    return (y, index) if return_indices else y


def stochastic(kind: str, training: bool) -> str:
    """The kind that a user's kind stands for."""
    return "stochastic_mean" if kind == "stochastic" and not training else kind


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether backward may be asked for."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


@torch.library.custom_op("fusedpool::window", mutates_args=())
def _window(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    param: Tensor | None,
    seed: Tensor | None,
    window: Sequence[int],
    kind: str,
    p: float,
    activation: str,
    save: bool,
    indices: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w = Window.from_ints(window)
    size = w.output_size(x.shape[2], x.shape[3])
    if runtime.use_triton(x):
        return cells.launch_forward(x, scale, shift, param, seed, (), w, size, kind, p, activation, save, indices)
    places = reference.window_cells(w, x.shape[2], x.shape[3], x.device)
    return operators.reference_forward(x, scale, shift, param, seed, places, kind, p, activation, save, indices)


@_window.register_fake
def _(x, scale, shift, param, seed, window, kind, p, activation, save, indices):
    w = Window.from_ints(window)
    return operators.empty_outputs(x, w.output_size(x.shape[2], x.shape[3]), w.taps, kind, save, indices)


@torch.library.custom_op("fusedpool::window_backward", mutates_args=())
def _window_backward(
    g: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    winner: Tensor,
    aux: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    param: Tensor | None,
    size: Sequence[int],
    last: bool,
    window: Sequence[int],
    kind: str,
    p: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w = Window.from_ints(window)
    if not runtime.use_triton(g):
        places = reference.window_cells(w, size[0], size[1], g.device)
        return operators.reference_backward(g, x, winner, scale, shift, param, last, places, kind, p, activation)
    return cells.launch_backward(
        g, x, y, winner, aux, scale, shift, param, (), w, w.overlap, size, last, kind, p, activation
    )


@_window_backward.register_fake
def _(g, x, y, winner, aux, scale, shift, param, size, last, window, kind, p, activation):
    return operators.empty_gradients(g, scale, shift, param, size, last)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, scale, shift, param, _, ctx.window, ctx.kind, ctx.p, ctx.activation, _, _ = inputs
    operators.save(ctx, x, scale, shift, param, output)


def _gradient(ctx: Any, g: Tensor, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    gradients = _window_backward(g, *saved, ctx.size, ctx.last, ctx.window, ctx.kind, ctx.p, ctx.activation)
    return *operators.wanted(gradients, *saved[-3:]), *(None,) * 7


_window.register_autograd(_gradient, setup_context=_setup)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    g, x, _, winner, _, scale, shift, param, ctx.size, _, ctx.window, ctx.kind, ctx.p, ctx.activation = inputs
    ctx.save_for_backward(g, x, winner, scale, shift, param)


def _second_gradient(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    places = reference.window_cells(Window.from_ints(ctx.window), ctx.size[0], ctx.size[1], gradients[0].device)
    dg, dx, dscale, dshift, dparam = operators.second_gradient(
        ctx.saved_tensors, gradients, places, ctx.kind, ctx.p, ctx.activation
    )
    return dg, dx, None, None, None, dscale, dshift, dparam, *(None,) * 6


_window_backward.register_autograd(_second_gradient, setup_context=_setup_backward)
