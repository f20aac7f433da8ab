"""What is fixed to the source's size becomes right at every size: reshapes, channel shuffles, SAME padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

import numpy as np
import onnx

from fullframe.convert.draft import Array, Draft, Shape, attributes, counted, set_attributes, words
from fullframe.convert.layout import moved, moves, numbered
from fullframe.errors import InvalidModel
from fullframe.model.graphs import title

_BROADCASTING: Final = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Where", "Sum", "Mean", "PRelu"})


def write_out_padding(draft: Draft) -> None:
    """auto_pad becomes pads, those of the source's size; every convolution says its kernel's size."""
    changed = []
    for node in draft.nodes:
        given = attributes(node)
        if node.op_type == "Conv" and "kernel_shape" not in given:
            set_attributes(node, kernel_shape=draft.shape(node.input[1])[2:])
        if (auto_pad := given.get("auto_pad", "NOTSET")) == "NOTSET":
            continue
        kernel = attributes(node)["kernel_shape"]
        strides, dilations = (given.get(name) or [1] * len(kernel) for name in ("strides", "dilations"))
        totals = [0] * len(kernel)
        if auto_pad.startswith("SAME"):
            sizes = draft.shape(node.input[0])[2:]
            totals = [
                max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
                for size, stride, k, dilation in zip(sizes, strides, kernel, dilations, strict=True)
            ]
            if max(strides) > 1:
                changed.append(title(node))
        less, more = [total // 2 for total in totals], [total - total // 2 for total in totals]
        set_attributes(node, auto_pad=None, pads=more + less if auto_pad == "SAME_LOWER" else less + more)
    draft.touch()
    if changed:
        draft.note(
            f"SAME padding of {counted(len(changed), 'strided window')} ({changed[0]}"
            f"{', ...' if len(changed) > 1 else ''}) written out as at {words(draft.size)}; it depends on the image's "
            "size no longer"
        )


def gather_shuffles(draft: Draft) -> None:
    """A channel shuffle, by reshapes and a transpose, becomes one Gather along the channels; what leaves them goes."""
    count = 0
    for node in list(draft.nodes):
        if node.op_type == "Reshape" and draft.producer(node.output[0]) is node:
            chain = _there_and_back(draft, node)
            order = _channel_order(draft, chain) if chain else None
            if order is None:
                continue
            for each in chain[:-1]:
                draft.remove(each)
            if np.array_equal(order, np.arange(len(order))):
                draft.remove(chain[-1])
                continue
            picks = draft.add_constant(order.astype(np.int64))
            draft.replace(chain[-1], [draft.make("Gather", [chain[-1].input[0], picks], axis=1)])
            count += 1
    if count:
        draft.note(f"{counted(count, 'channel shuffle')} written for one size: now channels picked by number")


def _there_and_back(draft: Draft, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The layout operators from a Reshape of a map to where the map has its shape again; none if it never has."""
    shape, chain = draft.shape(node.input[0]), [node]
    while draft.shape(chain[-1].output[0]) != shape:
        consumers = draft.consumers(chain[-1].output[0])
        if len(consumers) != 1 or not moves(draft, consumers[0]):
            return []
        chain.append(consumers[0])
    return chain if len(shape) == 4 else []


def _channel_order(draft: Draft, chain: Sequence[onnx.NodeProto]) -> Array | None:
    """Which channel each channel was; None where pixels move too."""
    values = before = numbered(draft, chain[0].input[0])
    for node in chain:
        values = moved(draft, node, values)
    order = values[0, :, 0, 0] // np.prod(before.shape[2:])
    return order if np.array_equal(before[:, order], values) else None


def free_reshapes(draft: Draft) -> None:
    """Targets of reshapes say "as before", "the rest" or a map's size where they said the source's."""
    count = 0
    for node in list(draft.nodes):
        if node.op_type != "Reshape":
            continue
        source = draft.free_shape(node.input[0])
        if source is None or None not in source:
            continue
        if draft.shape(node.input[0]) == draft.shape(node.output[0]):
            draft.remove(node)
            continue
        dims = _freed(draft, node, source)
        computed = draft.constant(node, 1) is None
        if dims is not None and (shape := _target(draft, node, dims, computed)):
            node.input[1] = shape
            set_attributes(node, allowzero=None)
            draft.touch()
            count += 1
    if count:
        draft.note(f"{counted(count, 'reshape')} freed of the source's batch, height and width")


