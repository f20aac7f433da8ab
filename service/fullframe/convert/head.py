"""Where the map ends and the classifier begins; the outputs that the contract names."""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import onnx

from fullframe.convert.draft import Draft, attributes, words
from fullframe.convert.layout import moves
from fullframe.convert.unroll import POINTWISE, Unrolled, unroll
from fullframe.errors import InvalidModel
from fullframe.model.graphs import title

_POOLS: Final = {"GlobalAveragePool": "avg", "GlobalMaxPool": "max"}


@dataclass(frozen=True)
class Head:
    """The last map, and the nodes from there to the scores.

    Attributes:
        map: [N, C, h, w].
        nodes: in topological order.
        pools: those of them that take the map, where they all pool all of it.
        pooled: what these make, together; None where the map is not pooled first.
        pooling: how, as engine.pooling spells it.
    """

    map: str
    nodes: tuple[onnx.NodeProto, ...]
    pools: tuple[onnx.NodeProto, ...] = ()
    pooled: onnx.NodeProto | None = None
    pooling: str = "avg"


def find_head(draft: Draft) -> Head:
    """Raises InvalidModel where the scores are not computed from one map."""
    geometry = draft.geometry()
    ends, inside, waiting = set[str](), set[int](), [draft.scores]
    for name in waiting:
        node = draft.producer(name)
        if name in geometry.tensors and geometry.tensors[name].shape[2:] == ("h", "w"):
            ends.add(name)
        elif node is not None and id(node) not in inside:
            inside.add(id(node))
            waiting += draft.fed(node)
    if len(ends) != 1 or draft.image in ends:
        found = ", ".join(repr(name) for name in sorted(ends - {draft.image})) or "none"
        raise InvalidModel(
            f"the scores must be computed from one map of features that grows with the image; found: {found}. "
            f"{geometry.doubts[0] if geometry.doubts else geometry.why(draft.scores)}"
        )
    (last,) = ends
    nodes = tuple(node for node in draft.nodes if id(node) in inside)
    takers = tuple(node for node in nodes if last in node.input)
    if not takers or any(node.op_type not in _POOLS for node in takers):
        return Head(last, nodes)
    if len(takers) == 1:
        return Head(last, nodes, takers, takers[0], _POOLS[takers[0].op_type])
    return _several_pools(draft, Head(last, nodes, takers))


def _several_pools(draft: Draft, head: Head) -> Head:
    """Their values side by side; raises InvalidModel where they meet otherwise."""
    before = {pool.output[0]: _POOLS[pool.op_type] for pool in head.pools}
    for node in head.nodes:
        if moves(draft, node) and node.input[0] in before:
            before[node.output[0]] = before.pop(node.input[0])
        elif node.op_type == "Concat" and set(node.input) == set(before) and attributes(node)["axis"] % 4 == 1:
            return replace(head, pooled=node, pooling="+".join(before[name] for name in node.input))
    names = ", ".join(title(pool) for pool in head.pools)
    raise InvalidModel(f"{names} pool the same map; their values must be joined side by side before anything else")


def check_scores(draft: Draft) -> None:
    """Raise InvalidModel where what comes out is, at the source's size, no score for each class."""
    shape, node = draft.source_shape(draft.scores), draft.producer(draft.scores)
    if node is None or shape is None or len(shape) < 2 or None in shape:
        return
    if shape[1] == 0:
        raise InvalidModel(f"{title(node)} makes the output, and it has no classes: it is {list(shape)}")
    if len(shape) == 4 and shape[2:] != (1, 1):
        raise InvalidModel(
            f"{title(node)} makes the output, and its scores {draft.scores!r} are a map of {shape[2]} x {shape[3]} "
            f"cells at {words(draft.size)}: scores for each place, as a segmentation has them. A classifier pools "
            "them to one for each class: [N, K] or [N, K, 1, 1]"
        )


def make_outputs(draft: Draft) -> str:
    """Features, logits and, where there is one, the class map; returns how features are pooled."""
    head = find_head(draft)
    found = unroll(draft, head.map, head.nodes, head.pooled) if head.pooling == "avg" else None
    if found is not None:
        _pool_last(draft, found)
        draft.outputs = ["features", "logits", "feature_map", "class_map"]
    else:
        assert head.pooled is not None
        _keep_vectors(draft, head, head.pooled)
        draft.outputs = ["features", "logits", "feature_map"]
        names = ", ".join(title(pool) for pool in head.pools)
        draft.note(f"head: {names} before layers that are not linear, so logits = head(features)")
    draft.sweep()
    return head.pooling


def _pool_last(draft: Draft, found: Unrolled) -> None:
    """Features and logits are the means of their maps."""
    features, classes = found.features, found.classes
    if not features:
        features = _before_last_convolution(draft, classes)
    if features == classes:
        draft.insert([draft.make("Identity", [classes], "class_map")])
    else:
        draft.rename(classes, "class_map")
    draft.rename(features, "feature_map")
    space = draft.add_constant(np.array([2, 3]), "space")
    for of, to in (("feature_map", "features"), ("class_map", "logits")):
        draft.insert([draft.make("ReduceMean", [of, space], to, keepdims=0)])
    layers = f"{'; '.join(found.layers)}; " if found.layers else ""
    draft.note(f"head: {layers}scores are pooled last, so logits = mean(class_map)")


def _before_last_convolution(draft: Draft, classes: str) -> str:
    """What the convolution of 1x1 that makes the scores takes; the scores themselves if there is none."""
    name = classes
    while (node := draft.producer(name)) is not None and len(draft.fed(node)) == 1:
        if node.op_type == "Conv":
            given, kernel = attributes(node), draft.shape(node.input[1])
            steps = set(given.get("strides", ())) <= {1} and not any(given.get("pads", ()))
            return node.input[0] if steps and kernel[2:] == (1, 1) and given.get("group", 1) == 1 else classes
        if node.op_type not in POINTWISE | {"BatchNormalization", "Add", "Mul"}:
            break
        (name,) = draft.fed(node)
    return classes


def _keep_vectors(draft: Draft, head: Head, pooled: onnx.NodeProto) -> None:
    """The head as it is, behind the pooled features [N, C]."""
    flat = draft.make("Flatten", [pooled.output[0]], "features", axis=1)
    again = draft.make("Reshape", ["features", _same_rank(draft, pooled.output[0])])
    following = draft.consumers(pooled.output[0])
    draft.rename_uses(pooled.output[0], again.output[0])
    flat.input[0] = pooled.output[0]
    draft.insert([flat, again], following[0])
    draft.insert([draft.make("Flatten", [draft.scores], "logits", axis=1)])
    draft.rename(head.map, "feature_map")


def _same_rank(draft: Draft, name: str) -> str:
    """The target of a reshape from [N, C] to a pooled tensor's shape."""
    return draft.add_constant(np.array([0, -1, *draft.shape(name)[2:]], np.int64), "shape")
