"""A 1x1 convolution, an activation and global pooling in one operator that never writes the convolution's map.

Bytes per pixel of a large map, for elements of size s: forward s Cin (fp16: 2 Cin), where one operator after another
moves s (Cin + 5 Cout) or more; backward 2 s Cin to read x and write dx, and s Cin to read x once more for dweight and
dbias. What the gradient needs of the map is computed again, tile by tile: 2 Cin Cout operations per pixel, each time.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from fusedpool import arguments, conv_launch, operators, prologue, runtime
from fusedpool.kinds import KINDS
from fusedpool.taps import Pooled, grad_taps, pool_taps

CONV_KINDS: Final = tuple(kind for kind in KINDS if kind != "stochastic")
"""The kinds that there are here: all but the one that samples."""

_MOST_PIXELS: Final = 2**31 - 256  # of an image: its positions are int32


def conv1x1_global_pool2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "relu",
    kind: str = "avg",
    *,
    p: float | Tensor | None = None,
) -> Tensor:
    """Pool activation(conv2d(x, weight, bias)), for a kernel of 1 x 1, over whole maps.

    Args:
        x: [N, Cin, H, W], float32, bfloat16, float16 or float64, of any strides; float32 is multiplied as such.
        weight: [Cout, Cin] or [Cout, Cin, 1, 1], of x's dtype; under autocast, all three are cast as for conv2d.
        bias: [Cout], of x's dtype.
        activation: none, relu, leaky_relu (slope 0.01), gelu (exact) or silu.
        kind: one of CONV_KINDS; see kinds.py for the formulas.
        p: of lp (2), gem (3), lse (1) and mixed (0.5); a tensor of one number gets a gradient with gem and mixed.

    Returns:
        [N, Cout] in x's dtype. The map is not rounded to it before it is pooled.

    Raises:
        ValueError: an argument is wrong; the message names it.
        NotImplementedError: the kind is not one of CONV_KINDS.
    """
    arguments.check_tensors(x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    x, weight, bias = (_autocast(tensor, x.device.type) for tensor in (x, weight, bias))
    arguments.check_map(x)
    arguments.check_kind(kind, CONV_KINDS, "conv1x1_global_pool2d")
    name = arguments.check_prologue(x, None, None, activation, 1)
    number, param = arguments.parameter(kind, p, x)
    _check_weights(x, weight, bias)
    save = operators.wants_gradient(x, weight, bias, param)
    y: Tensor = _conv(x, weight.reshape(weight.shape[:2]), bias, param, kind, number, name, save)[0]
    return y


def _autocast(tensor: Any, device: str) -> Any:
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype is not torch.float64
    return tensor.to(torch.get_autocast_dtype(device)) if enabled and eligible else tensor


def _check_weights(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless they fit x."""
    if weight.dim() not in (2, 4) or weight.shape[1] != x.shape[1] or any(size != 1 for size in weight.shape[2:]):
        raise ValueError(
            f"weight has shape {list(weight.shape)}; it must be [Cout, Cin] or [Cout, Cin, 1, 1], Cin = {x.shape[1]}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}; Cout must be at least 1")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}; it must be [Cout] = [{weight.shape[0]}]")
    for label, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(
                f"{label} is {tensor.dtype} on {tensor.device}; it must be {x.dtype} on {x.device}, as x is"
            )
    if x.shape[2] * x.shape[3] > _MOST_PIXELS:
        raise ValueError(f"x has shape {list(x.shape)}; H * W must be at most {_MOST_PIXELS}")


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """The pre-activations and the map, [N, Cout, H * W], and which of its values are valid: all."""
    u = prologue.apply(weight @ x.flatten(2), None, bias, "none")
    return u, prologue.apply(u, None, None, activation), torch.ones(u.shape[-1], dtype=torch.bool, device=u.device)


def _reference_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, p: float | Tensor, activation: str
) -> Pooled:
    """The map, pooled, in plain PyTorch."""
    _, v, valid = _reference(x, weight, bias, activation)
    return pool_taps(kind, v, valid, None, p)


