"""Every graph that an engine is given, in PyTorch beside ONNX Runtime: models, strips, heads, batches of many sizes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from fullframe.convert.options import Options
from fullframe.convert.pipeline import convert
from fullframe.engine.graph import TorchSession
from fullframe.errors import InvalidModel
from fullframe.model.geometry import graph_geometry
from fullframe.model.heads import head_graph
from fullframe.model.ragged import ragged_model
from fullframe.model.repository import BUNDLED, int8_copy
from fullframe.model.strips import Place, strip_graphs
from tests.convert.families import FAMILIES
from tests.convert.light import NAMES, light_model
from tests.convert.test_families import ALL, MEAN, SOME, STD, exported
from tests.engine.graph.parity import FUSED, PROMISE, Array, differences, largest_difference, serialized
from tests.models import Head, write_model
from tests.pictures import pixels

BEYOND = ((0, 3), (28, 21))
"""Rows and columns beyond the smallest size."""
SUBSETS = (["logits"], ["features"], ["features", "logits"], ["logits", "feature_map"])


def agrees(model: onnx.ModelProto, device: torch.device, sizes: Sequence[tuple[int, int]] = BEYOND) -> None:
    """Alone, in batches of one size and of several."""
    least = graph_geometry(model).smallest_size
    ragged = ragged_model(model)
    for fused in FUSED:
        for rows, columns in sizes:
            height, width = least[0] + rows, least[1] + columns
            images = np.stack([pixels(height, width, seed=seed) for seed in range(2)])
            found = differences(model, {"images": images}, SUBSETS, device=device, fused=fused)
            assert max(found.values()) <= PROMISE, (fused, height, width, found)
        own = np.array([[height, least[1] + 3], [least[0] + 5, width]], np.int64)
        found = differences(ragged, {"images": images, "sizes": own}, SUBSETS, device=device, fused=fused)
        assert max(found.values()) <= PROMISE, (fused, found)
        program = TorchSession(serialized(ragged), fused=fused)._program([*found])
        assert not program.asks, "what waits for a value can't be recorded and replayed"


def test_the_bundled_model(device: torch.device) -> None:
    agrees(onnx.load(BUNDLED), device, ((0, 0), (0, 6), (32, 46), (96, 71)))


@pytest.mark.parametrize(
    ("name", "exporter"),
    # What a slow exporter makes is slow too.
    [pytest.param(*each, marks=[] if each in SOME and each[1] != "dynamo" else pytest.mark.slow) for each in ALL],
)
def test_every_family_as_it_is_converted(device: torch.device, name: str, exporter: str) -> None:
    agrees(convert(exported(FAMILIES[name], exporter), Options(name, mean=MEAN, std=STD)).model, device)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "squeezenet" else pytest.mark.slow) for name in NAMES]
)
def test_the_light_classifiers(device: torch.device, name: str) -> None:
    agrees(convert(light_model(name), Options(name)).model, device, BEYOND[-1:])


@pytest.mark.parametrize("head", ["linear", "layers", "windows", "peeks"])
def test_small_models_and_their_heads(device: torch.device, head: Head, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.onnx", head=head)
    for fused in FUSED:
        feeds = {"images": np.stack([pixels(37, 50), pixels(37, 50, seed=1)])}
        found = differences(path, feeds, [["logits"]], device=device, fused=fused)
        if head not in ("linear", "peeks"):
            features = np.random.default_rng(0).normal(0, 1, (3, 16)).astype(np.float32)
            found |= differences(head_graph(path), {"features": features}, device=device, fused=fused)
        assert max(found.values()) <= PROMISE, found


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("model", ["small", "bundled"])
def test_strips(device: torch.device, model: str, fused: bool, tmp_path: Path) -> None:
    """Each strip's graph beside ONNX Runtime's, and what is carried fed to the next as it came."""
    path = BUNDLED if model == "bundled" else write_model(tmp_path / "m.onnx", depth=2)
    graphs = strip_graphs(path)
    rows = [0, graphs.least, graphs.least + 2 * graphs.step, graphs.least + 3 * graphs.step + 3]
    image = pixels(rows[-1], 40)[np.newaxis]
    carried: list[Array] = []
    parts = []
    places: tuple[Place, ...] = ("first", "middle", "last")
    for place, top, bottom in zip(places, rows, rows[1:], strict=False):
        feeds = {"images": image[:, top:bottom]} | {f"carry.{number}": each for number, each in enumerate(carried)}
        graph = graphs.graphs[place]
        found = differences(graph, feeds, device=device, fused=fused)
        assert max(found.values()) <= PROMISE, (place, found)
        names = ["feature_map", *(f"rest.{number}" for number in range(graphs.carries) if place != "last")]
        part, *carried = TorchSession(graph, device=device, fused=fused).run(names, feeds)
        parts.append(part)
    (whole,) = TorchSession(path, device=device, fused=fused).run(["feature_map"], {"images": image})
    assert largest_difference(np.concatenate(parts, axis=2), whole) <= PROMISE


def test_a_model_in_integers_is_refused() -> None:
    with pytest.raises(InvalidModel, match="serve the float model"):
        TorchSession(int8_copy(BUNDLED))


def altered(model: onnx.ModelProto, change: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    other = onnx.ModelProto.FromString(model.SerializeToString())
    change(other)
    return other


def _pads(model: onnx.ModelProto) -> None:
    pool = next(node for node in model.graph.node if node.op_type == "AveragePool")
    next(each for each in pool.attribute if each.name == "count_include_pad").i = 1


def _weight(model: onnx.ModelProto) -> None:
    weight = next(each for each in model.graph.initializer if len(each.dims) == 4)
    values = numpy_helper.to_array(weight).copy()
    values.flat[::100] *= 1.1
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))


@pytest.mark.parametrize("change", [_pads, _weight])
def test_a_graph_that_is_a_little_other_would_not_pass(change: Callable[[onnx.ModelProto], None]) -> None:
    """The control: padding that counts in averages; a weight in a hundred of the first layer off by a tenth."""
    model, feeds = onnx.load(BUNDLED), {"images": pixels(21, 30)[np.newaxis]}
    (found,) = TorchSession(altered(model, change).SerializeToString()).run(["logits"], feeds)
    (own,) = TorchSession(BUNDLED).run(["logits"], feeds)
    assert largest_difference(found, own) > 10 * PROMISE
