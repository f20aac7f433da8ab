"""gRPC channels as `core.Transport`: one that blocks, one on an asyncio event loop."""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from fullframe.client.core import Duplex, Source, Transport
from fullframe.client.failures import error_from_call
from fullframe.v1.vision_pb2_grpc import VisionServiceStub

T = TypeVar("T")

_END: Final = object()
_OPTIONS: Final = [
    # Finite, yet room for the feature map of a large image; the server tells its own limit, see core.
    ("grpc.max_receive_message_length", 512 * 2**20),
    ("grpc.max_send_message_length", -1),
    # Reconnect as often as calls are retried, not after gRPC's first whole second.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5000),
]
_PARTING: Final = 1.0
"""Seconds to wait for a call's status once all its answers are there."""


def connect(target: str, timeout: float, wait_for_ready: bool) -> Transport:
    """A transport that never suspends; threads may share it. `timeout` is what messages name."""
    return _Blocking(target, timeout, wait_for_ready)


def connect_on_loop(target: str, timeout: float, wait_for_ready: bool) -> Transport:
    """A transport for the running event loop."""
    return _OnLoop(target, timeout, wait_for_ready)


class _Blocking:
    def __init__(self, target: str, timeout: float, wait_for_ready: bool) -> None:
        self._target, self._timeout, self._wait = target, timeout, wait_for_ready
        self._channel = grpc.insecure_channel(target, _OPTIONS)
        self._vision, self._health = VisionServiceStub(self._channel), HealthStub(self._channel)

    async def unary(self, method: str, request: Message, timeout: float) -> Any:
        return self._call(getattr(self._vision, method), request, timeout)

    async def healthy(self, name: str, timeout: float) -> bool:
        response = self._call(self._health.Check, HealthCheckRequest(service=name), timeout)
        return bool(response.status == HealthCheckResponse.SERVING)

    def duplex(self, method: str, requests: Iterable[Message] | None = None, timeout: float | None = None) -> Duplex:
        call = getattr(self._vision, method)
        return _BlockingDuplex(
            lambda outgoing: call(outgoing, timeout=timeout, wait_for_ready=self._wait), requests, self._failure
        )

    def source(self, images: Iterable[Any]) -> Source:
        return _BlockingSource(iter(images))

    async def off_loop(self, work: Callable[..., T], *args: Any) -> T:
        return work(*args)

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def close(self) -> None:
        self._channel.close()

    def _call(self, method: Any, request: Message, timeout: float) -> Any:
        try:
            return method(request, timeout=timeout, wait_for_ready=self._wait)
        except grpc.RpcError as error:
            raise self._failure(error) from error

    def _failure(self, error: grpc.RpcError) -> Exception:
        return error_from_call(error, self._target, self._timeout)


class _BlockingSource:
    """Read in the caller's own thread."""

    def __init__(self, images: Iterator[Any]) -> None:
        self._images = images

    def ready(self) -> bool:
        return True

    async def take(self) -> Any:
        if (image := next(self._images, _END)) is _END:
            raise StopAsyncIteration
        return image

    def close(self) -> None:
        pass


class _BlockingDuplex:
    """gRPC pulls requests on a thread of its own; another one here collects the responses, to be waited for."""

    def __init__(
        self,
        start: Callable[[Iterator[Message]], Any],
        requests: Iterable[Message] | None,
        failure: Callable[[grpc.RpcError], Exception],
    ) -> None:
        self._outbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._next: Any = _END  # taken from the inbox by `wait`, not yet received
        self._failure = failure
        self._call = start(iter(self._outbox.get, None) if requests is None else iter(requests))
        self._reader = threading.Thread(target=self._read, name="fullframe-client", daemon=True)
        self._reader.start()

    async def send(self, request: Message) -> None:
        self._outbox.put(request)

    async def wait(self, source: Source | None = None, timeout: float | None = None) -> None:
        if self._next is _END:
            with contextlib.suppress(queue.Empty):
                self._next = self._inbox.get(block=source is None, timeout=timeout)

    def ready(self) -> bool:
        return self._next is not _END

    async def receive(self) -> Any:
        response, self._next = self._next, _END
        if isinstance(response, grpc.RpcError):
            raise self._failure(response) from response
        return response

    async def end(self) -> None:
        self._outbox.put(None)
        self._reader.join(_PARTING)

    def close(self) -> None:
        self._outbox.put(None)  # so that gRPC's thread ends
        self._call.cancel()

    def _read(self) -> None:
        try:
            for response in self._call:
                self._inbox.put(response)
            self._inbox.put(None)
        except grpc.RpcError as error:
            self._inbox.put(error)


