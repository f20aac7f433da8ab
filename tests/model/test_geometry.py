"""Geometry read off a graph, against ONNX Runtime running it: sizes, what lights which cell, tiles put together."""

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from fullframe.errors import InvalidInput, InvalidModel
from fullframe.model.geometry import OUTPUT, Geometry, GraphGeometry, TensorGeometry, graph_geometry
from fullframe.model.repository import BUNDLED
from tests.model.graphs import (
    Branches,
    Builder,
    Cut,
    Pair,
    Resize,
    Stage,
    Window,
    build,
    chains,
    run,
    seen,
    session,
    stages,
    windows,
)

LARGEST = 40  # every size up to this one is run
few = settings(max_examples=50, deadline=None)


def counted(window: Window, size: Pair) -> Pair:
    """The window's positions, one by one."""
    result = []
    for axis in (0, 1):
        extent = (window.kernel[axis] - 1) * window.dilation[axis] + 1
        before, after = window.pads[axis], window.pads[axis + 2]
        if window.auto_pad == "VALID":
            before = after = 0
        elif window.auto_pad != "NOTSET":
            before, after = extent - 1, 0
        padded, position, count = before + size[axis] + after, 0, 0
        while position + extent <= padded:
            position, count = position + window.stride[axis], count + 1
        covered = position - window.stride[axis] + extent
        count += window.ceil_mode and covered < padded and position < before + size[axis]
        result.append(count)
    return result[0], result[1]


def fits(path: Sequence[Stage], size: Pair) -> bool:
    """Whether every window has a place."""
    for stage in path:
        if not isinstance(stage, Window | Branches):
            continue
        for window in stage.windows if isinstance(stage, Branches) else (stage,):
            after = counted(window, size)
            if min(after) < 1:
                return False
        size = after
    return True


def images_of(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (1, height, width, 3), np.uint8)


@few
@example([Window("MaxPool", (2, 2), (2, 2), pads=(0, 0, 1, 1), ceil_mode=True)])  # a window in padding alone
@example([Cut((0, 1, 2, 0), step=2), Resize((3, 2)), Window("Conv", (4, 3), (3, 2), auto_pad="SAME_LOWER")])
@given(stages)
def test_sizes_of_all_maps_are_the_runtimes(path: list[Stage]) -> None:
    model = build(*path, everything=True)
    graph, opened = GraphGeometry(model), session(model)
    height, width = graph.smallest_size
    for size in range(0, LARGEST, 3):
        image = np.zeros((1, max(height, size), max(width, LARGEST - size), 3), np.uint8)
        for name, found in run(opened, image).items():
            sides = [
                dim for dim, kind in zip(found.shape, graph.tensors[name].shape, strict=True) if kind in ("h", "w")
            ]
            assert graph.size_of(name, *image.shape[1:3]) == tuple(sides), (name, image.shape)
    assert not graph.doubts
    assert not graph.disagreements


@few
@given(chains)
def test_no_smaller_size_fits(path: list[Stage]) -> None:
    geometry = graph_geometry(build(*path))
    height, width = geometry.smallest_size
    large = 10_000
    assert fits(path, (height, large))
    assert fits(path, (large, width))
    # Never run: a size that is too small can end the process inside the runtime.
    for small in ((height - 1, large), (large, width - 1)):
        assert min(small) == 0 or not fits(path, small)
        with pytest.raises(InvalidInput, match=f"needs at least {height} x {width}"):
            geometry.output_size(*small)


def check_cells(lit: NDArray[np.bool_], found: TensorGeometry, axis: int, *, tight: bool) -> None:
    """Hold which pixels light which cells of a map, [pixels, cells], against what is said of it.

    No cell may see more; where `tight`, those inside the image see just that, first pixel and last.
    """
    pixels, inside = len(lit), 0
    for cell in range(lit.shape[1]):
        start = float(found.start[axis] + cell * found.jump[axis])
        end = start + float(found.receptive_field[axis])
        lighting = np.flatnonzero(lit[:, cell])
        assert ((start <= lighting) & (lighting < end)).all(), (found.name, cell)
        if tight and start >= 0 and end <= pixels:
            inside += 1
            assert (lighting[0], lighting[-1] + 1) == (start, end), (found.name, cell)
    assert not tight or inside >= 2


