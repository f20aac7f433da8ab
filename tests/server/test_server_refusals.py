"""Hostile and mistaken requests: exact codes, fields and texts, little time and memory, and the next request works."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from fullframe.v1 import vision_pb2 as pb
from fullframe.v1.vision_pb2_grpc import VisionServiceStub
from tests.models import write_model
from tests.pictures import animated_gif, encode, pixels, png_header
from tests.serving import MIB, Running, resident, serving, serving_here, stub

GOOD = encode(pixels(24, 32))
JPEG = encode(pixels(300, 200), "JPEG")
INVALID, NOT_FOUND = 3, 5


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[VisionServiceStub]:
    with stub(server.target) as it:
        yield it


@pytest.fixture(autouse=True)
def next_request_works(client: VisionServiceStub) -> Iterator[None]:
    yield
    result = client.Classify(pb.ClassifyRequest(images=[pb.Image(encoded=GOOD)]), timeout=20).results[0]
    assert result.info.status.code == 0 and len(result.classes) == 5


def field(status: Status) -> str:
    """The one field that the status' BadRequest names; every status of ours has an ErrorInfo too."""
    info, request = ErrorInfo(), BadRequest()
    assert any(detail.Unpack(info) for detail in status.details) and info.domain == "fullframe"
    if not any(detail.Unpack(request) for detail in status.details):
        return ""
    [violation] = request.field_violations
    assert violation.description == status.message
    return str(violation.field)


