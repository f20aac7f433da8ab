"""Sessions: nothing waits for the device, memory is let go, threads share one; what comes out for what goes in."""

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from fullframe.engine.graph import TorchSession
from fullframe.errors import InvalidModel
from fullframe.model.ragged import ragged_model
from fullframe.model.repository import BUNDLED
from fullframe.model.strips import strip_graphs
from tests.engine.graph.parity import FUSED, in_onnx_runtime, serialized
from tests.model.test_ragged_graphs import AVERAGE3, CEILED, CONV3, MAX3, Squeeze, build
from tests.models import write_model
from tests.pictures import pixels
from tests.ragged import images_of, padded

META = torch.device("meta")
"""Tensors without values: to ask for one is an error."""


def on_meta(model: bytes, feeds: dict[str, Any], fused: bool) -> dict[str, tuple[int, ...]]:
    session = TorchSession(model, device=META, fused=fused)
    names = [each.name for each in session.outputs]
    given = {name: torch.from_numpy(each).to(META) for name, each in feeds.items()}
    return {name: tuple(each.shape) for name, each in zip(names, session.run_tensors(names, given), strict=True)}


@pytest.mark.parametrize("fused", FUSED)
def test_nothing_is_asked_of_the_device_on_the_way(fused: bool, tmp_path: Path) -> None:
    """Of no model's values, masks, own sizes or carried rows: shapes alone decide what is launched."""
    image = pixels(40, 33)[np.newaxis]
    batch = padded(images_of([(24, 31), (33, 18)]))
    own = build(CONV3, MAX3, AVERAGE3, Squeeze(), *CEILED)
    strips = strip_graphs(write_model(tmp_path / "m.onnx"))
    first = strips.graphs["first"]
    for model, feeds in (
        (BUNDLED.read_bytes(), {"images": image}),
        (serialized(ragged_model(onnx.load(BUNDLED))), batch),
        (serialized(ragged_model(own)), batch),
        (first, {"images": image}),
    ):
        wanted = in_onnx_runtime(model, feeds)
        assert on_meta(model, feeds, fused) == {name: each.shape for name, each in wanted.items()}


