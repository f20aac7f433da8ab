"""What is beyond a message goes up in chunks: read as it is sent, told on the way, tried again where that helps."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import fullframe
from fullframe.client import AsyncClient, Client
from fullframe.client.uploads import CHUNK, StoredFile, Upload
from fullframe.defaults import LEAST_LIMIT_BYTES
from fullframe.engine.progress import Progress
from fullframe.engine.query import Answer
from fullframe.errors import DeadlinePassed, InvalidInput, Overloaded, Unavailable
from fullframe.server.spool import SpooledFile
from fullframe.v1 import vision_pb2 as pb
from fullframe.v1.vision_pb2_grpc import VisionServiceServicer, add_VisionServiceServicer_to_server
from tests.pictures import encode, pixels
from tests.serving import MIB, InProcess, eventually, serving, serving_here

NOISE = np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8)
LARGE = encode(NOISE)  # 1.9 MB, which these servers take only as an upload
SMALL = encode(pixels(9, 9))
LIMITED: dict[str, Any] = {"max_image_bytes": MIB}
SURFACES = pytest.mark.parametrize("surface", ["blocking", "asyncio"])


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.png"
    path.write_bytes(LARGE)
    return path


@pytest.fixture(scope="module")
def limited(tiny_model: Path) -> Iterator[InProcess]:
    with serving_here(models=f"tiny={tiny_model}", **LIMITED) as server:
        yield server


def predict(surface: str, target: str, image: Any, wish: dict[str, Any], **options: Any) -> Answer:
    """The answer of either client."""

    async def run() -> Answer:
        async with AsyncClient(target, **options) as client:
            return await client.predict(image, **wish)

    if surface == "asyncio":
        return asyncio.run(run())
    with Client(target, **options) as client:
        return client.predict(image, **wish)


# -- what is sent, and how


@SURFACES
def test_a_long_file_goes_up_in_chunks_though_a_message_would_take_it(tiny_model: Path, surface: str) -> None:
    long = encode(pixels(9, 9), "JPEG") + bytes(9 * MIB)  # what follows a JPEG's end is of no account
    with serving_here(models=f"tiny={tiny_model}") as server:
        heard: list[Progress] = []
        answer = predict(surface, server.target, long, {"on_progress": heard.append})
        assert (answer.height, answer.width) == (9, 9)
        assert {news.total for news in heard} == {len(long)}
        heard.clear()
        predict(surface, server.target, long[: 7 * MIB], {"on_progress": heard.append})
        assert not heard, "this one goes in a message"


@SURFACES
def test_a_file_is_read_as_it_is_sent(
    limited: InProcess, tiny_model: Path, large: Path, surface: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_whole(path: Path) -> bytes:
        raise AssertionError(f"{path} must not be held whole")

    with fullframe.load(str(tiny_model)) as predictor:
        expected = predictor.predict(LARGE, logits=True)
    monkeypatch.setattr(Path, "read_bytes", read_whole)
    for image in (large, str(large)):
        answer = predict(surface, limited.target, image, {"logits": True})
        np.testing.assert_array_equal(answer.logits, expected.logits)
    with pytest.raises(AssertionError, match="must not be held whole"):  # the control: so is a small file
        small = large.with_name("small.png")
        small.write_bytes(SMALL)
        predict(surface, limited.target, small, {})


@SURFACES
def test_limits_are_asked_for_once_and_small_images_go_as_before(tiny_model: Path, large: Path, surface: str) -> None:
    async def stream(target: str) -> list[Any]:
        async with AsyncClient(target) as client:
            return [outcome async for _, outcome in client.stream([large, SMALL, NOISE, LARGE])]

    with serving(models=str(tiny_model), log_level="debug", **LIMITED) as server:
        if surface == "asyncio":
            outcomes = asyncio.run(stream(server.target))
        else:
            with Client(server.target) as client:
                outcomes = [outcome for _, outcome in client.stream([large, SMALL, NOISE, LARGE])]
        assert all(isinstance(outcome, Answer) for outcome in outcomes)
        server.wait_for("call", rpc="PredictStream")
        assert len(server.events("call", rpc="GetModel")) == 1
        assert len(server.events("call", rpc="PredictUpload", code="OK")) == 2  # raw pixels have the message's limit
        assert server.wait_for("call", rpc="PredictStream")["images"] == 2


def sent(upload: Upload) -> Iterator[pb.PredictUploadRequest]:
    """What a server gets that has room."""
    messages = upload.messages()
    upload.let_go()
    return messages


def test_a_file_waits_until_there_is_room() -> None:
    upload = Upload(LARGE, pb.ModelRef(), pb.PredictOptions())
    messages = upload.messages()
    assert next(messages).HasField("start")
    with futures.ThreadPoolExecutor() as pool:
        following = pool.submit(next, messages)
        assert not futures.wait([following], timeout=0.2).done
        upload.let_go()
        assert following.result(10).chunk == LARGE[:CHUNK]


def test_the_messages_of_an_upload(tmp_path: Path) -> None:
    data = bytes(range(256)) * (CHUNK // 100)
    path = tmp_path / "file"
    path.write_bytes(data)
    for source in (data, StoredFile(path, len(data))):
        upload = Upload(source, pb.ModelRef(name="m"), pb.PredictOptions(top_k=3))
        for _ in range(2):  # another attempt begins anew
            start, *chunks = sent(upload)
            assert (start.start.model.name, start.start.options.top_k, start.start.total_bytes) == ("m", 3, len(data))
            assert b"".join(message.chunk for message in chunks) == data
            assert max(len(message.chunk) for message in chunks) == CHUNK
            assert upload.error is None
    path.write_bytes(data[:1000])
    assert len(list(sent(upload))) == 2
    assert "became shorter" in str(upload.error)
    path.unlink()
    assert list(sent(upload)) == []
    assert f"cannot read {path}: No such file" in str(upload.error)


@SURFACES
def test_a_file_that_goes_away_is_named(limited: InProcess, large: Path, surface: str) -> None:
    wrong = large.with_name("gone.png")
    with pytest.raises(InvalidInput, match=r"cannot read .*gone\.png: No such file"):
        predict(surface, limited.target, wrong, {})
    file = large.with_name("shrinks.png")
    file.write_bytes(LARGE)

    def cut(self: SpooledFile, *args: Any) -> None:
        file.write_bytes(b"")
        opened(self, *args)

    opened = SpooledFile.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fullframe.client.uploads.CHUNK", 1000)
        patch.setattr(SpooledFile, "open", cut)
        with pytest.raises(InvalidInput, match="became shorter"):
            predict(surface, limited.target, file, {})


# -- news


@SURFACES
def test_news_are_of_this_image(slow_model: Path, large: Path, surface: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fullframe.server.uploads._NEWS", 0.02)
    news: list[Progress] = []
    with serving_here(models=str(slow_model), tile_pixels=100_000, **LIMITED) as server:
        predict(surface, server.target, large, {"on_progress": news.append})
    assert {each.total for each in news} == {len(LARGE)}
    received, computed = [each.received for each in news], [each.computed for each in news]
    assert received == sorted(received) and received[-1] == len(LARGE)
    assert computed == sorted(computed) and 0 < max(computed) <= 1


def test_news_of_a_stream_carry_the_number(limited: InProcess) -> None:
    news: list[tuple[int, Progress]] = []
    with Client(limited.target) as client:
        outcomes = dict(
            client.stream([SMALL, LARGE, SMALL], on_progress=lambda number, each: news.append((number, each)))
        )
    assert sorted(outcomes) == [0, 1, 2]
    assert {number for number, _ in news} == {1}


# -- what goes wrong


@SURFACES
def test_beyond_the_upload_limit(tiny_model: Path, large: Path, surface: str) -> None:
    with serving_here(models=str(tiny_model), max_upload_bytes=MIB, **LIMITED) as server:
        with pytest.raises(
            InvalidInput, match=f"an upload of {len(LARGE)} bytes is more than the limit of {MIB} bytes"
        ):
            predict(surface, server.target, large, {})
        assert predict(surface, server.target, SMALL, {}).classes


@SURFACES
def test_an_upload_refused_for_lack_of_room_is_tried_again_from_the_beginning(
    tiny_model: Path, large: Path, surface: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fullframe.server.spool._RETRY_AFTER", 0.1)
    with serving_here(models=str(tiny_model), max_spool_bytes=2 * MIB, **LIMITED) as server:
        other = SpooledFile(server.server.spool, MIB)
        other.open()
        with pytest.raises(Overloaded, match="no room for"):
            predict(surface, server.target, large, {}, retries=1)
        with futures.ThreadPoolExecutor() as pool:
            asked = pool.submit(predict, surface, server.target, large, {}, retries=100)
            time.sleep(0.5)
            assert not asked.done()
            other.close()
            assert asked.result(60).width == 900


@SURFACES
@pytest.mark.parametrize("limit", ["max_image_bytes", "max_message_bytes"])
def test_a_server_of_the_lowest_limits_gets_what_is_beyond_them_by_upload(
    surface: str, tiny_model: Path, limit: str
) -> None:
    images = {side: encode(pixels(side, side)) for side in (150, 220, 300)}
    small, middle, large = map(len, images.values())
    assert small < LEAST_LIMIT_BYTES - 2**16 < middle < LEAST_LIMIT_BYTES < large < MIB
    with serving_here(models=str(tiny_model), **{limit: LEAST_LIMIT_BYTES}) as server:
        for side, image in images.items():
            assert predict(surface, server.target, image, {}).width == side


class Scripted(VisionServiceServicer):
    """Takes uploads alone, and does with each what the next of `acts` does."""

    def __init__(self, *acts: Callable[[Iterator[Any], Any], Iterator[pb.PredictUploadResponse]]) -> None:
        self.acts, self.ended = list(acts), threading.Event()

    def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        return pb.GetModelResponse(limits=pb.Limits(max_message_bytes=MIB, max_image_bytes=MIB))

    def PredictUpload(self, requests: Iterator[Any], context: Any) -> Iterator[pb.PredictUploadResponse]:
        context.add_callback(self.ended.set)
        return self.acts.pop(0)(requests, context)


@contextmanager
def scripted(*acts: Any) -> Iterator[tuple[Scripted, str]]:
    servicer = Scripted(*acts)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add_VisionServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None).wait(10)


def news(computed: float) -> pb.PredictUploadResponse:
    return pb.PredictUploadResponse(progress=pb.PredictUploadResponse.Progress(computed=computed))


def answering(requests: Iterator[Any], context: Any) -> Iterator[pb.PredictUploadResponse]:
    yield news(0)
    received = sum(len(request.chunk) for request in requests)
    info = pb.ImageInfo(width=received)
    yield pb.PredictUploadResponse(done=pb.PredictUploadResponse.Done(result=pb.Prediction(info=info)))


def silent(requests: Iterator[Any], context: Any) -> Iterator[pb.PredictUploadResponse]:
    yield news(0.5)
    while context.is_active():
        time.sleep(0.01)


def slow(requests: Iterator[Any], context: Any) -> Iterator[pb.PredictUploadResponse]:
    for share in range(10):
        yield news(share / 10)
        time.sleep(0.3)
    yield from answering(requests, context)


def breaking(requests: Iterator[Any], context: Any) -> Iterator[pb.PredictUploadResponse]:
    next(requests)
    yield news(0.1)
    context.abort(grpc.StatusCode.UNAVAILABLE, "it fell over")


@SURFACES
def test_an_upload_may_take_longer_than_the_timeout_as_long_as_it_moves(large: Path, surface: str) -> None:
    with scripted(slow) as (_, target):
        assert predict(surface, target, large, {}, timeout=2).width == len(LARGE)
    with scripted(silent) as (servicer, target):
        with pytest.raises(DeadlinePassed, match=r"no news of the upload within 0.5 s"):
            predict(surface, target, large, {}, timeout=0.5)
        assert servicer.ended.wait(10)  # the server is told


@SURFACES
def test_an_upload_that_breaks_off_is_sent_again_whole(large: Path, surface: str) -> None:
    with scripted(breaking, answering) as (servicer, target):
        assert predict(surface, target, large, {}, retries=1).width == len(LARGE)
        assert not servicer.acts
    with scripted(breaking, breaking) as (_, target), pytest.raises(Unavailable, match="it fell over"):
        predict(surface, target, large, {}, retries=1)


def refusing(requests: Iterator[Any], context: Any) -> Iterator[pb.PredictUploadResponse]:
    next(requests)
    yield news(0)
    for number, _ in enumerate(requests):
        if number:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not this one")


def test_a_refusal_in_mid_upload_is_not_lost_among_writes_that_fail() -> None:
    """A race, which grpc.aio alone would lose once in ten times or so."""

    async def ask(target: str, times: int) -> None:
        async with AsyncClient(target, retries=0) as client:
            for _ in range(times):
                with pytest.raises(InvalidInput, match="not this one"):
                    await client.predict(bytes(16 * MIB))

    with scripted(*[refusing] * 50) as (_, target):
        asyncio.run(ask(target, 50))


@SURFACES
def test_giving_up_is_told_to_the_server(slow_model: Path, tmp_path: Path, surface: str) -> None:
    """By what a callback raises: Ctrl-C in blocking code, a cancelled task on a loop end it likewise."""

    class Enough(Exception):
        pass

    def stop(progress: Progress) -> None:
        raise Enough

    huge = tmp_path / "huge.png"
    huge.write_bytes(encode(pixels(1500, 2000)))
    with serving_here(models=str(slow_model), tile_pixels=100_000, workers=1, **LIMITED) as server:
        with pytest.raises(Enough):
            predict(surface, server.target, huge, {"on_progress": stop})
        eventually(lambda: server.server.calls.calls == server.server.spool.reserved() == 0)
        eventually(lambda: server.plane.counters().pixels_in_flight == 0)
        assert server.plane.counters().finished == 0
