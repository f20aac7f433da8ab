"""Operators that rearrange dimensions, and those that compute with them."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

from fullframe.model.geometry.axis import Computed
from fullframe.model.geometry.context import Context
from fullframe.model.geometry.nodes import Node
from fullframe.model.geometry.tensors import (
    SOME,
    Dim,
    Obstacle,
    Side,
    Tensor,
    Unfollowed,
    held,
    made,
    product,
    reshaped,
    varies,
)
from fullframe.model.geometry.windows import Inputs, Rule, data_of, first_of, ints_of

_ARITHMETIC: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": operator.floordiv,
}


def shape(context: Context, node: Node, inputs: Inputs) -> Tensor:
    """Shape: the dimensions as contents."""
    source = first_of(inputs)
    assert source.dims is not None
    dims = source.dims[slice(node.number("start", 0), node.number("end", len(source.dims)))]
    tensor = held(node.title, [Tensor(None, fed=source.fed)], (len(dims),), dims)
    latent = Obstacle(node.title, "image size", "takes the image's size")
    return made(node.title, [tensor], tensor.dims, data=dims, latent=latent) if tensor.fed else tensor


def arithmetic(context: Context, node: Node, inputs: Inputs) -> Tensor | None:
    """Sums, products and quotients of contents; None where these are no small vectors."""
    data = [tensor.data for tensor in inputs if tensor is not None]
    known = [each for each in data if each is not None]
    if node.op not in _ARITHMETIC or len(known) != 2 or len(data) != 2:
        return None
    count = max(map(len, known))
    pairs = zip(*(each * count if len(each) == 1 else each for each in known), strict=False)
    result = tuple(_computed(context, node, a, b) for a, b in pairs)
    sources = [tensor for tensor in inputs if tensor is not None]
    if None in result and not any(source.fed for source in sources):
        return None
    return held(node.title, sources, max((source.dims or () for source in sources), key=len), result)


def _computed(context: Context, node: Node, a: Dim | float, b: Dim | float) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return int(_ARITHMETIC[node.op](a, b)) if b or node.op != "Div" else None
    if isinstance(b, Side) and node.op in ("Add", "Mul"):
        a, b = b, a
    if not isinstance(a, Side) or not isinstance(b, int) or (b < 1 and node.op in ("Mul", "Div")):
        return None
    op, operand = ("Add", -b) if node.op == "Sub" else (node.op, b)
    return context.step(a, Computed(a.number, op, operand), node)


def gather(context: Context, node: Node, inputs: Inputs) -> Tensor:
    """Gather, of contents or by constant indices along a dimension that no image's size changes."""
    source = first_of(inputs)
    assert source.dims is not None
    index = inputs[1]
    if index is None or index.dims is None:
        raise Unfollowed("takes indices whose shape can't be followed")
    axis = node.number("axis", 0) % len(source.dims)
    picks = index.data
    if source.data is not None and picks is not None:
        data = tuple(source.data[pick] if isinstance(pick, int) else None for pick in picks)
        return held(node.title, [source], index.dims, data)
    if varies(source.dims[axis]):
        raise Unfollowed("picks some of the map's cells")
    return made(node.title, [source, index], (*source.dims[:axis], *index.dims, *source.dims[axis + 1 :]))


def concat(context: Context, node: Node, inputs: Inputs) -> Tensor:
    """Concat, of contents or along a dimension that no image's size changes."""
    tensors = [tensor for tensor in inputs if tensor is not None]
    dims = [tensor.dims for tensor in tensors if tensor.dims is not None]
    if len(dims) < len(tensors) or not dims:
        raise Unfollowed("joins values whose shapes can't be followed")
    parts = [tensor.data for tensor in tensors]
    if len(dims[0]) == 1 and any(part is not None for part in parts):
        data: list[Dim | float] = []
        for part, (length, *_) in zip(parts, dims, strict=True):
            if part is not None:
                data += part
            elif isinstance(length, int):
                data += [None] * length
            else:
                break
        else:
            return held(node.title, tensors, (len(data),), tuple(data))
    axis = node.number("axis", 1) % len(dims[0])
    lengths = [each[axis] for each in dims]
    if any(varies(length) for length in lengths):
        raise Unfollowed("joins maps side by side")
    met, obstacles = context.meet(node, tensors, skip=axis, broadcast=False)
    numbers = [length for length in lengths if isinstance(length, int)]
    total = sum(numbers) if len(numbers) == len(lengths) else SOME
    return made(node.title, tensors, (*met[:axis], total, *met[axis + 1 :]), obstacles=obstacles)


