"""Branches that meet have equal sizes at every image size, by padding that the source's size leaves untouched."""

from collections.abc import Iterable
from itertools import combinations

import onnx

from fullframe.convert.draft import Draft, attributes, set_attributes
from fullframe.errors import InvalidInput, InvalidModel
from fullframe.model.geometry import GraphGeometry, Obstacle
from fullframe.model.graphs import WINDOWS, ancestors, title


def make_agree(draft: Draft) -> None:
    """Pad the strided windows of the shorter branch behind, as far as the cells at the source's size stay as many.

    Then each window lies where it lay, and sees no padding that it did not see: those answers keep their bits.
    Raises InvalidModel, naming the join, where that can't make its branches agree.
    """
    changed: list[str] = []
    while (geometry := draft.geometry()).disagreements:
        join = geometry.disagreements[0]
        node = next(each for each in draft.nodes if title(each) == join.node)
        changed += _mend(draft, node, join, geometry)
    if changed:
        draft.note(f"branches of odd sizes made equal by padding {', '.join(changed)} further at the end")


def _mend(draft: Draft, join: onnx.NodeProto, found: Obstacle, geometry: GraphGeometry) -> list[str]:
    windows = _strided(draft, join)
    for count in (1, 2):
        for chosen in combinations(windows, count):
            for amount in range(1, max(map(_room, chosen), default=0) + 1):
                before = [_pads(node) for node in chosen]
                for node, (top, left, bottom, right) in zip(chosen, before, strict=True):
                    set_attributes(node, pads=[top, left, bottom + amount, right + amount])
                if all(_room(node) >= 0 for node in chosen) and _better(draft, chosen, found, geometry):
                    draft.touch()
                    return [title(node) for node in chosen]
                for node, pads in zip(chosen, before, strict=True):
                    set_attributes(node, pads=pads)
    raise InvalidModel(str(found))


def _better(draft: Draft, windows: Iterable[onnx.NodeProto], join: Obstacle, before: GraphGeometry) -> bool:
    """Whether the join's branches agree now, and the windows make as many cells as before at the source's size."""
    try:
        after = draft.geometry()
        if any(each.node == join.node for each in after.disagreements):
            return False
        names = [node.output[0] for node in windows]
        return all(after.size_of(name, *draft.size) == before.size_of(name, *draft.size) for name in names)
    except (InvalidInput, InvalidModel):
        return False


def _strided(draft: Draft, join: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The windows of some branches, not all, that take more than one step; pools first, the nearest first."""
    graph = draft.model(weights=False).graph
    branches = [ancestors(graph, [name]) for name in draft.fed(join)]
    shared = set.intersection(*branches)
    inside = set.union(*branches) - shared
    found = [
        node
        for node in reversed(draft.nodes)
        if node.output[0] in inside and node.op_type in WINDOWS and max(attributes(node).get("strides", [1])) > 1
    ]
    return sorted(found, key=lambda node: node.op_type == "Conv")


def _pads(node: onnx.NodeProto) -> list[int]:
    return list(attributes(node).get("pads", [0, 0, 0, 0]))


def _room(node: onnx.NodeProto) -> int:
    """By how much it can be padded behind: a window must see a cell, or ONNX Runtime does not take it."""
    kernel: list[int] = attributes(node)["kernel_shape"]
    return min(k - 1 - after for k, after in zip(kernel, _pads(node)[2:], strict=True))
