"""Why a graph can't be computed in tiles: the node, the reason, and what is known of it all the same."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fullframe.errors import InvalidInput, InvalidModel
from fullframe.model.geometry import Geometry, GraphGeometry, graph_geometry
from fullframe.model.strips import tiles_of
from tests.model.graphs import Branches, Builder, Cut, Stage, Window, build, run, seen, session

Step = Callable[[Builder], str]
STEM = Window("Conv", (3, 3), (2, 2), pads=(1, 1, 1, 1))
SMOOTH = Window("Conv", (3, 3), pads=(1, 1, 1, 1))


def graph(*steps: Step | Stage) -> onnx.ModelProto:
    """Stages, and nodes that steps make of `builder.last`."""
    builder = Builder()
    for step in steps:
        if callable(step):
            builder.last = step(builder)
        else:
            builder.add(step)
    return builder.model()


def node(op: str, *constants: np.ndarray[Any, Any] | None, **attributes: Any) -> Step:
    """One node over what is there and constants."""

    def step(b: Builder) -> str:
        names = ["" if c is None else b.constant(f"c{len(b.weights)}_{i}", c) for i, c in enumerate(constants)]
        return b.node(op, [b.last, *names], **attributes)

    return step


def longs(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


def gate(of: Callable[[Builder], str]) -> Step:
    """Squeeze and excite: what `of` makes of the map, turned into weights, times the map."""

    def step(b: Builder) -> str:
        return b.node("Mul", [b.last, b.node("Sigmoid", [of(b)])])

    return step


def by_convolution(b: Builder) -> str:
    return b.window(b.node("GlobalAveragePool", [b.last]), Window("Conv", (1, 1)))


def by_matrix(b: Builder) -> str:
    """Flattened, and brought back by a shape that takes the number of images from the image."""
    means = b.node("Flatten", [b.node("ReduceMean", [b.last, b.ints(2, 3)])])
    weighted = b.node("Gemm", [means, b.constant("matrix", np.full((3, 3), 0.5, np.float32))])
    images = b.node("Gather", [b.node("Shape", [b.last]), b.ints(0)])
    return b.node("Reshape", [weighted, b.node("Concat", [images, b.ints(3, 1, 1)], axis=0)])


def by_rows(b: Builder) -> str:
    return b.node("ReduceMax", [b.last, b.ints(3)])


def as_large_as(b: Builder, image: str = "images") -> str:
    """The image's height and width, behind the map's other dimensions."""
    sides = b.node("Shape", [image], start=1, end=3)
    return b.node("Concat", [b.node("Shape", [b.last], end=2), sides], axis=0)


def checked(model: onnx.ModelProto) -> Geometry:
    """The geometry, its sizes those of the runtime."""
    geometry = graph_geometry(model)
    opened = session(model)
    for height, width in ((1, 1), (2, 3), (7, 5), (16, 16), (19, 40)):
        size = max(height, geometry.smallest_size[0]), max(width, geometry.smallest_size[1])
        found = run(opened, np.zeros((1, *size, 3), np.uint8))["feature_map"]
        assert geometry.output_size(*size) == found.shape[2:], size
    return geometry


OBSTACLES: Final[list[tuple[list[Step | Stage], str, str]]] = [
    (
        [STEM, gate(by_convolution)],
        "whole image",
        "GlobalAveragePool 'node_globalaveragepool_4' takes one value from the whole image, and Mul 'node_mul_7' "
        "puts that back into the map",
    ),
    ([STEM, gate(by_matrix)], "whole image", "ReduceMean 'node_reducemean_4' takes one value from the whole image"),
    ([STEM, gate(by_rows)], "whole image", "ReduceMax 'node_reducemax_4' takes one value from whole rows"),
    (
        [STEM, node("InstanceNormalization", np.ones(3, "f"), np.zeros(3, "f"))],
        "whole image",
        "InstanceNormalization 'node_instancenormalization_4' computes every cell from all",
    ),
    ([STEM, node("Softmax", axis=-1)], "whole image", "Softmax 'node_softmax_4' works along a side of the map"),
    (
        [Window("Conv", (3, 3), (2, 2), auto_pad="SAME_UPPER")],
        "image size",
        "Conv 'node_conv_3' has auto_pad SAME_UPPER with a stride of 2, so where its windows begin depends",
    ),
    (
        [STEM, lambda b: b.node("Resize", [b.last, "", "", as_large_as(b)])],
        "image size",
        "Resize 'node_resize_7' scales the map to a size computed from another",
    ),
    (
        [
            STEM,
            node("Resize", None, np.array([1, 1, 2, 2], "f"), mode="linear"),
            lambda b: b.node("Resize", [b.last, "", "", as_large_as(b)]),
        ],
        "image size",
        "Resize 'node_resize_8' scales the map to a size",
    ),
    (
        [STEM, lambda b: b.node("Div", [b.last, b.node("Cast", [b.node("Size", [b.last])], to=1)])],
        "unknown",
        "Size 'node_size_4' is not known to keep",
    ),
    (
        [
            STEM,
            lambda b: b.node(
                "Add", [b.last, b.node("Cast", [b.node("Shape", ["images"], start=1, end=2)], to=TensorProto.FLOAT)]
            ),
        ],
        "image size",
        "Shape 'node_shape_4' takes the image's size, and Add 'node_add_6' puts that back into the map",
    ),
    ([STEM, Cut((3, 0, 0, 0), step=1), SMOOTH], "image size", "Slice 'node_slice_4' crops the map's border"),
    (
        [STEM, node("Pad", longs(0, 0, 1, 1, 0, 0, 1, 1), mode="edge")],
        "image size",
        "Pad 'node_pad_4' fills its padding with the map's own cells (mode 'edge')",
    ),
]
"""Graphs that can't be computed in tiles, with the kind of the obstacle and how it is told."""


