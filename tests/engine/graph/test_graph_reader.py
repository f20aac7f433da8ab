"""Graphs that are made to do harm: refused by the node's name, or opened, without a crash and without much memory."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fullframe.engine.graph import TorchSession
from fullframe.engine.graph.growth import elements
from fullframe.engine.graph.ir import Node
from fullframe.engine.graph.reader import _UNFOLDED, read_graph
from fullframe.errors import InvalidModel
from fullframe.model.ragged import ragged_model
from tests.engine.graph.parity import serialized
from tests.engine.graph.test_graph_operators import CASES
from tests.model.test_ragged_graphs import AVERAGE3, CONV3, MAX3, Squeeze, build
from tests.pictures import pixels
from tests.ragged import padded

MADE_OF_CONSTANTS: dict[str, list[onnx.NodeProto]] = {
    "ConstantOfShape": [helper.make_node("ConstantOfShape", ["shape"], ["large"], "big")],
    "Expand": [helper.make_node("Expand", ["half", "shape"], ["large"], "big")],
    "Tile": [
        helper.make_node("Reshape", ["half", "ones"], ["one"], "first"),
        helper.make_node("Tile", ["one", "shape"], ["large"], "big"),
    ],
    "Range": [helper.make_node("Range", ["zero", "elements", "step"], ["large"], "big")],
    "Pad": [
        helper.make_node("Reshape", ["half", "ones"], ["one"], "first"),
        helper.make_node("Pad", ["one", "pads"], ["large"], "big"),
    ],
    "in two steps": [
        helper.make_node("ConstantOfShape", ["root"], ["a"], "half way"),
        helper.make_node("Reshape", ["a", "line"], ["b"], "line"),
        helper.make_node("Reshape", ["a", "column"], ["c"], "column"),
        helper.make_node("Add", ["b", "c"], ["large"], "big"),
    ],
}


def large(nodes: list[onnx.NodeProto], elements: int) -> bytes:
    """float x [n] and so many numbers that are made of constants, each by itself."""
    root = round(elements**0.5)
    values: dict[str, Any] = {"shape": np.array([root, root]), "ones": np.array([1, 1]), "half": np.float32(0.5)}
    values |= {"zero": np.int64(0), "step": np.int64(1), "elements": np.int64(elements), "root": np.array([root])}
    values |= {"pads": np.array([0, 0, root, root]), "line": np.array([1, -1]), "column": np.array([-1, 1])}
    read = {name for node in nodes for name in node.input}
    last = helper.make_node("Shape", ["large"], ["y"])
    graph = helper.make_graph(
        [*nodes, last],
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [None])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items() if name in read],
    )
    return serialized(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


@pytest.mark.parametrize("kind", MADE_OF_CONSTANTS)
def test_what_constants_would_make_is_measured_first(kind: str) -> None:
    """A tera of elements is refused, and a few are folded."""
    with pytest.raises(InvalidModel, match=r"'big' makes [\d,]+ values of constants alone; at most"):
        read_graph(large(MADE_OF_CONSTANTS[kind], 10**12))
    assert [node.op for node in read_graph(large(MADE_OF_CONSTANTS[kind], 10**4)).nodes] == ["Shape"]


GROWS = {"ConstantOfShape", "Expand", "Tile", "Range", "Pad", "Gather", "MatMul", "Gemm", "Concat"}


@pytest.mark.parametrize("op", sorted({case.op for case in CASES} - _UNFOLDED))
def test_no_operator_makes_more_than_is_foretold(op: str) -> None:
    for case in (case for case in CASES if case.op == op):
        alone = replace(case, constant=tuple(range(len(case.inputs))))
        made = [
            each.numel() for name, each in read_graph(serialized(alone.model())).constants.items() if name[0] == "y"
        ]
        values = [None if each is None else torch.from_numpy(np.asarray(each)) for each in case.inputs]
        foretold = elements(Node(op, (), (), op, case.attributes), values)
        assert len(made) == case.outputs and foretold >= max(made), case
        assert foretold == max(made) or op not in GROWS, case


READS = """
import resource, sys
import torch
from fullframe.engine.graph.growth import elements
from fullframe.engine.graph.ir import Node
from fullframe.engine.graph.reader import _UNFOLDED, read_graph
torch.set_num_threads(1)
model = sys.stdin.buffer.read()
with open("/proc/self/statm") as file:
    limit = int(file.read().split()[0]) * resource.getpagesize() + 2**28
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print([node.op for node in read_graph(model).nodes])
torch.full((2**27,), 0.5)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited as Linux does")
def test_what_is_made_at_each_run_takes_no_memory_before() -> None:
    """512 MiB of constants where half of that may be taken; the control: making them fails."""
    model = large(MADE_OF_CONSTANTS["ConstantOfShape"], 2**27)
    done = subprocess.run([sys.executable, "-c", READS], input=model, capture_output=True, check=False)
    assert done.stdout == b"['ConstantOfShape', 'Shape']\n"
    assert done.returncode != 0 and b"can't allocate memory" in done.stderr


