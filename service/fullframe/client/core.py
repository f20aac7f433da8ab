"""What asking a server means, once for both surfaces: every step that waits is left to a `Transport`.

With a blocking transport no coroutine here ever suspends, so that plain code can run one to its end: see `finish`.
"""

import os
import random
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from google.protobuf.message import Message

from fullframe.client.failures import error_from_status
from fullframe.client.messages import (
    ServedModel,
    answer_from,
    file_of,
    image_message,
    options_message,
    served_model,
)
from fullframe.client.uploads import StoredFile, Upload, stored_file
from fullframe.defaults import LEAST_LIMIT_BYTES
from fullframe.engine.progress import OnProgress, OnStreamProgress, Progress
from fullframe.engine.query import Answer, Query
from fullframe.errors import DeadlinePassed, FullframeError, InvalidInput, Overloaded, ServerError, Unavailable
from fullframe.v1 import vision_pb2 as pb

T = TypeVar("T")

_FIRST_BACKOFF: Final = 0.2  # seconds, doubled for every further attempt
_LONGEST_BACKOFF: Final = 5.0
_JITTER: Final = 1.4  # clients refused together should not come back together
# A longer file is probably of so many pixels that news of it is wanted, and an answer at once not to be had.
_LONG: Final = 8 << 20
# Bytes of a request beside its image; options are bounded far below this.
_AROUND_IMAGE: Final = 1 << 16


class Source(Protocol):
    """The images of a stream."""

    def ready(self) -> bool:
        """Whether `take` would hold up no answer."""

    async def take(self) -> Any:
        """The next image; raises StopAsyncIteration after the last."""

    def close(self) -> None:
        """No more will be taken."""


class Duplex(Protocol):
    """One streaming call."""

    async def send(self, request: Message) -> None:
        """Queue a request; a call that has failed says so in `receive`."""

    async def wait(self, source: Source | None = None, timeout: float | None = None) -> None:
        """Until there is a response, an image of `source`, or `timeout` seconds have passed."""

    def ready(self) -> bool:
        """Whether `receive` has something."""

    async def receive(self) -> Any:
        """The next response, None after the last; raises FullframeError if the call failed."""

    async def end(self) -> None:
        """Say that no request follows, and hear the server out."""

    def close(self) -> None:
        """Break off what is still under way."""


class Transport(Protocol):
    """A channel, blocking or on an event loop; its calls raise FullframeError."""

    async def unary(self, method: str, request: Message, timeout: float) -> Any:
        """Call a method of VisionService."""

    async def healthy(self, name: str, timeout: float) -> bool:
        """Whether the server, or what it calls `name`, says SERVING."""

    def duplex(self, method: str, requests: Iterable[Message] | None = None, timeout: float | None = None) -> Duplex:
        """Start a streaming call that sends `requests`, or else what `send` is given."""

    def source(self, images: Any) -> Source:
        """Images from what the caller gave."""

    async def off_loop(self, work: Callable[..., T], *args: Any) -> T:
        """Run what reads files or computes where it holds up nobody."""

    async def sleep(self, seconds: float) -> None:
        """Wait."""

    async def close(self) -> None:
        """End the connection and what is under way on it."""


def finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits only through a blocking transport, hence never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise RuntimeError("a blocking transport suspended")


