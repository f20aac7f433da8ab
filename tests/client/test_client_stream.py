"""Many images over one stream: lazily read, each answered once, whatever fails in between."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from fullframe.client import AsyncClient, Client
from fullframe.engine.query import Answer
from fullframe.errors import InvalidInput, NotFound
from tests.pictures import Pixels, encode, pixels
from tests.serving import Running, eventually, serving, start


def by_height(outcomes: Mapping[int, object]) -> dict[int, int]:
    return {number: outcome.height for number, outcome in outcomes.items() if isinstance(outcome, Answer)}


def test_each_image_has_its_own_outcome(server: Running) -> None:
    images = [pixels(height, 9) if height % 5 else b"no image" for height in range(1, 60)]
    expected = {number: height for number, height in enumerate(range(1, 60)) if height % 5}
    with Client(server.target) as client:
        outcomes = list(client.stream(images, in_flight=7))
        assert sorted(number for number, _ in outcomes) == list(range(59))
        assert by_height(dict(outcomes)) == expected
        failed = [outcome for _, outcome in outcomes if not isinstance(outcome, Answer)]
        assert len(failed) == 11
        assert all(isinstance(error, InvalidInput) and "this is text" in str(error) for error in failed)

    async def ask() -> dict[int, object]:
        async with AsyncClient(server.target) as client:
            return {number: outcome async for number, outcome in client.stream(images, in_flight=7)}

    assert by_height(asyncio.run(ask())) == expected


def test_answers_come_as_they_are_ready(slow_model: Path) -> None:
    """A large image must not hold up the small ones behind it."""
    images = [pixels(1500, 1500), *[pixels(8, 8)] * 5]
    with serving(models=str(slow_model), workers=2) as server, Client(server.target, timeout=120) as client:
        order = [number for number, _ in client.stream(images)]
    assert sorted(order) == list(range(6))
    assert order[-1] == 0


def test_a_file_that_cannot_be_read_fails_alone(server: Running, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(encode(pixels(5, 6)))
    with Client(server.target) as client:
        outcomes = dict(client.stream([tmp_path / "missing.png", tmp_path / "good.png"]))
    assert isinstance(outcomes[0], InvalidInput)
    assert "missing.png" in str(outcomes[0])
    assert by_height(outcomes) == {1: 5}


def test_wrong_options_fail_every_image_and_the_stream_goes_on(server: Running) -> None:
    with Client(server.target) as client:
        outcomes = dict(client.stream([pixels(3, 3)] * 3, model="other"))
        assert all(isinstance(outcome, NotFound) for outcome in outcomes.values())
        assert len(outcomes) == 3
        with pytest.raises(InvalidInput, match="top_k"):
            next(client.stream([pixels(3, 3)], top_k=-1))
        with pytest.raises(InvalidInput, match="in_flight is 0"):
            next(client.stream([pixels(3, 3)], in_flight=0))


def test_nothing_to_ask(server: Running) -> None:
    with Client(server.target) as client:
        assert list(client.stream([])) == []


@pytest.mark.parametrize("in_flight", [1, 5])
def test_images_are_read_as_they_are_needed(server: Running, in_flight: int) -> None:
    read = answered = ahead = 0

    def endless() -> Iterator[Pixels]:
        nonlocal read
        for _ in itertools.count():
            read += 1
            yield pixels(4, 4)

    with Client(server.target) as client:
        for _ in itertools.islice(client.stream(endless(), in_flight=in_flight), 200):
            answered += 1
            ahead = max(ahead, read - answered)
    assert answered == 200
    assert ahead <= in_flight
    assert in_flight == 1 or ahead > 1


def test_a_stream_left_early_ends_on_the_server_too(tiny_model: Path) -> None:
    with serving(models=str(tiny_model), log_level="debug") as server, Client(server.target) as client:
        stream = client.stream(itertools.repeat(pixels(4, 4)))
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        server.wait_for("call", rpc="PredictStream", code="CANCELLED")
        assert client.classify(pixels(4, 4))


def test_what_the_images_raise_reaches_the_caller(server: Running) -> None:
    def broken() -> Iterator[Pixels]:
        yield pixels(4, 4)
        raise OSError("the disk is gone")

    async def broken_too() -> AsyncIterator[Pixels]:
        for picture in broken():
            yield picture

    async def ask() -> None:
        async with AsyncClient(server.target) as client:
            with pytest.raises(OSError, match="the disk is gone"):
                [_ async for _ in client.stream(broken_too())]

    with Client(server.target) as client, pytest.raises(OSError, match="the disk is gone"):
        list(client.stream(broken()))
    asyncio.run(ask())


def test_answers_do_not_wait_for_the_next_asynchronous_image(server: Running) -> None:
    """The next image is made only once the last one is answered: waiting for it first would never end."""

    async def ask() -> list[int]:
        answered = asyncio.Event()

        async def one_by_one() -> AsyncIterator[Pixels]:
            for height in range(1, 5):
                yield pixels(height, 3)
                await answered.wait()
                answered.clear()

        heights = []
        async with AsyncClient(server.target, timeout=20) as client:
            async for _, outcome in client.stream(one_by_one()):
                assert isinstance(outcome, Answer)
                heights.append(outcome.height)
                answered.set()
        return heights

    assert asyncio.run(ask()) == [1, 2, 3, 4]


@pytest.mark.parametrize("surface", ["blocking", "asyncio"])
def test_a_stream_survives_the_server_s_restart(tiny_model: Path, surface: str) -> None:
    first = start(models=str(tiny_model))
    second: list[Running] = []
    target, port = first.target, first.port
    heights = list(range(1, 201))

    def images() -> Iterator[Pixels]:
        for height in heights:
            if height == 100:
                first.process.terminate()
                first.process.wait(60)
                second.append(start(models=str(tiny_model), port=port))
            yield pixels(height, 5)

    async def ask() -> list[tuple[int, object]]:
        async with AsyncClient(target, wait_for_ready=True) as client:
            return [outcome async for outcome in client.stream(images(), in_flight=4)]

    try:
        if surface == "blocking":
            with Client(target, wait_for_ready=True) as client:
                outcomes: list[tuple[int, object]] = list(client.stream(images(), in_flight=4))
        else:
            outcomes = asyncio.run(ask())
        assert first.process.returncode == 0
        assert sorted(number for number, _ in outcomes) == list(range(200))
        assert by_height(dict(outcomes)) == dict(enumerate(heights))
    finally:
        for server in (first, *second):
            server.process.kill()
            server.process.wait()


def test_threads_share_a_client(server: Running) -> None:
    import threading

    failures = []

    def ask(client: Client, height: int) -> None:
        for number, outcome in client.stream([pixels(height + i, 4) for i in range(20)], poolings=["avg"]):
            expected = client.embed(pixels(height + number, 4))
            if not (isinstance(outcome, Answer) and np.array_equal(outcome.embeddings[0], expected)):
                failures.append((height, number))

    with Client(server.target) as client:
        threads = [threading.Thread(target=ask, args=(client, height)) for height in range(1, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        eventually(lambda: not [t for t in threading.enumerate() if t.name == "fullframe-client"])
