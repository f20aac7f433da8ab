"""The data plane: models by name and version, and answers that no neighbour changes."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fullframe.engine.ort import OrtEngine
from fullframe.engine.plane import EncodedImage, Plane, RawImage, open_plane
from fullframe.engine.pooling import KINDS, Pooling, pool
from fullframe.engine.query import Answer, Query
from fullframe.engine.ragged import RaggedEngine
from fullframe.errors import DeadlinePassed, InvalidInput, NotFound, Overloaded
from fullframe.image import Limits, Picture, Pixels
from tests.models import LABELS, write_model
from tests.pictures import encode, pixels
from tests.serving import eventually

SIZES = [(1, 1), (1, 500), (7, 5), (31, 33), (224, 224), (300, 451), (480, 640), (767, 1023)]
EVERYTHING = Query(7, (Pooling.parse("avg+max@1,2"),), logits=True, feature_map=True, class_map=True)


@pytest.fixture(scope="module")
def plane(slow_model: Path) -> Iterator[Plane]:
    opened = open_plane([f"slow={slow_model}"], workers=2)
    yield opened
    opened.close()


def submit(plane: Plane, image: RawImage | EncodedImage, query: Query = EVERYTHING) -> Future[Answer]:
    return plane.submit(plane.model(), [opened(plane, image)], query)[0]


def opened(plane: Plane, image: RawImage | EncodedImage) -> Picture:
    picture = plane.open(image)
    return picture.result() if isinstance(picture, Future) else picture


def raw(height: int, width: int, seed: int = 0) -> RawImage:
    return RawImage(pixels(height, width, seed).tobytes(), height, width)


def bits(answer: Answer) -> list[bytes]:
    arrays = [*answer.embeddings, answer.logits, answer.feature_map, answer.class_map]
    return [array.tobytes() for array in arrays if array is not None]


def test_answers_in_a_crowd_are_the_answers_alone(plane: Plane) -> None:
    alone = {size: bits(submit(plane, raw(*size)).result()) for size in SIZES}
    crowd = [(size, submit(plane, raw(*size))) for size in SIZES * 3]
    for size, future in crowd:
        assert bits(future.result()) == alone[size]
    assert bits(submit(plane, raw(31, 33, seed=1)).result()) != alone[31, 33]


def test_encoded_and_raw_pixels_give_the_same_bits(plane: Plane) -> None:
    picture = pixels(61, 47)
    assert bits(submit(plane, EncodedImage(encode(picture))).result()) == bits(submit(plane, raw(61, 47)).result())


def test_every_pooling_is_that_of_the_feature_map(plane: Plane) -> None:
    poolings = tuple(
        Pooling.parse(text, l2_normalize=norm) for text in (*KINDS, "avg+gem(4)@1,2") for norm in (False, True)
    )
    answer = submit(plane, raw(121, 97), Query(poolings=poolings, feature_map=True)).result()
    assert answer.feature_map is not None
    for pooling, embedding in zip(poolings, answer.embeddings, strict=True):
        np.testing.assert_allclose(embedding, pool(answer.feature_map, pooling), rtol=1e-4, atol=1e-5)


def test_classes_are_ordered_and_probabilities_are_a_softmax(plane: Plane) -> None:
    answer = submit(plane, raw(40, 50), Query(top_k=100, logits=True)).result()
    assert answer.logits is not None
    scores = [score.logit for score in answer.classes]
    assert scores == sorted(answer.logits.tolist(), reverse=True)
    assert sum(score.probability for score in answer.classes) == pytest.approx(1)
    assert {score.label for score in answer.classes} == set(LABELS)
    two = submit(plane, raw(40, 50), Query(top_k=2)).result().classes
    assert two == answer.classes[:2]


def test_only_what_was_asked_for_comes_back(plane: Plane) -> None:
    answer = submit(plane, raw(10, 10), Query(top_k=0)).result()
    assert (answer.height, answer.width, answer.classes, answer.embeddings) == (10, 10, [], [])
    assert answer.logits is answer.feature_map is answer.class_map is None


def test_timings_are_of_this_image(plane: Plane) -> None:
    began = time.monotonic()
    futures = [submit(plane, raw(480, 640)) for _ in range(6)]
    last = [future.result() for future in futures][-1].timings
    assert 0 < last.compute < time.monotonic() - began
    assert last.queue > last.decode >= 0


def test_a_damaged_image_fails_alone(plane: Plane) -> None:
    whole = encode(pixels(200, 300), "JPEG")
    sources = [EncodedImage(whole), EncodedImage(whole[: len(whole) // 2]), EncodedImage(whole)]
    pictures = [opened(plane, source) for source in sources]
    first, damaged, last = plane.submit(plane.model(), pictures, EVERYTHING)
    assert bits(first.result()) == bits(last.result())
    with pytest.raises(InvalidInput, match="ends early"):
        damaged.result()


def test_limits_and_deadlines_reach_the_engine(tiny_model: Path) -> None:
    plane = open_plane([str(tiny_model)], limits=Limits(max_pixels=100), workers=1)
    with pytest.raises(InvalidInput, match="11x10"):
        plane.open(raw(10, 11))
    picture = opened(plane, raw(10, 10))
    with pytest.raises(DeadlinePassed):
        plane.submit(plane.model(), [picture], Query(), deadline=time.monotonic())[0].result()
    plane.close()


def test_models_are_found_by_name_and_version(tmp_path: Path) -> None:
    for version in ("2", "10", "9"):
        folder = tmp_path / "birds" / version
        folder.mkdir(parents=True)
        write_model(folder / "model.onnx", seed=int(version))
    other = write_model(tmp_path / "fish.onnx")
    plane = open_plane([f"fish={other}", str(tmp_path / "birds")])
    assert [(m.name, m.version, m.default) for m in plane.models()] == [
        ("fish", "1", True), ("birds", "2", False), ("birds", "9", False), ("birds", "10", False)
    ]  # fmt: skip
    assert plane.model().name == "fish"
    assert plane.model("birds").version == "10"
    assert plane.model("birds", "9").version == "9"
    picture = opened(plane, raw(9, 9))
    nine, ten = (plane.submit(plane.model("birds", v), [picture], EVERYTHING)[0].result() for v in ("9", "10"))
    assert bits(nine) != bits(ten)
    with pytest.raises(NotFound, match="no model is named 'cat'; served here: birds, fish"):
        plane.model("cat")
    with pytest.raises(NotFound, match="'birds' has no version '3'; served here: 2, 9, 10"):
        plane.model("birds", "3")
    plane.close()


def test_an_image_that_takes_more_memory_than_the_budget_is_refused(slow_model: Path) -> None:
    """By the estimate: about 126 bytes a pixel, and in pieces more than the budget too."""
    plane = open_plane([str(slow_model)], workers=1, memory_budget=8 * 10**7)
    small, large = (opened(plane, raw(side, side)) for side in (700, 1000))
    with pytest.raises(InvalidInput, match=r"takes 1\d\d MB of memory; at most 80 MB of memory .* a smaller image"):
        plane.submit(plane.model(), [large], Query())
    first, second = plane.submit(plane.model(), [small, small], Query())
    assert 5e7 < plane.counters().memory_in_flight < 8e7  # one of them runs at a time
    assert bits(first.result()) == bits(second.result())
    assert plane.counters().memory_in_flight == 0
    plane.close()


def test_memory_that_huge_images_take_is_refused_for_now(slow_model: Path) -> None:
    plane = open_plane([str(slow_model)], workers=2, memory_budget=25 * 10**7, tile_pixels=10**6)
    pictures = [opened(plane, raw(1200, 1200)) for _ in range(3)]
    [first] = plane.submit(plane.model(), pictures[:1], Query())
    [second] = plane.submit(plane.model(), pictures[1:2], Query())
    with pytest.raises(Overloaded, match=r"no room for .* MB of memory now") as refused:
        plane.submit(plane.model(), pictures[2:], Query())
    assert refused.value.retry_after > 0
    assert first.result().classes and second.result().classes
    assert plane.submit(plane.model(), pictures[2:], Query())[0].result().classes
    plane.close()


def test_an_image_that_takes_too_much_memory_whole_is_computed_in_pieces(slow_model: Path) -> None:
    roomy, tight = (open_plane([str(slow_model)], memory_budget=budget) for budget in (10**9, 2 * 10**8))
    answers = []
    for plane in (roomy, tight):
        [future] = plane.submit(plane.model(), [opened(plane, raw(1100, 1700))], Query(logits=True))
        assert plane.counters().memory_in_flight < 2 * 10**8 or plane is roomy
        logits = future.result().logits
        assert logits is not None
        answers.append(logits)
        plane.close()
    np.testing.assert_allclose(answers[1], answers[0], atol=1e-4)


def test_on_a_device_others_are_decoded_while_a_batch_is_computed(
    slow_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stages alone: the device is a CPU here."""
    run, go, batches = RaggedEngine.run, threading.Event(), list[int]()

    def held(self: RaggedEngine, images: Sequence[Pixels], outputs: Sequence[str]) -> Any:
        batches.append(len(images))
        assert go.wait(30)
        return run(self, images, outputs)

    monkeypatch.setattr(RaggedEngine, "run", held)
    monkeypatch.setattr(OrtEngine, "accelerated", True)
    plane, alone = (open_plane([str(slow_model)], workers=2, batching=batching) for batching in ("auto", "one"))
    first = submit(plane, EncodedImage(encode(pixels(40, 50))))
    eventually(lambda: batches == [1])
    rest = [submit(plane, EncodedImage(encode(pixels(40, 50, seed)))) for seed in range(1, 4)]
    eventually(lambda: plane.counters().ready == 3)
    assert (plane.counters().running, batches) == (1, [1])
    time.sleep(0.05)
    go.set()
    for seed, future in enumerate([first, *rest]):
        found, wanted = future.result().logits, submit(alone, raw(40, 50, seed)).result().logits
        assert found is not None and wanted is not None
        np.testing.assert_allclose(found, wanted, atol=1e-4 * max(1.0, np.abs(wanted).max()))
        assert future is first or future.result().timings.queue >= 0.05, "ready is queued too"
    assert batches == [1, 3]
    for each in (plane, alone):
        each.close()


def test_a_low_image_however_wide_takes_no_memory_for_rows_that_it_has_not() -> None:
    plane = open_plane([], memory_budget=10**9, tile_pixels=10**5)
    [future] = plane.submit(plane.model(), [opened(plane, raw(1, 600_000))], Query())
    assert plane.counters().memory_in_flight < 5e8
    assert future.result().classes
    plane.close()
