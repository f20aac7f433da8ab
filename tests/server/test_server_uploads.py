"""Uploads: the same answer, news on the way, room for them refused in time, and nothing left on any way out."""

import gc
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pyvips
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status

import fullframe
from fullframe import Client
from fullframe.engine.plane import open_plane
from fullframe.engine.predictor import Predictor
from fullframe.engine.progress import Progress
from fullframe.engine.tiles import Piece, Tiler
from fullframe.image import Limits
from fullframe.server import uploads
from fullframe.server.spool import Spool
from fullframe.v1 import vision_pb2 as pb
from fullframe.v1.vision_pb2_grpc import VisionServiceStub
from tests.pictures import encode, pixels
from tests.serving import COMMAND, MIB, InProcess, eventually, resident, serving, serving_here, stub

TILE = 100_000  # pixels, beyond which these servers compute in pieces
START = pb.PredictUploadRequest.Start
HUGE = encode(pixels(1200, 1500), "JPEG")  # for the slow model about a second, in several pieces
MANY = encode(pixels(3000, 4000), "JPEG")  # some fifty pieces
SMALL = encode(pixels(20, 30))

Part = pb.PredictUploadRequest.Start | bytes


def upload(*parts: Part) -> Iterator[pb.PredictUploadRequest]:
    for part in parts:
        if isinstance(part, bytes):
            yield pb.PredictUploadRequest(chunk=part)
        else:
            yield pb.PredictUploadRequest(start=part)


def chunks(data: bytes, size: int = 50_000) -> Iterator[bytes]:
    for begin in range(0, len(data), size):
        yield data[begin : begin + size]


class Sending:
    """An upload whose caller decides when what is sent."""

    def __init__(self, client: VisionServiceStub, *parts: Part, timeout: float | None = None) -> None:
        self._outbox: queue.SimpleQueue[pb.PredictUploadRequest | None] = queue.SimpleQueue()
        self.call = client.PredictUpload(iter(self._outbox.get, None), timeout=timeout)
        self.send(*parts)

    def send(self, *parts: Part) -> None:
        for message in upload(*parts):
            self._outbox.put(message)

    def send_end(self) -> None:
        self._outbox.put(None)

    def end(self) -> list[pb.PredictUploadResponse]:
        self.send_end()
        return list(self.call)

    def cancel(self) -> None:
        self.send_end()  # so that gRPC's thread ends
        self.call.cancel()


