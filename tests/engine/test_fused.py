"""The engine on PyTorch: its answers are ONNX Runtime's, alone, in batches and in pieces; what memory it wants."""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fullframe
from fullframe import Client
from fullframe.convert.ragged import make_ragged
from fullframe.engine.fused import DeviceSession, Lane, TorchEngine, default_device
from fullframe.engine.graph import Replays, TorchSession
from fullframe.engine.graph.replay import Recording
from fullframe.engine.ort import OrtEngine
from fullframe.engine.plane import Plane, open_plane
from fullframe.engine.pooling import Pooling
from fullframe.engine.query import Answer, Query
from fullframe.engine.ragged import RaggedEngine
from fullframe.errors import InvalidInput, InvalidModel, Overloaded
from fullframe.image import Limits, Picture, open_raw
from fullframe.model.repository import BUNDLED
from tests.models import write_model
from tests.pictures import encode, pixels
from tests.serving import serving

OUTPUTS = ["features", "logits", "feature_map", "class_map"]
EVERYTHING = Query(7, (Pooling.parse("avg+max@1,2"),), logits=True, feature_map=True, class_map=True)
SIZES = [(1, 1), (7, 5), (33, 31), (31, 33), (64, 64), (64, 64), (60, 66), (120, 90), (9, 300)]
PROMISE = 1e-4
ILLEGAL = "an illegal memory access was encountered"


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def gap(found: Any, wanted: Any) -> float:
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype == np.float32
    return float(np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max()))


def raw(height: int, width: int, seed: int = 0) -> Picture:
    return open_raw(pixels(height, width, seed).tobytes(), height, width, Limits())


def ask(plane: Plane, pictures: Sequence[Picture], query: Query = EVERYTHING) -> list[Future[Answer]]:
    return plane.submit(plane.model(), pictures, query)


def assert_same(found: Answer, wanted: Answer) -> None:
    assert (found.height, found.width) == (wanted.height, wanted.width)
    assert [each.label for each in found.classes] == [each.label for each in wanted.classes]
    for name in ("logits", "feature_map", "class_map"):
        assert gap(getattr(found, name), getattr(wanted, name)) <= PROMISE, name
    for one, other in zip(found.embeddings, wanted.embeddings, strict=True):
        assert gap(one, other) <= PROMISE


@pytest.mark.parametrize("model", ["tiny", "bundled"])
def test_answers_are_onnx_runtime_s(device: str, tiny_model: Path, model: str) -> None:
    path = tiny_model if model == "tiny" else BUNDLED
    ours, theirs = TorchEngine(path, device=device), OrtEngine(path)
    assert ours.contract == theirs.contract
    for size in SIZES[:: 1 if model == "tiny" else 3]:
        found, wanted = (engine.run(pixels(*size), OUTPUTS) for engine in (ours, theirs))
        assert all(gap(found[name], wanted[name]) <= PROMISE for name in OUTPUTS), size


def test_half_precision_is_near_and_not_the_same(device: str) -> None:
    exact = OrtEngine(BUNDLED).run(pixels(60, 80), OUTPUTS)
    for compute, most in (("bfloat16", 0.1), ("float16", 0.02)):
        found = TorchEngine(BUNDLED, device=device, compute=compute).run(pixels(60, 80), OUTPUTS)  # type: ignore[arg-type]
        gaps = [gap(found[name], exact[name]) for name in OUTPUTS]
        assert PROMISE / 10 < max(gaps) < most, compute


