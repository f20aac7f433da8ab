"""Pooling over packed images of different sizes, several kinds from one read: `ragged_pool`."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fusedpool import arguments, regions


def ragged_pool(
    x: Tensor,
    offsets: Tensor,
    kinds: Sequence[str] = ("avg",),
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    p: float | Tensor | Mapping[str, float | Tensor] | None = None,
    generator: torch.Generator | None = None,
    training: bool = True,
) -> tuple[Tensor, ...]:
    """Pool activation(scale * x + shift) over segments of pixels, for all kinds in one read of x.

    A segment's result is the same bits whatever lies beside it.

    Args:
        x: [P, C]: the pixels of all images, one image after another; dtypes as in `global_pool2d`, of any strides.
        offsets: int64 [N + 1], from 0 to P, never falling: image n is x[offsets[n] : offsets[n + 1]]. Its values are
            checked on a CPU; on an accelerator they are not, and nothing outside x is read.

    Returns:
        [N, C] in x's dtype for each kind, in their order. A segment of no pixels pools to 0, as torch.nn.EmbeddingBag's
        empty bags do.

    The other arguments and errors are those of `global_pool2d`.
    """
    arguments.check_tensors(x=x)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [P, C], with at least one channel")
    arguments.check_dtype(x)
    arguments.check_bounds(offsets, "offsets", (None,), x)
    y, _ = regions.pool(
        x.t()[None, :, None], kinds, "packed", bounds=offsets, scale=scale, shift=shift, activation=activation,
        p=p, generator=generator, training=training,
    )  # fmt: skip
    return y.squeeze(-1).unbind()