class Core:
    """The questions a client can ask.

    Args:
        timeout: seconds a call may take, retries included; in a stream, the longest wait for the next answer; in an
            upload, for news of it.
        retries: attempts after the first; in a stream, since its last answer.
    """

    def __init__(self, transport: Transport, timeout: float, retries: int) -> None:
        self.transport = transport
        self._timeout, self._retries = timeout, retries
        self._limits: pb.Limits | None = None  # what the server takes, once asked

    async def predict(
        self, image: Any, query: Query, model: pb.ModelRef, on_progress: OnProgress | None = None
    ) -> Answer:
        """The answer for one image; `on_progress` hears of an upload."""
        options, loaded = options_message(query), await self._load(image)
        if not isinstance(loaded, pb.Image):
            return await self._upload(loaded, options, model, on_progress)
        request = pb.PredictRequest(model=model, images=[loaded], options=options)
        response: pb.PredictResponse = await self._unary("Predict", request)
        return _settle(response.results[0])

    async def stream(
        self,
        images: Any,
        query: Query,
        model: pb.ModelRef,
        in_flight: int,
        on_progress: OnStreamProgress | None = None,
    ) -> AsyncGenerator[tuple[int, Answer | FullframeError], None]:
        """Answers as they come, each with its image's number; `on_progress` hears of uploads."""
        if in_flight < 1:
            raise InvalidInput(f"in_flight is {in_flight}; it must be at least 1", "in_flight")
        options = options_message(query)
        source = self.transport.source(images)
        stream = _Stream(self.transport, self._timeout, self._retries)
        ended, number = False, -1
        try:
            while not ended or stream.unanswered:
                room = not ended and len(stream.unanswered) < in_flight
                await stream.wait(source if room else None)
                if stream.ready():
                    if outcome := await stream.receive():
                        yield outcome
                elif room and source.ready():
                    try:
                        image = await source.take()
                    except StopAsyncIteration:
                        ended = True
                        continue
                    number += 1
                    heard = on_progress and partial(on_progress, number)
                    if settled := await self._send(stream, number, image, options, model, heard):
                        yield number, settled
                else:
                    raise DeadlinePassed(f"no answer within {self._timeout:g} s")
            await stream.end()
        finally:
            source.close()
            stream.close()

    async def healthy(self, name: str) -> bool:
        """Whether the server, or what it calls `name`, says SERVING; asked once."""
        return await self.transport.healthy(name, self._timeout)

    async def models(self) -> list[ServedModel]:
        """All models of the server."""
        response: pb.ListModelsResponse = await self._unary("ListModels", pb.ListModelsRequest())
        return [served_model(model) for model in response.models]

    async def model(self, ref: pb.ModelRef) -> ServedModel:
        """One model of the server."""
        response: pb.GetModelResponse = await self._unary("GetModel", pb.GetModelRequest(model=ref))
        return served_model(response.model)

    async def _send(
        self,
        stream: "_Stream",
        number: int,
        image: Any,
        options: pb.PredictOptions,
        model: pb.ModelRef,
        on_progress: OnProgress | None,
    ) -> Answer | FullframeError | None:
        """Send an image; returns its outcome where there is one at once: it cannot be read, or went by itself."""
        try:
            loaded = await self._load(image)
            if not isinstance(loaded, pb.Image):
                return await self._upload(loaded, options, model, on_progress)
        except FullframeError as error:
            return error
        request = pb.PredictStreamRequest(request_id=str(number), model=model, image=loaded, options=options)
        await stream.send(request)
        return None

    async def _load(self, image: Any) -> pb.Image | StoredFile | bytes:
        """An image as it travels in a message, or the file to upload where it is beyond one."""
        if isinstance(image, str | os.PathLike):
            file = await self.transport.off_loop(stored_file, Path(image))
            if file is not None and await self._beyond(file.size, True):
                return file
        # A file's bytes are ready: nothing to wait for.
        ready = isinstance(image, bytes)
        message = image_message(image) if ready else await self.transport.off_loop(image_message, image)
        encoded = message.WhichOneof("source") == "encoded"
        if await self._beyond(len(message.encoded if encoded else message.raw.data), encoded):
            return await self.transport.off_loop(file_of, message)
        return message

    async def _beyond(self, size: int, encoded: bool) -> bool:
        """Whether a file, or pixels, of `size` bytes are more than the server takes in a message, or should."""
        if size + _AROUND_IMAGE <= LEAST_LIMIT_BYTES:
            return False
        limits = await self._server_limits()
        most = min(limits.max_image_bytes, _LONG) if encoded else size
        return size > most or size + _AROUND_IMAGE > limits.max_message_bytes

    async def _server_limits(self) -> pb.Limits:
        """Asked for once."""
        if self._limits is None:
            response: pb.GetModelResponse = await self._unary("GetModel", pb.GetModelRequest())
            self._limits = response.limits
        return self._limits

    async def _upload(
        self,
        file: bytes | StoredFile,
        options: pb.PredictOptions,
        model: pb.ModelRef,
        on_progress: OnProgress | None,
    ) -> Answer:
        limits = await self._server_limits()
        upload = Upload(file, model, options, limits.max_message_bytes - _AROUND_IMAGE)
        return _settle(await self._retried(partial(self._send_file, upload, on_progress)))

    async def _send_file(self, upload: Upload, on_progress: OnProgress | None, patience: "_Patience") -> pb.Prediction:
        """Upload a file from its beginning; asking twice does no harm."""
        call = self.transport.duplex("PredictUpload", upload.messages())
        result: pb.Prediction | None = None
        try:
            while (response := await _news(call, patience)) is not None:
                patience.renew()
                upload.let_go()
                if response.HasField("done"):
                    result = response.done.result
                elif on_progress is not None:
                    progress = response.progress
                    on_progress(Progress(progress.received_bytes, upload.size, progress.computed))
        except InvalidInput:
            if upload.error is not None:  # the server only saw the file end
                raise upload.error from None
            raise
        finally:
            upload.let_go()
            call.close()
        if result is None:
            raise ServerError("the upload ended without an answer", "INTERNAL")
        return result

    async def _unary(self, method: str, request: Message) -> Any:
        return await self._retried(lambda patience: self.transport.unary(method, request, patience.left()))

    async def _retried(self, attempt: "Callable[[_Patience], Coroutine[Any, Any, T]]") -> T:
        """What `attempt` returns; tried again where that may help and time allows."""
        patience = _Patience(self._timeout)
        attempts = 0
        while True:
            attempts += 1
            try:
                return await attempt(patience)
            except (Unavailable, Overloaded) as error:
                delay = _delay(error, attempts)
                if attempts > self._retries or delay >= patience.left():
                    raise
                await self.transport.sleep(delay)