@pytest.mark.parametrize(("steps", "kind", "words"), OBSTACLES)
def test_what_cannot_be_tiled_says_why_and_is_still_known(steps: list[Step | Stage], kind: str, words: str) -> None:
    model = graph(*steps)
    geometry = checked(model)
    assert kind in {obstacle.kind for obstacle in geometry.obstacles}
    assert any(str(obstacle).startswith(words) for obstacle in geometry.obstacles), geometry.obstacles
    assert not tiles_of(model).possible
    assert geometry.graph.tensors["images"].obstacles == ()


KEPT: Final[list[tuple[list[Step | Stage], str]]] = [
    ([STEM, node("Softmax", axis=1)], "over channels"),
    ([STEM, node("Transpose", perm=[0, 2, 3, 1]), node("LayerNormalization", np.ones(3, "f"), axis=-1),
      node("MatMul", np.ones((3, 5), "f")), node("Transpose", perm=[0, 3, 1, 2])], "in the order of channels last"),
    ([STEM, lambda b: b.node("Reshape", [b.node("Transpose", [b.node("Reshape", [
        b.last, b.node("Concat", [b.ints(0, 3, 1), b.node("Shape", [b.last], start=2)], axis=0)])],
        perm=[0, 2, 1, 3, 4]), b.node("Shape", [b.last])])], "channels shuffled"),
    ([STEM, lambda b: b.node("Sum", b.node("Split", [b.last], axis=1, num_outputs=1).split())], "split"),
    ([STEM, node("ReduceMean", longs(1))], "a mean over channels"),
    ([STEM, lambda b: b.node("Expand", [b.last, b.node("Shape", [b.last])])], "expanded to its own shape"),
    ([STEM, node("Slice", longs(0, 1), longs(2**40, 2**40), longs(2, 3), longs(2, 2))], "every second cell"),
    ([STEM, lambda b: b.node("Mul", [
        b.last, b.node("Unsqueeze", [b.constant("w", np.ones(3, "f")), b.ints(1, 2)])])],
     "a constant brought into shape"),
]  # fmt: skip
"""Graphs that can, each with what it has."""


@pytest.mark.parametrize(("steps", "kept"), KEPT, ids=[kept for _, kept in KEPT])
def test_what_keeps_cells_in_their_places_is_no_obstacle(steps: list[Step | Stage], kept: str) -> None:
    geometry = checked(graph(*steps))
    assert geometry.obstacles == (), kept
    assert geometry.start == ((-1, 1) if kept == "every second cell" else (-1, -1))
    geometry.graph.check_sizes()


