"""Batch normalisation, an activation and pooling over sliding windows in one operator: `batch_norm_act_pool2d`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedpool import arguments, batchnorm_launch, geometry, operators, reference, runtime, window_launch
from fusedpool.batchnorm_launch import Statistics
from fusedpool.geometry import IntPair, Window
from fusedpool.kinds import KINDS
from fusedpool.window import pool2d

_DIMS = (0, 2, 3)


def batch_norm_act_pool2d(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    kernel_size: IntPair,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    *,
    kind: str = "max",
    activation: str | None = "relu",
    training: bool = True,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    p: float | Tensor | None = None,
    return_indices: bool = False,
    generator: torch.Generator | None = None,
) -> Any:
    """Pool activation(batch_norm(x)) over sliding windows; the normalised map is never written, nor its gradient.

    In training, forward reads x twice, for the statistics and for the windows. Backward reads it once where windows
    have won and once to write dx. In evaluation it is `pool2d` with the running statistics as scale and shift.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, of any strides.
        weight, bias: [C], of any floating-point type; None: 1 and 0.
        running_mean, running_var: [C], updated in training as by torch.nn.functional.batch_norm, unless None; an empty
            batch leaves them as they are.
        training, momentum, eps: as in torch.nn.functional.batch_norm; momentum may be a tensor of one number.

    The other arguments, what is returned and what is raised are those of `pool2d`.

    Raises:
        ValueError: training with a single value per channel, or evaluation without running statistics.
    """
    arguments.check_map(x)
    kind = arguments.kind_in(kind, training)
    name = arguments.check_prologue(x, None, None, activation, 1)
    arguments.check_channels(x, 1, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    arguments.check_normalisation(x, running_mean, running_var, training, momentum, eps)
    places = (kernel_size, stride, padding, dilation)
    if not training:
        assert running_mean is not None and running_var is not None
        scale, shift = _affine(x, weight, bias, running_mean, running_var, eps)
        options: dict[str, Any] = {"kind": kind, "ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
        options |= {"divisor_override": divisor_override, "p": p, "return_indices": return_indices}
        return pool2d(x, *places, **options, scale=scale, shift=shift, activation=name)
    window = geometry.window(x, *places, ceil_mode, count_include_pad, divisor_override)
    number, param = arguments.parameter(kind, p, x)
    arguments.check_indices(kind, return_indices)
    seed = arguments.seed_for(x, generator) if kind == "stochastic" else None
    save = operators.wants_gradient(x, weight, bias, param)
    y, _, _, index, statistics = _norm_window(
        x, weight, bias, param, seed, window.to_ints(), kind, number, name, eps, save, return_indices
    )
    if x.shape[0]:
        known, count = Statistics(*statistics.unbind()), x.numel() // x.shape[1]
        _track(running_mean, known.mean, momentum)
        _track(running_var, known.variance * (count / (count - 1)), momentum)
    return (y, index) if return_indices else y


def _affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The scale and shift of x that are its normalisation."""
    acc = runtime.accumulator(x)
    scale = (variance.to(acc) + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean.to(acc) * scale
    return scale, shift if bias is None else shift + bias


@torch.no_grad()
def _track(running: Tensor | None, value: Tensor, momentum: float | Tensor) -> None:
    if running is not None:
        running.lerp_(value.to(running.dtype), momentum.to(running) if isinstance(momentum, Tensor) else momentum)


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """xhat, and mean, biased variance and 1 / sqrt(variance + eps) of each channel, in plain PyTorch."""
    variance, mean = torch.var_mean(x, _DIMS, correction=0, keepdim=True)
    factor = (variance + eps).rsqrt()
    return (x - mean) * factor, mean, variance, factor


def _reference_statistics(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """batchnorm_launch.statistics, in plain PyTorch."""
    acc = runtime.accumulator(x)
    mean, variance, factor = (t.flatten() for t in _normalise(x.to(acc), eps)[1:])
    return torch.stack([mean, variance, factor, *_affine(x, weight, bias, mean, variance, eps)]).to(acc)


def _reference_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    param: Tensor | None,
    winner: Tensor,
    window: Sequence[int],
    kind: str,
    p: float,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by x, weight, bias and param, in plain PyTorch; differentiable by them and g."""
    places = reference.window_cells(Window.from_ints(window), x.shape[2], x.shape[3], x.device)
    xhat, _, _, factor = _normalise(x, eps)
    taps = operators.winning_taps(winner, kind)
    results = reference.backward(g, xhat, weight, bias, param, taps, places, kind, p, activation)
    dxhat, dweight, dbias, dparam = results
    along = (dxhat * xhat).mean(_DIMS, keepdim=True)
    return factor * (dxhat - dxhat.mean(_DIMS, keepdim=True) - xhat * along), dweight, dbias, dparam


@torch.library.custom_op("fusedpool::norm_window", mutates_args=())
def _norm_window(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    param: Tensor | None,
    seed: Tensor | None,
    window: Sequence[int],
    kind: str,
    p: float,
    activation: str,
    eps: float,
    save: bool,
    indices: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if x.shape[0] == 0:
        empty = _empty(x, window, kind, save, indices)
        empty[-1].zero_()
        return empty
    w = Window.from_ints(window)
    kernels = runtime.use_triton(x)
    statistics = (batchnorm_launch.statistics if kernels else _reference_statistics)(x, weight, bias, eps)
    inputs = (x, *Statistics(*statistics.unbind())[-2:], param, seed)
    if kernels:
        size = w.output_size(x.shape[2], x.shape[3])
        outputs = window_launch.forward(*inputs, (), w, size, kind, p, activation, save, indices)
    else:
        places = reference.window_cells(w, x.shape[2], x.shape[3], x.device)
        outputs = operators.reference_forward(*inputs, places, kind, p, activation, save, indices)
    return *outputs, statistics


def _empty(
    x: Tensor, window: Sequence[int], kind: str, save: bool, indices: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised outputs, and statistics."""
    w = Window.from_ints(window)
    shape = (x.shape[1], *w.output_size(x.shape[2], x.shape[3]))
    statistics = x.new_empty((len(Statistics._fields), x.shape[1]), dtype=runtime.accumulator(x))
    return *operators.empty_outputs(x, shape, w.taps, kind, save, indices), statistics


@_norm_window.register_fake
def _(x, weight, bias, param, seed, window, kind, p, activation, eps, save, indices):
    return _empty(x, window, kind, save, indices)


@torch.library.custom_op("fusedpool::norm_window_backward", mutates_args=())
def _norm_window_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    param: Tensor | None,
    winner: Tensor,
    y: Tensor | None,
    aux: Tensor,
    statistics: Tensor,
    window: Sequence[int],
    kind: str,
    p: float,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (g, x, weight, bias, param, winner)
    if runtime.use_triton(g) and x.shape[0]:
        known = Statistics(*statistics.unbind())
        return batchnorm_launch.backward(*tensors, y, aux, known, Window.from_ints(window), kind, p, activation)
    outputs = operators.empty_gradients(g, weight, bias, param, x.shape, runtime.channels_last(x))
    if x.shape[0] == 0:
        return tuple(output.zero_() for output in outputs)  # type: ignore[return-value]
    acc = runtime.accumulator(g)
    results = _reference_backward(g.to(acc), x.to(acc), *tensors[2:], window, kind, p, activation, eps)
    operators.fill(outputs, results)
    return outputs


@_norm_window_backward.register_fake
def _(g, x, weight, bias, param, winner, y, aux, statistics, window, kind, p, activation, eps):
    return operators.empty_gradients(g, weight, bias, param, x.shape, runtime.channels_last(x))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, param, _, ctx.window, ctx.kind, ctx.p, ctx.activation, ctx.eps, _, _ = inputs
    y, winner, aux, index, statistics = output
    ctx.mark_non_differentiable(winner, aux, index, statistics)
    kept = y if KINDS[ctx.kind].uses_input else None
    ctx.save_for_backward(x, weight, bias, param, winner, kept, aux, statistics)


def _gradient(ctx: Any, g: Tensor, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    gradients = _norm_window_backward(g, *saved, ctx.window, ctx.kind, ctx.p, ctx.activation, ctx.eps)
    return *operators.wanted(gradients, *saved[1:4]), *(None,) * 8


_norm_window.register_autograd(_gradient, setup_context=_setup)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, _, ctx.window, ctx.kind, ctx.p, ctx.activation, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _second_gradient(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
    *inputs, winner = ctx.saved_tensors

    def backward(g: Tensor, x: Tensor, *others: Tensor | None) -> Sequence[Tensor | None]:
        constants = (ctx.window, ctx.kind, ctx.p, ctx.activation, ctx.eps)
        return _reference_backward(g, x, *others, winner, *constants)  # type: ignore[call-arg, arg-type]

    return *operators.differentiate(backward, inputs, upstream), *(None,) * 9


_norm_window_backward.register_autograd(_second_gradient, setup_context=_setup_backward)