def refusal(call: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value


@contextmanager
def uploading_to(folder: Path, model: Path, **settings: Any) -> Iterator[tuple[InProcess, VisionServiceStub]]:
    """A server in this process whose spool is `folder`; at the end it must have nothing in flight and hold no bytes."""
    given = {"tile_pixels": TILE, "workers": 1, "spool_folder": str(folder), **settings}
    with serving_here(models=str(model), **given) as here, stub(here.target) as client:
        yield here, client
        eventually(lambda: clean(here, folder))


def clean(here: InProcess, folder: Path) -> bool:
    """Every image came to one end, and neither the quota nor the disk holds anything."""
    c = here.plane.counters()
    assert c.created == c.finished + c.failed + c.cancelled + c.expired + c.queued + c.running
    idle = c.queued == c.running == c.pixels_in_flight == 0
    return idle and here.server.spool.reserved() == here.server.calls.bytes == on_disk(folder) == 0


def on_disk(folder: Path, pid: int | str = "self") -> int:
    """Bytes of the files there, those without a name that a process holds open included."""
    found = {path.stat().st_ino: path.stat().st_size for path in folder.iterdir()}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if str(entry.readlink()).startswith(f"{folder}/"):
                found[entry.stat().st_ino] = entry.stat().st_size
        except OSError:  # closed meanwhile
            continue
    return sum(found.values())


# -- answers and news


@pytest.mark.parametrize("announce", [True, False])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_the_answer_is_that_of_the_picture_and_news_come_before_it(
    tmp_path: Path, tiny_model: Path, format: str, announce: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "_NEWS", 0.0)  # after every chunk
    data = encode(pixels(700, 900), format)
    options = pb.PredictOptions(top_k=2, poolings=[pb.Pooling()], logits=True)
    start = START(options=options, total_bytes=len(data) if announce else 0)
    with uploading_to(tmp_path, tiny_model) as (_, client):
        *news, last = client.PredictUpload(upload(start, *chunks(data)))
    with Predictor(open_plane([str(tiny_model)], tile_pixels=TILE)) as predictor:
        expected = predictor.predict(data, top_k=2, poolings=["avg"], logits=True)
    result = last.done.result
    assert (result.info.height, result.info.width) == (700, 900)
    assert expected.logits is not None
    assert list(result.logits.values) == expected.logits.tolist()
    assert list(result.embeddings[0].values) == expected.embeddings[0].tolist()
    received = [each.progress.received_bytes for each in news]
    computed = [each.progress.computed for each in news]
    assert received == sorted(received) and computed == sorted(computed)
    assert received[0] < received[-1] == len(data)
    assert computed[0] == 0 and all(at == len(data) for at, share in zip(received, computed, strict=True) if share)


def test_news_of_what_is_computed(tmp_path: Path, slow_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_NEWS", 0.02)
    with uploading_to(tmp_path, slow_model) as (_, client):
        *news, _ = client.PredictUpload(upload(START(), HUGE))
    computed = [each.progress.computed for each in news]
    assert computed == sorted(computed)
    assert len({share for share in computed if 0 < share < 1}) >= 3


def test_a_caller_who_takes_no_news_gets_the_answer(tmp_path: Path, slow_model: Path) -> None:
    """Nothing is piled up for one who reads late."""
    with uploading_to(tmp_path, slow_model) as (here, client):
        call = client.PredictUpload(upload(START(), HUGE))
        eventually(lambda: here.plane.counters().finished == 1)
        *news, last = call
        assert last.done.result.info.status.code == 0
        assert len(news) < 100


def test_how_far_a_truncated_picture_could_be_read_is_told(tmp_path: Path, tiny_model: Path) -> None:
    with uploading_to(tmp_path, tiny_model) as (_, client):
        *_, last = client.PredictUpload(upload(START(), HUGE[: len(HUGE) * 2 // 3]))
    status = last.done.result.info.status
    assert status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "of 1200 rows" in status.message and "could be read" in status.message


def test_other_callers_are_answered_while_the_disk_is_slow(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()

    class Slow:
        closed = False

        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, data: Any) -> int:
            assert let_go.wait(60)
            return int(self._file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    make = Spool.make
    monkeypatch.setattr(Spool, "make", lambda spool: Slow(make(spool)))
    with uploading_to(tmp_path, tiny_model) as (_, client):
        sending = Sending(client, START(), SMALL)
        for _ in range(3):
            response = client.Classify(pb.ClassifyRequest(images=[pb.Image(encoded=SMALL)]), timeout=20)
            assert response.results[0].info.status.code == 0
        let_go.set()
        assert sending.end()[-1].done.result.info.status.code == 0


# -- room


def test_too_large_is_refused_before_it_is_sent(tmp_path: Path, tiny_model: Path) -> None:
    with uploading_to(tmp_path, tiny_model, max_upload_bytes=MIB) as (_, client):
        assert client.GetModel(pb.GetModelRequest()).limits.max_upload_bytes == MIB
        announced = Sending(client, START(total_bytes=MIB + 1))  # and not a byte of it
        told = Sending(client, START(), bytes(MIB // 2), bytes(MIB // 2), b"x")
        for sending in (announced, told):
            error = refusal(sending.call)
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert error.details() == "an upload of 1048577 bytes is more than the limit of 1048576 bytes"
        assert Sending(client, START(total_bytes=len(SMALL)), SMALL).end()[-1].HasField("done")


def test_a_full_quota_says_when_to_come_again(tmp_path: Path, tiny_model: Path) -> None:
    with uploading_to(tmp_path, tiny_model, max_spool_bytes=MIB) as (here, client):
        first = Sending(client, START(total_bytes=len(SMALL)), SMALL[:100])
        eventually(lambda: here.server.spool.reserved() == len(SMALL))
        size = MIB - len(SMALL) + 1
        for parts in ([START(total_bytes=size)], [START(), bytes(size)]):
            error = refusal(Sending(client, *parts).call)
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert f"of at most {MIB}: no room for {size} now" in (error.details() or "")
            retry = RetryInfo()
            assert any(detail.Unpack(retry) for detail in rpc_status.from_call(error).details)
            assert retry.retry_delay.ToMilliseconds() > 0
        first.send(SMALL[100:])
        assert first.end()[-1].done.result.info.status.code == 0
        assert Sending(client, START(total_bytes=size), bytes(size)).end()[-1].HasField("done")


def test_the_disk_keeps_some_room_free(tmp_path: Path, tiny_model: Path) -> None:
    with uploading_to(tmp_path, tiny_model, min_free_bytes=2**60) as (_, client):
        error = refusal(Sending(client, START(), SMALL).call)
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "disk for uploads is nearly full" in (error.details() or "")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    if (
        os.getuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("may not mount")
    yield tmp_path
    gc.collect()  # descriptors of what was read are closed with the objects that held them
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_disk_that_fills_up_fails_one_upload_alone(small_disk: Path, tiny_model: Path) -> None:
    with uploading_to(small_disk, tiny_model, min_free_bytes=0) as (_, client):
        before = os.statvfs(small_disk).f_bavail
        other = Sending(client, START(), SMALL[:100])
        (small_disk / "somebody's").write_bytes(bytes(MIB))
        error = refusal(Sending(client, START(), *[bytes(MIB // 4)] * 8).call)
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "disk for uploads" in (error.details() or "")
        other.send(SMALL[100:])
        assert other.end()[-1].done.result.info.status.code == 0
        (small_disk / "somebody's").unlink()
        eventually(lambda: os.statvfs(small_disk).f_bavail == before)


def test_a_write_that_fails_half_way_fails_one_upload_alone(tmp_path: Path, tiny_model: Path) -> None:
    """The system lets this server's files grow to a mebibyte; the error comes while a chunk is being written."""
    command = ["sh", "-c", f'ulimit -f {MIB // 512} && exec "$@"', "sh", *COMMAND]
    with (
        serving(command=command, models=str(tiny_model), spool_folder=tmp_path) as running,
        stub(running.target) as client,
    ):
        for _ in range(2):
            error = refusal(client.PredictUpload(upload(START(), bytes(MIB * 3 // 4), bytes(MIB))))
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "takes no more now: File too large" in (error.details() or "")
            assert any(detail.Is(RetryInfo.DESCRIPTOR) for detail in rpc_status.from_call(error).details)
            *_, last = client.PredictUpload(upload(START(), SMALL))
            assert last.done.result.info.status.code == 0
        eventually(lambda: on_disk(tmp_path, running.pid) == 0)


def test_without_a_folder_small_uploads_are_held_in_memory(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with uploading_to(tmp_path, tiny_model, spool_folder="", max_image_bytes=MIB) as (_, client):
        assert client.GetModel(pb.GetModelRequest()).limits.max_upload_bytes == MIB
        *_, last = client.PredictUpload(upload(START(), *chunks(HUGE)))
        assert last.done.result.info.status.code == 0
        error = refusal(client.PredictUpload(upload(START(total_bytes=MIB + 1))))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "limit of 1048576 bytes" in (error.details() or "")


# -- ways out; uploading_to looks that nothing is left


def test_a_bad_image_leaves_nothing(tmp_path: Path, tiny_model: Path) -> None:
    with uploading_to(tmp_path, tiny_model, max_megapixels=1) as (_, client):
        for data, text in ((bytes(MIB), "no known image format"), (HUGE, "1500x1200"), (b"", "empty")):
            *_, last = client.PredictUpload(upload(START(), data))
            assert text in last.done.result.info.status.message


def test_cancelled_while_it_is_received(tmp_path: Path, slow_model: Path) -> None:
    with uploading_to(tmp_path, slow_model) as (here, client):
        sending = Sending(client, START(total_bytes=len(HUGE)), HUGE[:100_000])
        eventually(lambda: on_disk(tmp_path) == 100_000)
        sending.cancel()
        eventually(lambda: clean(here, tmp_path))
        assert here.plane.counters().created == 0


SENDER = """
import sys, grpc
from fullframe.v1 import vision_pb2 as pb, vision_pb2_grpc
parts = [{"start": {}}, {"chunk": sys.stdin.buffer.read()}]
stub = vision_pb2_grpc.VisionServiceStub(grpc.insecure_channel(sys.argv[1]))
list(stub.PredictUpload(pb.PredictUploadRequest(**part) for part in parts))
"""


@pytest.mark.parametrize("end", ["cancelled", "late", "gone"])
def test_given_up_while_it_is_computed(
    tmp_path: Path, slow_model: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Tiler.pieces

    def unhurriedly(*arguments: Any) -> Iterator[Piece]:
        for piece in compute(*arguments):
            time.sleep(0.2)  # fifty of them take longer than the deadline on any machine
            yield piece

    monkeypatch.setattr(Tiler, "pieces", unhurriedly)
    with uploading_to(tmp_path, slow_model) as (here, client):
        if end == "gone":
            process = subprocess.Popen([sys.executable, "-c", SENDER, here.target], stdin=subprocess.PIPE)
            assert process.stdin
            process.stdin.write(MANY)
            process.stdin.close()
        else:
            sending = Sending(client, START(), MANY, timeout=3.0 if end == "late" else None)
            sending.send_end()
        eventually(lambda: here.plane.counters().created == 1)
        assert on_disk(tmp_path) == len(MANY)
        if end == "gone":
            process.kill()
            process.wait()
        elif end == "late":
            assert refusal(sending.call).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        else:
            sending.cancel()
        eventually(lambda: clean(here, tmp_path))
        counters = here.plane.counters()
        assert counters.cancelled + counters.expired == 1 and counters.finished == 0


def test_a_server_that_stops_ends_uploads_that_come_in_and_finishes_those_it_has(
    tmp_path: Path, slow_model: Path
) -> None:
    with (
        serving(models=str(slow_model), tile_pixels=TILE, spool_folder=tmp_path, log_level="debug") as running,
        stub(running.target) as client,
    ):
        computing = Sending(client, START(), HUGE)
        computing.send_end()
        eventually(lambda: on_disk(tmp_path, running.pid) == len(HUGE))
        coming = Sending(client, START(total_bytes=len(HUGE)), HUGE[:1000])
        eventually(lambda: on_disk(tmp_path, running.pid) == len(HUGE) + 1000)
        running.stop()
        error = refusal(coming.call)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in (error.details() or "")
        *_, last = computing.call
        assert last.done.result.info.status.code == 0


@pytest.mark.parametrize("end", ["cut off", "killed"])
def test_a_server_that_ends_in_the_middle_leaves_nothing(tmp_path: Path, slow_model: Path, end: str) -> None:
    code = 1 if end == "cut off" else -signal.SIGKILL
    with (
        serving(code, models=str(slow_model), tile_pixels=TILE, spool_folder=tmp_path, grace=0.1) as running,
        stub(running.target) as client,
    ):
        sending = Sending(client, START(), MANY)
        sending.send_end()
        while next(sending.call).progress.received_bytes < len(MANY):
            pass
        assert on_disk(tmp_path, running.pid) == len(MANY)
        running.stop(signal.SIGTERM if end == "cut off" else signal.SIGKILL)
        refusal(sending.call)
        running.process.wait(30)
    assert not list(tmp_path.iterdir())


def test_descriptors_are_given_back(tmp_path: Path, tiny_model: Path) -> None:
    with uploading_to(tmp_path, tiny_model) as (here, client):
        counts = []
        for number in range(12):
            data = HUGE if number % 3 else HUGE[: len(HUGE) // 2]
            sending = Sending(client, START(), data)
            if number % 4:
                sending.end()
            else:
                sending.cancel()
            eventually(lambda: clean(here, tmp_path))
            gc.collect()
            counts.append(len(list(Path("/proc/self/fd").iterdir())))
        assert max(counts[6:]) <= max(counts[:6]) + 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_huge_upload_in_the_memory_of_a_piece(tmp_path: Path, tiny_model: Path) -> None:
    """48 megapixels as a tiled TIFF of 144 MB and as a JPEG, sent by the client: the bits that this process finds."""
    noise = pyvips.Image.gaussnoise(1000, 750, mean=128, sigma=60, seed=1).resize(8, vscale=8)
    picture = noise.bandjoin([noise.linear(1, shift) for shift in (-10, 10)]).cast("uchar")
    picture = picture.copy(interpretation="srgb")
    files = [tmp_path / "p.tif", tmp_path / "p.jpg"]
    picture.tiffsave(str(files[0]), tile=True, tile_width=256, tile_height=256)
    picture.jpegsave(str(files[1]), Q=90)
    folder = tmp_path / "spool"
    folder.mkdir()
    given: dict[str, Any] = {"max_megapixels": 100, "max_image_bytes": MIB, "spool_folder": folder}
    news: list[Progress] = []
    peak, done = 0, threading.Event()
    with serving(models=str(tiny_model), **given) as running, Client(running.target, timeout=120) as client:

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.02):
                peak = max(peak, resident(running.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        answers = [client.predict(file, logits=True, on_progress=news.append) for file in files]
        done.set()
        watcher.join()
        assert on_disk(folder, running.pid) == 0
    assert peak < 400 * MIB
    assert news[0].computed == 0 and news[-1].computed > 0.8
    with fullframe.load(str(tiny_model), limits=Limits(max_pixels=10**9, max_bytes=10**9)) as predictor:
        for file, answer in zip(files, answers, strict=True):
            expected = predictor.predict(file, logits=True)
            assert (answer.height, answer.width) == (6000, 8000)
            np.testing.assert_array_equal(answer.logits, expected.logits)
