"""A graph for batches that refuses by itself, whoever runs it, sizes that no image of the batch can have."""

from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fullframe.model.contract import INPUT, SIZES

_RULE: Final = "sizes must be each image's own height and width, between the least that the model takes and the batch's"

_PREFIX: Final = "ragged.checked."


def check_sizes(model: onnx.ModelProto, least: tuple[int, int]) -> None:
    """Make a ragged graph's run fail unless `sizes` are one for each image, none below `least` or above the batch's.

    ONNX has no operator that fails, but a Reshape to another number of elements does: a single 0 is reshaped to [1], or
    to more where something is wrong, and added to the sizes. (Of a Reshape of the sizes themselves ONNX Runtime infers
    a side, and fails no more.) The node's name is the rule that was broken, which ONNX Runtime puts into its message.
    """
    graph = model.graph
    nodes: list[onnx.NodeProto] = []

    def add(op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [f"{_PREFIX}{len(nodes)}"], name, **attributes))
        return str(nodes[-1].output[0])

    def numbers(*values: int) -> str:
        name = f"{_PREFIX}number.{'.'.join(map(str, values))}"
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    wrong = add("Or", add("Less", SIZES, numbers(*least)), add("Greater", SIZES, add("Shape", INPUT, start=1, end=3)))
    out_of_range = add("ReduceMax", add("Cast", wrong, to=onnx.TensorProto.INT64), keepdims=0)
    images, given = (add("Shape", name, start=0, end=1) for name in (INPUT, SIZES))
    faults = add("Add", out_of_range, add("Abs", add("Sub", given, images)))
    nothing = add("Reshape", numbers(0), add("Add", faults, numbers(1)), name=_RULE)
    checked = add("Add", SIZES, nothing)
    for node in graph.node:
        node.input[:] = [checked if name == SIZES else name for name in node.input]
    nodes.extend(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    [sizes] = [each for each in graph.input if each.name == SIZES]
    sizes.doc_string = f"Height and width of each image, int64 [N, 2]. {_RULE.capitalize()}; others end the run."
