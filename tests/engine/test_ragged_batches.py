"""Batches of images of different sizes in the engine: which go together, what each gets, and what fails alone."""

import logging
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullframe.engine import plane as plane_module
from fullframe.engine import ragged
from fullframe.engine.ort import OrtEngine
from fullframe.engine.plane import EncodedImage, Plane, RawImage, open_plane
from fullframe.engine.pooling import Pooling
from fullframe.engine.query import Answer, Query
from fullframe.engine.ragged import MOST_PIXELS, MOST_WASTE, BatchSize, RaggedEngine, companions, padded
from fullframe.engine.size_classes import count_class, side_class
from fullframe.errors import DeadlinePassed, InvalidInput, InvalidModel
from fullframe.image import Picture, Pixels
from fullframe.model.repository import BUNDLED, int8_copy
from tests.models import write_model
from tests.pictures import encode, pixels

OUTPUTS = ["features", "logits", "feature_map", "class_map"]
EVERYTHING = Query(7, (Pooling.parse("avg+max@1,2"),), logits=True, feature_map=True, class_map=True)
SIZES = [
    (1, 1),
    (33, 31),
    (31, 33),
    (32, 32),
    (30, 30),
    (64, 64),
    (60, 66),
    (200, 300),
    (210, 290),
    (205, 300),
    (9, 500),
]

sizes = st.tuples(st.integers(1, 400), st.integers(1, 400))


def exact(height: int, width: int, alike: bool) -> tuple[int, int]:
    return height, width


def classes(height: int, width: int, alike: bool) -> tuple[int, int]:
    """As an accelerator's engine pads."""
    return (height, width) if alike else (side_class(height), side_class(width))


@given(sizes, st.lists(sizes, max_size=40), st.integers(1000, MOST_PIXELS), st.sampled_from([exact, classes]))
def test_a_batch_pads_little(
    first: tuple[int, int], others: list[tuple[int, int]], most: int, batch_size: BatchSize
) -> None:
    chosen = companions(first, others, most, batch_size)
    assert len(set(chosen)) == len(chosen)
    batch = [first, *(others[number] for number in chosen)]
    largest = max(h for h, _ in batch), max(w for _, w in batch)
    height, width = batch_size(*largest, len(set(batch)) == 1)
    paid, own = len(batch) * height * width, sum(h * w for h, w in batch)
    assert len(batch) == 1 or paid <= min((1 + MOST_WASTE) * own, most)


def test_alike_images_go_together() -> None:
    assert companions((32, 32), [(500, 500), (32, 32), (31, 33), (1, 1), (32, 30)]) == [1, 2, 4]
    assert companions((32, 32), [(32, 32)] * 9, most_pixels=4 * 32 * 32) == [0, 1, 2]
    assert companions((1, 1), []) == []


def test_padding_to_classes_leaves_alike_images_alone() -> None:
    assert companions((100, 100), [(100, 100), (101, 99)], batch_size=classes) == [0, 1]
    assert companions((33, 33), [(33, 36)]) == [0]


def test_padding_holds_the_images() -> None:
    images = [pixels(3, 7), pixels(5, 2)]
    batch = padded(images, np.zeros((2, 5, 7, 3), np.uint8))
    np.testing.assert_array_equal(batch[0, :3], images[0])
    np.testing.assert_array_equal(batch[1, :, :2], images[1])


def close(found: Any, wanted: Any) -> None:
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * max(1.0, np.abs(wanted).max()))


@settings(max_examples=25, deadline=None)
@given(shapes=st.lists(sizes, min_size=1, max_size=6))
def test_each_image_gets_what_it_gets_alone_whoever_is_beside_it(
    tiny_model: Path, shapes: list[tuple[int, int]]
) -> None:
    alone = OrtEngine(tiny_model)
    together = RaggedEngine(alone)
    images = [pixels(*shape, seed) for seed, shape in enumerate(shapes)]
    for image, found in zip(images, together.run(images, OUTPUTS), strict=True):
        for name, wanted in alone.run(image, OUTPUTS).items():
            close(found[name], wanted)


