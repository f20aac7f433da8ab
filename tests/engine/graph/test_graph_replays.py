"""Recorded runs: what is replayed is what would be launched, on new values; what can't be recorded is launched."""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fullframe.engine.graph import CudaGraphs, Replays, TorchSession, replay
from fullframe.engine.graph.program import Program, _Upload
from fullframe.engine.graph.replay import Record, Recording
from fullframe.model.ragged import ragged_model
from fullframe.model.repository import BUNDLED
from fullframe.model.strips import strip_graphs
from tests.engine.graph.parity import FUSED, PROMISE, largest_difference, serialized
from tests.engine.graph.test_graph_session import META, asks
from tests.model.test_ragged_graphs import AVERAGE3, CEILED, CONV3, MAX3, Squeeze, build
from tests.models import write_model
from tests.pictures import pixels
from tests.ragged import images_of, padded

SIZES = [[(24, 31), (33, 18)], [(33, 31), (7, 9)], [(33, 5), (12, 31)], [(33, 31), (33, 31)]]
"""Of images in batches of one padded size."""


class Again:
    """A recording on the CPU: as a graph does, it computes nothing when it is made, and then it reads the same inputs
    and fills the same outputs."""

    def __init__(self, run: Callable[[], list[Tensor]]) -> None:
        self._run, self._outputs = run, list[Tensor]()

    def replay(self) -> list[Tensor]:
        found = self._run()
        self._outputs = self._outputs or found
        for kept, each in zip(self._outputs, found, strict=True):
            kept.copy_(each)
        return self._outputs