@settings(max_examples=40, deadline=None)
@example(3, 2, False)
@example(2, 2, True)
@example(1, 2, False)
@example(1, 4, False)  # windows that leave gaps may crop
@given(st.integers(1, 6), st.integers(1, 4), st.booleans())
def test_same_padding_is_an_obstacle_where_windows_begin_elsewhere_at_other_sizes(
    kernel: int, stride: int, lower: bool
) -> None:
    auto_pad = "SAME_LOWER" if lower else "SAME_UPPER"
    model = build(Window("Conv", (kernel, 1), (stride, 1), auto_pad=auto_pad))
    geometry, opened = graph_geometry(model), session(model)
    begins, ends, cell = set(), set(), 6  # far from the border
    for height in range(cell * stride + 12, cell * stride + 12 + stride):
        inside = np.flatnonzero(seen(opened, (height, 1), 0)["feature_map"][:, cell]) - cell * stride
        begins.add(int(inside[0]))
        ends.add(int(inside[-1]) + 1)
        assert geometry.output_size(height, 1) == (-(-height // stride), 1)
    start, end = geometry.start[0], geometry.start[0] + geometry.receptive_field[0]
    if stride <= kernel or geometry.obstacles == ():
        assert (geometry.obstacles == ()) == (len(begins) == 1)
        assert (start, end) == (min(begins), max(ends))
    assert start <= min(begins)
    assert max(ends) <= end


def test_pools_with_gaps_and_same_padding_are_doubted() -> None:
    """The runtime refuses such padding at some sizes."""
    geometry = graph_geometry(build(Window("MaxPool", (1, 1), (2, 2), auto_pad="SAME_UPPER")))
    with pytest.raises(InvalidModel, match="MaxPool 'node_maxpool_3' has auto_pad SAME and windows that leave gaps"):
        geometry.graph.check_sizes()


def test_branches_that_differ_at_odd_sizes_say_at_which_first() -> None:
    """Inception v2's reduction."""
    pool = Window("MaxPool", (3, 3), (2, 2), pads=(0, 0, 1, 1))
    geometry = graph_geometry(build(SMOOTH, Branches((STEM, pool), "Concat")))
    high, wide = geometry.obstacles
    assert high.node == wide.node == "Concat 'node_concat_6'"
    assert high.kind == "branches"
    assert high.reason.startswith(
        "joins branches of different sizes: 1 and 2 cells for an image 3 pixels high, the first"
    )
    assert "3 pixels wide" in wide.reason
    assert geometry.output_size(8, 10) == (4, 5)
    with pytest.raises(InvalidInput, match=r"Concat 'node_concat_6' joins branches of 4 and 5 cells .* 9 pixels wide"):
        geometry.output_size(8, 9)
    with pytest.raises(InvalidModel, match="not every image size is known to work: Concat 'node_concat_6'"):
        geometry.graph.check_sizes()
    # Padded as the reference says, they agree.
    assert not build_obstacles(Branches((STEM, Window("MaxPool", (3, 3), (2, 2), pads=(0, 0, 2, 2))), "Concat"))
    [first, _] = build_obstacles(Branches((STEM, Window("Conv", (1, 1))), "Add"))
    assert "different sizes and strides 1 and 2: 1 and 2 cells for an image 2 pixels high" in first


def build_obstacles(*steps: Step | Stage) -> list[str]:
    return [str(each) for each in graph_geometry(graph(*steps)).obstacles]


def test_a_constant_of_one_size_fits_one_image() -> None:
    [first, *_] = build_obstacles(STEM, node("Add", np.zeros((1, 3, 7, 7), "f")))
    assert first.startswith("Add 'node_add_4' joins branches of different sizes: 1 and 7 cells for an image 1 pixels")


def test_the_first_of_each_kind_stands_for_all() -> None:
    same = Window("MaxPool", (3, 3), (2, 2), auto_pad="SAME_UPPER")
    tiles = tiles_of(graph(same, gate(by_convolution), gate(by_convolution), gate(by_convolution)))
    assert len(tiles.obstacles) == 2
    assert tiles.obstacles[0].startswith("MaxPool 'node_maxpool_3' has auto_pad SAME_UPPER")
    assert tiles.obstacles[1].endswith("puts that back into the map (and 2 more such)")


def test_a_class_map_of_other_cells_stands_against_tiles() -> None:
    builder = Builder()
    builder.add(STEM)
    builder.node("Identity", [builder.last], output="feature_map")
    fine = builder.node("Conv", ["feature_map", builder.constant("k1", np.ones((5, 3, 1, 1), "f"))], output="class_map")
    assert graph_geometry(builder.model(["feature_map", fine])).obstacles == ()
    builder.nodes.pop()
    wide = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    builder.node(
        "Conv", ["feature_map", builder.constant("k3", np.ones((5, 3, 3, 3), "f"))], output="class_map", **wide
    )
    [obstacle] = graph_geometry(builder.model(["feature_map", "class_map"])).obstacles
    assert str(obstacle) == "Conv 'node_class_map' makes 'class_map' of other cells than 'feature_map''s"
    builder.nodes.pop()
    builder.last = "feature_map"
    builder.node("Mul", ["feature_map", by_convolution(builder)], output="class_map")
    [obstacle] = graph_geometry(builder.model(["feature_map", "class_map"])).obstacles
    assert obstacle.kind == "whole image"


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([node("Whatever")], "Whatever 'node_whatever_4' is not known to keep what a cell sees bounded"),
        ([node("Relu", domain="com.example")], "Relu 'node_relu_4' is not known to keep"),
        ([node("GlobalMaxPool")], "GlobalMaxPool 'node_globalmaxpool_4' takes one value from the whole image"),
        ([node("Reshape", longs(0, 0, 7, 7))], "Reshape 'node_reshape_4' has a shape that fits one image size alone"),
        ([node("Flatten")], "Flatten 'node_flatten_4' rearranges the cells of the whole map"),
        ([node("Resize", None, None, longs(1, 3, 7, 7))], "Resize 'node_resize_4' scales every map to 7 cells"),
        ([node("Resize", None, np.array([1, 1, 1.5, 1], "f"))], "Resize 'node_resize_4' scales by 1.5; only by whole"),
        (
            [node("Resize", None, np.array([1, 1, 2, 2], "f"), coordinate_transformation_mode="align_corners")],
            "Resize 'node_resize_4' scales in mode 'align_corners', which depends on the map's size",
        ),
        (
            [Window("Conv", (3, 3), dilation=(2, 2), auto_pad="SAME_UPPER")],
            "Conv 'node_conv_4' has auto_pad SAME with a dilation",
        ),
        ([lambda b: b.node("Concat", [b.last, b.last], axis=-2)], "Concat 'node_concat_4' joins maps side by side"),
        (
            [node("Transpose", perm=[0, 2, 3, 1]), lambda b: b.window(b.last, Window("MaxPool", (3, 3)))],
            "MaxPool 'node_maxpool_5' is not over [N, C, height, width]",
        ),
        ([lambda b: b.node("MatMul", [b.last, b.last])], "MatMul 'node_matmul_4' multiplies by what is no constant"),
        ([lambda b: b.node("Conv", [b.last, by_rows(b)])], "Conv 'node_conv_5' has weights that are computed from the"),
        ([node("Transpose", perm=[0, 2, 3, 1])], "it has other dimensions"),
        ([lambda b: b.constant("fixed", np.zeros((1, 3, 2, 2), "f"))], "it is not computed from the image"),
    ],
)  # fmt: skip
def test_a_feature_map_that_cannot_be_followed_names_the_node(steps: list[Step | Stage], words: str) -> None:
    model = graph(STEM, *steps)
    with pytest.raises(InvalidModel) as error:
        graph_geometry(model)
    assert str(error.value).startswith(
        f"the graph has no output 'feature_map' [N, C, h, w] that can be followed: {words}"
    )
    table = GraphGeometry(model)
    assert table.tensors["conv_3"].jump == (2, 2), "what lies before is known"
    assert table.size_of("conv_3", 9, 5) == (5, 3)


