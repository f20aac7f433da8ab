"""Operators that see a map through windows, and those that enlarge, pad or crop it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Final, TypeAlias

from fullframe.model.geometry.axis import Repeat, Unsized, Window
from fullframe.model.geometry.context import Context
from fullframe.model.geometry.nodes import Node
from fullframe.model.geometry.tensors import SOME, Dim, Obstacle, Side, Tensor, Unfollowed, held, made, varies

Inputs: TypeAlias = Sequence[Tensor | None]
Rule: TypeAlias = Callable[[Context, Node, Inputs], Tensor | Sequence[Tensor]]

_Cut: TypeAlias = tuple[int | None, int | None, int]
"""What is added before and behind, below 0 what is taken away, None where that is not known; and the step."""

_END: Final = 2**31 - 1
"""Slice writes this or more for "to the end"."""


def first_of(inputs: Inputs) -> Tensor:
    """The first input; raises Unfollowed where its dimensions are not known."""
    if not inputs or inputs[0] is None or inputs[0].dims is None:
        raise Unfollowed("takes a value whose shape can't be followed")
    return inputs[0]


def data_of(inputs: Inputs, number: int) -> tuple[Dim | float, ...] | None:
    """An input's contents; None where it is absent, or has none that are known."""
    tensor = inputs[number] if number < len(inputs) else None
    return None if tensor is None else tensor.data


def ints_of(inputs: Inputs, number: int, what: str) -> list[int] | None:
    """An input's contents, all numbers; None where it is absent. Raises Unfollowed where they are not known."""
    if number >= len(inputs) or inputs[number] is None:
        return None
    data = data_of(inputs, number)
    if data is None or not all(isinstance(each, int) for each in data):
        raise Unfollowed(f"takes its {what} from values that can't be followed")
    return [each for each in data if isinstance(each, int)]


def window(context: Context, node: Node, inputs: Inputs) -> Tensor:
    """Convolution and pooling over [N, C, h, w]."""
    source, others = first_of(inputs), [tensor for tensor in inputs[1:] if tensor is not None]
    assert source.dims is not None
    if any(tensor.fed for tensor in others):
        raise Unfollowed("has weights that are computed from the image")
    if len(source.dims) != 4 or any(isinstance(dim, Side) for dim in source.dims[:2]):
        raise Unfollowed("is not over [N, C, height, width]")
    weights = others[0].dims if node.op == "Conv" and others else None
    kernel = node.numbers("kernel_shape") or [dim for dim in (weights or ())[2:] if isinstance(dim, int)]
    strides, dilations = node.numbers("strides") or [1, 1], node.numbers("dilations") or [1, 1]
    if not len(kernel) == len(strides) == len(dilations) == 2 or min(kernel + strides + dilations) < 1:
        raise Unfollowed("has no two-dimensional kernel, strides and dilations")
    extents = [(k - 1) * dilation + 1 for k, dilation in zip(kernel, dilations, strict=True)]
    pads, obstacles = _pads(node, extents, strides)
    if node.text("auto_pad", "").startswith("SAME"):
        if max(dilations) > 1:
            raise Unfollowed("has auto_pad SAME with a dilation, which ONNX Runtime does not run; write the pads out")
        if node.op != "Conv" and any(stride > extent for stride, extent in zip(strides, extents, strict=True)):
            context.doubt(node, "has auto_pad SAME and windows that leave gaps, which not every size allows")
    ceil_mode = bool(node.number("ceil_mode", 0))
    sides: list[Dim] = []
    for i, dim in enumerate(source.dims[2:]):
        before, extent, after = pads[i]
        if isinstance(dim, Side):
            step = Window(dim.number, extent, strides[i], before, after, ceil_mode)
            sides.append(context.step(dim, step, node))
        elif isinstance(dim, int):
            sides.append(Window(0, extent, strides[i], before, after, ceil_mode).of(dim))
        else:
            sides.append(dim)
            if dim is None:
                context.doubt(node, "is over a map whose size can't be followed")
    channels = source.dims[1] if node.op != "Conv" else weights[0] if weights else SOME
    return made(node.title, [source], (source.dims[0], channels, *sides), obstacles=obstacles)


