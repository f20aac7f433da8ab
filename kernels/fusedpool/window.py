"""Pooling over sliding windows: the operator `pool2d`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedpool import arguments, geometry, operators, runtime, window_launch
from fusedpool.geometry import IntPair, Window
from fusedpool.reference import Cells, window_cells


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
    kind = arguments.kind_in(kind, training)
    window = geometry.window(x, kernel_size, stride, padding, dilation, ceil_mode, count_include_pad, divisor_override)
    name = arguments.check_prologue(x, scale, shift, activation, 1)
    number, param = arguments.parameter(kind, p, x)
    arguments.check_indices(kind, return_indices)
    seed = arguments.seed_for(x, generator) if kind == "stochastic" else None
    save = operators.wants_gradient(x, scale, shift, param)
    y, _, _, index = _window(x, scale, shift, param, seed, window.to_ints(), kind, number, name, save, return_indices)
    return (y, index) if return_indices else y


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
    if runtime.use_triton(x):
        w = Window.from_ints(window)
        size = w.output_size(x.shape[2], x.shape[3])
        return window_launch.forward(x, scale, shift, param, seed, (), w, size, kind, p, activation, save, indices)
    places = _places(x.shape, x.device, window)
    return operators.reference_forward(x, scale, shift, param, seed, places, kind, p, activation, save, indices)


@_window.register_fake
def _(x, scale, shift, param, seed, window, kind, p, activation, save, indices):
    w = Window.from_ints(window)
    shape = (x.shape[1], *w.output_size(x.shape[2], x.shape[3]))
    return operators.empty_outputs(x, shape, w.taps, kind, save, indices)


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
    shape: Sequence[int],
    last: bool,
    window: Sequence[int],
    kind: str,
    p: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if runtime.use_triton(g):
        w = Window.from_ints(window)
        return window_launch.backward(
            g, x, y, winner, aux, scale, shift, param, (), w, w.overlap, shape, last, kind, p, activation
        )
    places = _places(shape, g.device, window)
    return operators.reference_backward(g, x, winner, scale, shift, param, shape, last, places, kind, p, activation)


def _places(shape: Sequence[int], device: torch.device, window: Sequence[int]) -> Cells:
    return window_cells(Window.from_ints(window), shape[2], shape[3], device)


operators.register_gradients(_window, _window_backward, _places)
