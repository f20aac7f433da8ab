"""Room, deadlines and cancellation: what is refused or given up frees its room, and every image is accounted for."""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status

from fullframe import Client
from fullframe.engine.opening import Opening
from fullframe.engine.query import Answer
from fullframe.v1 import vision_pb2 as pb
from fullframe.v1.vision_pb2_grpc import VisionServiceStub
from tests.pictures import encode, pixels
from tests.serving import MIB, InProcess, eventually, serving, serving_here, stub

SMALL = pb.Image(encoded=encode(pixels(16, 16)))
LARGE = pb.Image(encoded=encode(pixels(1000, 1000), "JPEG"))  # the slow model takes about half a second


def classify(*images: pb.Image) -> pb.ClassifyRequest:
    return pb.ClassifyRequest(images=images)


@contextmanager
def busy(client: VisionServiceStub, here: InProcess, count: int = 1) -> Iterator[list[Any]]:
    """While it lasts, or for about half a second an image, the one worker is held by `count` large images."""
    calls = [client.Classify.future(classify(LARGE)) for _ in range(count)]
    eventually(lambda: here.plane.counters().running == 1 and here.plane.counters().queued == count - 1)
    yield calls
    for call in calls:
        assert call.result().results[0].info.status.code == 0


def trailers(error: grpc.RpcError) -> dict[str, str | bytes]:
    return {item.key: item.value for item in error.trailing_metadata() or ()}


def settled(here: InProcess) -> bool:
    """Nothing is in flight, and every image created came to exactly one end."""
    c = here.plane.counters()
    ended = c.finished + c.failed + c.cancelled + c.expired
    assert c.created == ended + c.queued + c.running
    return c.queued == c.running == c.pixels_in_flight == 0


@pytest.fixture(scope="module")
def here(slow_model: Path) -> Iterator[InProcess]:
    with serving_here(models=str(slow_model), workers=1, max_megapixels_in_flight=4) as it:
        yield it


@pytest.fixture
def client(here: InProcess) -> Iterator[VisionServiceStub]:
    with stub(here.target) as it:
        yield it
    eventually(lambda: settled(here))


def test_a_full_queue_says_when_to_come_again(here: InProcess, client: VisionServiceStub) -> None:
    refused = here.plane.counters().refused
    with busy(client, here, 4):
        with pytest.raises(grpc.RpcError) as caught:
            client.Classify(classify(LARGE))
        error = caught.value
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == "4 megapixels of 4 megapixels are in flight: no room for 1 megapixels now"
        retry = RetryInfo()
        assert any(detail.Unpack(retry) for detail in rpc_status.from_call(error).details)
        milliseconds = retry.retry_delay.ToMilliseconds()
        assert 50 <= milliseconds <= 60_000
        assert trailers(error)["grpc-retry-pushback-ms"] == str(milliseconds)
        assert here.plane.counters().refused == refused + 1
    assert client.Classify(classify(LARGE)).results[0].info.status.code == 0


