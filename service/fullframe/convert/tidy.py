"""What inference does not need is taken away: training's leftovers, old operators, constants to be computed, the
softmax at the end."""

from collections.abc import Sequence
from math import prod
from typing import Final

import numpy as np
import onnx
from onnx import helper, version_converter

from fullframe.convert.draft import Array, Draft, attributes, counted, set_attributes, taken
from fullframe.convert.runtime import open_session
from fullframe.errors import InvalidModel, first_line
from fullframe.model.contract import OPSET
from fullframe.model.graphs import title

_MOST_ELEMENTS: Final = 2**29
_LAYOUT: Final = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Dropout"})
_RANDOM: Final = ("Random", "Multinomial", "Bernoulli")


def in_inference(nodes: Sequence[onnx.NodeProto]) -> int:
    """Make nodes that were left in training work as in inference; returns how many there were.

    Raises InvalidModel where a node takes what is made in training alone.
    """
    count = 0
    takers = {name: node for node in nodes for name in node.input}
    for node in nodes:
        if node.op_type not in ("BatchNormalization", "Dropout"):
            continue
        for name in node.output[1:]:
            if name in takers:
                raise InvalidModel(f"{title(takers[name])} takes {name!r}, which {title(node)} makes in training alone")
        norm = node.op_type == "BatchNormalization"
        count += bool(attributes(node).get("training_mode") or (norm and len(node.output) > 1))
        del node.output[1:]
        set_attributes(node, training_mode=None)
        if not norm:
            del node.input[2:]
    return count


def drop_training(draft: Draft) -> None:
    """BatchNormalization as in inference, no Dropout."""
    if trained := in_inference(draft.nodes):
        draft.note(f"{counted(trained, 'node')} left in training: now as in inference")
    dropouts = 0
    for node in list(draft.nodes):
        if node.op_type == "Dropout":
            dropouts += 1
            draft.remove(node)
        elif node.op_type == "BatchNormalization":
            if not attributes(node).get("spatial", 1):
                raise InvalidModel(f"{title(node)} has statistics for every pixel (spatial=0), of one size alone")
            set_attributes(node, spatial=None)
    draft.touch()
    if dropouts:
        draft.note(f"{counted(dropouts, 'Dropout')} dropped")


def upgrade(draft: Draft) -> None:
    """Opset 18 at least."""
    old = draft.opset
    if old >= OPSET:
        return
    try:
        # With the source's own size, since some operators' converters ask for shapes.
        model = draft.model(weights=False, images=1, size=draft.size)
        draft.take(version_converter.convert_version(model, OPSET))
    except RuntimeError as error:  # the only kind it has
        raise InvalidModel(f"the graph can't be brought from opset {old} to {OPSET}: {first_line(error)}") from error
    draft.note(f"opset {old} -> {OPSET}")


def fold(draft: Draft) -> None:
    """What is computed from constants alone becomes constant; Identity goes."""
    before = len(draft.nodes)
    _fold_constants(draft)
    while _know_channels(draft) or _choose_branches(draft):
        _fold_constants(draft)
    for node in list(draft.nodes):
        if node.op_type == "Identity":
            draft.remove(node)
    draft.sweep()
    if len(draft.nodes) < before:
        draft.note(f"constants folded: {before} -> {counted(len(draft.nodes), 'node')}")


def _fold_constants(draft: Draft) -> None:
    draft.sweep()
    constant = [node for node in draft.nodes if _is_constant(draft, node)]
    rest = [node for node in draft.nodes if not _is_constant(draft, node)]
    wanted = {name for node in rest for name in taken(node)}
    draft.constants |= _computed(draft, constant, wanted)
    draft.nodes = rest
    draft.touch()