def asks() -> bytes:
    """A graph whose output's shape is in the image."""
    nodes = [
        helper.make_node("Cast", ["images"], ["numbers"], to=onnx.TensorProto.INT64),
        helper.make_node("Reshape", ["numbers", "flat"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "asks",
        [helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, [1, 1, 1, 3])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None] * 3)],
        [numpy_helper.from_array(np.array([-1]), "flat")],
    )
    return serialized(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def test_what_has_to_ask_does() -> None:
    """The control."""
    image = np.array([[[[2, 1, 3]]]], np.uint8)
    (found,) = TorchSession(asks()).run(["y"], {"images": image})
    assert found.shape == (2, 1, 3)
    with pytest.raises((RuntimeError, NotImplementedError)):
        on_meta(asks(), {"images": image}, False)


def most_alive(session: TorchSession, outputs: list[str], feeds: dict[str, Any]) -> int:
    """The largest number of maps that are alive together behind any step."""
    program = session._program(outputs)
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watched(run: Any) -> Any:
        def step(*inputs: Any) -> Any:
            nonlocal most
            found = run(*inputs)
            made.extend(weakref.ref(each) for each in (found if isinstance(found, tuple) else (found,)))
            most = max(most, len({id(each) for ref in made if (each := ref()) is not None and each.dim() == 4}))
            return found

        return step

    program._steps = [step._replace(run=watched(step.run)) for step in program._steps]
    session.run(outputs, feeds)
    gc.collect()
    return most


@pytest.mark.parametrize("fused", FUSED)
def test_each_tensor_is_let_go_after_its_last_reader(fused: bool, tmp_path: Path) -> None:
    """In a chain a map and the one that it is made of are there, however long it is."""
    feeds = {"images": pixels(16, 16)[np.newaxis]}
    for depth in (2, 9):
        session = TorchSession(write_model(tmp_path / f"{depth}.onnx", depth=depth), fused=fused)
        assert most_alive(session, ["features"], feeds) <= 3


def test_threads_share_a_session(device: torch.device) -> None:
    session = TorchSession(BUNDLED, device=device)
    images = [pixels(16 + number, 24)[np.newaxis] for number in range(3)]
    outputs = (["logits"], ["features", "logits"], ["class_map"], ["features", "logits", "feature_map", "class_map"])
    work = [(names, image) for names in outputs for image in images]
    alone = [TorchSession(BUNDLED, device=device).run(names, {"images": image}) for names, image in work[:3]]
    found: dict[int, Any] = {}

    def run(first: int) -> None:
        for number in range(first, len(work), 4):
            names, image = work[number]
            found[number] = session.run(names, {"images": image})

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(work)
    for number, wanted in enumerate(alone):
        np.testing.assert_array_equal(found[number][0], wanted[0])


def test_tensors_go_in_and_come_out_where_they_are(device: torch.device) -> None:
    session = TorchSession(BUNDLED, device=device)
    image = pixels(20, 24)[np.newaxis]
    (found,) = session.run_tensors(["logits"], {"images": torch.from_numpy(image).to(device)})
    assert found.device.type == device.type and found.dtype is torch.float32 and not found.requires_grad
    np.testing.assert_array_equal(found.cpu().numpy(), session.run(["logits"], {"images": image})[0])


def test_what_is_carried_keeps_no_map_alive(tmp_path: Path) -> None:
    graphs = strip_graphs(write_model(tmp_path / "m.onnx"))
    session = TorchSession(graphs.graphs["first"])
    image = torch.from_numpy(pixels(graphs.least + 8 * graphs.step, 40)[np.newaxis])
    rests = [f"rest.{number}" for number in range(graphs.carries)]
    for rest in session.run_tensors(rests, {"images": image}):
        assert rest.untyped_storage().nbytes() == rest.nbytes


def test_other_types_of_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype is torch.float64; it must be float32, bfloat16 or float16"):
        TorchSession(BUNDLED, dtype=torch.float64)


@pytest.mark.parametrize("op", ["Add", "Mul", "Sub"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 1, 1), (1, 3, 4, 1), (), (1,), (6, 2, 3, 4, 5), (2, 1, 1, 1)])
def test_memory_is_taken_over_only_where_it_suffices(op: str, shape: tuple[int, ...]) -> None:
    """A map that nobody else reads meets what reaches as far as itself, less far, or further."""
    random = np.random.default_rng(0)
    x, other = random.normal(0, 1, (2, 3, 4, 5)).astype("f4"), random.normal(0, 1, shape).astype("f4")
    shapes = {"x": x.shape, "other": other.shape}
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["n"]), helper.make_node(op, ["n", "other"], ["y"])],
        "meets",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, each) for name, each in shapes.items()],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
    )
    model = serialized(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))
    feeds = {"x": x.copy(), "other": other.copy()}
    (found,) = TorchSession(model).run(["y"], feeds)
    np.testing.assert_array_equal(found, in_onnx_runtime(model, feeds)["y"])
    np.testing.assert_array_equal(feeds["x"], x, "what was fed is as it was")
    np.testing.assert_array_equal(feeds["other"], other)


def small(node: onnx.NodeProto, *before: onnx.NodeProto, **constants: list[int]) -> bytes:
    """A graph from float x [n] to y."""
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [*before, node],
        "small",
        [helper.make_tensor_value_info("x", kind, ["n"])],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.array(each), name) for name, each in constants.items()],
    )
    return serialized(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (small(helper.make_node("Add", ["x", "z"], ["y"], "sum")), "Add 'sum' reads 'z', which nothing"),
        (
            small(
                helper.make_node("Where", ["mask", "x", "x"], ["y"], "w"),
                helper.make_node("Dropout", ["x"], ["d", "mask"]),
            ),
            "Where 'w' reads 'mask', which nothing",
        ),
        (
            small(
                helper.make_node("Reshape", ["x", "s"], ["y"]),
                helper.make_node("Reshape", ["a", "b"], ["s"], "odd"),
                a=[1, 2, 3],
                b=[2, 2],
            ),
            "Reshape 'odd' can't be computed: ",
        ),
    ],
    ids=["nobody makes it", "a dropout's mask", "constants that don't fit"],
)
def test_a_graph_that_can_t_be_run_names_its_node(model: bytes, reason: str) -> None:
    with pytest.raises(InvalidModel, match=reason):
        TorchSession(model)


def test_a_node_that_fails_is_named() -> None:
    session = TorchSession(small(helper.make_node("Reshape", ["x", "s"], ["y"], "odd"), s=[2, 2]))
    assert session.run(["y"], {"x": np.zeros(4, "f4")})[0].shape == (2, 2)
    with pytest.raises(RuntimeError) as failed:
        session.run(["y"], {"x": np.zeros(5, "f4")})
    assert failed.value.__notes__ == ["at Reshape 'odd'"]
