"""What is on the wire but no sensible request: malformed, bloated, compressed or broken off."""

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullframe.errors import InvalidInput
from fullframe.server import wire
from fullframe.v1 import vision_pb2 as pb
from tests.pictures import encode, pixels
from tests.serving import MIB, Running, resident, stub

SMALL = encode(pixels(16, 16))
IMAGES, POOLING = b"\x12", b"\x1a"  # of an EmbedRequest: a tag, then a length and as many bytes
TERMS = b"\x0a"  # of a Pooling


def field(tag: bytes, data: bytes) -> bytes:
    length, size = bytearray(), len(data)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return tag + bytes(length) + bytes([size]) + data


requests = st.builds(
    pb.PredictRequest,
    model=st.builds(pb.ModelRef, name=st.text(max_size=20)),
    images=st.lists(
        st.one_of(
            st.builds(pb.Image, encoded=st.binary(max_size=3000)),
            st.builds(pb.Image, raw=st.builds(pb.RawImage, height=st.integers(0, 2**32 - 1), data=st.binary())),
        ),
        max_size=5,
    ),
    options=st.builds(
        pb.PredictOptions,
        top_k=st.integers(-(2**31), 2**31 - 1),
        poolings=st.lists(
            st.builds(
                pb.Pooling,
                terms=st.lists(st.builds(pb.Pooling.Term, p=st.floats(width=32)), max_size=5),
                levels=st.lists(st.integers(0, 2**32 - 1), max_size=5),
            ),
            max_size=5,
        ),
    ),
)


@given(requests)
def test_sensible_requests_are_parsed(request: pb.PredictRequest) -> None:
    data = request.SerializeToString()
    assert wire.parse(pb.PredictRequest, data).SerializeToString() == data


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    try:
        wire.parse(pb.PredictRequest, data)
    except InvalidInput as error:
        assert str(error) == "the request is no well-formed fullframe.v1.PredictRequest"


BLOATED = {
    "images": field(IMAGES, b"") * (wire.MAX_FIELDS + 1),
    "terms": field(POOLING, field(TERMS, b"") * wire.MAX_FIELDS),
    "levels": pb.EmbedRequest(pooling=pb.Pooling(levels=[1] * (wire.MAX_FIELDS + 1))).SerializeToString(),
    "unknown": b"\x98\x06\x01" * (wire.MAX_FIELDS + 1),
    "groups": b"\x9b\x06\x9c\x06" * wire.MAX_FIELDS,
}


@pytest.mark.parametrize("name", BLOATED)
def test_too_many_fields_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="more than 20000 fields"):
        wire.parse(pb.EmbedRequest, BLOATED[name])


def test_just_enough_fields_are_parsed() -> None:
    assert len(wire.parse(pb.EmbedRequest, field(IMAGES, b"") * wire.MAX_FIELDS).images) == wire.MAX_FIELDS


def send(target: str, data: bytes, compression: grpc.Compression | None = None) -> grpc.RpcError:
    """What becomes of an Embed call whose request is `data`, whatever that is."""
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(target, options=options) as channel, pytest.raises(grpc.RpcError) as caught:
        embed: Any = channel.unary_unary("/fullframe.v1.VisionService/Embed")
        embed(data, timeout=30, compression=compression)
    return caught.value


def works(running: Running) -> bool:
    with stub(running.target) as client:
        response = client.Embed(pb.EmbedRequest(images=[pb.Image(encoded=SMALL)]), timeout=20)
    return bool(response.results[0].info.status.code == 0)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xff" * 100, "the request is no well-formed fullframe.v1.EmbedRequest"),
        (field(IMAGES, b"")[:-1] + b"\x7f", "the request is no well-formed fullframe.v1.EmbedRequest"),
        (field(IMAGES, b"") * (30 * MIB), "more than 20000 fields"),
    ],
)
def test_hostile_messages(server: Running, data: bytes, text: str) -> None:
    peak, error = peak_while(server, lambda: send(server.target, data))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert text in (error.details() or "")
    # gRPC holds it three times, in slices, joined and as Python's bytes; parsed it would be 24 times as long.
    assert peak < 4 * len(data) + 20 * MIB
    assert works(server)


def test_a_malformed_message_ends_a_stream_with_a_reason(server: Running) -> None:
    with grpc.insecure_channel(server.target) as channel, pytest.raises(grpc.RpcError) as caught:
        stream: Any = channel.stream_stream("/fullframe.v1.VisionService/PredictStream")
        list(stream(iter([b"\xff\xff"])))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert works(server)


def test_compressed_messages_are_not_inflated(server: Running) -> None:
    """A thousandfold smaller on the wire: gRPC would inflate it before it looks at its size."""
    data = pb.EmbedRequest(images=[pb.Image(encoded=bytes(300 * MIB))]).SerializeToString()
    peak, error = peak_while(server, lambda: send(server.target, data, grpc.Compression.Gzip))
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED
    assert peak < 50 * MIB
    assert works(server)


def test_what_is_no_grpc_at_all(server: Running) -> None:
    for data in (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        os.urandom(4096),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 99,
    ):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(data)
    assert works(server)


def test_unknown_methods(server: Running) -> None:
    for method in ("/fullframe.v1.VisionService/Delete", "/fullframe.v1.Nothing/Classify", "/"):
        with grpc.insecure_channel(server.target) as channel, pytest.raises(grpc.RpcError) as caught:
            call: Any = channel.unary_unary(method)
            call(b"")
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def peak_while(running: Running, action: Callable[[], grpc.RpcError]) -> tuple[int, grpc.RpcError]:
    """By how many bytes the server's resident memory rose at most while `action` went on."""
    start, done, seen = resident(running.pid), threading.Event(), [0]

    def look() -> None:
        while not done.is_set():
            seen.append(resident(running.pid) - start)
            time.sleep(0.005)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        outcome = action()
    finally:
        done.set()
        looker.join()
    return max(seen), outcome