def refusal(call: Callable[[], Any]) -> Status:
    """The status that an RPC as a whole ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status = rpc_status.from_call(caught.value)
    assert status is not None, caught.value
    return status


IMAGES = {
    "zero bytes": (b"", ["empty", "0 bytes"]),
    "text named .jpg": (b"This is not the picture you are looking for.\n" * 20, ["text"]),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", ["SVG", "jpeg"]),
    "truncated jpeg": (JPEG[: len(JPEG) // 2], ["ends early"]),
    "truncated header": (JPEG[:30], ["ends early"]),
    "60000x60000": (png_header(60000, 60000), ["60000x60000", "3600", "32"]),
    "10,000 frames": (animated_gif(10_000), ["10000 frames", "1000"]),
    "no pixels behind the header": (png_header(500, 500), ["ends early"]),
}


@pytest.mark.parametrize("name", IMAGES)
def test_hostile_images(server: Running, client: VisionServiceStub, name: str) -> None:
    data, texts = IMAGES[name]
    before, started = resident(server.pid), time.monotonic()
    response = client.Classify(pb.ClassifyRequest(images=[pb.Image(encoded=data)]), timeout=20)
    assert time.monotonic() - started < 5
    assert resident(server.pid) - before < 150 * MIB
    status = response.results[0].info.status
    assert status.code == INVALID
    assert field(status) == "images"
    for text in texts:
        assert text.lower() in status.message.lower(), status.message


RAW = {
    "wrong length": (pb.RawImage(height=10, width=10, data=bytes(299)), ["300", "299", "10x10"]),
    "one more": (pb.RawImage(height=10, width=10, data=bytes(301)), ["300", "301"]),
    "no pixels": (pb.RawImage(height=0, width=10), ["10x0"]),
    "a claim of 1 GB": (pb.RawImage(height=20_000, width=17_895, data=bytes(3)), ["17895x20000", "32"]),
    "a product past 2^64": (pb.RawImage(height=2**32 - 1, width=2**32 - 1, data=bytes(3)), ["4294967295", "32"]),
}


@pytest.mark.parametrize("name", RAW)
def test_hostile_raw_pixels(client: VisionServiceStub, name: str) -> None:
    raw, texts = RAW[name]
    status = client.Embed(pb.EmbedRequest(images=[pb.Image(raw=raw)]), timeout=20).results[0].info.status
    assert status.code == INVALID
    assert field(status) == "images"
    for text in texts:
        assert text in status.message, status.message


@pytest.mark.parametrize("top_k", [-1, -(2**31), 1_000_001, 10**9])
def test_top_k_of_classify(client: VisionServiceStub, top_k: int) -> None:
    status = refusal(lambda: client.Classify(pb.ClassifyRequest(images=[pb.Image(encoded=GOOD)], top_k=top_k)))
    assert (status.code, field(status)) == (INVALID, "top_k")
    assert status.message == f"top_k is {top_k}; it must be 1 to 1000000, or 0 for the best 5"


@pytest.mark.parametrize("top_k", [-2, 10**9])
def test_top_k_of_predict(client: VisionServiceStub, top_k: int) -> None:
    options = pb.PredictOptions(top_k=top_k)
    request = pb.PredictRequest(images=[pb.Image(encoded=GOOD)], options=options)
    status = refusal(lambda: client.Predict(request))
    assert (status.code, field(status)) == (INVALID, "top_k")
    assert status.message == f"top_k is {top_k}; it must be 1 to 1000000, or 0 for the best 5, or -1 for none"


@pytest.mark.parametrize(
    ("model", "texts"),
    [
        (pb.ModelRef(name="nobody"), ["'nobody'", "served here: tiny"]),
        (pb.ModelRef(name="tiny", version="7"), ["'tiny'", "'7'", "served here: 1"]),
        (pb.ModelRef(version="../../etc"), ["'../../etc'"]),
        (pb.ModelRef(name="x" * 1_000_000), ["xxx"]),
        (pb.ModelRef(name="\u732b" * 100_000), ["\u732b"]),
        (pb.ModelRef(name="../../../etc/passwd\0"), ["passwd"]),
    ],
)
def test_unknown_models(client: VisionServiceStub, model: pb.ModelRef, texts: list[str]) -> None:
    image = pb.Image(encoded=GOOD)
    for call in (
        lambda: client.Classify(pb.ClassifyRequest(model=model, images=[image])),
        lambda: client.Embed(pb.EmbedRequest(model=model, images=[image])),
        lambda: client.Predict(pb.PredictRequest(model=model, images=[image])),
        lambda: client.GetModel(pb.GetModelRequest(model=model)),
        lambda: list(client.PredictUpload(iter([pb.PredictUploadRequest(start={"model": model})]))),
    ):
        status = refusal(call)
        assert status.code == NOT_FOUND
        assert len(status.message.encode()) < 1000
        for text in texts:
            assert text in status.message


@pytest.mark.parametrize("count", [0, 129])
def test_too_few_and_too_many_images(client: VisionServiceStub, count: int) -> None:
    status = refusal(lambda: client.Embed(pb.EmbedRequest(images=[pb.Image(encoded=b"x")] * count)))
    assert (status.code, field(status)) == (INVALID, "images")
    assert status.message == f"the request holds {count} images; it must hold 1 to 128"


POOLINGS = {
    "unknown kind": (pb.Pooling(terms=[pb.Pooling.Term.FromString(b"\x08\x63")]), ["99", "KIND_AVG"]),
    "p where none is": (pb.Pooling(terms=[pb.Pooling.Term(kind=pb.Pooling.KIND_MAX, p=2)]), ["max", "p"]),
    "p that is no number": (pb.Pooling(terms=[pb.Pooling.Term(kind=pb.Pooling.KIND_GEM, p=float("nan"))]), ["nan"]),
    "p of zero": (pb.Pooling(terms=[pb.Pooling.Term(kind=pb.Pooling.KIND_GEM, p=0)]), ["0"]),
    "too many terms": (pb.Pooling(terms=[pb.Pooling.Term()] * 1000), ["1000"]),
    "a huge level": (pb.Pooling(levels=[2**32 - 1]), ["4294967295"]),
    "level zero": (pb.Pooling(levels=[0]), ["0"]),
}


@pytest.mark.parametrize("name", POOLINGS)
def test_poolings_that_cannot_be(client: VisionServiceStub, name: str) -> None:
    pooling, texts = POOLINGS[name]
    image = pb.Image(encoded=GOOD)
    for call in (
        lambda: client.Embed(pb.EmbedRequest(images=[image], pooling=pooling)),
        lambda: client.Predict(pb.PredictRequest(images=[image], options=pb.PredictOptions(poolings=[pooling]))),
    ):
        status = refusal(call)
        assert (status.code, field(status)) == (INVALID, "pooling")
        for text in texts:
            assert text in status.message, status.message


def test_too_many_poolings(client: VisionServiceStub) -> None:
    options = pb.PredictOptions(poolings=[pb.Pooling()] * 17)
    status = refusal(lambda: client.Predict(pb.PredictRequest(images=[pb.Image(encoded=GOOD)], options=options)))
    assert (status.code, field(status)) == (INVALID, "poolings")
    assert status.message == "17 poolings; one request takes at most 16"


def test_an_image_too_small_for_the_model(tmp_path: Path) -> None:
    model = write_model(tmp_path / "big.onnx", least=20)
    with serving_here(models=str(model)) as here, stub(here.target) as client:
        images = [pb.Image(encoded=encode(pixels(*size))) for size in ((20, 19), (20, 20))]
        results = client.Classify(pb.ClassifyRequest(images=images)).results
        assert [r.info.status.code for r in results] == [INVALID, 0]
        assert results[0].info.status.message == "the image is 19x20 pixels; this model needs at least 20x20"


def upload(*parts: pb.PredictUploadRequest.Start | bytes) -> Iterator[pb.PredictUploadRequest]:
    for part in parts:
        if isinstance(part, bytes):
            yield pb.PredictUploadRequest(chunk=part)
        else:
            yield pb.PredictUploadRequest(start=part)


START = pb.PredictUploadRequest.Start
UPLOADS: dict[str, tuple[list[pb.PredictUploadRequest.Start | bytes], str, str]] = {
    "nothing": ([], "start", "the first message must be start"),
    "no start": ([GOOD], "start", "the first message must be start"),
    "two starts": ([START(), START()], "chunk", "every message after the first must be a chunk"),
    "a huge claim": ([START(total_bytes=2**63)], "total_bytes", "9223372036854775808 bytes"),
    "less than claimed": ([START(total_bytes=1000), b"x" * 999], "total_bytes", "999 bytes came"),
    "more than claimed": ([START(total_bytes=1000), b"x" * 1001], "total_bytes", "1001 bytes came"),
    "a bad option": ([START(options={"top_k": -3}), GOOD], "top_k", "top_k is -3"),
}


@pytest.mark.parametrize("name", UPLOADS)
def test_uploads_that_cannot_be(client: VisionServiceStub, name: str) -> None:
    parts, at_fault, text = UPLOADS[name]
    status = refusal(lambda: list(client.PredictUpload(upload(*parts), timeout=20)))
    assert (status.code, field(status)) == (INVALID, at_fault)
    assert text in status.message, status.message


def test_an_uploaded_image_that_is_none(client: VisionServiceStub) -> None:
    *_, response = client.PredictUpload(upload(START(), b"nothing", b" of the kind"))
    assert response.done.result.info.status.code == INVALID
    assert field(response.done.result.info.status) == "images"


def test_a_message_too_large(tiny_model: Path) -> None:
    with serving_here(models=str(tiny_model), max_message_bytes=MIB) as here, stub(here.target) as client:
        with pytest.raises(grpc.RpcError) as caught:
            client.Classify(pb.ClassifyRequest(images=[pb.Image(encoded=bytes(MIB + 100))]))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        result = client.Classify(pb.ClassifyRequest(images=[pb.Image(encoded=GOOD)])).results[0]
        assert result.info.status.code == 0


def test_an_answer_too_large(tiny_model: Path) -> None:
    with serving_here(models=str(tiny_model), max_message_bytes=MIB) as here, stub(here.target) as client:
        images = [pb.Image(encoded=encode(pixels(400, 400), "JPEG")) for _ in range(3)]  # 640 kB of feature map each
        options = pb.PredictOptions(feature_map=True)
        results = client.Predict(pb.PredictRequest(images=images, options=options)).results
        assert [r.info.status.code for r in results] == [0, INVALID, INVALID]
        assert "ask for pooled features instead of maps" in results[1].info.status.message
        assert len(results[0].feature_map.data) == 640_000


def test_texts_tell_nothing_of_the_server(client: VisionServiceStub, tiny_model: Path) -> None:
    secrets = [str(tiny_model.parent), ".onnx", "Traceback", "fullframe.", "vips", "onnxruntime", "site-packages"]
    texts = []
    for data, _ in IMAGES.values():
        texts += [r.info.status.message for r in client.Classify(_request(data)).results]
    texts.append(refusal(lambda: client.Classify(pb.ClassifyRequest(model={"name": "x"}, images=[{}]))).message)
    for text in texts:
        assert text and not [secret for secret in secrets if secret in text], text


def _request(data: bytes) -> pb.ClassifyRequest:
    return pb.ClassifyRequest(images=[pb.Image(encoded=data)])


def test_an_error_of_our_own_is_told_by_an_id(tmp_path: Path) -> None:
    """A model whose graph breaks at some sizes stands for any bug: the caller learns an id, the log has the rest."""
    model = write_model(tmp_path / "broken.onnx", breaks_above=64)
    with serving(models=str(model), may_fail=True) as running, stub(running.target) as client:
        images = [pb.Image(encoded=encode(pixels(*size))) for size in ((20, 20), (100, 100), (30, 30))]
        results = client.Classify(pb.ClassifyRequest(images=images)).results
        assert [r.info.status.code for r in results] == [0, 13, 0]
        status = results[1].info.status
        info = ErrorInfo()
        assert any(detail.Unpack(info) for detail in status.details)
        incident = info.metadata["id"]
        assert status.message == f"internal error; the server's log has it under id {incident}"
        assert "Traceback" in running.wait_for("internal error", id=incident)["traceback"]
