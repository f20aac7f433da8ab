"""The part of a graph that makes logits of pooled features, as a graph of its own."""

from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fullframe.errors import InvalidModel
from fullframe.model.contract import INPUT
from fullframe.model.graphs import ancestors

FEATURES: Final = "features"
LOGITS: Final = "logits"

_SAME_VALUES: Final = frozenset({"Flatten", "Identity", "Reshape", "Squeeze"})


def head_graph(path: Path) -> bytes:
    """Cut a contract model behind its features.

    A head that begins at the features' own [N, C, 1, 1], before they were flattened, is cut there.

    Returns:
        A serialized graph from `features`, float32 [N, C], to `logits`, float32 [N, K].

    Raises:
        InvalidModel: the logits see more of the image than its features.
    """
    model = onnx.load(path)
    graph = model.graph
    pooled = _pooled(graph)
    needed = ancestors(graph, [LOGITS], given=pooled)
    if INPUT in needed:
        raise InvalidModel(f"its {LOGITS!r} are computed from more of the image than its {FEATURES!r}")
    typed = onnx.shape_inference.infer_shapes(model).graph.value_info
    ranks = {each.name: len(each.type.tensor_type.shape.dim) for each in typed}
    nodes, weights = [], [each for each in graph.initializer if each.name in needed]
    for name in sorted(needed & pooled - {FEATURES}):
        axes = numpy_helper.from_array(np.arange(2, ranks.get(name, 4)), f"{name}.axes")
        weights.append(axes)
        nodes.append(helper.make_node("Unsqueeze", [FEATURES, axes.name], [name]))
    nodes += [node for node in graph.node if not needed.isdisjoint(node.output) and pooled.isdisjoint(node.output)]
    ends = [next(each for each in graph.output if each.name == name) for name in (FEATURES, LOGITS)]
    head = helper.make_graph(nodes, "head", ends[:1], ends[1:], weights)
    cut = helper.make_model(head, opset_imports=model.opset_import, ir_version=model.ir_version)
    return bytes(cut.SerializeToString())


def _pooled(graph: onnx.GraphProto) -> set[str]:
    """The features, and the tensors behind them that hold the same values in another shape."""
    made_by = {name: node for node in graph.node for name in node.output}
    found = {name := FEATURES}
    while (node := made_by.get(name)) is not None and node.op_type in _SAME_VALUES:
        found.add(name := node.input[0])
    return found
