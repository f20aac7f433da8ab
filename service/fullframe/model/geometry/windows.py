"""Operators that see a map through windows, and those that enlarge, pad or crop it."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Final, TypeAlias

from fullframe.model.geometry.axis import Repeat, Unsized, Window
from fullframe.model.geometry.context import Context
from fullframe.model.geometry.nodes import Node
from fullframe.model.geometry.tensors import SOME, Dim, Obstacle, Side, Tensor, Unfollowed, held, made, varies

Inputs: TypeAlias = Sequence[Tensor | None]
Rule: TypeAlias = Callable[[Context, Node, Inputs], Tensor | Sequence[Tensor]]

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
    kernel = node.ints("kernel_shape") or [dim for dim in (weights or ())[2:] if isinstance(dim, int)]
    strides, dilations = node.ints("strides") or [1, 1], node.ints("dilations") or [1, 1]
    if not len(kernel) == len(strides) == len(dilations) == 2 or min(kernel + strides + dilations) < 1:
        raise Unfollowed("has no two-dimensional kernel, strides and dilations")
    extents = [(k - 1) * dilation + 1 for k, dilation in zip(kernel, dilations, strict=True)]
    pads, obstacles = _pads(node, extents, strides)
    ceil_mode = bool(node.int("ceil_mode", 0))
    sides = []
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

    auto_pad SAME pads max(0, extent - r) in all, r in 1..stride being what is left of the size after whole strides,
    to ceil(size / stride) cells; where the padding before is the same for every r that is explicit padding. Else the
    window that is returned is the hull of those for every r.
    """
    auto_pad = node.text("auto_pad", "NOTSET")
    if not auto_pad.startswith("SAME"):
        pads = node.ints("pads") if auto_pad == "NOTSET" else None
        pads = pads or [0, 0, 0, 0]
        if len(pads) != 4 or min(pads) < 0:
            raise Unfollowed(f"has pads {pads}; they must be four, none below 0")
        return [(pads[i], extents[i], pads[i + 2]) for i in (0, 1)], []
    found, obstacles = [], []
    for extent, stride in zip(extents, strides, strict=True):
        most, least = max(0, extent - 1), max(0, extent - stride)
        begin = [total // 2 if auto_pad == "SAME_UPPER" else -(-total // 2) for total in (least, most)]
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
    """Pad; amounts below 0 crop."""
    source = first_of(inputs)
    assert source.dims is not None
    rank = len(source.dims)
    if node.text("mode", "constant") not in ("constant", "edge"):
        raise Unfollowed("pads by mirroring or wrapping the map")
    axes = ints_of(inputs, 3, "axes") or list(range(rank))
    pads: Sequence[Dim | float] | None = node.ints("pads") or data_of(inputs, 1)
    pads = pads if pads is not None and len(pads) == 2 * len(axes) else [None] * 2 * len(axes)
    amounts = {axis % rank: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    return _cut(context, node, source, {axis: (begin, end, 1) for axis, (begin, end) in amounts.items()})


def crop(context: Context, node: Node, inputs: Inputs) -> Tensor:
    """Slice: of a map, or of a small vector's contents."""
    source = first_of(inputs)
    assert source.dims is not None
    starts = node.ints("starts") or data_of(inputs, 1)
    ends = node.ints("ends") or data_of(inputs, 2)
    axes = node.ints("axes") or ints_of(inputs, 3, "axes") or list(range(len(starts or ())))
    steps = ints_of(inputs, 4, "steps") or [1] * len(axes)
    if source.data is not None and starts and ends and len(starts) == 1:
        start, end = starts[0], ends[0]
        if isinstance(start, int) and isinstance(end, int):
            data = source.data[slice(start, end, steps[0])]
            return held(node.title, [source], (len(data),), data)
    starts, ends = (each if each and len(each) == len(axes) else [None] * len(axes) for each in (starts, ends))
    cuts = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if isinstance(end, int) and (end < 0 or end >= _END):
            end = min(end, 0)  # cells kept away from the end, less than none
        else:
            end = None
        before = -start if isinstance(start, int) and start >= 0 else None
        cuts[axis % len(source.dims)] = (before, end, step)
    return _cut(context, node, source, cuts)


def _cut(
    context: Context, node: Node, source: Tensor, cuts: dict[int, tuple[Dim | float, Dim | float, int]]
) -> Tensor:
    """Pad or crop: per dimension what is added before and behind, None where that is not known, and the step."""
    assert source.dims is not None
    dims, obstacles = list(source.dims), []
    for axis, (before, after, step) in cuts.items():
        dim = dims[axis]
        if (before, after, step) == (0, 0, 1):
            continue
        if not isinstance(dim, Side):
            known = isinstance(dim, int) and isinstance(before, int) and isinstance(after, int) and step > 0
            dims[axis] = Window(0, 1, step, before, after).of(dim) if known else None if dim is None else SOME  # type: ignore[arg-type]
        elif isinstance(before, int) and isinstance(after, int) and step > 0:
            cut = Window(dim.number, 1, step, before, after)
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
    axes = node.ints("axes") or list(range(len(source.dims)))
    scales = dict(zip(axes, data_of(inputs, 1 if old else 2) or (), strict=False))
    targets = dict(zip(axes, data_of(inputs, 3) or (), strict=False))
    dims, obstacles = list(source.dims), []
    for axis in axes:
        dim = dims[axis]
        scale, target = scales.get(axis), targets.get(axis)
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
        return f"scales in mode {node.text('coordinate_transformation_mode', 'half_pixel')!r}, which depends on the " \
            "map's size"
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
                taps.append((rounded, rounded))
    return tuple(taps)
