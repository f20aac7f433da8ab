"""Graphs cut for strips: what they carry, in what numbers, and which can't be cut."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fullframe.errors import InvalidModel
from fullframe.model.geometry import graph_geometry
from fullframe.model.repository import BUNDLED, int8_copy
from fullframe.model.strips import Place, StripGraphs, carried_bytes, strip_graphs, tiles_of
from tests.model.graphs import Builder, Cut, Stage, Window
from tests.model.test_geometry_obstacles import KEPT, OBSTACLES, STEM, Step, graph, longs, node
from tests.models import write_model

Array = NDArray[Any]


def run(model: bytes | Path, feeds: dict[str, Array], outputs: list[str]) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    found: list[Array] = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(outputs, feeds)
    return found


def in_strips(graphs: StripGraphs, image: Array, rows: list[int]) -> Array:
    """The feature map of uint8 [1, H, W, 3] whose strips begin at `rows`."""
    carried: list[Array] = []
    parts = []
    for top, bottom in pairwise(rows):
        place: Place = "first" if top == 0 else "last" if bottom == rows[-1] else "middle"
        rests = [] if place == "last" else [f"rest.{number}" for number in range(graphs.carries)]
        feeds = {"images": image[:, top:bottom]} | {f"carry.{number}": each for number, each in enumerate(carried)}
        part, *carried = run(graphs.graphs[place], feeds, ["feature_map", *rests])
        parts.append(part)
    return np.concatenate(parts, axis=2)


WINDOWS = st.lists(
    st.tuples(
        st.sampled_from(["Conv", "MaxPool", "AveragePool"]),
        st.integers(1, 5),  # kernel
        st.integers(1, 3),  # stride
        st.integers(1, 4),  # dilation
        st.integers(0, 2),  # padding above
        st.integers(0, 2),  # and below
        st.booleans(),  # joined with a branch that sees other rows
        st.booleans(),  # the output's size rounded up, along the columns too
    ),
    min_size=1,
    max_size=4,
)


def build(path: Path, windows: list[tuple[str, int, int, int, int, int, bool, bool]]) -> Path:
    """Windows one after the other, each with its own rows' arithmetic; some joined with a branch beside them."""
    base = onnx.load(write_model(path, channels=4))
    nodes = [node for node in base.graph.node if node.output[0] in ("floats", "planes", "centred", "normal")]
    weights = {each.name: each for each in base.graph.initializer if each.name in ("mean", "scale")}
    random = np.random.default_rng(0)
    source = "normal"

    def window(
        op: str, source: str, target: str, kernel: int, stride: int, dilation: int, pads: tuple[int, int], up: bool
    ) -> None:
        attributes: dict[str, Any] = {
            "kernel_shape": [kernel, 3],
            "strides": [stride, 2 if up else 1],
            "pads": [pads[0], 1, pads[1], 1],
        }
        if up:
            attributes["ceil_mode"] = 1
        inputs = [source]
        if op == "Conv":
            values = random.normal(0, 0.4, (3, 3, kernel, 3)).astype(np.float32)
            weights[f"{target}.w"] = numpy_helper.from_array(values, f"{target}.w")
            inputs.append(f"{target}.w")
        if op != "AveragePool":  # opset 18 has no dilation there
            attributes["dilations"] = [dilation, 1]
        nodes.append(helper.make_node(op, inputs, [target], **attributes))

    for number, (op, kernel, stride, dilation, above, below, joined, up) in enumerate(windows):
        up = up and op != "Conv"
        dilation = 1 if op == "AveragePool" else dilation
        extent = (kernel - 1) * dilation + 1
        above, below = min(above, kernel - 1), min(below, kernel - 1)
        window(op, source, f"w{number}", kernel, stride, dilation, (above, below), up)
        source = f"w{number}"
        if joined and above + below == extent - 1 and not up:
            window("MaxPool", f"w{number - 1}" if number else "normal", f"b{number}", 1, stride, 1, (0, 0), False)
            nodes.append(helper.make_node("Concat", [source, f"b{number}"], [f"c{number}"], axis=1))
            weights[f"m{number}"] = numpy_helper.from_array(
                random.normal(0, 0.5, (3, 6, 1, 1)).astype(np.float32), f"m{number}"
            )
            nodes.append(helper.make_node("Conv", [f"c{number}", f"m{number}"], [f"j{number}"]))
            source = f"j{number}"
    nodes.append(helper.make_node("Identity", [source], ["feature_map"]))
    outputs = [helper.make_tensor_value_info("feature_map", TensorProto.FLOAT, ["N", 3, "h", "w"])]
    graph = helper.make_graph(nodes, "windows", list(base.graph.input), outputs, list(weights.values()))
    onnx.save(helper.make_model(graph, opset_imports=base.opset_import, ir_version=10), path)
    return path


@settings(max_examples=120, deadline=None)
@given(WINDOWS, st.integers(0, 3), st.lists(st.integers(1, 3), max_size=4), st.integers(0, 40), st.integers(3, 9))
def test_strips_of_any_windows_make_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    windows: list[tuple[str, int, int, int, int, int, bool, bool]],
    more: int,
    middles: list[int],
    last: int,
    width: int,
) -> None:
    path = build(tmp_path_factory.mktemp("strips") / "m.onnx", windows)
    graphs = strip_graphs(path)
    rows = [0, graphs.least + more * graphs.step]
    for steps in middles:
        rows.append(rows[-1] + steps * graphs.step)
    rows.append(rows[-1] + graphs.step + last)
    image = np.random.default_rng(1).integers(0, 256, (1, rows[-1], width, 3), np.uint8)
    [whole] = run(path, {"images": image}, ["feature_map"])
    found = in_strips(graphs, image, rows)
    assert found.shape == whole.shape
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)