def lit_size(graph: GraphGeometry, axis: int) -> Pair:
    """An image with two cells of each map well inside along one axis, small along the other."""
    size = []
    for i, least in enumerate(graph.smallest_size):
        steps = 2 if i == axis else 0
        spans = (math.ceil(found.receptive_field[i] + steps * found.jump[i]) for found in graph.tensors.values())
        size.append(max(least, *spans))
    assume(max(size) <= 80)
    return size[0], size[1]


@few
@example([Resize((3, 2), "linear"), Window("Conv", (3, 3), (2, 2))])
@given(stages)
def test_every_map_sees_what_lights_it(path: list[Stage]) -> None:
    model = build(*path, everything=True)
    graph, opened = GraphGeometry(model), session(model)
    tight = not any(isinstance(stage, Resize) for stage in path)
    for axis in (0, 1):
        for name, lit in seen(opened, lit_size(graph, axis), axis).items():
            found = graph.tensors[name]
            if found.shape[2:] == ("h", "w"):
                check_cells(lit, found, axis, tight=tight and not found.obstacles)


@pytest.mark.parametrize(
    "change",
    [
        {"start": (-2, -2)},
        {"start": (0, 0)},
        {"receptive_field": (4, 4)},
        {"receptive_field": (6, 6)},
        {"jump": (1, 1)},
        {"jump": (3, 3)},
    ],
)
def test_control_a_wrong_value_is_caught(change: dict[str, Any]) -> None:
    """The lit pixels can tell."""
    model = build(Window("Conv", (3, 3), (2, 2), pads=(1, 1, 1, 1)), Window("MaxPool", (2, 2)))
    graph = GraphGeometry(model)
    found = graph.tensors["feature_map"]
    assert (found.jump, found.receptive_field, found.start) == ((2, 2), (5, 5), (-1, -1))
    for axis in (0, 1):
        lit = seen(session(model), (16, 17), axis)["feature_map"]
        check_cells(lit, found, axis, tight=True)
        with pytest.raises(AssertionError):
            check_cells(lit, replace(found, **change), axis, tight=True)


