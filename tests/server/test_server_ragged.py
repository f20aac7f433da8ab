"""A server told to compute images together: its answers are, within the promise, those of one that does so alone."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fullframe import Client
from fullframe.engine.query import Answer
from fullframe.engine.ragged import RaggedEngine
from fullframe.errors import InvalidInput
from fullframe.settings import read_settings
from tests.pictures import encode, pixels
from tests.serving import InProcess, eventually, serving, serving_here

CLIENTS = 16
SIZES = [(1 + 37 * i % 150, 1 + 53 * i % 200) for i in range(24)] + [(100, 100), (101, 99), (1, 300)]


@pytest.fixture(scope="module")
def together(slow_model: Path) -> Iterator[InProcess]:
    with serving_here(models=(f"slow={slow_model}",), batching="ragged", workers=2) as running:
        yield running


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each batch had."""
    run, seen = RaggedEngine.run, list[int]()

    def noting(self: RaggedEngine, images: Sequence[Any], outputs: Sequence[str]) -> Any:
        seen.append(len(images))
        return run(self, images, outputs)

    monkeypatch.setattr(RaggedEngine, "run", noting)
    return seen


def ask(target: str, file: bytes) -> Answer:
    with Client(target) as client:
        return client.predict(file, poolings=["avg", "gem(3)+max@1,2"], logits=True, feature_map=True, class_map=True)


def arrays(answer: Answer) -> list[Any]:
    return [*answer.embeddings, answer.logits, answer.feature_map, answer.class_map]


def test_a_crowd_gets_what_each_gets_alone(together: InProcess, slow_model: Path, batches: list[int]) -> None:
    files = [encode(pixels(*size, seed), "JPEG", quality=90) for seed, size in enumerate(SIZES)]
    with serving_here(models=(f"slow={slow_model}",), batching="one") as alone:
        wanted = [ask(alone.target, file) for file in files]
    assert batches == [], "one by one means so"
    with ThreadPoolExecutor(CLIENTS) as pool:
        crowd = list(pool.map(lambda number: ask(together.target, files[number % len(files)]), range(4 * len(files))))
    for number, found in enumerate(crowd):
        one = wanted[number % len(files)]
        assert (found.height, found.width) == (one.height, one.width)
        assert found.classes[0].label == one.classes[0].label
        for ours, theirs in zip(arrays(found), arrays(one), strict=True):
            assert ours.shape == theirs.shape
            assert np.abs(ours - theirs).max() <= 1e-4 * max(1, np.abs(theirs).max())
    assert max(batches) > 1
    assert sum(batches) == len(crowd)
    counters = together.plane.counters()
    assert counters.created == counters.finished
    eventually(lambda: together.plane.counters().pixels_in_flight == 0)


def test_a_damaged_image_of_a_request_fails_alone(together: InProcess) -> None:
    whole = encode(pixels(60, 80), "JPEG")
    with Client(together.target) as client:
        found = dict(client.stream([whole, whole[: len(whole) // 2], whole], logits=True))
    first, damaged, last = (found[number] for number in range(3))
    assert isinstance(damaged, InvalidInput)
    assert isinstance(first, Answer) and isinstance(last, Answer)
    assert first.logits is not None and last.logits is not None
    np.testing.assert_allclose(first.logits, last.logits, atol=1e-4)


def test_it_is_a_setting(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLFRAME_BATCHING", "ragged")
    assert read_settings().batching == "ragged"
    monkeypatch.setenv("FULLFRAME_BATCHING", "often")
    with pytest.raises(InvalidInput, match="'auto', 'one' or 'ragged'"):
        read_settings()
    with serving(models=f"tiny={tiny_model}", batching="ragged") as running:
        assert ask(running.target, encode(pixels(20, 30))).classes