def split(context: Context, node: Node, inputs: Inputs) -> list[Tensor]:
    """Split along a dimension that no image's size changes."""
    source = first_of(inputs)
    assert source.dims is not None
    axis = node.number("axis", 0) % len(source.dims)
    whole, count = source.dims[axis], len(node.outputs)
    if varies(whole):
        raise Unfollowed("cuts the map")
    parts: Sequence[Dim | float] = node.numbers("split") or data_of(inputs, 1) or ()
    if len(parts) != count:
        even = isinstance(whole, int) and whole % count == 0
        parts = [whole // count if even else SOME] * count  # type: ignore[operator]
    lengths = [part if isinstance(part, int) else SOME for part in parts]
    return [made(node.title, [source], (*source.dims[:axis], length, *source.dims[axis + 1 :])) for length in lengths]


def transpose(context: Context, node: Node, inputs: Inputs) -> Tensor:
    """Transpose."""
    source = first_of(inputs)
    assert source.dims is not None
    order = node.numbers("perm") or list(range(len(source.dims)))[::-1]
    if sorted(order) != list(range(len(source.dims))):
        raise Unfollowed(f"has the order {order} for {len(source.dims)} dimensions")
    return made(node.title, [source], tuple(source.dims[each] for each in order))


def reshape(context: Context, node: Node, inputs: Inputs) -> Tensor:
    """Reshape: harmless where every cell stays in its place."""
    source = first_of(inputs)
    assert source.dims is not None
    target = data_of(inputs, 1)
    if target is None:
        raise Unfollowed("takes its shape from values that can't be followed")
    wanted = [context.same(each, source.dims) if isinstance(each, int | str | Side) else None for each in target]
    if source.data is not None and len(source.data) > 0:
        dims: tuple[Dim, ...] = () if not wanted else (len(source.data),)
        return held(node.title, [source], dims, source.data)
    dims, same = reshaped(source.dims, wanted)
    return _rearranged(node, source, dims, same)


def flatten(context: Context, node: Node, inputs: Inputs) -> Tensor:
    """Flatten."""
    source = first_of(inputs)
    assert source.dims is not None
    axis = node.number("axis", 1) % (len(source.dims) + 1)
    dims = product(source.dims[:axis]), product(source.dims[axis:])
    return _rearranged(node, source, *reshaped(source.dims, dims))


def _rearranged(node: Node, source: Tensor, dims: tuple[Dim, ...], same: bool) -> Tensor:
    against = None
    if not same and source.varies:
        fixed = not any(varies(dim) for dim in dims)
        reason = "has a shape that fits one image size alone" if fixed else "rearranges the cells of the whole map"
        against = Obstacle(node.title, "image size" if fixed else "whole image", reason)
    return made(node.title, [source], dims, latent=against)


def squeeze(context: Context, node: Node, inputs: Inputs) -> Tensor:
    """Squeeze."""
    source = first_of(inputs)
    assert source.dims is not None
    axes = node.numbers("axes") or ints_of(inputs, 1, "axes")
    rank = len(source.dims)
    if axes is None and (None in source.dims or any(isinstance(dim, str | Side) for dim in source.dims)):
        raise Unfollowed("drops dimensions that can't be followed")
    gone = {axis % rank for axis in axes} if axes is not None else {i for i, dim in enumerate(source.dims) if dim == 1}
    if any(varies(source.dims[axis]) for axis in gone):
        raise Unfollowed("drops a side of the map")
    dims = tuple(dim for i, dim in enumerate(source.dims) if i not in gone)
    return _with_data(node, source, dims)


def unsqueeze(context: Context, node: Node, inputs: Inputs) -> Tensor:
    """Unsqueeze."""
    source = first_of(inputs)
    assert source.dims is not None
    axes = node.numbers("axes") or ints_of(inputs, 1, "axes") or []
    rank = len(source.dims) + len(axes)
    new, rest = {axis % rank for axis in axes}, iter(source.dims)
    return _with_data(node, source, tuple(1 if i in new else next(rest) for i in range(rank)))


def same(context: Context, node: Node, inputs: Inputs) -> Tensor:
    """Identity and Cast: the contents too."""
    source = first_of(inputs)
    assert source.dims is not None
    return _with_data(node, source, source.dims)


def _with_data(node: Node, source: Tensor, dims: tuple[Dim, ...]) -> Tensor:
    if source.data is not None and len(dims) < 2:
        return held(node.title, [source], dims, source.data)
    return made(node.title, [source], dims)


def expand(context: Context, node: Node, inputs: Inputs) -> Tensor:
    """Expand: as if it met a value of the target's shape."""
    source = first_of(inputs)
    target = data_of(inputs, 1)
    if target is None:
        raise Unfollowed("takes its shape from values that can't be followed")
    like = Tensor(tuple(each if isinstance(each, int | str | Side) else None for each in target))
    dims, obstacles = context.meet(node, [source, like])
    return made(node.title, [source], dims, obstacles=obstacles)


SHAPE_RULES: Final[dict[str, Rule]] = {
    "Shape": shape,
    "Gather": gather,
    "Concat": concat,
    "Split": split,
    "Transpose": transpose,
    "Reshape": reshape,
    "Flatten": flatten,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Identity": same,
    "Cast": same,
    "Expand": expand,
}
