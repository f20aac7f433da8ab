"""Operators of our own, that simplification puts in the place of several of ONNX's."""

from typing import Final

import torch
from torch import Tensor

from fullframe.engine.graph.ir import Node
from fullframe.engine.graph.operators.elementwise import MAP_TYPE
from fullframe.engine.graph.operators.table import Operator, operator

OWN: Final[dict[str, Operator]] = {}
"""By names that ONNX has not."""
AFFINE: Final = "fullframe.Affine"
PIXELS: Final = "fullframe.Pixels"


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """[C] or [1] of a map's type, as it meets the map."""
    return values.to(like.dtype).reshape(-1, 1, 1)


@operator(AFFINE, table=OWN)
def affine(node: Node, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """x * scale + shift of each channel, [C] or [1]; either may be left out."""
    return _scaled(x, scale, shift)


def _scaled(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is None or shift is None:
        x = x if scale is None else x * per_channel(scale, x)
        return x if shift is None else x + per_channel(shift, x)
    return torch.addcmul(per_channel(shift, x), x, per_channel(scale, x))


@operator(PIXELS, table=OWN, exact=True)
def pixels(node: Node, images: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """The same of uint8 images, in float32; [N, H, W, C] becomes [N, C, H, W], and stays as it lies in memory."""
    x = images.permute(0, 3, 1, 2) if node.get("last", 0) else images
    return _scaled(x.to(torch.float32), scale, shift).to(node.get(MAP_TYPE, torch.float32))