@pytest.mark.parametrize("shapes", [[(33, 31)] * 9, [(64, 61), (63, 64)] * 5 + [(61, 63)], [(40, 70), (5, 5)]])
def test_a_batch_of_more_images_than_there_are(
    tiny_model: Path, shapes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that fill it up to its class are of no account, and are not where they would be more than a quarter."""
    alone, batches = OrtEngine(tiny_model), list[int]()

    def zeros(self: OrtEngine, shape: tuple[int, ...]) -> Pixels:
        batches.append(shape[0])
        return np.zeros(shape, np.uint8)

    monkeypatch.setattr(OrtEngine, "batch_size", staticmethod(classes))
    monkeypatch.setattr(OrtEngine, "batch_count", lambda self, count: count_class(count) if count > 2 else 3)
    monkeypatch.setattr(OrtEngine, "zeros", zeros)
    images = [pixels(*shape, seed) for seed, shape in enumerate(shapes)]
    found = RaggedEngine(alone).run(images, OUTPUTS)
    assert batches == [{9: 10, 11: 12, 2: 2}[len(images)]]
    for image, one in zip(images, found, strict=True):
        for name, wanted in alone.run(image, OUTPUTS).items():
            close(one[name], wanted)


def test_a_small_image_is_refused_before_the_runtime_sees_it(tmp_path: Path) -> None:
    engine = RaggedEngine(OrtEngine(write_model(tmp_path / "m.onnx", least=9)))
    with pytest.raises(InvalidInput, match="at least 9x9"):
        engine.run([pixels(20, 20), pixels(8, 20)], OUTPUTS)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """The sizes of every batch that is run."""
    run, seen = RaggedEngine.run, []

    def noting(self: RaggedEngine, images: Sequence[Any], outputs: Sequence[str]) -> Any:
        seen.append([image.shape[:2] for image in images])
        return run(self, images, outputs)

    monkeypatch.setattr(RaggedEngine, "run", noting)
    return seen


@pytest.fixture(scope="module")
def planes(slow_model: Path) -> Iterator[tuple[Plane, Plane]]:
    """One that works on images together, and one that does so one by one."""
    specs = [f"slow={slow_model}"]
    made = open_plane(specs, workers=1, batching="ragged"), open_plane(specs, workers=1)
    yield made
    for plane in made:
        plane.close()


def picture(plane: Plane, source: RawImage | EncodedImage) -> Picture:
    opened = plane.open(source)
    return opened.result() if isinstance(opened, Future) else opened


def raw(height: int, width: int, seed: int = 0) -> RawImage:
    return RawImage(pixels(height, width, seed).tobytes(), height, width)


def ask(plane: Plane, sources: Sequence[Any], query: Query = EVERYTHING, **more: Any) -> list[Future[Answer]]:
    return plane.submit(plane.model(), [picture(plane, source) for source in sources], query, **more)


def assert_same(found: Answer, wanted: Answer) -> None:
    assert (found.height, found.width) == (wanted.height, wanted.width)
    assert [each.label for each in found.classes] == [each.label for each in wanted.classes]
    for name in ("logits", "feature_map", "class_map"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert (one is None) == (other is None)
        if one is not None:
            close(one, other)
    for one, other in zip(found.embeddings, wanted.embeddings, strict=True):
        close(one, other)


def test_answers_together_are_the_answers_alone(planes: tuple[Plane, Plane], groups: list[Any]) -> None:
    together, alone = planes
    sources = [raw(*size, seed) for seed in range(3) for size in SIZES]
    found = ask(together, sources)
    for future, source in zip(found, sources, strict=True):
        [wanted] = ask(alone, [source])
        assert_same(future.result(), wanted.result())
    assert max(map(len, groups)) >= 5, "some went together"
    assert sorted(size for group in groups for size in group) == sorted(3 * SIZES)
    for group in groups:
        height, width = np.max(group, axis=0)
        assert len(group) == 1 or len(group) * height * width <= 1.25 * sum(h * w for h, w in group)
    counters = together.counters()
    assert counters.created == counters.finished + counters.failed


def test_each_asks_for_its_own(planes: tuple[Plane, Plane], groups: list[Any]) -> None:
    together, alone = planes
    queries = [Query(3), Query(0, (Pooling.parse("max"),)), Query(0, class_map=True), EVERYTHING]
    ask(together, [raw(300, 300)])
    asked = [(query, ask(together, [raw(40, 40, seed)], query)[0]) for seed, query in enumerate(queries)]
    for seed, (query, future) in enumerate(asked):
        [wanted] = ask(alone, [raw(40, 40, seed)], query)
        assert_same(future.result(), wanted.result())
        assert (future.result().class_map is None) == (not query.class_map)
    assert [(40, 40)] * 4 in groups


def test_a_damaged_image_fails_alone(planes: tuple[Plane, Plane], groups: list[Any]) -> None:
    together, _ = planes
    whole = encode(pixels(200, 300), "JPEG")
    first, damaged, last = ask(
        together, [EncodedImage(whole), EncodedImage(whole[: len(whole) // 2]), EncodedImage(whole)]
    )
    assert_same(first.result(), last.result())
    with pytest.raises(InvalidInput, match="ends early"):
        damaged.result()


def test_the_late_and_the_cancelled_are_left_out(planes: tuple[Plane, Plane], groups: list[Any]) -> None:
    together, _ = planes
    before = together.counters()
    held = ask(together, [raw(1000, 1000)])
    [first] = ask(together, [raw(50, 50)])
    [late] = ask(together, [raw(50, 50)], deadline=time.monotonic())
    [cancelled] = ask(together, [raw(50, 50)])
    [last] = ask(together, [raw(50, 50)])
    assert cancelled.cancel()
    with pytest.raises(DeadlinePassed):
        late.result()
    assert_same(first.result(), last.result())
    assert held[0].result()
    assert [(50, 50)] * 2 in groups
    after = together.counters()
    assert after.finished - before.finished == 3
    assert (after.expired - before.expired, after.cancelled - before.cancelled) == (1, 1)


def test_large_images_go_their_own_way(slow_model: Path, groups: list[Any]) -> None:
    plane = open_plane([f"slow={slow_model}"], workers=2, batching="ragged", tile_pixels=100_000)
    huge, small = ask(plane, [raw(400, 400), raw(40, 40)], Query(3))
    assert huge.result().classes
    assert small.result().classes
    assert groups == [[(40, 40)]]
    plane.close()


def test_batches_leave_room_in_memory(slow_model: Path) -> None:
    plane = open_plane([f"slow={slow_model}"], workers=2, batching="ragged", memory_budget=300_000_000)
    for future in ask(plane, [raw(60, 60)] * 50, Query(1)):
        future.result()
    held = ask(plane, [raw(60, 60)] * 9, Query(1))
    assert plane.counters().memory_in_flight <= 150_000_000
    for future in held:
        future.result()
    plane.close()


def test_a_cpu_works_one_by_one_unless_told(tiny_model: Path, groups: list[Any]) -> None:
    plane = open_plane([str(tiny_model)], batching="auto")
    for future in ask(plane, [raw(40, 40)] * 5):
        future.result()
    assert groups == []
    plane.close()


def test_a_model_that_cannot_be_masked_is_named(tiny_model: Path) -> None:
    with pytest.raises(InvalidModel, match=r"int8\.onnx: can't run on batches .*QuantizeLinear"):
        open_plane([str(tiny_model), f"eight={int8_copy(BUNDLED)}"], batching="ragged")


def test_an_accelerator_batches_what_it_can(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The choice alone: there is no such device here."""
    monkeypatch.setattr(OrtEngine, "accelerated", True)
    caplog.set_level(logging.INFO, "fullframe")
    assert ragged.ragged_engine(OrtEngine(tiny_model), "auto", "tiny 1") is not None
    assert ragged.ragged_engine(OrtEngine(int8_copy(BUNDLED)), "auto", "small 2") is None
    assert ragged.ragged_engine(OrtEngine(tiny_model), "one", "tiny 1") is None
    eight, tiny = [each.getMessage() for each in caplog.records]
    assert eight.startswith("the images of model small 2 are computed one by one, not in batches: ")
    assert "QuantizeLinear" in eight
    assert tiny == 'the images of model tiny 1 are computed one by one, not in batches: batching is "one"'


def test_an_accelerator_is_warmed_up_for_every_model(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice alone: there is no such device here."""
    monkeypatch.setattr(OrtEngine, "accelerated", True)
    seen: list[str] = []
    monkeypatch.setattr(plane_module, "warm_up_alone", lambda engine: seen.append(engine.path.name))
    monkeypatch.setattr(ragged, "warm_up_together", lambda run, contract: seen.append("together"))
    for batching, models in (
        ("auto", ["together", int8_copy(BUNDLED).name]),
        ("one", [tiny_model.name, int8_copy(BUNDLED).name]),
    ):
        plane = open_plane([f"tiny={tiny_model}", f"eight={int8_copy(BUNDLED)}"], batching=batching, engine="onnx")  # type: ignore[arg-type]
        plane.warm_up()
        plane.close()
        assert seen == models
        seen.clear()


OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from fullframe.engine.ort import OrtEngine
from fullframe.engine.query import Query, Timings
from fullframe.engine.ragged import Decoded, RaggedBatches, RaggedEngine
from tests.pictures import pixels

class Noting(RaggedEngine):
    def run(self, images, outputs):
        try:
            found = super().run(images, outputs)
        except Exception:
            print(len(images), "failed")
            raise
        print(len(images), "done")
        return found

engine = Noting(OrtEngine(Path(sys.argv[1])))
engine.run([pixels(400, 400)] * 6, ["logits"])  # for so many there is memory
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (30 << 20),) * 2)
asked = [Decoded(pixels(400, 400, seed), Query(1), ["logits"], Timings()) for seed in range(12)]
print(*(type(each).__name__ for each in RaggedBatches(engine).work(asked)))
"""


def test_a_batch_for_which_there_is_no_memory_is_split(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.onnx", depth=2)
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, str(model)], check=True, capture_output=True, text=True, timeout=120
    )
    _, first, *rest, answers = done.stdout.splitlines()
    assert first == "12 failed"
    assert sum(int(line.split()[0]) for line in rest if line.endswith("done")) == 12
    assert answers.split() == ["Answer"] * 12