def test_many_threads_get_what_one_gets(device: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks, one thread launches, since PyTorch keeps plans of convolutions for each thread."""
    engine = TorchEngine(tiny_model, device=device)
    run, launchers = TorchSession.run_tensors, set[int]()

    def noting(self: TorchSession, *arguments: Any) -> Any:
        launchers.add(threading.get_ident())
        return run(self, *arguments)

    monkeypatch.setattr(TorchSession, "run_tensors", noting)
    wanted = {size: engine.run(pixels(*size), OUTPUTS) for size in SIZES}
    with ThreadPoolExecutor(8) as pool:
        for size, found in pool.map(lambda size: (size, engine.run(pixels(*size), OUTPUTS)), SIZES * 6):
            assert all(gap(found[name], wanted[size][name]) <= PROMISE for name in OUTPUTS)
    assert len(launchers) == 1


def test_an_image_that_may_not_be_written_is_taken_and_left_as_it_is(tiny_model: Path) -> None:
    engine, image = TorchEngine(tiny_model), pixels(20, 30)
    shared = np.frombuffer(image.tobytes(), np.uint8).reshape(image.shape)
    mirrored = image[::-1, ::-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, turned = (engine.run(each, ["logits"])["logits"] for each in (shared, mirrored))
    assert gap(found, engine.run(image, ["logits"])["logits"]) == 0
    assert gap(turned, OrtEngine(tiny_model).run(mirrored, ["logits"])["logits"]) <= PROMISE
    np.testing.assert_array_equal(image, pixels(20, 30))


def test_files_and_images_that_will_not_do_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.onnx").write_text("not a model")
    for name in ("notes.onnx", "absent.onnx"):
        with pytest.raises(InvalidModel, match=rf"^{name} can't be loaded: ") as raised:
            TorchEngine(tmp_path / name)
        assert str(raised.value).count("can't") == 1, "said once"
    engine = TorchEngine(write_model(tmp_path / "picky.onnx", least=9))
    with pytest.raises(InvalidInput, match="is 100x8 pixels; this model needs at least 9x9"):
        engine.run(pixels(8, 100), ["logits"])


def test_batches_of_any_sizes_are_what_each_gets_alone(device: str, tiny_model: Path) -> None:
    engine = RaggedEngine(TorchEngine(tiny_model, device=device))
    alone = OrtEngine(tiny_model)
    for shapes in (SIZES, [(64, 64)] * 3, [(61, 67)] * 2, [(61, 67)]):
        images = [pixels(*shape, seed) for seed, shape in enumerate(shapes)]
        for image, found in zip(images, engine.run(images, OUTPUTS), strict=True):
            wanted = alone.run(image, OUTPUTS)
            assert all(gap(found[name], wanted[name]) <= PROMISE for name in OUTPUTS)


def test_a_file_for_batches_runs_alone_and_together(tmp_path: Path, tiny_model: Path) -> None:
    make_ragged(tiny_model, tmp_path / "ragged.onnx")
    engine, alone = TorchEngine(tmp_path / "ragged.onnx"), OrtEngine(tiny_model)
    images = [pixels(*shape) for shape in ((33, 31), (40, 20), (40, 20))]
    for image, found in zip(images, RaggedEngine(engine).run(images, OUTPUTS), strict=True):
        for each in (found, engine.run(image, OUTPUTS)):
            assert all(gap(each[name], wanted) <= PROMISE for name, wanted in alone.run(image, OUTPUTS).items())


def test_images_of_one_size_run_without_masks_and_others_in_few_shapes(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device, that is; on a CPU no shape is worth padding for."""
    engine = TorchEngine(tiny_model)
    assert (engine.batch_size(61, 67, False), engine.batch_count(9)) == ((61, 67), 9)
    monkeypatch.setattr(TorchEngine, "accelerated", True)
    monkeypatch.setattr(TorchEngine, "zeros", OrtEngine.zeros)
    together = RaggedEngine(engine)
    seen: list[tuple[bool, tuple[int, ...]]] = []
    run = TorchSession.run_tensors

    def noting(self: TorchSession, outputs: Sequence[str], feeds: dict[str, Any]) -> Any:
        seen.append(("sizes" in feeds, tuple(feeds["images"].shape[:3])))
        return run(self, outputs, feeds)

    monkeypatch.setattr(TorchSession, "run_tensors", noting)
    for shapes in ([(61, 67)] * 2, [(61, 67)], [(64, 72)], [(61, 67), (60, 68)], [(200, 131), (193, 142)]):
        together.run([pixels(*shape) for shape in shapes], ["logits"])
    together.run([pixels(64, 72)] * 9, ["logits"])
    together.run([pixels(64, 71), pixels(63, 72)] * 6 + [pixels(64, 72)], ["logits"])
    assert seen == [
        (False, (2, 61, 67)),
        (True, (1, 64, 72)),
        (False, (1, 64, 72)),
        (True, (2, 64, 72)),
        (True, (2, 208, 144)),
        (False, (10, 64, 72)),
        (True, (14, 64, 72)),
    ]


@pytest.fixture(scope="module")
def planes(slow_model: Path, device: str) -> Iterator[tuple[Plane, Plane]]:
    """One on PyTorch that works on images together, and one on ONNX Runtime."""
    specs = [f"slow={slow_model}"]
    made = (
        open_plane(specs, workers=2, batching="ragged", engine="torch"),
        open_plane(specs, workers=1, engine="onnx"),
    )
    yield made
    for plane in made:
        plane.close()


def test_a_crowd_gets_what_each_gets_alone(planes: tuple[Plane, Plane], monkeypatch: pytest.MonkeyPatch) -> None:
    together, alone = planes
    batches, run = list[int](), RaggedEngine.run

    def noting(self: RaggedEngine, images: Sequence[Any], outputs: Sequence[str]) -> Any:
        batches.append(len(images))
        return run(self, images, outputs)

    monkeypatch.setattr(RaggedEngine, "run", noting)
    sources = [raw(*size, seed) for seed in range(3) for size in SIZES]
    for found, wanted in zip(ask(together, sources), ask(alone, sources), strict=True):
        assert_same(found.result(), wanted.result())
    assert sum(batches) == len(sources)
    assert max(batches) > 1


def test_a_batch_for_which_the_device_has_no_memory_is_split(
    planes: tuple[Plane, Plane], monkeypatch: pytest.MonkeyPatch
) -> None:
    together, alone = planes
    run, room, failed = TorchSession.run_tensors, [2], list[int]()

    def full(self: TorchSession, outputs: Sequence[str], feeds: dict[str, Any]) -> Any:
        if (count := len(feeds["images"])) > room[0]:
            failed.append(count)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ...")
        return run(self, outputs, feeds)

    monkeypatch.setattr(TorchSession, "run_tensors", full)
    sources = [raw(60 + seed % 3, 60, seed) for seed in range(24)]
    for found, wanted in zip(ask(together, sources), ask(alone, sources), strict=True):
        assert_same(found.result(), wanted.result())
    assert failed, "some batch was too large"
    room[0] = 0
    [lone] = ask(together, sources[:1])
    with pytest.raises(Overloaded, match="no memory for this image now"):
        lone.result()
    room[0] = 2
    assert ask(together, sources[:1])[0].result().classes, "and the next one is answered"


def test_recorded_runs_are_given_up_for_an_image(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchEngine(tiny_model)
    wanted, run, failures = engine.run(pixels(40, 30), ["logits"]), TorchSession.run_tensors, list[int]()

    class Kept(Replays):
        """As if there were recordings, so many times."""

        left = 1

        def clear(self) -> bool:
            self.left -= 1
            return self.left >= 0

    def full(self: TorchSession, *arguments: Any) -> Any:
        if failures and failures.pop():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return run(self, *arguments)

    monkeypatch.setattr(engine._session._lane, "replays", Kept(lambda _: pytest.fail("on the CPU")))
    monkeypatch.setattr(TorchSession, "run_tensors", full)
    failures += [1]
    assert gap(engine.run(pixels(40, 30), ["logits"])["logits"], wanted["logits"]) == 0, "their memory is enough"
    failures += [1]
    with pytest.raises(Overloaded):
        engine.run(pixels(40, 30), ["logits"])
    assert not failures


def test_no_answer_waits_for_its_recording(tiny_model: Path) -> None:
    lane, recording, asked = Lane(torch.device("cpu")), threading.Event(), threading.Event()

    def slowly(run: Callable[[], list[torch.Tensor]]) -> Recording:
        asked.set()
        assert recording.wait(60)
        raise RuntimeError("not on the CPU")

    lane.replays = Replays(slowly)
    session = DeviceSession(TorchSession(tiny_model, replays=lane.replays), lane)
    feeds = {"images": pixels(40, 30)[np.newaxis]}
    first, *_, third = [session.run(["logits"], feeds)[0] for _ in range(3)]
    assert asked.wait(60)
    assert not recording.is_set(), "and yet the answer is here"
    assert gap(third, first) == 0
    recording.set()
    assert gap(session.run(["logits"], feeds)[0], first) == 0


def test_a_lost_device_is_bad_health(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plane = open_plane([str(tiny_model)], engine="torch")
    lane = plane.model().engine._session._lane  # type: ignore[attr-defined]
    monkeypatch.setattr(lane, "lost", "")
    calls, errors = (
        list[None](),
        [RuntimeError("shape mismatch"), *[torch.AcceleratorError(f"CUDA error: {ILLEGAL}")] * 2],
    )

    def failing(self: TorchSession, *_: Any) -> Any:
        calls.append(None)
        raise errors[0]

    with monkeypatch.context() as patch:
        patch.setattr(TorchSession, "run_tensors", failing)
        for computes, healthy in ((False, True), (True, True), (False, False)):
            patch.setattr(Lane, "_computes", lambda self, computes=computes: computes)
            with pytest.raises(RuntimeError, match=str(errors[0])):
                ask(plane, [raw(40, 30)])[0].result()
            errors.pop(0)
            assert plane.healthy() == healthy
    assert len(calls) == 3, "none is tried again"
    assert lane.lost == f"CUDA error: {ILLEGAL}"
    assert lane._computes(), "the control: this device does"
    plane.close()


@pytest.mark.gpu
def test_sizes_that_come_again_are_replayed_on_a_gpu(tiny_model: Path) -> None:
    engine = TorchEngine(tiny_model, device="cuda")
    together, alone = RaggedEngine(engine), OrtEngine(tiny_model)
    replays = engine._session._lane.replays
    assert replays is not None
    replays.clear()
    for seed in range(6):
        for shapes in ([(33, 31), (40, 20)], [(64, 64)], [(100, 120), (90, 120), (99, 110)]):
            images = [pixels(*shape, seed) for shape in shapes]
            for image, found in zip(images, together.run(images, OUTPUTS), strict=True):
                assert all(gap(found[name], wanted) <= PROMISE for name, wanted in alone.run(image, OUTPUTS).items())
    assert replays.clear(), "some were recorded"


def test_pieces_are_the_whole(device: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = []
    run = TorchSession.run_tensors

    def noting(self: TorchSession, outputs: Sequence[str], feeds: dict[str, Any]) -> Any:
        fed.append({name: each.device.type for name, each in feeds.items()})
        return run(self, outputs, feeds)

    monkeypatch.setattr(TorchSession, "run_tensors", noting)
    monkeypatch.setattr(TorchEngine, "__init__", _with_small_pieces(TorchEngine.__init__, device))
    whole, pieces = (
        open_plane([str(tiny_model)], engine=engine, tile_pixels=most)  # type: ignore[arg-type]
        for engine, most in (("onnx", 10**6), ("torch", 1000))
    )
    try:
        for found, wanted in zip(
            *(ask(plane, [raw(350, 130), raw(90, 300)]) for plane in (pieces, whole)), strict=True
        ):
            assert_same(found.result(), wanted.result())
    finally:
        whole.close()
        pieces.close()
    assert len(fed) > 4
    assert any(name.startswith("carry.") for feeds in fed for name in feeds)
    assert {kind for feeds in fed for kind in feeds.values()} == {device}


def _with_small_pieces(begin: Any, device: str) -> Any:
    def started(self: TorchEngine, path: Path, **options: Any) -> None:
        begin(self, path, **{**options, "device": device})
        self.piece_pixels = 5000

    return started


def test_what_is_carried_stays_where_it_was_computed(tiny_model: Path) -> None:
    session = TorchEngine(tiny_model).open_session(tiny_model)
    images = pixels(9, 9)[np.newaxis]
    kept, told = session.run(["feature_map", "logits"], {"images": images}, held=["feature_map"])
    assert isinstance(kept, torch.Tensor)
    assert isinstance(told, np.ndarray)


def test_memory_is_counted(device: str, tiny_model: Path) -> None:
    engine = TorchEngine(tiny_model, device=device)
    assert 30 < engine.bytes_per_pixel < 2000, "its maps are 28"
    assert engine.available_memory() > 2**28
    plane = open_plane([str(tiny_model)], engine="torch", memory_budget=1_000_000, tile_pixels=10**6)
    with pytest.raises(InvalidInput):
        ask(plane, [raw(900, 900)] * 300)
    plane.close()


def test_a_server_answers_as_onnx_runtime_and_stops_cleanly(tiny_model: Path) -> None:
    local = fullframe.load(str(tiny_model), engine="onnx")
    wanted = {size: local.predict(pixels(*size), logits=True, class_map=True) for size in set(SIZES)}
    threads = threading.active_count()
    with serving(models=f"tiny={tiny_model}", engine="torch", batching="ragged", workers=2) as running:
        assert running.wait_for("ready")["engines"] == [f"torch on {default_device()}, float32"]
        with Client(running.target, timeout=60) as client:
            files = [encode(pixels(*size)) for size in SIZES]
            for number, found in client.stream(files, logits=True, class_map=True):
                assert isinstance(found, Answer), found
                for name in ("logits", "class_map"):
                    assert gap(getattr(found, name), getattr(wanted[SIZES[number]], name)) <= PROMISE
    local.close()
    assert threading.active_count() <= threads
