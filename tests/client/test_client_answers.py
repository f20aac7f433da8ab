"""Client, AsyncClient and the Predictor in this process: the same questions, the same bits."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from PIL import Image

import fullframe
from fullframe.client import AsyncClient, Client
from fullframe.engine.predictor import Predictor
from fullframe.engine.query import Answer
from fullframe.errors import NotFound
from tests.pictures import encode, pixels
from tests.serving import Running, serving

T = TypeVar("T")
SIZES = [(1, 1), (1, 500), (7, 5), (31, 33), (300, 451)]


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


@pytest.fixture(scope="module")
def predictor(tiny_model: Path) -> Iterator[Predictor]:
    with fullframe.load(str(tiny_model)) as predictor:
        yield predictor


def on_loop(target: str, ask: Callable[[AsyncClient], Awaitable[T]], **options: Any) -> T:
    async def run() -> T:
        async with AsyncClient(target, **options) as client:
            return await ask(client)

    return asyncio.run(run())


def same_bits(answer: Answer, expected: Answer) -> bool:
    """Whether all but the timings is equal."""
    arrays = [
        (one.height, one.width, *one.embeddings, one.logits, one.feature_map, one.class_map)
        for one in (answer, expected)
    ]
    return answer.classes == expected.classes and all(map(np.array_equal, *arrays))


@pytest.mark.parametrize("height, width", SIZES)
def test_all_three_give_the_same_bits(
    height: int, width: int, server: Running, client: Client, predictor: Predictor, tmp_path: Path
) -> None:
    everything: dict[str, Any] = {
        "top_k": 3,
        "poolings": ["avg", "gem(3.3)+max@1,2"],
        "logits": True,
        "feature_map": True,
        "class_map": True,
    }
    picture = pixels(height, width)
    file = tmp_path / "picture.png"
    file.write_bytes(encode(picture))
    expected = predictor.predict(file, **everything)
    for image in (file, str(file), file.read_bytes(), picture, Image.fromarray(picture)):
        assert same_bits(client.predict(image, **everything), expected)
        assert same_bits(on_loop(server.target, lambda c, i=image: c.predict(i, **everything)), expected)  # type: ignore[misc]
    assert not same_bits(client.predict(pixels(height, width, seed=1), **everything), expected)


def test_classify_and_embed(server: Running, client: Client, predictor: Predictor) -> None:
    picture = encode(pixels(40, 50))
    assert client.classify(picture, 2) == client.predict(picture, top_k=2).classes
    assert [c.label for c in client.classify(picture)] == [c.label for c in predictor.classify(picture)]
    assert on_loop(server.target, lambda c: c.classify(picture, 2)) == client.classify(picture, 2)
    for pooling, normalize in (("avg", False), ("max+std@1,3", True)):
        vector = client.embed(picture, pooling, normalize)
        assert vector.dtype == np.float32
        np.testing.assert_array_equal(vector, predictor.embed(picture, pooling, normalize))
        served = on_loop(server.target, lambda c, p=pooling, n=normalize: c.embed(picture, p, n))  # type: ignore[misc]
        np.testing.assert_array_equal(vector, served)


def test_an_answer_carries_its_timings(client: Client) -> None:
    times = client.predict(encode(pixels(400, 500))).timings
    assert 0 < times.decode < 30
    assert 0 < times.compute < 30
    assert 0 <= times.queue < 30


def test_models_and_their_contracts(server: Running, client: Client, predictor: Predictor) -> None:
    [model] = client.models()
    assert (model.name, model.version, model.default) == ("tiny", "1", True)
    assert model.contract == predictor.contract
    assert client.model() == client.model("tiny") == client.model("tiny", "1") == model
    assert on_loop(server.target, lambda c: c.models()) == [model]
    assert on_loop(server.target, lambda c: c.model("tiny")) == model
    with pytest.raises(NotFound, match="no model is named 'other'; served here: tiny"):
        client.model("other")
    with pytest.raises(NotFound, match="has no version '9'"):
        client.classify(encode(pixels(3, 3)), model="tiny", version="9")


def test_health(server: Running, client: Client) -> None:
    assert client.health()
    assert client.health("tiny")
    assert on_loop(server.target, lambda c: c.health())
    with pytest.raises(NotFound):
        client.health("other")


def test_what_is_beyond_the_message_limit_is_uploaded(tiny_model: Path, predictor: Predictor) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 1000, 3), np.uint8)
    file = encode(noise)
    assert len(file) > 2 * 2**20
    expected = predictor.predict(file, poolings=["max"], logits=True)
    with serving(models=f"tiny={tiny_model}", max_message_bytes="2MiB", log_level="debug") as server:
        with Client(server.target) as client:
            for image in (file, noise):
                assert same_bits(client.predict(image, poolings=["max"], logits=True), expected)
            small = encode(pixels(9, 9))
            outcomes = dict(client.stream([small, file, small], poolings=["max"], logits=True))
            assert same_bits(outcomes[1], expected)  # type: ignore[arg-type]
            assert all(isinstance(outcome, Answer) for outcome in outcomes.values())
        uploaded = on_loop(server.target, lambda c: c.predict(noise, poolings=["max"], logits=True))
        assert same_bits(uploaded, expected)
        server.wait_for("call", rpc="PredictStream")
        assert len(server.events("call", rpc="PredictUpload", code="OK", images=1)) == 4
        assert not [e for e in server.events("call") if e["code"] != "OK"]
