"""Pooling over grids of adaptive cells: `adaptive_pool2d`, and `pyramid_pool2d` for all levels of a pyramid at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedpool import arguments, geometry, regions


def adaptive_pool2d(
    x: Tensor,
    output_size: int | Sequence[int | None],
    kind: str = "avg",
    *,
    p: float | Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    return_indices: bool = False,
    generator: torch.Generator | None = None,
    training: bool = True,
) -> Any:
    """Pool activation(scale * x + shift) over OH x OW cells that cover the map, in one read of x.

    Cell i takes in rows floor(i H / OH) to ceil((i + 1) H / OH), as in torch.nn.functional.adaptive_avg_pool2d: where
    OH does not divide H, neighbours share rows; where it is larger, rows are repeated. With stochastic, cells that
    share a pixel draw it alike.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, of any strides.
        output_size: one number, or (OH, OW); None: as x has it.
        return_indices: for max and min.

    Returns:
        [N, C, OH, OW] in x's dtype and memory format; with return_indices also int64 places h * W + w, as in
        torch.nn.functional.adaptive_max_pool2d.

    The other arguments and errors are those of `pool2d`.
    """
    arguments.check_map(x)
    arguments.check_kind(kind)
    arguments.check_indices(kind, return_indices)
    size = geometry.adaptive_size(x, output_size)
    y, index = regions.pool(
        x, (kind,), "grid", levels=(size,), scale=scale, shift=shift, activation=activation, p=p,
        generator=generator, training=training, indices=return_indices,
    )  # fmt: skip
    y = y.squeeze(0).unflatten(2, size)
    return (y, index.squeeze(0).unflatten(2, size)) if return_indices else y


def pyramid_pool2d(
    x: Tensor,
    levels: Sequence[int] = (1, 2, 4),
    kind: str = "max",
    *,
    p: float | Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    generator: torch.Generator | None = None,
    training: bool = True,
) -> Tensor:
    """Pool activation(scale * x + shift) over grids of l x l cells for each level l, all in one read of x.

    With max, flattened, it is the vector that spatial pyramid pooling feeds to a classifier (He et al. 2014,
    arXiv:1406.4729): as long for every image size. The cells are those of `adaptive_pool2d`. On the paper's 13 x 13
    maps they are its windows, ceil(13 / l) at a stride of floor(13 / l); at other sizes those may miss the last rows.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, of any strides.
        levels: cells along each side of each level.

    Returns:
        [N, C, sum of l * l], dense, in x's dtype: levels in order, cells of each in row-major order.

    The other arguments and errors are those of `pool2d`.
    """
    arguments.check_map(x)
    arguments.check_kind(kind)
    sides = geometry.check_levels(levels)
    y, _ = regions.pool(
        x, (kind,), "grid", levels=tuple((side, side) for side in sides), scale=scale, shift=shift,
        activation=activation, p=p, generator=generator, training=training,
    )  # fmt: skip
    return y.squeeze(0).contiguous()
