"""Poolings that no map's size changes: of the whole map, and over neighbouring channels."""

from collections.abc import Iterator
from typing import Final

import numpy as np
import onnx

from fullframe.convert.draft import Draft, attributes
from fullframe.convert.layout import moves
from fullframe.model.graphs import WINDOWS, title

_REDUCTIONS: Final = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}
_LOCAL: Final = 4
"""A pool of fewer cells may cover a small map by chance; of this many it is meant to."""


def make_global(draft: Draft) -> None:
    """Every mean over whole maps [N, C, h, w] becomes GlobalAveragePool, every maximum GlobalMaxPool."""
    found = []
    for node in list(draft.nodes):
        if node.op_type in _REDUCTIONS:
            _reduction(draft, node)
        elif node.op_type == "AveragePool" and (factor := _covers(draft, node)):
            found.append(title(node))
            pooled = draft.make("GlobalAveragePool", node.input[:1])
            pooled.name = node.name
            scale = draft.add_constant(np.array(factor, np.float32))
            draft.replace(node, [pooled] if factor == 1 else [pooled, draft.make("Mul", [pooled.output[0], scale])])
    if found:
        draft.note(f"{', '.join(found)} covers its whole map: now a global average, at every size")


def _covers(draft: Draft, node: onnx.NodeProto) -> float:
    """By what to multiply the map's mean to have the pool's one value; 0 where it is no pool of the whole map."""
    given = attributes(node)
    if len(draft.shape(node.input[0])) != 4:
        return 0
    map_size, made = draft.shape(node.input[0])[2:], draft.shape(node.output[0])[2:]
    kernel = given["kernel_shape"]
    pads = given.get("pads", [0, 0, 0, 0])
    if set(made) != {1} or given.get("auto_pad", "NOTSET").startswith("SAME") or any(pads[:2]):
        return 0
    if kernel == [1, 1] or any(k < size for k, size in zip(kernel, map_size, strict=True)):
        return 0
    if min(kernel) < _LOCAL and any(each.op_type in WINDOWS for each in _downstream(draft, node)):
        return 0
    seen = [min(k, size + after) for k, size, after in zip(kernel, map_size, pads[2:], strict=True)]
    return float(np.prod(map_size) / np.prod(seen)) if given.get("count_include_pad") else 1.0


def _downstream(draft: Draft, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Windows of more than one cell come from a map; those of one are linear layers in disguise."""
    reached = set(node.output)
    for each in draft.nodes:
        if not reached.isdisjoint(each.input):
            reached.update(each.output)
            if each.op_type != "Conv" or set(draft.shape(each.input[1])[2:]) != {1}:
                yield each


def pool_channels(draft: Draft) -> None:
    """A mean over neighbouring channels, by a 3-D pool (local response normalisation), becomes a convolution of 1x1."""
    for node in list(draft.nodes):
        given = attributes(node)
        if node.op_type != "AveragePool" or given["kernel_shape"][1:] != [1, 1] or len(given["kernel_shape"]) != 3:
            continue
        first, last = draft.producer(node.input[0]), draft.consumers(node.output[0])
        before, between = given.get("pads", [0])[0], [node]
        if any(given.get("pads", ())) and not given.get("count_include_pad"):
            continue
        if first is not None and first.op_type == "Pad":
            pads = draft.constant(first, 1)
            if pads is None or len(pads) != 10 or attributes(first).get("mode", "constant") != "constant":
                continue
            before, between = before + int(pads[2]), [first, node]
            first = draft.producer(first.input[0])
        if first is None or len(last) != 1 or not moves(draft, first) or not moves(draft, last[0]):
            continue
        shape, unfolded = draft.shape(first.input[0]), draft.shape(first.output[0])
        if unfolded != (1, *shape) or draft.shape(last[0].output[0]) != shape:
            continue
        band = sum(np.eye(shape[1], k=offset) for offset in range(-before, given["kernel_shape"][0] - before))
        weights = draft.add_constant((band / given["kernel_shape"][0]).astype(np.float32)[..., None, None], "band")
        conv = draft.make("Conv", [first.input[0], weights], kernel_shape=[1, 1])
        for each in (first, *between):
            draft.remove(each)
        draft.replace(last[0], [conv])
        draft.note(f"{title(node)} over neighbouring channels: now a convolution of 1x1")


def _reduction(draft: Draft, node: onnx.NodeProto) -> None:
    """A mean or maximum over height and width, at once or one after the other."""
    source, rank, keep = node.input[0], len(draft.shape(node.input[0])), _keeps(node)
    axes = {axis % rank for axis in _axes(draft, node)}
    last, consumers = node, draft.consumers(node.output[0])
    if len(axes) == 1 and [each.op_type for each in consumers] == [node.op_type] and _keeps(consumers[0]) == keep:
        last = consumers[0]
        left = [axis for axis in range(rank) if keep or axis not in axes]
        axes |= {left[axis] for axis in _axes(draft, last)}
    if rank != 4 or axes not in ({2, 3}, {1, 2}):
        return
    channels_last = axes == {1, 2}
    nodes = [draft.make("Transpose", [source], perm=[0, 3, 1, 2])] if channels_last else []
    nodes.append(draft.make(_REDUCTIONS[node.op_type], [nodes[-1].output[0] if nodes else source]))
    nodes[-1].name = last.name
    if not keep:
        nodes.append(draft.make("Flatten", [nodes[-1].output[0]], axis=1))
    elif channels_last:
        nodes.append(draft.make("Transpose", [nodes[-1].output[0]], perm=[0, 2, 3, 1]))
    if last is not node:
        draft.remove(node)
    draft.replace(last, nodes)


def _keeps(node: onnx.NodeProto) -> bool:
    return bool(attributes(node).get("keepdims", 1))


def _axes(draft: Draft, node: onnx.NodeProto) -> list[int]:
    """Of a reduction; none: all, or unknown."""
    given = draft.constant(node, 1)
    return [] if given is None else [int(axis) for axis in given]
