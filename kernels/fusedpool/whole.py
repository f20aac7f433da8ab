"""Pooling over whole maps, several kinds from one read: `global_pool2d`."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fusedpool import arguments, regions


def global_pool2d(
    x: Tensor,
    kinds: Sequence[str] = ("avg",),
    *,
    sizes: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    p: float | Tensor | Mapping[str, float | Tensor] | None = None,
    generator: torch.Generator | None = None,
    training: bool = True,
) -> tuple[Tensor, ...]:
    """Pool activation(scale * x + shift) over each map, for all kinds in one read of x, and one of it in backward.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, of any strides.
        kinds: different ones; see kinds.py for the formulas.
        sizes: int64 [N, 2]: of image n only the top-left sizes[n] = (height, width) counts, so that images of
            different sizes can share a padded batch; the rest is not read, and gets no gradient. On an accelerator its
            values are not checked, but clamped to x's.
        scale, shift: [C].
        activation: none, relu, leaky_relu (slope 0.01), gelu (exact) or silu.
        p: of lp (2), gem (3), lse (1) and mixed (0.5): of the one kind that takes it, or a mapping from kinds to
            theirs; a tensor of one number gets a gradient with gem and mixed.
        generator, training: for stochastic: samples in training, their expectation otherwise.

    Returns:
        [N, C] in x's dtype for each kind, in their order. An image of no pixels pools to 0, as torch.nn.EmbeddingBag's
        empty bags do.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """
    arguments.check_map(x)
    if sizes is not None:
        arguments.check_bounds(sizes, "sizes", (x.shape[0], 2), x)
    y, _ = regions.pool(
        x, kinds, "whole" if sizes is None else "sized", bounds=sizes, scale=scale, shift=shift, activation=activation,
        p=p, generator=generator, training=training,
    )  # fmt: skip
    return y.squeeze(-1).unbind()
