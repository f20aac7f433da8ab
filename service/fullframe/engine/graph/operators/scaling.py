"""Resize: nearest and linear, each output cell computed from the cells of its own coordinates."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from fullframe.engine.graph.ir import Node, refused
from fullframe.engine.graph.operators.table import Given, ints, numbers, operator

_PLACES: Final[dict[str, Callable[[Tensor, float, int, int], Tensor]]] = {
    "half_pixel": lambda cell, scale, old, new: (cell + 0.5) / scale - 0.5,
    "pytorch_half_pixel": lambda cell, scale, old, new: (cell + 0.5) / scale - 0.5 if new > 1 else cell * 0,
    "half_pixel_symmetric": lambda cell, scale, old, new: (
        old / 2 * (1 - new / (scale * old)) + (cell + 0.5) / scale - 0.5
    ),
    "asymmetric": lambda cell, scale, old, new: cell / scale,
    "align_corners": lambda cell, scale, old, new: cell * (old - 1) / (new - 1) if new > 1 else cell * 0,
}
"""An output cell's coordinate among the input's cells, of scale, old and new length."""
_ROUNDINGS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "round_prefer_floor": lambda place: torch.ceil(place - 0.5),
    "round_prefer_ceil": lambda place: torch.floor(place + 0.5),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def _known_modes(node: Node) -> None:
    place, mode = node.get("coordinate_transformation_mode", "half_pixel"), node.get("mode", "nearest")
    if mode not in ("nearest", "linear") or place not in _PLACES or node.get("antialias", 0):
        antialias = ", antialias" if node.get("antialias", 0) else ""
        raise refused(
            node,
            f"resizes by mode {mode}, {place}{antialias}; the PyTorch engine does so by nearest or linear, with "
            + ", ".join(_PLACES),
        )
    if node.get("axes", None) or node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise refused(node, "resizes by axes or keeps the aspect ratio, which the PyTorch engine does not")


@operator("Resize", host_from=1, check=_known_modes)
def resize(node: Node, x: Tensor, roi: Given = None, scales: Given = None, sizes: Given = None) -> Tensor:
    """By scales or to sizes, one axis after the other."""
    if targets := ints(sizes):
        factors = [new / old for new, old in zip(targets, x.shape, strict=True)]
    else:
        factors = numbers(scales) or []
        targets = [int(factor * old) for factor, old in zip(factors, x.shape, strict=True)]
    for axis, (target, factor) in enumerate(zip(targets, factors, strict=True)):
        if target != x.shape[axis] or factor != 1.0:
            x = _along(node, x, axis, target, factor)
    return x


def _along(node: Node, x: Tensor, axis: int, target: int, factor: float) -> Tensor:
    length = x.shape[axis]
    place = _PLACES[node.get("coordinate_transformation_mode", "half_pixel")]
    cells = torch.arange(target, dtype=torch.float32, device=x.device)  # as the runtimes count: ties depend on it
    places = place(cells, factor, length, target)
    if node.get("mode", "nearest") == "nearest":
        chosen = _ROUNDINGS[node.get("nearest_mode", "round_prefer_floor")](places)
        return x.index_select(axis, chosen.clamp(0, length - 1).long())
    places = places.clamp(0, length - 1)
    below = places.floor()
    share = (places - below).to(x.dtype).reshape(-1, *[1] * (x.dim() - 1 - axis))
    first, second = (x.index_select(axis, (below + more).clamp(max=length - 1).long()) for more in (0, 1))
    return first + (second - first) * share
