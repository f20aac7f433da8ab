"""What goes wrong on the way: refused, late, full, away, and what a client makes of it."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from fullframe.client import AsyncClient, Client
from fullframe.engine.query import Answer, ClassScore, Query
from fullframe.errors import DeadlinePassed, InvalidInput, Overloaded, ServerError, Unavailable
from fullframe.image import Checkpoint, Regions
from fullframe.image.regions import no_checkpoint
from fullframe.v1 import vision_pb2 as pb
from fullframe.v1.vision_pb2_grpc import VisionServiceServicer, add_VisionServiceServicer_to_server
from tests.pictures import Pixels, encode, pixels
from tests.serving import InProcess, Running, eventually, serving, serving_here, start

SMALL = encode(pixels(8, 8))
MEGAPIXEL = encode(pixels(1000, 1000))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def full(tiny_model: Path) -> Iterator[InProcess]:
    """A server with room for one large image."""
    with serving_here(models=str(tiny_model), max_megapixels_in_flight=1.0) as server:
        yield server


class Endless:
    """A picture that takes all of that room, and a worker, until it is let go."""

    height = width = 1000
    format = "raw"
    random_access, opening_bytes = True, 0

    def __init__(self, server: InProcess) -> None:
        self._let_go = threading.Event()
        [self._answer] = server.plane.submit(server.plane.model(), [self], Query())

    def pixels(self) -> Pixels:
        assert self._let_go.wait(60)
        return pixels(self.height, self.width)

    def regions(self, checkpoint: Checkpoint = no_checkpoint) -> Regions:
        raise AssertionError("it is not huge")

    def reading_bytes(self, rows: int) -> int:
        raise AssertionError("it is not huge")

    def end(self) -> None:
        self._let_go.set()
        assert self._answer.result(60)


def test_refusals_name_the_argument(server: Running) -> None:
    with Client(server.target) as client:
        with pytest.raises(InvalidInput, match="this is text") as text:
            client.classify(b"hello, world")
        assert text.value.field == "images"
        with pytest.raises(InvalidInput, match="top_k is 10000000") as top_k:
            client.classify(SMALL, 10_000_000)
        assert top_k.value.field == "top_k"
        with pytest.raises(InvalidInput, match="unknown kind 'median'") as pooling:
            client.embed(SMALL, "median")
        assert pooling.value.field == "pooling"
        assert client.classify(SMALL)


def test_nobody_there() -> None:
    target = f"127.0.0.1:{free_port()}"
    with Client(target, retries=0) as client, pytest.raises(Unavailable, match=f"reached at {target}"):
        client.classify(SMALL)
    with Client(target, retries=1) as client, pytest.raises(Unavailable):
        list(client.stream([SMALL]))

    async def ask() -> None:
        async with AsyncClient(target, retries=0) as client:
            with pytest.raises(Unavailable, match=f"reached at {target}"):
                await client.classify(SMALL)
            with pytest.raises(Unavailable):
                [_ async for _ in client.stream([SMALL])]

    asyncio.run(ask())


def test_retries_wait_longer_each_time_and_end() -> None:
    """Two retries wait 0.2 and 0.4 s or somewhat more, three another 0.8 s."""
    target = f"127.0.0.1:{free_port()}"
    for retries, least, most in ((0, 0.0, 0.5), (2, 0.6, 1.4), (3, 1.4, 5.0)):
        started = time.monotonic()
        with Client(target, retries=retries) as client, pytest.raises(Unavailable):
            client.models()
        assert least <= time.monotonic() - started < most


def test_retries_end_with_the_deadline() -> None:
    started = time.monotonic()
    with Client(f"127.0.0.1:{free_port()}", timeout=0.5) as client, pytest.raises(Unavailable):
        client.models()
    assert time.monotonic() - started < 1.5


def test_waiting_for_a_server_that_starts_late(tiny_model: Path) -> None:
    port = free_port()
    target = f"127.0.0.1:{port}"
    with Client(target, timeout=60, wait_for_ready=True) as client, futures.ThreadPoolExecutor() as pool:
        asked = pool.submit(client.classify, SMALL)
        streamed = pool.submit(lambda: list(client.stream([SMALL] * 3)))
        time.sleep(0.3)
        assert not asked.done()
        server = start(models=str(tiny_model), port=port)
        try:
            assert asked.result(60)
            assert len(streamed.result(60)) == 3
        finally:
            server.process.terminate()
            assert server.process.wait(60) == 0


def test_a_full_server_says_when_to_come_back(full: InProcess) -> None:
    with Client(full.target, retries=0) as client:
        busy = Endless(full)
        with pytest.raises(Overloaded, match="in flight") as refused:
            client.classify(SMALL)
        assert 0 < refused.value.retry_after < 60
        busy.end()
        assert client.classify(SMALL)


@pytest.mark.parametrize("surface", ["blocking", "asyncio"])
def test_a_full_server_is_asked_again(full: InProcess, surface: str) -> None:
    async def ask() -> list[ClassScore]:
        async with AsyncClient(full.target) as client:
            return await client.classify(SMALL)

    busy = Endless(full)
    with futures.ThreadPoolExecutor() as pool, Client(full.target) as client:
        asked = pool.submit(client.classify, SMALL) if surface == "blocking" else pool.submit(asyncio.run, ask())
        eventually(lambda: full.plane.counters().refused > 1)
        assert not asked.done()
        busy.end()
        assert asked.result(60)


def test_a_stream_waits_for_room(full: InProcess) -> None:
    busy = Endless(full)
    with futures.ThreadPoolExecutor() as pool, Client(full.target) as client:
        asked = pool.submit(lambda: [outcome for _, outcome in client.stream([SMALL] * 3)])
        eventually(lambda: full.plane.counters().refused > 1)
        busy.end()
        assert all(isinstance(outcome, Answer) for outcome in asked.result(60))


def test_deadlines(slow_model: Path) -> None:
    photograph = encode(pixels(1000, 1000), "JPEG")
    with serving(models=str(slow_model)) as server:

        async def ask() -> None:
            async with AsyncClient(server.target, timeout=0.02) as client:
                with pytest.raises(DeadlinePassed):
                    await client.classify(photograph)
                with pytest.raises(DeadlinePassed):
                    [_ async for _ in client.stream([photograph])]

        with Client(server.target, timeout=0.02) as client:
            with pytest.raises(DeadlinePassed, match=r"within 0.02 s|deadline"):
                client.classify(photograph)
            with pytest.raises(DeadlinePassed, match=r"no answer within 0.02 s"):
                list(client.stream([photograph]))
        asyncio.run(ask())
        with Client(server.target, timeout=60) as client:
            assert client.classify(photograph)


def test_a_server_of_another_kind() -> None:
    other = grpc.server(futures.ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    with Client(f"127.0.0.1:{port}") as client, pytest.raises(ServerError, match="UNIMPLEMENTED") as error:
        client.classify(SMALL)
    assert error.value.code == "UNIMPLEMENTED"
    other.stop(None)


class Stopping(VisionServiceServicer):
    """Ends as many calls as it is told as gRPC's core does at shutdown, those never begun; answers what follows."""

    def __init__(self, cancelled: int) -> None:
        self.left = cancelled
        self.holding, self.let_go = threading.Event(), threading.Event()
        self.let_go.set()

    def Predict(self, request: pb.PredictRequest, context: grpc.ServicerContext) -> pb.PredictResponse:
        self._meet(context)
        return pb.PredictResponse(results=[pb.Prediction()])

    def PredictStream(
        self, requests: Iterator[pb.PredictStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.PredictStreamResponse]:
        self._meet(context)
        for request in requests:
            yield pb.PredictStreamResponse(request_id=request.request_id)

    def _meet(self, context: grpc.ServicerContext) -> None:
        self.holding.set()
        self.let_go.wait(60)
        if self.left:
            self.left -= 1
            context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")


@contextmanager
def stopping(cancelled: int) -> Iterator[tuple[Stopping, str]]:
    servicer = Stopping(cancelled)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add_VisionServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    servicer.let_go.set()
    server.stop(None).wait(10)


def test_a_cancellation_of_the_servers_own_is_no_end() -> None:
    """Blocking and asyncio, single calls and streams: each is tried again, and says why where it may not be."""

    async def ask(target: str, retries: int) -> None:
        async with AsyncClient(target, retries=retries) as client:
            assert await client.classify(SMALL) == []
            servicer.left = 1
            assert [number async for number, _ in client.stream([SMALL])] == [0]

    with stopping(2) as (servicer, target):
        with Client(target) as client:
            assert client.classify(SMALL) == []
            servicer.left = 2
            assert [number for number, _ in client.stream([SMALL] * 2)] == [0, 1]
        servicer.left = 2
        asyncio.run(ask(target, retries=2))
        servicer.left = 2
        with Client(target, retries=0) as client, pytest.raises(Unavailable, match=f"{target} is stopping"):
            client.classify(SMALL)
        with pytest.raises(Unavailable, match=f"{target} is stopping"):
            asyncio.run(ask(target, retries=0))


def test_a_client_closed_in_the_middle_does_not_ask_again() -> None:
    with stopping(0) as (servicer, target), futures.ThreadPoolExecutor() as pool:
        servicer.let_go.clear()
        client = Client(target)
        asked = pool.submit(client.classify, SMALL)
        assert servicer.holding.wait(10)
        client.close()
        with pytest.raises(ServerError, match="Channel closed") as error:
            asked.result(10)
        assert error.value.code == "CANCELLED"


def test_a_message_limit_that_shrank_is_named(tiny_model: Path) -> None:
    """As after a server's restart: the client knows a limit that no longer holds."""
    with serving(models=str(tiny_model), max_message_bytes="4MiB") as first, Client(first.target) as client:
        assert client.classify(MEGAPIXEL)
        port = first.port
    with Client(f"127.0.0.1:{port}", wait_for_ready=True) as client:
        client._core._limits = pb.Limits(max_message_bytes=4 * 2**20, max_image_bytes=4 * 2**20)
        with serving(models=str(tiny_model), port=port, max_message_bytes="1MiB"):
            with pytest.raises(ServerError, match="larger than max"):
                client.classify(MEGAPIXEL)
            assert client.classify(SMALL)