def test_more_than_could_ever_have_room(client: VisionServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.Classify(classify(*[LARGE] * 5))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "send its images in several requests" in (caught.value.details() or "")


def test_files_that_wait_to_be_opened_are_bounded_too(
    here: InProcess, client: VisionServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that finds no room there is refused whole, and one alone in a stream waits."""
    monkeypatch.setattr(here.plane, "_opening", Opening(most=1))
    tiff = pb.Image(encoded=encode(pixels(16, 16), "TIFF"))
    before = here.plane.counters()
    with pytest.raises(grpc.RpcError) as caught:
        client.Classify(classify(SMALL, *[tiff] * 40))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "wait to be opened" in (caught.value.details() or "")
    assert int(trailers(caught.value)["grpc-retry-pushback-ms"]) > 0
    eventually(lambda: here.plane.counters().opening == 0)
    assert here.plane.counters().refused == before.refused + 1
    assert here.plane.counters().created == before.created
    assert client.Classify(classify(SMALL, tiff)).results[1].info.status.code == 0
    requests = [pb.PredictStreamRequest(request_id=str(i), image=tiff) for i in range(5)]
    responses = list(client.PredictStream(iter(requests)))
    assert [response.result.info.status.code for response in responses] == [0] * 5


def test_a_stream_waits_for_room(here: InProcess, client: VisionServiceStub) -> None:
    with busy(client, here, 4):
        requests = [pb.PredictStreamRequest(request_id=str(i), image=LARGE) for i in range(3)]
        responses = list(client.PredictStream(iter(requests)))
    assert [r.result.info.status.code for r in responses] == [0, 0, 0]


def test_a_stream_stops_waiting_before_its_deadline(here: InProcess, client: VisionServiceStub) -> None:
    with busy(client, here, 4):
        created = here.plane.counters().created
        [response] = client.PredictStream(iter([pb.PredictStreamRequest(image=LARGE)]), timeout=0.2)
        status = response.result.info.status
        assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert any(detail.Is(RetryInfo.DESCRIPTOR) for detail in status.details)
        assert here.plane.counters().created == created


def test_a_deadline_that_passes_in_the_queue(here: InProcess, client: VisionServiceStub) -> None:
    with busy(client, here, 2):
        before = here.plane.counters()
        with pytest.raises(grpc.RpcError) as caught:
            client.Classify(classify(LARGE), timeout=0.1)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        # Its room is free long before the worker gets to it.
        eventually(lambda: here.plane.counters().pixels_in_flight <= before.pixels_in_flight, 0.3)
        after = here.plane.counters()
        assert after.created == before.created + 1
        assert after.cancelled + after.expired == before.cancelled + before.expired + 1


def test_cancelling_while_queued(here: InProcess, client: VisionServiceStub) -> None:
    with busy(client, here, 2):
        before = here.plane.counters()
        call = client.Classify.future(classify(LARGE, SMALL))
        eventually(lambda: here.plane.counters().created == before.created + 2)
        call.cancel()
        eventually(lambda: here.plane.counters().cancelled == before.cancelled + 2, 0.3)
        assert here.plane.counters().pixels_in_flight == before.pixels_in_flight


def test_cancelling_while_running(here: InProcess, client: VisionServiceStub) -> None:
    before = here.plane.counters()
    call = client.Classify.future(classify(LARGE))
    eventually(lambda: here.plane.counters().running == 1)
    call.cancel()
    eventually(lambda: here.plane.counters().finished == before.finished + 1)
    assert client.Classify(classify(SMALL)).results[0].info.status.code == 0


def test_cancelling_before_the_request_is_complete(here: InProcess, client: VisionServiceStub) -> None:
    created = here.plane.counters().created
    sent = threading.Event()

    def parts() -> Iterator[pb.PredictUploadRequest]:
        yield pb.PredictUploadRequest(start=pb.PredictUploadRequest.Start())
        yield pb.PredictUploadRequest(chunk=LARGE.encoded[:1000])
        sent.set()
        time.sleep(0.3)

    call = client.PredictUpload(parts())
    assert sent.wait(10)
    call.cancel()
    assert here.plane.counters().created == created
    assert client.Classify(classify(SMALL)).results[0].info.status.code == 0


def test_cancelling_a_stream_frees_all_its_images(here: InProcess, client: VisionServiceStub) -> None:
    before = here.plane.counters()
    stream = client.PredictStream(iter([pb.PredictStreamRequest(image=LARGE)] * 4))
    eventually(lambda: here.plane.counters().queued >= 2)
    stream.cancel()
    eventually(lambda: here.plane.counters().queued == 0, 0.3)
    eventually(lambda: settled(here))
    after = here.plane.counters()
    assert after.cancelled >= before.cancelled + 2


def test_a_storm_leaves_nothing_behind(here: InProcess, caplog: pytest.LogCaptureFixture) -> None:
    """Calls of every sort, cancelled or timed out at random moments: the counts add up and all room is free."""
    dice = random.Random(5)
    before = here.plane.counters()
    bad = pb.Image(encoded=LARGE.encoded[:5000])

    async def one(client: Any) -> str:
        images = dice.choices([SMALL, bad, LARGE, pb.Image()], [24, 8, 1, 4], k=dice.randint(1, 4))
        timeout = dice.choice([None, dice.uniform(0.001, 0.5)])
        if dice.random() < 0.3:
            call = client.PredictStream(iter([pb.PredictStreamRequest(image=i) for i in images]), timeout=timeout)
            work = asyncio.create_task(_drained(call))
        else:
            work = asyncio.ensure_future(_answered(client.Classify(classify(*images), timeout=timeout)))
        if dice.random() < 0.3:
            await asyncio.sleep(dice.uniform(0, 0.2))
            work.cancel()
        try:
            await work
        except asyncio.CancelledError:
            return "CANCELLED"
        except grpc.aio.AioRpcError as error:
            # What grpc.aio calls its own failure to send on a stream whose deadline has passed.
            return "LATE" if error.details() == "Internal error from Core" else error.code().name
        return "OK"

    async def storm() -> list[str]:
        async with grpc.aio.insecure_channel(here.target) as channel:
            client = VisionServiceStub(channel)
            outcomes = []
            for _ in range(5):
                outcomes += await asyncio.gather(*(one(client) for _ in range(40)))
            return outcomes

    outcomes = set(asyncio.run(storm()))
    assert {"OK", "CANCELLED", "DEADLINE_EXCEEDED"} <= outcomes
    assert outcomes <= {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "LATE"}
    eventually(lambda: settled(here))
    after = here.plane.counters()
    assert after.created > before.created + 100
    assert after.finished > before.finished and after.failed > before.failed
    assert after.cancelled + after.expired > before.cancelled + before.expired
    calls = here.server.calls
    assert (calls.calls, calls.bytes) == (0, 0)
    # grpc itself complains when a caller leaves just as the status is sent.
    ours = [record for record in caplog.records if record.name.startswith(("fullframe", "asyncio"))]
    assert not [record for record in ours if record.levelno >= logging.WARNING]


async def _drained(call: Any) -> None:
    async for _ in call:
        pass


async def _answered(call: Any) -> None:
    await call


def test_calls_beyond_the_limit_are_refused(slow_model: Path) -> None:
    with (
        serving_here(models=str(slow_model), workers=1, max_concurrent_rpcs=2) as here,
        stub(here.target) as client,
        busy(client, here, 2),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            client.Classify(classify(SMALL))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.details() == "2 calls are being answered: no room for more now"
        assert "grpc-retry-pushback-ms" in trailers(caught.value)


def test_requests_beyond_the_bytes_in_flight_are_refused(slow_model: Path) -> None:
    with serving_here(models=str(slow_model), workers=1, max_bytes_in_flight=MIB) as here, stub(here.target) as client:
        slow = pb.Image(raw=pb.RawImage(height=500, width=500, data=bytes(750_000)))
        call = client.Classify.future(classify(slow))
        eventually(lambda: here.plane.counters().running == 1)
        with pytest.raises(grpc.RpcError) as caught:
            client.Classify(classify(slow))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "no room for 7500" in (caught.value.details() or "")
        assert call.result().results[0].info.status.code == 0
        assert client.Classify(classify(slow)).results[0].info.status.code == 0

        with pytest.raises(grpc.RpcError) as caught:
            client.Classify(classify(pb.Image(encoded=bytes(MIB))))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "at most 1048576 can be held" in (caught.value.details() or "")
        assert here.server.calls.bytes == 0


def test_no_more_of_a_stream_is_read_than_may_wait(slow_model: Path) -> None:
    """The caller sends as fast as it can; the server takes in few requests while it has not answered others."""
    sent = 0
    data = encode(pixels(400, 400))

    def requests() -> Iterator[pb.PredictStreamRequest]:
        nonlocal sent
        for i in range(400):
            sent += 1
            yield pb.PredictStreamRequest(request_id=str(i), image=pb.Image(encoded=data))

    with (
        serving_here(models=str(slow_model), workers=1, max_stream_images=3) as here,
        ExitStack() as stack,
        stub(here.target) as client,
    ):
        stream = client.PredictStream(requests())
        stack.callback(stream.cancel)
        for _ in range(3):
            next(stream)
            counters = here.plane.counters()
            assert counters.queued + counters.running <= 3
        held = here.server.calls.bytes
        assert held <= 3 * 410_000
        # A connection buffers up to gRPC's largest window, 16 MiB, and the kernel's two socket buffers: 30 MB or so.
        assert sent * len(data) < 40e6
        stream.cancel()
        eventually(lambda: settled(here) and here.server.calls.calls == 0)


def test_a_stream_may_carry_more_than_fits_at_once(tiny_model: Path) -> None:
    with serving(models=str(tiny_model), max_bytes_in_flight="8MiB") as running, Client(running.target) as client:
        outcomes = [outcome for _, outcome in client.stream([pixels(1000, 1000)] * 6)]
    assert [type(outcome) for outcome in outcomes] == [Answer] * 6