@dataclass(frozen=True)
class _SizeOf:
    """A dimension of a tensor."""

    name: str
    axis: int


_REST: Final = "the rest"
_Dim = int | _SizeOf | str


def _freed(draft: Draft, node: onnx.NodeProto, source: Shape) -> list[_Dim] | None:
    """What each dimension of a reshape's output is for any image; None where that can't be told."""
    before, after = draft.shape(node.input[0]), draft.shape(node.output[0])
    if source[0] is not None or not before or not after or before[0] != after[0]:
        return None
    dims: list[_Dim] = [_SizeOf(node.input[0], 0), *after[1:]]
    ours = [axis for axis in range(1, len(before)) if before[axis] > 1 or source[axis] is None]
    theirs = [axis for axis in range(1, len(after)) if after[axis] > 1]
    while ours:
        group, made = [ours.pop(0)], list[int]()
        while (size := prod(before[i] for i in group)) != (others := prod(after[i] for i in made)):
            (made if others < size else group).append((theirs if others < size else ours).pop(0))
        while ours and before[ours[0]] == 1:  # a side of one cell at this size goes with what lies before it
            group.append(ours.pop(0))
        if None not in (source[axis] for axis in group):
            continue
        if len(made) == 1:
            dims[made[0]] = _SizeOf(node.input[0], group[0]) if len(group) == 1 else _REST
        elif (like := _map_of(draft, node, after[-2:])) and made[-2:] == [len(after) - 2, len(after) - 1]:
            dims[-2:] = [_SizeOf(like, 2), _SizeOf(like, 3)]
        else:
            return None
    return dims


def _map_of(draft: Draft, node: onnx.NodeProto, size: Sequence[int]) -> str:
    """The nearest map of this size that a node's input is computed from."""
    waiting = list(node.input[:1])
    for name in waiting:
        shape, free = draft.shape(name), draft.free_shape(name) or ()
        if len(shape) == 4 and shape[2:] == tuple(size) and free[2:] == (None, None):
            return name
        maker = draft.producer(name)
        waiting += [each for each in (draft.fed(maker) if maker else []) if each not in waiting]
    return ""


def _target(draft: Draft, node: onnx.NodeProto, dims: Sequence[_Dim], computed: bool) -> str:
    """A reshape's second input; "" where it can't be written, or is `computed` already and would be no simpler."""
    numbers = [0 if dim == _SizeOf(node.input[0], axis) else dim for axis, dim in enumerate(dims)]
    sizes = [dim for dim in numbers if not isinstance(dim, int)]
    if len(sizes) <= 1:
        return draft.add_constant(np.array([dim if isinstance(dim, int) else -1 for dim in numbers], np.int64), "shape")
    if computed or sizes.count(_REST) > 1:
        return ""
    nodes, names = list[onnx.NodeProto](), list[str]()
    for dim in numbers:
        if isinstance(dim, _SizeOf):
            nodes.append(draft.make("Shape", [dim.name], start=dim.axis, end=dim.axis + 1))
            names.append(nodes[-1].output[0])
        else:
            names.append(draft.add_constant(np.array([dim if isinstance(dim, int) else -1], np.int64), "shape"))
    joined = draft.make("Concat", names, axis=0)
    draft.insert([*nodes, joined], node)
    return joined.output[0]


def refuse_fixed_constants(draft: Draft) -> None:
    """Raise InvalidModel for a constant with a value for each place of the source's map: a position embedding, say."""
    for node in draft.nodes:
        fed = draft.fed(node)
        if node.op_type not in _BROADCASTING or not fed:
            continue
        for name in node.input:
            value, met = draft.constants.get(name), draft.free_shape(fed[0])
            if value is None or met is None:
                continue
            for axis in range(1, min(value.ndim, len(met) - 1) + 1):
                if value.shape[-axis] > 1 and met[-axis] is None:
                    raise InvalidModel(
                        f"{title(node)} takes {name!r}, which has {value.shape[-axis]} values along an axis that grows "
                        f"with the image: a position embedding or the like, fixed to {words(draft.size)}. Such a "
                        "network has no answer at other sizes"
                    )
