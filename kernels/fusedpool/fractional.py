"""Pooling over windows at fractional strides, placed by a seed: the operator `fractional_pool2d`."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from fusedpool import arguments, geometry, operators, runtime, window_launch
from fusedpool.geometry import IntPair, Window
from fusedpool.reference import Cells

_BITS: Final = 20  # of each uniform sample; a side squared times 2^20 must fit into int64
_MIDDLE: Final = (1 << _BITS - 1) * ((1 << _BITS) + 1)  # the seed of samples 1/2 and 1/2


def fractional_pool2d(
    x: Tensor,
    kernel_size: IntPair,
    output_size: IntPair | None = None,
    output_ratio: float | Sequence[float] | None = None,
    kind: str = "max",
    *,
    generator: torch.Generator | None = None,
    p: float | Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    return_indices: bool = False,
    training: bool = True,
) -> Any:
    """Pool activation(scale * x + shift) over windows whose strides vary between two integers (arXiv:1412.6071).

    Windows start where torch.nn.functional.fractional_max_pool2d puts them: start_i = floor((i + u) a) - floor(u a)
    with a = (size - kernel) / (outputs - 1), the last at size - kernel. Here one u per axis serves all planes of a
    call, and the starts are exact integers, where PyTorch rounds in x's dtype.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, of any strides; H and W at most 2^21.
        output_size: (OH, OW) or one number for both; or else
        output_ratio: of the outputs' size to the map's, each in (0, 1).
        generator: of the windows' places and of stochastic's samples.
        training: for stochastic, as in `pool2d`; in evaluation without a generator, u is 1/2: the same windows in
            every call.

    Returns, the other arguments and errors: as in `pool2d`; the output is [N, C, OH, OW].
    """
    arguments.check_map(x)
    kind = arguments.kind_in(kind, training)
    kernel = geometry.pair(kernel_size, "kernel_size", 1)
    size = geometry.fractional_size(x, kernel, output_size, output_ratio)
    name = arguments.check_prologue(x, scale, shift, activation, 1)
    number, param = arguments.parameter(kind, p, x)
    arguments.check_indices(kind, return_indices)
    fixed = generator is None and not training
    seed = x.new_full((1,), _MIDDLE, dtype=torch.int64) if fixed else arguments.seed_for(x, generator)
    top, left = starts(seed, (x.shape[2], x.shape[3]), kernel, size)
    save = operators.wants_gradient(x, scale, shift, param)
    y, _, _, index = _fractional(
        x, scale, shift, param, seed, top, left, list(kernel), kind, number, name, save, return_indices
    )
    return (y, index) if return_indices else y


def starts(
    seed: Tensor, size: tuple[int, int], kernel: tuple[int, int], outputs: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """int32 [OH] and [OW]: the first row and column of each window, without waiting for the seed's device."""
    samples = seed & (1 << _BITS) - 1, seed >> _BITS & (1 << _BITS) - 1
    top, left = (_starts(u, *each) for u, *each in zip(samples, size, kernel, outputs, strict=True))
    return top, left


def _starts(u: Tensor, size: int, kernel: int, outputs: int) -> Tensor:
    """Those of an axis; u: int64 [1], the sample in units of 2^-20."""
    i = torch.arange(outputs, device=u.device)
    last = torch.full_like(i, size - kernel)
    if outputs == 1:
        return last.int()
    unit = (outputs - 1) << _BITS
    begun = ((i << _BITS) + u) * last // unit - u * last // unit
    return begun.int()


def _covering(begin: Tensor, size: int, kernel: int) -> tuple[Tensor, int]:
    """int32 [size]: the first window that each row lies in, or would; the most windows that a row can lie in."""
    rows = torch.arange(size, device=begin.device, dtype=torch.int32)
    first = torch.searchsorted(begin + kernel, rows, right=True, out_int32=True)
    # As start_{i + m} - start_i >= floor(m a), the m-th next window has no row of this one once m a >= kernel.
    return first, max(1, runtime.cdiv(kernel * (len(begin) - 1), max(1, size - kernel)))


def _window(kernel: Sequence[int]) -> Window:
    return Window(kernel[0], kernel[1], 1, 1, 0, 0, 1, 1, 0, 0)


def _places(shape: Sequence[int], device: torch.device, top: Tensor, left: Tensor, kernel: Sequence[int]) -> Cells:
    rows = top.long()[:, None] + torch.arange(kernel[0], device=device)
    columns = left.long()[:, None] + torch.arange(kernel[1], device=device)
    return Cells(rows, columns, shape[2], shape[3])


@torch.library.custom_op("fusedpool::fractional", mutates_args=())
def _fractional(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    param: Tensor | None,
    seed: Tensor,
    top: Tensor,
    left: Tensor,
    kernel: Sequence[int],
    kind: str,
    p: float,
    activation: str,
    save: bool,
    indices: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if runtime.use_triton(x):
        size = (top.shape[0], left.shape[0])
        return window_launch.forward(
            x, scale, shift, param, seed, (top, left), _window(kernel), size, kind, p, activation, save, indices
        )
    places = _places(x.shape, x.device, top, left, kernel)
    return operators.reference_forward(x, scale, shift, param, seed, places, kind, p, activation, save, indices)


@_fractional.register_fake
def _(x, scale, shift, param, seed, top, left, kernel, kind, p, activation, save, indices):
    shape = (x.shape[1], top.shape[0], left.shape[0])
    return operators.empty_outputs(x, shape, kernel[0] * kernel[1], kind, save, indices)


@torch.library.custom_op("fusedpool::fractional_backward", mutates_args=())
def _fractional_backward(
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
    top: Tensor,
    left: Tensor,
    kernel: Sequence[int],
    kind: str,
    p: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not runtime.use_triton(g):
        places = _places(shape, g.device, top, left, kernel)
        return operators.reference_backward(g, x, winner, scale, shift, param, shape, last, places, kind, p, activation)
    covering = (_covering(*each) for each in zip((top, left), shape[2:], kernel, strict=True))
    (first_h, most_h), (first_w, most_w) = covering
    tables, overlap = (top, left, first_h, first_w), (most_h, most_w)
    return window_launch.backward(
        g, x, y, winner, aux, scale, shift, param, tables, _window(kernel), overlap, shape, last, kind, p, activation
    )


operators.register_gradients(_fractional, _fractional_backward, _places)