def test_padding_computed_from_the_size_leaves_the_stride_and_a_doubt() -> None:
    """As networks with TensorFlow's padding are exported."""

    def pad(b: Builder) -> str:
        height = b.node("Mod", [b.node("Shape", ["images"], start=1, end=2), b.ints(2)])
        return b.node("Pad", [b.last, b.node("Concat", [b.ints(0, 0, 0, 0, 0, 0), height, b.ints(1)], axis=0)])

    geometry = graph_geometry(graph(STEM, pad, Window("Conv", (3, 3), (2, 2))))
    assert geometry.stride == (4, 4)
    assert geometry.smallest_size == (1, 3), "for all that can be followed"
    [obstacle] = geometry.obstacles
    assert str(obstacle).startswith("Pad 'node_pad_7' pads or crops by amounts that change with the image's size")
    with pytest.raises(InvalidModel, match="not every image size is known to work: Pad 'node_pad_7'"):
        geometry.graph.check_sizes()
    with pytest.raises(InvalidModel, match="the size of 'feature_map' can't be followed: Pad 'node_pad_7'"):
        geometry.output_size(20, 20)
    assert geometry.graph.size_of("feature_map", 20, 20) == (None, 5)


def test_a_head_for_one_size_is_told_though_the_map_can_be_tiled() -> None:
    builder = Builder()
    builder.add(STEM)
    builder.node("Identity", [builder.last], output="feature_map")
    flat = builder.node("Flatten", ["feature_map"])
    builder.node("Gemm", [flat, builder.constant("m", np.ones((147, 5), "f"))], output="logits")
    model = builder.model(["feature_map", "logits"])
    geometry = graph_geometry(model)
    assert tiles_of(model).possible
    with pytest.raises(InvalidModel, match="Gemm 'node_logits' multiplies a flattened map by a matrix, which fits one"):
        geometry.graph.check_sizes()