def broken(change: Callable[[onnx.GraphProto], object]) -> bytes:
    model = build(CONV3, MAX3, AVERAGE3)
    change(model.graph)
    return serialized(model)


def _of(graph: onnx.GraphProto, op: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.op_type == op)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda graph: _of(graph, "MaxPool").ClearField("attribute"), "^MaxPool .* has no attribute 'kernel_shape'"),
        (
            lambda graph: _of(graph, "Conv").input.__delitem__(slice(1, None)),
            "^Conv .* has 1 inputs; ONNX asks for 2 to 3",
        ),
        (
            lambda graph: _of(graph, "MaxPool").attribute[0].CopyFrom(helper.make_attribute("ceil_mode", "three")),
            "^MaxPool .* has an attribute 'ceil_mode' of another type than ONNX's",
        ),
        (lambda graph: graph.node.append(graph.node[-1]), " makes '.*', which is there already"),
        (lambda graph: _of(graph, "Conv").output.pop(), "^Conv .* makes nothing"),
        (lambda graph: _of(graph, "Conv").ClearField("input"), "^Conv .* has 0 inputs; ONNX asks for 2 to 3"),
        (lambda graph: graph.output.add(name="none"), "^nothing makes its output 'none'"),
        (lambda graph: graph.initializer[0].dims.append(10**9), "^its graph can't be read: "),
    ],
)
def test_what_is_broken_is_named(change: Callable[[onnx.GraphProto], object], reason: str) -> None:
    with pytest.raises(InvalidModel, match=reason):
        TorchSession(broken(change))


def test_a_long_product_is_no_deep_one() -> None:
    """Thousands of factors, of which no formula has more than a few."""
    count = 3000
    nodes = [helper.make_node("Mul", [f"x{n}", "x0"], [f"x{n + 1}"]) for n in range(count)]
    kinds = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x0", f"x{count}")]
    graph = helper.make_graph(nodes, "long", kinds[:1], kinds[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (found,) = TorchSession(serialized(model), fused=True).run([f"x{count}"], {"x0": np.ones(3, np.float32)})
    np.testing.assert_array_equal(found, np.ones(3))


BASE = [
    (build(CONV3, MAX3, Squeeze(), AVERAGE3), {"images": pixels(20, 17)[np.newaxis]}),
    (ragged_model(build(CONV3, AVERAGE3)), padded([pixels(20, 17), pixels(9, 30)])),
]
numbers = st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 1000])


def altered(graph: onnx.GraphProto, data: st.DataObject) -> None:
    """One thing of a node or of a small constant is another."""
    if data.draw(st.booleans()):
        small = [each for each in graph.initializer if len(each.raw_data) <= 64 and each.data_type == TensorProto.INT64]
        if small:
            constant = data.draw(st.sampled_from(small))
            values = numpy_helper.to_array(constant).copy()
            if values.size:
                values.flat[data.draw(st.integers(0, values.size - 1))] = data.draw(numbers)
            constant.CopyFrom(numpy_helper.from_array(values, constant.name))
            return
    names = [name for node in graph.node for name in (*node.input, *node.output)]
    node = data.draw(st.sampled_from(list(graph.node)))
    match data.draw(st.sampled_from(["attribute", "number", "input", "fewer", "op", "output"])):
        case "attribute" if node.attribute:
            node.attribute.pop(data.draw(st.integers(0, len(node.attribute) - 1)))
        case "number" if node.attribute:
            attribute = data.draw(st.sampled_from(list(node.attribute)))
            if attribute.ints:
                attribute.ints[data.draw(st.integers(0, len(attribute.ints) - 1))] = data.draw(numbers)
            attribute.i = data.draw(numbers)
        case "fewer" if node.input:
            node.input.pop()
        case "op":
            node.op_type = data.draw(st.sampled_from([each.op_type for each in graph.node]))
        case "output":
            node.output[0] = data.draw(st.sampled_from(names))
        case "input" if node.input:
            node.input[data.draw(st.integers(0, len(node.input) - 1))] = data.draw(st.sampled_from([*names, ""]))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_altered_is_refused_or_opened(data: st.DataObject) -> None:
    """A run may fail, by an exception."""
    base, feeds = data.draw(st.sampled_from(BASE))
    model = onnx.ModelProto.FromString(base.SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        altered(model.graph, data)
    try:
        session = TorchSession(serialized(model), fused=data.draw(st.booleans()))
    except InvalidModel as error:
        assert str(error)
        return
    try:
        session.run([each.name for each in session.outputs], feeds)
    except Exception as error:
        assert not isinstance(error, RecursionError | MemoryError)
