"""Operators that rearrange elements, and those that compute with shapes."""

from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from fullframe.engine.graph.ir import Node, refused
from fullframe.engine.graph.operators.table import Given, ints, largest, number, operator


@operator("Shape")
def shape(node: Node, x: Tensor) -> Tensor:
    """On the CPU, where shapes are known without asking the device."""
    return torch.tensor(x.shape[slice(node.get("start", 0), node.get("end", x.dim()))], dtype=torch.int64)


@operator("Size")
def size(node: Node, x: Tensor) -> Tensor:
    """On the CPU."""
    return torch.tensor(x.numel())


@operator("Reshape", host=(1,))
def reshape(node: Node, x: Tensor, target: Given) -> Tensor:
    """0 is the dimension in that place, unless `allowzero`; -1 the rest."""
    wanted = ints(target) or []
    if not node.get("allowzero", 0):
        wanted = [x.shape[axis] if each == 0 else each for axis, each in enumerate(wanted)]
    return x.reshape(wanted)


@operator("Flatten")
def flatten(node: Node, x: Tensor) -> Tensor:
    """To two dimensions, those before and from `axis` on."""
    axis = node.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(prod(x.shape[:axis]), prod(x.shape[axis:]))


@operator("Squeeze", host=(1,))
def squeeze(node: Node, x: Tensor, axes: Given = None) -> Tensor:
    """Along these axes, or all of length 1."""
    chosen = ints(axes)
    return x.squeeze() if chosen is None else x.squeeze(tuple(chosen))


@operator("Unsqueeze", host=(1,))
def unsqueeze(node: Node, x: Tensor, axes: Given) -> Tensor:
    """New axes, counted in what comes out."""
    chosen = ints(axes) or []
    rank = x.dim() + len(chosen)
    for axis in sorted(each % rank for each in chosen):
        x = x.unsqueeze(axis)
    return x


@operator("Transpose")
def transpose(node: Node, x: Tensor) -> Tensor:
    """By `perm`, else reversed."""
    return x.permute(node.get("perm", list(range(x.dim()))[::-1]))


@operator("Concat", fresh=True)
def concat(node: Node, *parts: Tensor) -> Tensor:
    """Along an axis."""
    return torch.cat(_cat_aligned(parts), node.attributes["axis"])


def _cat_aligned(parts: tuple[Tensor, ...]) -> list[Tensor]:
    """In one type and on one device, each of its own rank."""
    if len({(each.device, each.dtype) for each in parts}) == 1:
        return list(parts)
    like = largest(parts)
    return [each.to(like.device, like.dtype) for each in parts]


@operator("Split", host=(1,))
def split(node: Node, x: Tensor, sizes: Given = None) -> tuple[Tensor, ...]:
    """In the sizes given, or as evenly as goes, the last one smaller."""
    axis, lengths = node.get("axis", 0), ints(sizes)
    if lengths is None:
        count = len(node.outputs)
        even = -(-x.shape[axis] // count)
        ends = [min(even * number, x.shape[axis]) for number in range(count + 1)]
        lengths = [after - before for before, after in pairwise(ends)]
    return torch.split(x, lengths, axis)


@operator("Slice", host_from=1)
def slice_(node: Node, x: Tensor, starts: Given, ends: Given, axes: Given = None, steps: Given = None) -> Tensor:
    """Bounds beyond the ends are cut to them; steps may be negative."""
    firsts, lasts = ints(starts) or [], ints(ends) or []
    along, strides = ints(axes) or list(range(len(firsts))), ints(steps) or [1] * len(firsts)
    for axis, first, last, step in zip(along, firsts, lasts, strides, strict=True):
        first, last, step = slice(max(first, -(2**62)), max(last, -(2**62)), step).indices(x.shape[axis])
        if step > 0:
            index: list[slice] = [slice(None)] * x.dim()
            index[axis] = slice(first, max(first, last), step)
            x = x[tuple(index)]
        else:
            x = x.index_select(axis, torch.arange(first, min(first, last), step, device=x.device))
    return x


@operator("Gather")
def gather(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    """Whole slices along `axis`; negative indices count from the end."""
    axis = node.get("axis", 0) % x.dim()
    if indices.device.type == "cpu" and indices.dim() == 0:
        return x.select(axis, int(indices))
    where = torch.where(indices < 0, indices + x.shape[axis], indices).to(x.device).reshape(-1)
    found = x.index_select(axis, where)
    return found.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@operator("Expand", host=(1,))
def expand(node: Node, x: Tensor, target: Given) -> Tensor:
    """As if it met a value of that shape."""
    wanted = ints(target) or []
    rank = max(len(wanted), x.dim())
    ours, theirs = ([1] * (rank - len(shape)) + list(shape) for shape in (x.shape, wanted))
    return x.expand([own if other == 1 else other for own, other in zip(ours, theirs, strict=True)])


@operator("Tile", host=(1,))
def tile(node: Node, x: Tensor, repeats: Given) -> Tensor:
    """So often along each axis."""
    return x.repeat(ints(repeats) or [])


@operator("Range", host=(0, 1, 2), creates=True)
def range_(node: Node, start: Given, limit: Given, delta: Given, *, device: torch.device) -> Tensor:
    """Up to but without the limit."""
    dtype = next((each.dtype for each in (start, limit, delta) if isinstance(each, Tensor)), None)
    return torch.arange(number(start), number(limit), number(delta), dtype=dtype, device=device)


@operator("ConstantOfShape", host=(0,), creates=True)
def constant_of_shape(node: Node, target: Given, *, device: torch.device) -> Tensor:
    """Of one value, 0.0 unless told."""
    value = node.get("value", torch.zeros(1))
    return torch.full(ints(target) or [], value.item(), dtype=value.dtype, device=device)


def _by_depth(node: Node) -> None:
    if node.get("mode", "DCR") not in ("DCR", "CRD"):
        raise refused(node, f"has mode {node.attributes['mode']!r}; there are DCR and CRD")


@operator("DepthToSpace", check=_by_depth)
def depth_to_space(node: Node, x: Tensor) -> Tensor:
    """Channels become blocks of cells."""
    block = node.attributes["blocksize"]
    n, c, h, w = x.shape
    if node.get("mode", "DCR") == "DCR":
        blocks = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        blocks = x.reshape(n, c // block**2, block, block, h, w).permute(0, 1, 4, 2, 5, 3)
    return blocks.reshape(n, c // block**2, h * block, w * block)


@operator("SpaceToDepth")
def space_to_depth(node: Node, x: Tensor) -> Tensor:
    """Blocks of cells become channels."""
    block = node.attributes["blocksize"]
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(n, c * block**2, h // block, w // block)