def _pads(node: Node, extents: list[int], strides: list[int]) -> tuple[list[tuple[int, int, int]], list[Obstacle]]:
    """Per axis the padding before, the window's extent and the padding behind; and what stands against tiles.

    auto_pad SAME pads extent - r in all, r in 1..stride being what is left of the size after whole strides, so that
    there are ceil(size / stride) cells; below 0 it may crop, as ONNX Runtime does. Where the padding before is the same
    for every r that is explicit padding. Else the window that is returned is the hull of those for every r.
    """
    auto_pad = node.text("auto_pad", "NOTSET")
    if not auto_pad.startswith("SAME"):
        pads = node.numbers("pads") if auto_pad == "NOTSET" else None
        pads = pads or [0, 0, 0, 0]
        if len(pads) != 4 or min(pads) < 0:
            raise Unfollowed(f"has pads {pads}; they must be four, none below 0")
        return [(pads[i], extents[i], pads[i + 2]) for i in (0, 1)], []
    found: list[tuple[int, int, int]] = []
    obstacles: list[Obstacle] = []
    for extent, stride in zip(extents, strides, strict=True):
        more = auto_pad == "SAME_LOWER"  # of an odd number before
        begin = [int((total + more) / 2) for total in (extent - stride, extent - 1)]  # rounded towards 0
        hull = extent + begin[1] - begin[0]
        found.append((begin[1], hull, hull - 1 - begin[1]))
        if hull > extent and not obstacles:
            reason = (
                f"has auto_pad {auto_pad} with a stride of {stride}, so where its windows begin depends on the "
                "image's size; with its padding written out they would not"
            )
            obstacles.append(Obstacle(node.title, "image size", reason))
    return found, obstacles


def padding(context: Context, node: Node, inputs: Inputs) -> Tensor:
    """Pad; amounts below 0 crop. What is not constant repeats pixels that a cell near the border else would not see."""
    source = first_of(inputs)
    assert source.dims is not None
    rank = len(source.dims)
    axes = ints_of(inputs, 3, "axes") or list(range(rank))
    pads: Sequence[Dim | float] | None = node.numbers("pads") or data_of(inputs, 1)
    if pads is None or len(pads) != 2 * len(axes):
        pads = (None,) * 2 * len(axes)
    amounts = [each if isinstance(each, int) else None for each in pads]
    cuts = zip(axes, amounts[: len(axes)], amounts[len(axes) :], strict=True)
    padded = _cut(context, node, source, {axis % rank: (before, after, 1) for axis, before, after in cuts})
    if (mode := node.text("mode", "constant")) == "constant" or not source.varies:
        return padded
    against = Obstacle(node.title, "image size", f"fills its padding with the map's own cells (mode {mode!r})")
    if mode != "edge":  # which takes a map of any size
        context.doubts.append(against)
    return made(node.title, [padded], padded.dims, obstacles=[against])


def crop(context: Context, node: Node, inputs: Inputs) -> Tensor:
    """Slice: of a map, or of a small vector's contents."""
    source = first_of(inputs)
    assert source.dims is not None
    starts: Sequence[Dim | float] | None = node.numbers("starts") or data_of(inputs, 1)
    ends: Sequence[Dim | float] | None = node.numbers("ends") or data_of(inputs, 2)
    axes = node.numbers("axes") or ints_of(inputs, 3, "axes")
    if axes is None and starts is None:
        raise Unfollowed("takes its bounds from values that can't be followed")
    axes = axes or list(range(len(starts or ())))
    steps = ints_of(inputs, 4, "steps") or [1] * len(axes)
    nothing = [None] * len(axes)
    dims, cuts = list(source.dims), {}
    for axis, start, end, step in zip(axes, starts or nothing, ends or nothing, steps, strict=True):
        dim = dims[axis]
        if isinstance(start, int) and isinstance(end, int) and isinstance(dim, int):
            part = slice(start, end, step)
            dims[axis] = len(range(dim)[part])
            if source.data is not None:
                return held(node.title, [source], tuple(dims), source.data[part])
        else:
            whole = isinstance(end, Side) and context.same(end, [dim]) == dim
            cuts[axis % len(dims)] = _cut_of(start, _END if whole else end, step)
    return _cut(context, node, replace(source, dims=tuple(dims)), cuts)


def _cut_of(start: Dim | float, end: Dim | float, step: int) -> _Cut:
    """A slice as padding below 0; a negative end leaves away that many cells, one past all of them none."""
    if isinstance(start, int) and start >= 0 and isinstance(end, int) and (end < 0 or end >= _END):
        return -start, min(end, 0), step
    return None, None, step