def from_tiles(geometry: Geometry, model: onnx.ModelProto, image: NDArray[np.uint8], cut: Pair, halo: int = 0) -> float:
    """The largest difference between the whole image's map and what two overlapping tiles a side keep of it.

    `cut` is where the second tile begins, in alignments. A cell is kept where all that it sees lies on the tile, less
    `halo` pixels, or beyond the image.
    """
    opened = session(model)
    whole = run(opened, image)["feature_map"]
    kept = np.full_like(whole, np.nan)
    alignment, pixels = geometry.graph.alignment(OUTPUT), image.shape[1:3]
    first = [each * step for each, step in zip(cut, alignment, strict=True)]
    for top, left in ((0, 0), (0, first[1]), (first[0], 0), (first[0], first[1])):
        begin, end, cells = [], [], []
        for i, at in enumerate((top, left)):
            begin.append(at)
            # The first tile goes on so far that no cell falls between the two.
            overlap = first[i] + geometry.receptive_field[i] + geometry.stride[i] + max(0, geometry.start[i])
            end.append(pixels[i] if at else min(pixels[i], max(overlap, geometry.smallest_size[i])))
        part = run(opened, image[:, begin[0] : end[0], begin[1] : end[1]])["feature_map"]
        for i in (0, 1):
            numbers = np.arange(part.shape[2 + i]) + begin[i] // geometry.stride[i]
            start = geometry.start[i] + numbers * geometry.stride[i]
            good = (start + halo >= begin[i]) | (begin[i] == 0)
            good &= (start + geometry.receptive_field[i] - halo <= end[i]) | (end[i] == pixels[i])
            cells.append(numbers[good])
        local = [numbers - at // step for numbers, at, step in zip(cells, begin, geometry.stride, strict=True)]
        kept[:, :, cells[0][:, None], cells[1]] = part[:, :, local[0][:, None], local[1]]
    assert np.isfinite(kept).all(), "every cell is some tile's"
    return float(np.abs(kept - whole).max() / max(1.0, np.abs(whole).max()))


@few
@example(
    [Window("Conv", (3, 3), (2, 2), pads=(1, 1, 1, 1)), Resize((2, 2), "linear"), Window("Conv", (3, 3), (2, 2))], 0
)
@example([Window("MaxPool", (2, 2), (2, 2), auto_pad="SAME_UPPER"), Window("Conv", (3, 3), auto_pad="SAME_LOWER")], 1)
@given(stages, st.integers(0, 2))
def test_tiles_put_together_are_the_whole(path: list[Stage], extra: int) -> None:
    model = build(*path)
    try:
        geometry = graph_geometry(model)
    except InvalidModel as error:  # resized, cells may lie closer than pixels
        assert "closer than the image's pixels" in str(error)
        assume(False)
    assume(not geometry.obstacles)
    alignment = geometry.graph.alignment(OUTPUT)
    image = images_of(*(max(2 * geometry.receptive_field[i] + extra + 5, alignment[i] * 3 + 7) for i in (0, 1)))
    cut = [max(1, (image.shape[1 + i] - max(geometry.smallest_size)) // alignment[i] // 2) for i in (0, 1)]
    assume(all(image.shape[1 + i] - cut[i] * alignment[i] >= geometry.smallest_size[i] for i in (0, 1)))
    assert from_tiles(geometry, model, image, (cut[0], cut[1])) < 1e-5


def test_control_a_halo_too_short_is_seen_in_tiles() -> None:
    model = build(Window("Conv", (5, 5), (2, 2), pads=(2, 2, 2, 2)), Window("Conv", (3, 3), pads=(1, 1, 1, 1)))
    geometry = graph_geometry(model)
    assert from_tiles(geometry, model, images_of(50, 61), (9, 10)) < 1e-6
    # Fewer pixels than one step of cells make none that is wrong.
    assert from_tiles(geometry, model, images_of(50, 61), (9, 10), halo=geometry.stride[0]) > 1e-3


@pytest.mark.parametrize(
    "path",
    [
        [Cut((5, 5, 0, 0), step=1), Window("Conv", (3, 3), pads=(1, 1, 1, 1))],
        [Window("Conv", (3, 3), (2, 2), auto_pad="SAME_UPPER")],
    ],
    ids=["crop", "SAME"],
)
def test_control_an_obstacle_is_one(path: list[Stage]) -> None:
    """Tiles of a graph that is said to allow none are wrong."""
    model = build(*path)
    geometry = graph_geometry(model)
    assert geometry.obstacles
    assert from_tiles(geometry, model, images_of(50, 61), (9, 10)) > 1e-3


@pytest.mark.parametrize(
    ("stage", "stride", "field", "start", "smallest"),
    [
        (Window("Conv", (3, 3), pads=(1, 1, 1, 1)), (1, 1), (3, 3), (-1, -1), (1, 1)),
        (Window("Conv", (3, 3), (2, 2)), (2, 2), (3, 3), (0, 0), (3, 3)),
        (Window("Conv", (3, 1), dilation=(2, 1)), (1, 1), (5, 1), (0, 0), (5, 1)),
        (Window("MaxPool", (3, 3), (2, 2), ceil_mode=True), (2, 2), (3, 3), (0, 0), (2, 2)),
        (Window("MaxPool", (2, 2), (2, 2), auto_pad="SAME_UPPER"), (2, 2), (2, 2), (0, 0), (1, 1)),
        (Cut((2, 0, 0, 3)), (1, 1), (1, 1), (-2, 0), (1, 1)),
        (Cut((1, 0, 0, 0), step=2), (2, 2), (1, 1), (1, 0), (2, 1)),
    ],
)
def test_known_values(stage: Stage, stride: Pair, field: Pair, start: Pair, smallest: Pair) -> None:
    geometry = graph_geometry(build(stage))
    assert geometry.stride == stride
    assert geometry.receptive_field == field
    assert geometry.start == start
    assert geometry.smallest_size == smallest
    assert geometry.obstacles == ()


@pytest.mark.parametrize(
    ("resize", "start", "field"),
    [
        (Resize((2, 2)), -2, 6),  # the second of a cell's copies begins where the first does
        (Resize((2, 2), "linear"), -4, 10),
        (Resize((2, 2), "cubic"), -8, 18),
    ],
)
def test_enlarged_cells_lie_closer(resize: Resize, start: int, field: int) -> None:
    """From a map of jump 4: jump /= scale, and the hull of what the copies of a cell see."""
    model = build(Window("MaxPool", (4, 4), (4, 4)), resize)
    geometry = graph_geometry(model)
    assert geometry.stride == (2, 2)
    assert geometry.start == (start, start)
    assert geometry.receptive_field == (field, field)
    assert geometry.graph.alignment(OUTPUT) == (4, 4), "a tile that begins between the coarse cells has others"
    lit = seen(session(model), (24, 24), 0)["feature_map"]
    check_cells(lit, geometry.graph.tensors["feature_map"], 0, tight=False)


def test_cells_closer_than_pixels_are_listed_but_no_feature_map() -> None:
    model = build(Resize((2, 4)), everything=True)
    found = GraphGeometry(model).tensors["feature_map"]
    assert found.jump == (Fraction(1, 2), Fraction(1, 4))
    with pytest.raises(InvalidModel, match="cells of 'feature_map' lie closer than the image's pixels"):
        graph_geometry(model)


def test_the_table_says_what_each_map_is() -> None:
    graph = GraphGeometry(build(Window("Conv", (3, 3), (2, 1)), "Relu"))
    found = {name: (tensor.node, tensor.shape) for name, tensor in graph.tensors.items()}
    assert found == {
        "images": ("", ("N", "h", "w", 3)),
        "cast_0": ("Cast 'node_cast_0'", ("N", "h", "w", 3)),
        "mul_1": ("Mul 'node_mul_1'", ("N", "h", "w", 3)),
        "transpose_2": ("Transpose 'node_transpose_2'", ("N", 3, "h", "w")),
        "conv_3": ("Conv 'node_conv_3'", ("N", 3, "h", "w")),
        "relu_4": ("Relu 'node_relu_4'", ("N", 3, "h", "w")),
        "feature_map": ("Identity 'node_feature_map'", ("N", 3, "h", "w")),
    }
    assert graph.tensors["images"].jump == graph.tensors["images"].receptive_field == (1, 1)
    assert graph.tensors["relu_4"].jump == (2, 1)


@settings(max_examples=30, deadline=None)
@given(windows(), windows(), st.sampled_from(("Concat", "Add")))
def test_branches_that_differ_are_told_with_the_first_size(one: Window, other: Window, join: str) -> None:
    builder = Builder()
    ends = [builder.window(builder.last, window) for window in (one, other)]
    apart = builder.model(ends)
    del apart.graph.node[-1]  # the feature map
    opened, graph = session(apart), GraphGeometry(apart)
    joined = build(Branches((one, other), join))
    told = {each.reason.split(" pixels ")[1][:4]: each.reason for each in GraphGeometry(joined).disagreements}
    for axis, word in enumerate(("high", "wide")):
        first = None
        least = graph.smallest_size[axis]
        for pixels in range(least, least + 10):  # strides are at most 3
            size = [max(least, 20) for least in graph.smallest_size]
            size[axis] = pixels
            maps = run(opened, np.zeros((1, *size, 3), np.uint8))
            cells = sorted({found.shape[2 + axis] for found in maps.values()})
            if len(cells) > 1:
                first = f"sizes{{}}: {cells[0]} and {cells[1]} cells for an image {pixels} pixels {word}"
                break
        if first is None:
            assert word not in told
            continue
        strides = sorted({one.stride[axis], other.stride[axis]})
        between = f" and strides {strides[0]} and {strides[1]}" if len(strides) > 1 else ""
        assert first.format(between) in told[word]
        with pytest.raises(InvalidInput, match=r"joins branches .* this model does not work at that size"):
            graph_geometry(joined).output_size(*size)


class Residual(nn.Module):
    """What torch exports of the usual parts: strided convolution, batch norm, activations, Add, pools, heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.deep = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.BatchNorm2d(8),
            nn.GELU(),
            nn.ChannelShuffle(2),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2),
            nn.LeakyReLU(0.1),
        )
        self.down = nn.AvgPool2d(2, 2, ceil_mode=True)
        self.head = nn.Linear(16, 5)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = (images.permute(0, 3, 1, 2).float() - 120) / torch.tensor([60.0, 61, 62]).view(3, 1, 1)
        x = self.pool(self.stem(x))
        x = self.down(torch.cat((x + self.deep(x), x), 1))
        features = x.mean((2, 3))
        return features, self.head(features), x


def test_what_torch_exports() -> None:
    net = Residual().eval()
    names = ("N", "H", "W")
    program = torch.onnx.export(
        net,
        (torch.zeros(8, 61, 67, 3, dtype=torch.uint8),),
        dynamo=True,
        opset_version=18,
        input_names=["images"],
        output_names=["features", "logits", "feature_map"],
        # The pool without padding makes torch ask for a least size.
        dynamic_shapes={"images": {axis: torch.export.Dim(name, min=5) for axis, name in enumerate(names)}},
        verbose=False,
    )
    assert program is not None
    geometry = graph_geometry(program.model_proto)
    assert geometry.stride == (8, 8)
    # 7x7 stride 2; 3x3 pool stride 2; then a 3x3 and a dilated 3x3 at jump 4; a 2x2 pool at jump 4.
    assert geometry.receptive_field == (7 + 4 + 2 * 4 + 4 * 4 + 4,) * 2
    assert geometry.start == (-3 - 2 - 4 - 8,) * 2
    assert geometry.smallest_size == (1, 1)
    assert geometry.obstacles == ()
    geometry.graph.check_sizes()
    for height, width in ((1, 1), (1, 50), (7, 5), (31, 33), (64, 65)):
        with torch.no_grad():
            expected = net(torch.zeros(1, height, width, 3, dtype=torch.uint8))[2].shape[2:]
        assert geometry.output_size(height, width) == tuple(expected)
    stem, pooled = (32 * 33, 16 * 17)
    assert geometry.multiply_adds(63, 66) == stem * 8 * 3 * 49 + pooled * (8 * 9 + 8 * 8 * 9)


def test_the_bundled_model_can_be_tiled() -> None:
    """Several levels of the image, their maps averaged on the coarsest grid and divided by summed weights."""
    geometry = graph_geometry(onnx.load(BUNDLED))
    assert not geometry.obstacles
    geometry.graph.check_sizes()
    assert geometry.graph.alignment(OUTPUT) == geometry.stride


def test_heads_count_for_the_smallest_size_alone() -> None:
    builder = Builder()
    builder.add(Window("Conv", (3, 3), pads=(1, 1, 1, 1)))
    builder.node("Identity", [builder.last], output="feature_map")
    alone = graph_geometry(builder.model())
    pooled = builder.window("feature_map", Window("MaxPool", (5, 4)))
    convolved = builder.window(pooled, Window("Conv", (1, 1)))
    builder.node("ReduceMean", [convolved], output="logits")
    geometry = graph_geometry(builder.model())
    assert alone.smallest_size == (1, 1)
    assert geometry.smallest_size == (5, 4)
    assert geometry.output_size(9, 9) == (9, 9)
    assert geometry.receptive_field == alone.receptive_field
    assert geometry.multiply_adds(9, 9) == alone.multiply_adds(9, 9) == 9 * 9 * 3 * 3 * 9
    assert geometry.obstacles == ()


def test_it_is_read_without_the_onnx_package() -> None:
    code = "import sys, fullframe.model.geometry; sys.exit('onnx' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