def test_a_graph_within_the_graph_is_not_trusted() -> None:
    """It reads tensors that are not among its inputs."""
    builder = Builder()
    builder.add(STEM)
    branch = helper.make_graph(
        [helper.make_node("Relu", [builder.last], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    condition = builder.constant("condition", np.array(True))
    builder.node("If", [condition], output="feature_map", then_branch=branch, else_branch=branch)
    with pytest.raises(InvalidModel, match="If 'node_feature_map' is not known to keep"):
        graph_geometry(builder.model())


def test_softmax_flattened_before_opset_13() -> None:
    model = graph(STEM, node("Softmax", axis=1))
    assert graph_geometry(model).obstacles == ()
    model.opset_import[0].version = 11
    [obstacle] = graph_geometry(model).obstacles
    assert obstacle.node == "Softmax 'node_softmax_4'"


def test_any_graph_can_be_listed() -> None:
    """A float image, channels first, of one size in the file."""
    weights = helper.make_tensor("w", TensorProto.FLOAT, (4, 3, 7, 7), np.ones(588, np.float32).tobytes(), raw=True)
    data = helper.make_tensor_value_info("data", TensorProto.FLOAT, [1, 3, 224, 224])
    prob = helper.make_tensor_value_info("prob", TensorProto.FLOAT, None)
    nodes = [
        helper.make_node("Conv", ["data", "w"], ["conv"], strides=[2, 2], pads=[3, 3, 3, 3]),
        helper.make_node("GlobalAveragePool", ["conv"], ["prob"]),
    ]
    graph = GraphGeometry(helper.make_model(helper.make_graph(nodes, "zoo", [data], [prob], [weights])))
    assert graph.tensors["data"].shape == ("N", 3, "h", "w")
    assert graph.tensors["conv"].shape == ("N", 4, "h", "w")
    assert graph.tensors["conv"].node == "Conv 'conv'"
    assert graph.size_of("conv", 300, 451) == (150, 226)
    assert set(graph.tensors) == {"data", "conv"}
    graph.check_sizes()
    with pytest.raises(InvalidModel, match="the graph has no tensor of that name"):
        graph.size_of("elsewhere", 300, 451)


def test_what_is_no_model_of_ours_is_refused() -> None:
    builder = Builder()
    builder.node("Relu", [builder.last], output="elsewhere")
    model = builder.model(["elsewhere"])
    del model.graph.node[-1]
    with pytest.raises(InvalidModel, match="no output 'feature_map'"):
        graph_geometry(model)
    del model.graph.input[:]
    with pytest.raises(InvalidModel, match="no input"):
        GraphGeometry(model)
    for window in (Window("Conv", (1, 1), (5000, 1)), Window("MaxPool", (1, 5000))):
        with pytest.raises(InvalidModel, match="more than 4096 pixels"):
            graph_geometry(build(window))