def _know_channels(draft: Draft) -> bool:
    """A map's number of channels, asked for by Shape and Gather, is the same at every size; whether there was one."""
    known = {}
    for node in draft.nodes:
        asked = draft.producer(node.input[0]) if node.op_type == "Gather" else None
        if asked is not None and asked.op_type == "Shape" and not asked.attribute:
            index, shape = draft.constant(node, 1), draft.free_shape(asked.input[0])
            if index is not None and (index == 1).all() and shape is not None and len(shape) > 2 and shape[1]:
                known[node.output[0]] = np.full(index.shape, shape[1], np.int64)
    for name, count in known.items():
        draft.rename_uses(name, draft.add_constant(count, "channels"))
    return bool(known)


def _choose_branches(draft: Draft) -> bool:
    """The nodes of its one branch take the place of each If whose condition is constant; whether there was one."""
    chosen = [node for node in draft.nodes if node.op_type == "If" and draft.constant(node, 0) is not None]
    for node in chosen:
        condition = draft.constant(node, 0)
        branch: onnx.GraphProto = attributes(node)["then_branch" if np.all(condition) else "else_branch"]
        draft.constants |= {each.name: onnx.numpy_helper.to_array(each) for each in branch.initializer}
        ends = [draft.make("Identity", [end.name], name) for end, name in zip(branch.output, node.output, strict=True)]
        draft.replace(node, [*branch.node, *ends])
    return bool(chosen)


def _is_constant(draft: Draft, node: onnx.NodeProto) -> bool:
    """Whether what a node makes is the same for every image, and can be computed here."""
    plain = not node.op_type.startswith(_RANDOM) and not any(each.HasField("g") for each in node.attribute)
    return plain and not draft.fed(node)


def _computed(draft: Draft, nodes: list[onnx.NodeProto], wanted: set[str]) -> dict[str, Array]:
    """Those of the tensors `wanted` that constant nodes make."""
    made = {name for node in nodes for name in node.output if name}
    if draft.scores in made:
        raise InvalidModel("the scores do not depend on the image")
    names = sorted(made & wanted)
    if not names:
        return {}
    weights = {name for node in nodes for name in node.input if name in draft.constants}
    outputs = [helper.make_empty_tensor_value_info(name) for name in names]
    graph = helper.make_graph(nodes, "constants", [], outputs, [draft.as_tensor(name) for name in weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", draft.opset)], ir_version=10)
    _check_elements(model)
    session = open_session(model.SerializeToString(), "the graph's constant part")
    try:
        values = session.run(names, {})
    except Exception as error:  # ONNX Runtime's exceptions share no narrower base
        raise InvalidModel(f"the graph's constants can't be computed: {first_line(error)}") from error
    return dict(zip(names, map(np.asarray, values), strict=True))


def _check_elements(model: onnx.ModelProto) -> None:
    """A few bytes can ask for more memory than there is."""
    known = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    total = 0
    for value in (*known.value_info, *known.output):
        total += prod(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    if total > _MOST_ELEMENTS:
        raise InvalidModel(f"the graph computes {total:,} numbers from constants; at most {_MOST_ELEMENTS:,} may be")


def scores_before_softmax(graph: onnx.GraphProto) -> tuple[str, str]:
    """The tensor of scores from which a graph computes its output, and the softmax between them, "" if there is none.

    Raises InvalidModel where the output is no scores of one image's classes.
    """
    makers = {name: node for node in graph.node for name in node.output}
    name = graph.output[0].name
    while (node := makers.get(name)) is not None:
        match node.op_type:
            case "Softmax" | "LogSoftmax":
                return node.input[0], title(node)
            case "Sigmoid":
                raise InvalidModel(
                    f"the scores go through {title(node)}, one by one: each label is a yes or no of its own; "
                    "a classifier's labels exclude each other"
                )
            case "ArgMax" | "TopK":
                raise InvalidModel(f"{title(node)} leaves the best classes alone; the output must be all scores")
            case op if op in _LAYOUT:
                name = node.input[0]
            case _:
                break
    return graph.output[0].name, ""


def drop_softmax(draft: Draft) -> None:
    """The scores come before it."""
    name, softmax = scores_before_softmax(draft.model(weights=False).graph)
    if softmax:
        draft.outputs = [name]
        draft.sweep()
        draft.note(f"{softmax} at the end taken off: logits are served, and probabilities computed from them")