def _cut(context: Context, node: Node, source: Tensor, cuts: dict[int, _Cut]) -> Tensor:
    """Pad or crop some dimensions."""
    assert source.dims is not None
    dims, obstacles = list(source.dims), []
    for axis, (before, after, step) in cuts.items():
        dim = dims[axis]
        if (before, after, step) == (0, 0, 1):
            continue
        known = before is not None and after is not None and step > 0
        if not isinstance(dim, Side):
            dims[axis] = None if dim is None else SOME
            if known and isinstance(dim, int):
                dims[axis] = Window(0, 1, step, before or 0, after or 0).of(dim)
        elif known:
            cut = Window(dim.number, 1, step, before or 0, after or 0)
            dims[axis] = context.step(dim, cut, node)
            if cut.hides_cells:
                reason = "crops the map's border, which is not there on a tile inside the image"
                obstacles.append(Obstacle(node.title, "image size", reason))
        else:
            reason = "pads or crops by amounts that change with the image's size or can't be followed"
            dims[axis] = context.step(dim, Unsized(dim.number, node.title), node)
            obstacles.append(Obstacle(node.title, "image size", reason))
            context.doubt(node, reason)
    return made(node.title, [source], tuple(dims), obstacles=obstacles)


def resize(context: Context, node: Node, inputs: Inputs) -> Tensor:
    """Resize, and Upsample as it was before it."""
    source = first_of(inputs)
    assert source.dims is not None
    old = len(inputs) == 2
    axes = node.numbers("axes") or list(range(len(source.dims)))
    scales = dict(zip(axes, data_of(inputs, 1 if old else 2) or (), strict=False))
    targets = dict(zip(axes, data_of(inputs, 3) or (), strict=False))
    dims, obstacles = list(source.dims), []
    for axis in axes:
        dim = dims[axis]
        scale, target = scales.get(axis), targets.get(axis)
        target = context.same(target, [dim]) if isinstance(target, Side) else target
        if scale == 1 or (target is not None and target == dim):
            continue
        if not isinstance(dim, Side):
            dims[axis] = target if isinstance(target, int) else None if varies(dim) or varies(target) else SOME
        elif isinstance(scale, float) and scale == int(scale) and (taps := _taps(node, int(scale), old)):
            dims[axis] = context.step(dim, Repeat(dim.number, taps), node)
        else:
            dims[axis] = target if isinstance(target, int | Side) else None
            obstacles.append(Obstacle(node.title, "image size", _reason(node, scale, target)))
            if dims[axis] is None:
                context.doubts.append(obstacles[-1])
    changed = [axis for axis in axes if isinstance(source.dims[axis], Side) and not isinstance(dims[axis], Side)]
    latent = obstacles[-1] if changed else None
    return made(node.title, [source], tuple(dims), latent=latent, obstacles=[] if changed else obstacles)


def _reason(node: Node, scale: Dim | float, target: Dim | float) -> str:
    if isinstance(target, int):
        return f"scales every map to {target} cells"
    if scale is None:
        return "scales the map to a size computed from another, so that its cells keep no fixed step"
    if isinstance(scale, float) and scale == int(scale) > 0:
        return (
            f"scales in mode {node.text('coordinate_transformation_mode', 'half_pixel')!r}, which depends on the "
            "map's size"
        )
    return f"scales by {scale:g}; only by whole factors do cells keep a fixed step"


def _taps(node: Node, factor: int, old: bool) -> tuple[tuple[int, int], ...]:
    """The old cells that each new cell of one is made of; none where that depends on the map's size."""
    where = node.text("coordinate_transformation_mode", "asymmetric" if old else "half_pixel")
    mode, nearest = node.text("mode", "nearest"), node.text("nearest_mode", "floor" if old else "round_prefer_floor")
    halves = {"asymmetric": 0, "half_pixel": 1, "half_pixel_symmetric": 1, "pytorch_half_pixel": 1}
    if where not in halves or factor < 1:
        return ()
    centre = Fraction(halves[where], 2)
    taps = []
    for number in range(factor):
        place = (number + centre) / factor - centre
        low = math.floor(place)
        match mode:
            case "linear":
                taps.append((low, low + (place > low)))
            case "cubic":
                taps.append((low - 1, low + 2))
            case _:
                half = Fraction(1, 2)
                rounded = {
                    "round_prefer_floor": math.ceil(place - half),
                    "round_prefer_ceil": math.floor(place + half),
                    "floor": low,
                    "ceil": math.ceil(place),
                }[nearest]
                # Beyond the border it is the old cell itself.
                taps.append((min(rounded, 0), max(rounded, 0)))
    return tuple(taps)