class _Patience:
    """How long a call is still waited for."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.renew()

    def renew(self) -> None:
        """All of it again."""
        self._last = time.monotonic() + self.seconds

    def left(self) -> float:
        """Seconds."""
        return self._last - time.monotonic()


async def _news(call: Duplex, patience: _Patience) -> Any:
    """The next response of an upload, None after the last; raises DeadlinePassed if it takes too long."""
    await call.wait(timeout=max(0.0, patience.left()))
    if not call.ready():
        raise DeadlinePassed(f"no news of the upload within {patience.seconds:g} s")
    return await call.receive()


class _Stream:
    """A PredictStream that outlives the calls that carry it.

    What was not answered when a call broke off, or had found no room, is sent again: asking twice does no harm.
    """

    def __init__(self, transport: Transport, timeout: float, retries: int) -> None:
        self._transport, self._timeout, self._retries = transport, timeout, retries
        self.unanswered: dict[str, tuple[pb.PredictStreamRequest, int]] = {}  # the int: attempts made
        self._breaks, self._broke = 0, 0.0  # since the last answer: how often, and when first
        self._call = transport.duplex("PredictStream")

    def ready(self) -> bool:
        return self._call.ready()

    async def end(self) -> None:
        await self._call.end()

    def close(self) -> None:
        self._call.close()

    async def send(self, request: pb.PredictStreamRequest) -> None:
        self.unanswered[request.request_id] = request, 1
        await self._call.send(request)

    async def wait(self, source: Source | None) -> None:
        await self._call.wait(source, self._timeout if self.unanswered else None)

    async def receive(self) -> tuple[int, Answer | FullframeError] | None:
        """The outcome that is ready, None where it is to be tried again; raises if the stream itself has failed."""
        try:
            response: pb.PredictStreamResponse | None = await self._call.receive()
            if response is None:
                raise Unavailable("the server ended the stream before it had answered every image")
        except (Unavailable, Overloaded) as error:
            await self._reopen(error)
            return None
        self._breaks = 0
        request, attempts = self.unanswered.pop(response.request_id)
        number = int(response.request_id)
        try:
            return number, _settle(response.result)
        except (Unavailable, Overloaded) as error:
            if attempts > self._retries:
                return number, error
            self.unanswered[response.request_id] = request, attempts + 1
            await self._transport.sleep(_delay(error, attempts))
            await self._call.send(request)
            return None
        except FullframeError as error:
            return number, error

    async def _reopen(self, error: Unavailable | Overloaded) -> None:
        """Go on with another call after a while; raises `error` where retries or time are used up."""
        now = time.monotonic()
        self._broke = self._broke if self._breaks else now
        self._breaks += 1
        delay = _delay(error, self._breaks)
        if self._breaks > self._retries or now + delay >= self._broke + self._timeout:
            raise error
        self._call.close()
        await self._transport.sleep(delay)
        self._call = self._transport.duplex("PredictStream")
        for request, _ in self.unanswered.values():
            await self._call.send(request)


def _delay(error: Unavailable | Overloaded, attempts: int) -> float:
    """Seconds to wait after that many attempts: ever longer, and no less than the server asks for."""
    least = error.retry_after if isinstance(error, Overloaded) else 0.0
    backoff = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2.0 ** (attempts - 1))
    return max(least, backoff) * random.uniform(1.0, _JITTER)


def _settle(prediction: pb.Prediction) -> Answer:
    if prediction.info.status.code:
        raise error_from_status(prediction.info.status)
    return answer_from(prediction)
