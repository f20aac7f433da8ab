"""Pooling over regions of any size: the operator behind whole maps, grids and packed images."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusedpool import arguments, operators, region_launch, region_reference, runtime
from fusedpool.kinds import KINDS
from fusedpool.operators import Outputs
from fusedpool.region_launch import Levels, Mode
from fusedpool.region_reference import Regions


def pool(
    x: Tensor,
    kinds: Sequence[str],
    mode: Mode,
    *,
    levels: Levels = (),
    bounds: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    p: float | Tensor | Mapping[str, float | Tensor] | None = None,
    generator: torch.Generator | None = None,
    training: bool = True,
    indices: bool = False,
) -> tuple[Tensor, Tensor]:
    """Pool activation(scale * x + shift) over regions of maps; the arguments but x and bounds are checked here.

    Args:
        x: [N, C, H, W]; one row of pixels where packed.
        mode, levels, bounds: what the regions are, see region_kernels.

    Returns:
        y [kinds, N, C, cells], and index of the same shape, empty unless wanted: places h * W + w.
    """
    names = [arguments.kind_in(kind, training) for kind in arguments.check_kinds(kinds)]
    name = arguments.check_prologue(x, scale, shift, activation, 1)
    numbers, param = arguments.parameters(kinds, p, x)
    seed = arguments.seed_for(x, generator) if "stochastic" in names else None
    save = operators.wants_gradient(x, scale, shift, param)
    flat = [size for level in levels for size in level]
    bounds = None if bounds is None else bounds.contiguous()
    # Where a traced size may be anything, winners have room for all places.
    far = not statically_known_true(x.shape[2] * x.shape[3] < 2**31)
    y, _, _, index = _regions(
        x, bounds, scale, shift, param, seed, mode, flat, ",".join(names), numbers, name, save, indices, far
    )
    return y, index


def _levels(flat: Sequence[int]) -> Levels:
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _empty_outputs(
    x: Tensor, bounds: Tensor | None, mode: str, levels: Sequence[int], kinds: str, save: bool, indices: bool,
    far: bool,
) -> Outputs:  # fmt: skip
    """Uninitialised (y, winner, aux, index), each [kinds, N, C, cells], laid out as x is; unwanted ones are empty."""
    names = kinds.split(",")
    samples = bounds.shape[0] - 1 if bounds is not None and mode == "packed" else x.shape[0]
    cells = sum(rows * columns for rows, columns in _levels(levels)) if mode == "grid" else 1
    last = runtime.channels_last(x)
    wanted = (
        (True, x.dtype),
        (save and any(KINDS[kind].winner for kind in names), torch.int64 if far else torch.int32),
        (save and any(KINDS[kind].aux for kind in names), runtime.accumulator(x)),
        (indices, torch.int64),
    )

    def empty(dtype: torch.dtype) -> Tensor:
        if last:
            return x.new_empty((len(names), samples, cells, x.shape[1]), dtype=dtype).transpose(2, 3)
        return x.new_empty((len(names), samples, x.shape[1], cells), dtype=dtype)

    y, winner, aux, index = (empty(dtype) if want else x.new_empty(0, dtype=dtype) for want, dtype in wanted)
    return y, winner, aux, index


def _check_bounds(bounds: Tensor | None, mode: str, height: int, width: int) -> None:
    """Raise ValueError for impossible bounds, where looking at them costs no wait for an accelerator."""
    if bounds is None or bounds.is_cuda:
        return
    if mode == "sized":
        limit = bounds.new_tensor([height, width])
        if ((bounds < 0) | (bounds > limit)).any():
            raise ValueError(f"sizes has rows outside of 0 to {height} x 0 to {width}, the size of x's maps")
    elif bounds[0] != 0 or bounds[-1] != width or (bounds.diff() < 0).any():
        raise ValueError(
            f"offsets must begin at 0, end at {width} (the pixels of x) and never fall; they run from "
            f"{int(bounds[0])} to {int(bounds[-1])}"
        )


@torch.library.custom_op("fusedpool::regions", mutates_args=())
def _regions(
    x: Tensor,
    bounds: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    param: Tensor | None,
    seed: Tensor | None,
    mode: str,
    levels: Sequence[int],
    kinds: str,
    ps: Sequence[float],
    activation: str,
    save: bool,
    indices: bool,
    far: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_bounds(bounds, mode, x.shape[2], x.shape[3])
    outputs = _empty_outputs(x, bounds, mode, levels, kinds, save, indices, far)
    names = kinds.split(",")
    if runtime.use_triton(x):
        region_launch.forward(
            x, bounds, scale, shift, param, seed, cast(Mode, mode), _levels(levels), names, ps, activation, outputs
        )
    else:
        regions = Regions(cast(Mode, mode), _levels(levels), bounds, x.shape[0], x.shape[2], x.shape[3], x.device)
        wide = x.to(runtime.accumulator(x))
        region_reference.forward(wide, scale, shift, param, seed, regions, names, ps, activation, outputs)
    return outputs


@_regions.register_fake
def _(x, bounds, scale, shift, param, seed, mode, levels, kinds, ps, activation, save, indices, far):
    return _empty_outputs(x, bounds, mode, levels, kinds, save, indices, far)


@torch.library.custom_op("fusedpool::regions_backward", mutates_args=())
def _regions_backward(
    g: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    winner: Tensor,
    aux: Tensor,
    bounds: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    param: Tensor | None,
    shape: Sequence[int],
    last: bool,
    mode: str,
    levels: Sequence[int],
    kinds: str,
    ps: Sequence[float],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = operators.empty_gradients(g, scale, shift, param, shape, last)
    names = kinds.split(",")
    if runtime.use_triton(g):
        region_launch.backward(
            *(g, x, y, winner, aux, bounds, scale, shift, param, cast(Mode, mode), _levels(levels), last, names, ps),
            *(activation, outputs),
        )
        return outputs
    acc = runtime.accumulator(g)
    regions = Regions(cast(Mode, mode), _levels(levels), bounds, shape[0], shape[2], shape[3], g.device)
    wide = None if x is None else x.to(acc)
    results = region_reference.backward(g.to(acc), wide, scale, shift, param, winner, regions, names, ps, activation)
    operators.fill(outputs, results)
    return outputs


@_regions_backward.register_fake
def _(g, x, y, winner, aux, bounds, scale, shift, param, shape, last, mode, levels, kinds, ps, activation):
    return operators.empty_gradients(g, scale, shift, param, shape, last)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, bounds, scale, shift, param, _, *ctx.what, _, _, _ = inputs  # what: mode, levels, kinds, ps, activation
    y, winner, aux, index = output
    ctx.mark_non_differentiable(winner, aux, index)
    ctx.shape, ctx.last = x.shape, runtime.channels_last(x)
    names, activation = ctx.what[2].split(","), ctx.what[4]
    keep = any(operators.needs_input(kind, activation, scale, param) for kind in names)
    uses = any(KINDS[kind].uses_input for kind in names)
    ctx.save_for_backward(x if keep else None, y if uses else None, winner, aux, bounds, scale, shift, param)


def _gradient(ctx: Any, g: Tensor, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    gradients = _regions_backward(g, *saved, ctx.shape, ctx.last, *ctx.what)
    dx, dscale, dshift, dparam = operators.wanted(gradients, *saved[-3:])
    return dx, None, dscale, dshift, dparam, *(None,) * 9


_regions.register_autograd(_gradient, setup_context=_setup)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    g, x, _, winner, _, bounds, scale, shift, param, ctx.shape, _, *ctx.what = inputs
    ctx.save_for_backward(g, x, scale, shift, param, winner, bounds)


def _second_gradient(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
    *inputs, winner, bounds = ctx.saved_tensors
    mode, levels, kinds, ps, activation = ctx.what
    n, _, height, width = ctx.shape
    regions = Regions(cast(Mode, mode), _levels(levels), bounds, n, height, width, upstream[0].device)

    def first(
        g: Tensor, x: Tensor | None, scale: Tensor | None, shift: Tensor | None, param: Tensor | None
    ) -> Sequence[Tensor | None]:
        names = kinds.split(",")
        return region_reference.backward(g, x, scale, shift, param, winner, regions, names, ps, activation)

    dg, dx, dscale, dshift, dparam = operators.differentiate(first, inputs, upstream)
    return dg, dx, None, None, None, None, dscale, dshift, dparam, *(None,) * 7


_regions_backward.register_autograd(_second_gradient, setup_context=_setup_backward)