def test_a_cell_has_the_same_bits_wherever_strips_begin(tmp_path: Path) -> None:
    """Behind slices too, where a runtime that no longer knew the channels would choose another kernel."""
    builder, random = Builder(), np.random.default_rng(0)

    def conv(source: str, inputs: int, kernel: int, stride: int = 1) -> str:
        weights = random.normal(0, 0.2, (16, inputs, kernel, kernel)).astype(np.float32)
        named = builder.constant(f"w{len(builder.weights)}", weights)
        made = builder.node("Conv", [source, named], pads=[kernel // 2] * 4, strides=[stride, stride])
        return builder.node("Relu", [made])

    stem = conv(builder.last, 3, 3, 2)
    joined = builder.node("Concat", [conv(stem, 16, 1), conv(stem, 16, 3)], axis=1)
    pooled = builder.node("AveragePool", [joined], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2])
    builder.node("Identity", [conv(pooled, 32, 3)], output="feature_map")
    onnx.save(builder.model(), tmp_path / "m.onnx")
    graphs = strip_graphs(tmp_path / "m.onnx")
    image = random.integers(0, 256, (1, 200, 130, 3), np.uint8)
    first, *others = (in_strips(graphs, image, rows) for rows in ([0, 100, 200], [0, 40, 80, 200], [0, 160, 200]))
    for other in others:
        np.testing.assert_array_equal(other, first)


def test_what_is_carried_is_known_to_the_byte(tmp_path: Path) -> None:
    assert carried_bytes(write_model(tmp_path / "none.onnx", breaks_above=1000)) == 0  # it can't be cut
    for path in (write_model(tmp_path / "m.onnx", depth=3), BUNDLED, int8_copy(BUNDLED)):
        graphs, width = strip_graphs(path), 64
        image = np.zeros((1, graphs.least + graphs.step, width, 3), np.uint8)
        rests = [f"rest.{number}" for number in range(graphs.carries)]
        carried = run(graphs.graphs["first"], {"images": image}, rests)
        assert carried_bytes(path) == sum(each.nbytes for each in carried) / width > 0


def test_a_carry_that_is_lost_shows(tmp_path: Path) -> None:
    """The control."""
    graphs = strip_graphs(write_model(tmp_path / "m.onnx", depth=2))
    height = graphs.least + 8 * graphs.step
    image = np.random.default_rng(1).integers(0, 256, (1, height, 20, 3), np.uint8)
    rests = [f"rest.{number}" for number in range(graphs.carries)]
    first, *carried = run(graphs.graphs["first"], {"images": image[:, : graphs.least]}, ["feature_map", *rests])
    feeds = {f"carry.{number}": each for number, each in enumerate(carried)} | {"images": image[:, graphs.least :]}
    whole, damaged = (
        run(graphs.graphs["last"], feeds | changed, ["feature_map"])[0]
        for changed in ({}, {"carry.0": np.zeros_like(carried[0])})
    )
    assert first.shape[2] + whole.shape[2] == -(-height // 4)
    assert np.abs(damaged - whole).max() > 1e-3


@pytest.mark.parametrize("steps", [steps for steps, *_ in (*OBSTACLES, *KEPT)])
def test_a_file_says_of_tiles_what_becomes_of_it(tmp_path: Path, steps: list[Step | Stage]) -> None:
    """Without an obstacle strips make the whole; else they refuse, by the obstacle that the file names."""
    model = graph(*steps)
    onnx.save(model, tmp_path / "m.onnx")
    if obstacles := tiles_of(model).obstacles:
        with pytest.raises(InvalidModel, match=f"^{re.escape(obstacles[0])}$"):
            strip_graphs(tmp_path / "m.onnx")
        return
    graphs = strip_graphs(tmp_path / "m.onnx")
    image = np.random.default_rng(0).integers(0, 256, (1, 40, 9, 3), np.uint8)
    [whole] = run(tmp_path / "m.onnx", {"images": image}, ["feature_map"])
    np.testing.assert_allclose(in_strips(graphs, image, [0, 16, 24, 40]), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (node("Slice", longs(0), longs(2**40), longs(2), longs(2)), "Slice 'node_slice_4' changes the rows of its map"),
        (lambda b: b.node("Expand", [b.last, b.node("Shape", [b.last])]), "Shape 'node_shape_4' changes the rows"),
        (Cut((1, 0, 0, 0)), "Pad 'node_pad_4' changes the rows of its map"),
        (Window("Conv", (3, 3), auto_pad="SAME_UPPER"), "Conv 'node_conv_4' has auto_pad; write its padding out"),
    ],
    ids=["every second row", "a shape", "padding", "auto_pad"],
)
def test_what_only_strips_cannot_do_is_an_obstacle_too(last: Step | Stage, words: str) -> None:
    model = graph(STEM, last)
    assert graph_geometry(model).obstacles == ()
    [obstacle] = tiles_of(model).obstacles
    assert obstacle.startswith(words)
