"""Operators that only move values about, applied to an array."""

from typing import Final

import numpy as np
import onnx

from fullframe.convert.draft import Array, Draft, attributes

LAYOUT: Final = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"})
"""And Gather by constant indices."""


def moves(draft: Draft, node: onnx.NodeProto) -> bool:
    """Whether a node only moves values."""
    return node.op_type in LAYOUT or (node.op_type == "Gather" and draft.constant(node, 1) is not None)


def moved(draft: Draft, node: onnx.NodeProto, values: Array) -> Array:
    """What a node that only moves values makes at the source's size of values in its input's shape."""
    if node.op_type == "Gather":
        return np.take(values, draft.constants[node.input[1]], attributes(node).get("axis", 0))
    if node.op_type == "Transpose":
        return np.transpose(values, attributes(node).get("perm"))
    return values.reshape(draft.shape(node.output[0]))


def numbered(draft: Draft, name: str) -> Array:
    """Every value of a tensor by its place, in the tensor's shape at the source's size."""
    shape = draft.shape(name)
    return np.arange(np.prod(shape)).reshape(shape)