def _reference_backward(
    tensors: Sequence[Tensor | None], winner: Tensor, kind: str, p: float, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients by x, weight, a bias and param, of g and those; in plain PyTorch, differentiable by all five."""
    g, x, weight, bias, param = tensors
    assert g is not None and x is not None and weight is not None
    q = p if param is None else param
    taken = winner.to(torch.int64) if KINDS[kind].winner else None
    u, v, valid = _reference(x, weight, bias, activation)
    pooled = pool_taps(kind, v, valid, None, q, None, taken)
    du = grad_taps(kind, g, v, pooled, taken, valid, None, q) * prologue.derivative(u, activation)
    dparam = None if param is None or pooled.aux is None else (g * pooled.aux).sum().view(param.shape)
    dweight = (du @ x.flatten(2).transpose(1, 2)).sum(0)
    return (weight.t() @ du).view(x.shape), dweight, du.sum((0, 2)), dparam


def _outputs(x: Tensor, weight: Tensor, kind: str, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised y, winner, saved; those not wanted are empty, since a schema has no optional results."""
    size, known = (x.shape[0], weight.shape[0]), KINDS[kind]
    return (
        x.new_empty(size),
        x.new_empty(size if save and known.winner else 0, dtype=torch.int32),
        x.new_empty((2, *size) if save and (known.uses_input or known.aux) else 0, dtype=runtime.accumulator(x)),
    )


@torch.library.custom_op("fusedpool::conv1x1_global", mutates_args=())
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    param: Tensor | None,
    kind: str,
    p: float,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = y, winner, saved = _outputs(x, weight, kind, save)
    if x.shape[0] == 0:
        return outputs
    if runtime.use_triton(x):
        conv_launch.forward(x, weight, bias, param, kind, p, activation, *outputs)
        return outputs
    acc = runtime.accumulator(x)
    with torch.autocast(x.device.type, enabled=False):
        inputs = x.to(acc), weight.to(acc), None if bias is None else bias.to(acc)
        pooled = _reference_forward(*inputs, kind, p if param is None else param, activation)
    y.copy_(pooled.y)
    if winner.dim() == 2 and pooled.winner is not None:
        masked = operators.masked(kind, activation)
        winner.copy_(torch.where(pooled.y <= 0, -1, pooled.winner) if masked else pooled.winner)
    if saved.dim() == 3:
        saved[0].copy_(pooled.y)
        saved[1].copy_(pooled.y if pooled.aux is None else pooled.aux)
    return outputs


@_conv.register_fake
def _(x, weight, bias, param, kind, p, activation, save):
    return _outputs(x, weight, kind, save)


def _gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, param: Tensor | None, kind: str, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised dx, dweight, dbias, dparam; those not wanted are empty."""
    return (
        runtime.empty_map(x, x.shape[1:]) if wanted[0] else x.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted[1] else x.new_empty(0),
        torch.empty_like(bias) if wanted[1] and bias is not None else x.new_empty(0),
        torch.empty_like(param) if param is not None and KINDS[kind].learnable else x.new_empty(0),
    )


@torch.library.custom_op("fusedpool::conv1x1_global_backward", mutates_args=())
def _conv_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    param: Tensor | None,
    winner: Tensor,
    saved: Tensor,
    kind: str,
    p: float,
    activation: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = runtime.accumulator(x)
    outputs = _gradients(x, weight, bias, param, kind, wanted)
    if x.shape[0] == 0:
        operators.fill(outputs, [torch.zeros_like(output) for output in outputs])
    elif runtime.use_triton(x):
        conv_launch.backward(g, x, weight, bias, param, winner, saved, kind, p, activation, outputs[:3])
        if outputs[3].numel():
            outputs[3].fill_((g.to(acc) * saved[1]).sum())
    else:
        with torch.autocast(x.device.type, enabled=False):
            upcast = [None if t is None else t.to(acc) for t in (g, x, weight, bias, param)]
            operators.fill(outputs, _reference_backward(upcast, winner, kind, p, activation))
    return outputs


@_conv_backward.register_fake
def _(g, x, weight, bias, param, winner, saved, kind, p, activation, wanted):
    return _gradients(x, weight, bias, param, kind, wanted)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.kind, ctx.p, ctx.activation, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _gradient(ctx: Any, g: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, bias, param, winner, saved = ctx.saved_tensors
    need = ctx.needs_input_grad
    wanted = [need[0], need[1] or need[2]]
    results = _conv_backward(g, x, weight, bias, param, winner, saved, ctx.kind, ctx.p, ctx.activation, wanted)
    return *(result if needed else None for result, needed in zip(results, need[:4], strict=True)), *(None,) * 4


_conv.register_autograd(_gradient, setup_context=_setup)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.kind, ctx.p, ctx.activation, ctx.wanted = inputs
    ctx.save_for_backward(*tensors)


def _second_gradient(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
    *tensors, winner = ctx.saved_tensors
    acc = runtime.accumulator(tensors[0])

    def backward(*inputs: Tensor | None) -> Sequence[Tensor | None]:
        upcast = [None if t is None else t.to(acc) for t in inputs]
        results = _reference_backward(upcast, winner, ctx.kind, ctx.p, ctx.activation)
        return [result if u.numel() else None for result, u in zip(results, upstream, strict=True)]

    with torch.autocast(winner.device.type, enabled=False):
        return *operators.differentiate(backward, tensors, upstream), *(None,) * 6


_conv_backward.register_autograd(_second_gradient, setup_context=_setup_backward)