class Recorder:
    """Counts; fails where told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.made, self.error = 0, error

    def __call__(self, run: Callable[[], list[Tensor]]) -> Recording:
        self.made += 1
        if self.error:
            raise self.error
        return Again(run)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = write_model(tmp_path_factory.mktemp("masked") / "m.onnx", channels=4, depth=2)
    return serialized(ragged_model(onnx.load(path)))


@pytest.fixture
def record(device: torch.device) -> Record:
    return Recorder() if device.type == "cpu" else CudaGraphs(device)


def on(device: torch.device, feeds: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(each).to(device) for name, each in feeds.items()}


@contextmanager
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """The runs of programs that are made inside."""
    run, seen = Program.run, list[None]()

    def noting(self: Program, *arguments: Any) -> list[Tensor]:
        seen.append(None)
        return run(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Program, "run", noting)
        yield seen


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("names", [["logits"], ["features", "logits", "feature_map", "map_sizes"]])
def test_a_replay_gives_what_a_launch_gives(
    device: torch.device, record: Record, fused: bool, names: list[str]
) -> None:
    """Images and their own sizes are others each time; the padded size is the same."""
    masked = serialized(ragged_model(onnx.load(BUNDLED)))
    replays = Replays(record)
    session = TorchSession(masked, device=device, fused=fused, replays=replays)
    plain = TorchSession(masked, device=device, fused=fused)
    answers = []
    for seed, sizes in enumerate(SIZES * 2):
        feeds = padded(images_of(sizes, seed), seed)
        assert feeds["images"].shape == (2, 33, 31, 3)
        found = session.run_tensors(names, on(device, feeds))
        answers.append((found, plain.run(names, feeds)))
        replays.record_next()
    assert len(replays._kept) == 1
    for found, wanted in answers:  # after all replays: an answer is the caller's own
        for one, other in zip(found, wanted, strict=True):
            assert largest_difference(one.cpu().numpy(), other) <= PROMISE


class Shapes:
    """Runs a model on masked batches, each followed by the recordings that it makes due."""

    def __init__(self, model: bytes, record: Record, most: int = 9) -> None:
        self.replays = Replays(record, most)
        self._session = TorchSession(model, replays=self.replays)

    def __call__(self, *sides: int, outputs: str = "logits", count: int = 1) -> None:
        for side in sides:
            self._session.run([outputs], padded(images_of([(side, 16)] * count)))
            while self.replays.due:
                self.replays.record_next()


def test_the_third_run_of_a_shape_is_recorded_after_its_answer(masked: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    replays = Replays(recorder)
    session = TorchSession(masked, replays=replays)

    def runs(outputs: str, count: int, side: int = 16) -> int:
        with launched(monkeypatch) as seen:
            session.run([outputs], padded(images_of([(side, side)] * count)))
        return len(seen)

    replays.record_next()
    assert (runs("logits", 1), runs("logits", 1), replays.due) == (1, 1, False), "it may never come again"
    assert (runs("logits", 1), replays.due, recorder.made) == (1, True, 0), "the answer"
    assert (runs("logits", 1), recorder.made) == (1, 0), "it is due once"
    replays.record_next()
    assert (replays.due, recorder.made) == (False, 1)
    assert (runs("logits", 1), replays.due) == (1, False), "a replay: here it runs the program"
    for _ in range(2):
        assert (runs("features", 1), runs("logits", 2), runs("logits", 1, 17), replays.due) == (1, 1, 1, False)
    assert (runs("features", 1), replays.due) == (1, True), "each is a shape of its own"


def test_shapes_that_come_more_often_keep_their_recordings(masked: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    run = Shapes(masked, recorder, most=2)

    def kept() -> set[int]:
        return {each[1][0][1][1] for each in run.replays._kept}

    run(*[16] * 8, *[17] * 4)
    assert (kept(), recorder.made) == ({16, 17}, 2)
    run(*[*range(18, 30)] * 4)
    assert (kept(), recorder.made) == ({16, 17}, 2), "many colder shapes, each of them seen as often"
    run(*[18] * 4)
    assert (kept(), recorder.made) == ({16, 18}, 3), "one that is seen twice as often takes the coldest one's place"
    run(*[17, 18, 16] * 9)
    assert (kept(), recorder.made) == ({16, 18}, 3), "shapes that are seen alike do not take turns"
    monkeypatch.setattr(replay, "_AGEING", 4)
    run(*[30] * 60)
    assert 30 in kept(), "what was seen long ago counts less"
    assert len(run.replays._sights) < 10


def test_large_runs_and_those_that_ask_are_launched(masked: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    replays = Replays(recorder)
    asking, feeds = asks(), {"images": np.array([[[[2, 1, 3]]]], np.uint8)}
    session = TorchSession(asking, replays=replays)
    for _ in range(4):
        assert session.run(["y"], feeds)[0].shape == (2, 1, 3)
    assert not replays.due
    monkeypatch.setattr(replay, "_MOST_ELEMENTS", 2 * 16 * 16 * 3 + 4)
    run = Shapes(masked, recorder)
    run(17, 17, 17, 17, count=2)
    assert recorder.made == 0
    run(16, 16, 16, count=2)
    assert recorder.made == 1


def test_what_fails_to_be_recorded_is_launched_from_then_on(masked: bytes, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors ..."))
    replays = Replays(recorder)
    session, plain = TorchSession(masked, replays=replays), TorchSession(masked)
    with caplog.at_level(logging.WARNING):
        for seed, side in enumerate((16, 17, 18, 19, 20) * 5):
            feeds = padded(images_of([(side, 16)], seed))
            for one, other in zip(session.run(["logits"], feeds), plain.run(["logits"], feeds), strict=True):
                np.testing.assert_array_equal(one, other)
            replays.record_next()
    assert recorder.made == 3, "each shape once, and after some no more"
    assert [each.getMessage() for each in caplog.records] == [
        f"a run on images [1, {side}, 16, 3], sizes [1, 2] can't be recorded and is launched each time: "
        "operation not permitted when stream is capturing"
        for side in (16, 17, 18)
    ]


def test_memory_is_given_back(masked: bytes) -> None:
    recorder = Recorder()
    run = Shapes(masked, recorder)
    run(*[16, 17] * 3)
    assert (recorder.made, run.replays.clear(), run.replays.clear()) == (2, True, False)
    run(*[18] * 3)
    assert recorder.made == 3
    recorder.error = RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ...")
    run(*[19] * 3)
    assert (recorder.made, run.replays.clear()) == (4, False), "memory for other runs, rather than for recordings"


def test_models_that_are_gone_are_forgotten(masked: bytes) -> None:
    """A graph keeps no program alive, as a recording on the CPU would."""

    class Still:
        def replay(self) -> list[Tensor]:
            raise AssertionError("nothing comes again")

    replays, feeds = Replays(lambda run: Still()), padded(images_of([(16, 16)]))
    for _ in range(3):
        session = TorchSession(masked, replays=replays)
        for _ in range(3):
            session.run(["logits"], feeds)
        replays.record_next()
        del session
        gc.collect()
    assert len(replays._kept) == 1


def shares() -> bytes:
    """A graph that uploads what it computes of its input's shape: y = x / its width."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Cast", ["shape"], ["numbers"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Div", ["x", "numbers"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 2]) for name in "xy"]
    graph = helper.make_graph(nodes, "shares", values[:1], values[1:])
    return serialized(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def test_what_is_uploaded_of_shapes_alone_is_so_once() -> None:
    session = TorchSession(shares())
    program, uploaded = session._program(["y"]), dict[str, Tensor]()
    assert not program.asks
    for seed in range(3):
        x = torch.rand(4, 2, generator=torch.Generator().manual_seed(seed))
        (found,), (wanted,) = program.run({"x": x}, uploaded), program.run({"x": x})
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        torch.testing.assert_close(found, x / torch.tensor([4.0, 2.0]), rtol=0, atol=0)
    assert uploaded
    # The control: of another shape they are wrong, which is why recordings are kept by shapes.
    x = torch.rand(8, 2)
    assert not torch.equal(program.run({"x": x}, uploaded)[0], program.run({"x": x})[0])
    replays = Replays(Recorder())
    replaying = TorchSession(shares(), replays=replays)
    for rows in (4, 4, 8, 4, 8, 8, 4, 8):
        x = torch.rand(rows, 2)
        torch.testing.assert_close(replaying.run_tensors(["y"], {"x": x})[0], x / torch.tensor([rows, 2.0]))
        replays.record_next()
    assert len(replays._kept) == 2


def test_nothing_is_pinned_where_it_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile can't follow it."""
    pinned, upload = list[Tensor](), _Upload(torch.device("cuda"))

    def pin(value: Tensor) -> Tensor:
        pinned.append(value)
        return value

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", lambda self, *_, **__: self)
    upload(torch.ones(2))
    assert len(pinned) == 1
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    upload(torch.ones(2))
    assert len(pinned) == 1


def test_what_is_asked_of_the_device_is_named() -> None:
    (asked,) = TorchSession(asks())._program(["y"]).asks
    assert asked.startswith("copy of ")


class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operators that take a tensor of the CPU to another device, or write one from there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [each for each in args if isinstance(each, Tensor)]
        # A tensor of one number is an argument of its kernel.
        from_cpu = any(each.device.type == "cpu" and each.dim() for each in tensors)
        if from_cpu and isinstance(found, Tensor) and found.device.type != "cpu":
            self.seen.append(str(func))
        return found


def copies(session: TorchSession, feeds: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What a first run copies to the device on its way, and what a second with the same uploads does."""
    program, uploaded = session._program([each.name for each in session.outputs]), dict[str, Tensor]()
    assert not program.asks
    seen, there = [], on(META, feeds)
    for _ in range(2):
        with torch.inference_mode(), Copies() as mode:
            program.run(there, uploaded)
        seen.append(mode.seen)
    return seen[0], seen[1]


@pytest.mark.parametrize("fused", FUSED)
def test_nothing_is_copied_to_the_device_in_a_recorded_run(fused: bool, tmp_path: Path) -> None:
    """What a capture refuses; of models alone, masked and in strips."""
    batch = padded(images_of([(24, 31), (33, 18)]))
    own = build(CONV3, MAX3, AVERAGE3, Squeeze(), *CEILED)
    graphs = strip_graphs(write_model(tmp_path / "m.onnx")).graphs
    for model, feeds in (
        (BUNDLED.read_bytes(), {"images": pixels(40, 33)[np.newaxis]}),
        (serialized(ragged_model(onnx.load(BUNDLED))), batch),
        (serialized(ragged_model(own)), batch),
        (graphs["first"], {"images": pixels(40, 33)[np.newaxis]}),
    ):
        assert copies(TorchSession(model, device=META, fused=fused), feeds)[1] == []
    first, second = copies(TorchSession(shares(), device=META), {"x": np.ones((4, 2), "f4")})
    assert first, "the control: what is uploaded is seen"
    assert not second


def test_strips_ask_for_nothing(tmp_path: Path) -> None:
    for graph in strip_graphs(write_model(tmp_path / "m.onnx")).graphs.values():
        session = TorchSession(graph)
        assert not session._program([each.name for each in session.outputs]).asks


def shapes(count: int) -> Sequence[dict[str, Any]]:
    """Masked batches of different padded sizes."""
    return [padded(images_of([(40 + number, 30), (33, 40 + number)], number)) for number in range(count)]


@pytest.mark.gpu
def test_graphs_are_replayed_in_any_order(masked: bytes) -> None:
    """They share memory, so that each replay is on what the one before has left there."""
    device, random = torch.device("cuda"), np.random.default_rng(0)
    replays = Replays(CudaGraphs(device), most=5)
    session = TorchSession(masked, device=device, replays=replays)
    plain = TorchSession(masked, device=device)
    feeds = shapes(8)
    names = ["logits", "feature_map"]
    for number in [*range(8), *range(8), *random.integers(0, 8, 60)]:
        found = session.run_tensors(names, on(device, feeds[number]))
        replays.record_next()
        for one, other in zip(found, plain.run(names, feeds[number]), strict=True):
            assert largest_difference(one.cpu().numpy(), other) <= PROMISE
    assert len(replays._kept) == 5
    before = torch.cuda.memory_reserved()
    assert replays.clear()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before


@pytest.mark.gpu
def test_a_failed_capture_leaves_the_device_as_it_was(masked: bytes) -> None:
    device, graphs = torch.device("cuda"), CudaGraphs(torch.device("cuda"))

    def asks_for_a_value() -> list[Tensor]:
        return [torch.ones(3, device=device).cumsum(0) + torch.ones(3, device=device).sum().item()]

    with torch.inference_mode():
        kept = graphs(lambda: [torch.ones(3, device=device) * 2])
        for _ in range(2):
            with pytest.raises(RuntimeError):
                graphs(asks_for_a_value)
    assert not torch.cuda.is_current_stream_capturing()
    assert kept.replay()[0].tolist() == [2.0] * 3
    # What other streams have used is given back, which it is not while PyTorch believes in a capture.
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        block = torch.zeros(2**20, device=device)
        block.record_stream(side)
        del block
        torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before <= 2 * 2**22
    replays = Replays(graphs)
    session = TorchSession(masked, device=device, replays=replays)
    plain = TorchSession(masked, device=device)
    for _ in range(5):
        feeds = shapes(1)[0]
        for one, other in zip(session.run(["logits"], feeds), plain.run(["logits"], feeds), strict=True):
            assert largest_difference(one, other) <= PROMISE
        replays.record_next()
    assert len(replays._kept) == 1, "what comes after it is recorded"
    assert kept.replay()[0].tolist() == [2.0] * 3