class _OnLoop:
    def __init__(self, target: str, timeout: float, wait_for_ready: bool) -> None:
        self._target, self._timeout, self._wait = target, timeout, wait_for_ready
        self._channel = grpc.aio.insecure_channel(target, _OPTIONS)
        self._vision, self._health = VisionServiceStub(self._channel), HealthStub(self._channel)

    async def unary(self, method: str, request: Message, timeout: float) -> Any:
        return await self._call(getattr(self._vision, method), request, timeout)

    async def healthy(self, name: str, timeout: float) -> bool:
        response = await self._call(self._health.Check, HealthCheckRequest(service=name), timeout)
        return bool(response.status == HealthCheckResponse.SERVING)

    def duplex(self, method: str, requests: Iterable[Message] | None = None, timeout: float | None = None) -> Duplex:
        outgoing = None if requests is None else _read_off_loop(iter(requests))
        call = getattr(self._vision, method)(outgoing, timeout=timeout, wait_for_ready=self._wait)
        return _AsyncDuplex(call, self._failure)

    def source(self, images: Iterable[Any] | AsyncIterable[Any]) -> Source:
        return _AsyncSource(aiter(images)) if isinstance(images, AsyncIterable) else _BlockingSource(iter(images))

    async def off_loop(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.to_thread(work, *args)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        await self._channel.close()

    async def _call(self, method: Any, request: Message, timeout: float) -> Any:
        try:
            return await method(request, timeout=timeout, wait_for_ready=self._wait)
        except grpc.RpcError as error:
            raise self._failure(error) from error

    def _failure(self, error: grpc.RpcError) -> Exception:
        return error_from_call(error, self._target, self._timeout)


async def _read_off_loop(requests: Iterator[Message]) -> AsyncIterator[Message]:
    while (request := await asyncio.to_thread(next, requests, None)) is not None:
        yield request


class _AsyncSource:
    """The next image is asked for while answers are waited for."""

    def __init__(self, images: AsyncIterator[Any]) -> None:
        self._images = images
        self._task: asyncio.Task[Any] | None = None

    def task(self) -> "asyncio.Task[Any]":
        if self._task is None:
            self._task = asyncio.create_task(self._read())
        return self._task

    def ready(self) -> bool:
        return self._task is not None and self._task.done()

    async def take(self) -> Any:
        image = await self.task()
        self._task = None
        if image is _END:
            raise StopAsyncIteration
        return image

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _read(self) -> Any:
        return await anext(self._images, _END)


class _StatusFromServer:
    """What grpc.aio holds of a call, without the INTERNAL that it puts in place of the status which the call has ended
    with, where it hears of a failed write first."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def set_internal_error(self, text: str) -> None:
        """End the write alone; the status comes once all responses have been read."""
        raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), text)


class _AsyncDuplex:
    """A response is always being read, so that `wait` can tell when it is there."""

    def __init__(self, call: Any, failure: Callable[[grpc.RpcError], Exception]) -> None:
        self._call, self._failure = call, failure
        call._cython_call = _StatusFromServer(call._cython_call)
        self._response: asyncio.Task[Any] = asyncio.create_task(self._read())

    async def send(self, request: Message) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # `receive` raises it
            await self._call.write(request)

    async def wait(self, source: Source | None = None, timeout: float | None = None) -> None:
        if isinstance(source, _AsyncSource):
            await asyncio.wait({self._response, source.task()}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        else:
            await asyncio.wait({self._response}, timeout=timeout if source is None else 0)

    def ready(self) -> bool:
        return self._response.done()

    async def receive(self) -> Any:
        response = await self._response
        if isinstance(response, grpc.aio.AioRpcError):
            raise self._failure(response) from response
        if response is not None:
            self._response = asyncio.create_task(self._read())
        return response

    async def end(self) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            await self._call.done_writing()
        await asyncio.wait({self._response}, timeout=_PARTING)

    def close(self) -> None:
        self._response.cancel()
        self._call.cancel()

    async def _read(self) -> Any:
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            return error
        return None if response is grpc.aio.EOF else response
