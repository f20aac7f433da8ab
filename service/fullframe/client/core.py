"""What asking a server means, once for both surfaces: every step that waits is left to a `Transport`.

With a blocking transport no coroutine here ever suspends, so that plain code can run one to its end: see `finish`.
"""

import random
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
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
    upload_messages,
)
from fullframe.engine.query import Answer, Query
from fullframe.errors import DeadlinePassed, FullframeError, InvalidInput, Overloaded, ServerError, Unavailable
from fullframe.v1 import vision_pb2 as pb

T = TypeVar("T")

_FIRST_BACKOFF: Final = 0.2  # seconds, doubled for every further attempt
_LONGEST_BACKOFF: Final = 5.0
_JITTER: Final = 1.4  # clients refused together should not come back together
# Every server takes a message this long, so that its limit need not be asked for.
_SMALL: Final = 1 << 20
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
        timeout: seconds a call may take, retries included; in a stream, the longest wait for the next answer.
        retries: attempts after the first; in a stream, since its last answer.
    """

    def __init__(self, transport: Transport, timeout: float, retries: int) -> None:
        self.transport = transport
        self._timeout, self._retries = timeout, retries
        self._longest: int | None = None  # bytes of a message that the server takes, once asked

    async def predict(self, image: Any, query: Query, model: pb.ModelRef) -> Answer:
        """The answer for one image."""
        return await self._predict(await self._load(image), options_message(query), model)

    async def stream(
        self, images: Any, query: Query, model: pb.ModelRef, in_flight: int
    ) -> AsyncGenerator[tuple[int, Answer | FullframeError], None]:
        """Answers as they come, each with its image's number."""
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
                    if failed := await self._send(stream, number, image, options, model):
                        yield number, failed
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

    async def _predict(self, image: pb.Image, options: pb.PredictOptions, model: pb.ModelRef) -> Answer:
        if await self._too_long(image):
            return await self._upload(image, options, model)
        request = pb.PredictRequest(model=model, images=[image], options=options)
        response: pb.PredictResponse = await self._unary("Predict", request)
        return _settle(response.results[0])

    async def _send(
        self, stream: "_Stream", number: int, image: Any, options: pb.PredictOptions, model: pb.ModelRef
    ) -> Answer | FullframeError | None:
        """Send an image; returns its outcome where there is one at once: it cannot be read, or went by itself."""
        try:
            message = await self._load(image)
            if await self._too_long(message):
                return await self._upload(message, options, model)
        except FullframeError as error:
            return error
        request = pb.PredictStreamRequest(request_id=str(number), model=model, image=message, options=options)
        await stream.send(request)
        return None

    async def _load(self, image: Any) -> pb.Image:
        if isinstance(image, bytes):  # nothing to wait for
            return image_message(image)
        return await self.transport.off_loop(image_message, image)

    async def _too_long(self, image: pb.Image) -> bool:
        size = image.ByteSize() + _AROUND_IMAGE
        if size <= _SMALL:
            return False
        if self._longest is None:
            response: pb.GetModelResponse = await self._unary("GetModel", pb.GetModelRequest())
            self._longest = response.limits.max_message_bytes
        return size > self._longest

    async def _upload(self, image: pb.Image, options: pb.PredictOptions, model: pb.ModelRef) -> Answer:
        data = await self.transport.off_loop(file_of, image)

        async def attempt(timeout: float) -> pb.Prediction:
            call = self.transport.duplex("PredictUpload", upload_messages(data, model, options), timeout)
            result: pb.Prediction | None = None
            try:
                await call.wait()
                while (response := await call.receive()) is not None:
                    if response.HasField("done"):
                        result = response.done.result
                    await call.wait()
            finally:
                call.close()
            if result is None:
                raise ServerError("the upload ended without an answer", "INTERNAL")
            return result

        return _settle(await self._retried(attempt))

    async def _unary(self, method: str, request: Message) -> Any:
        return await self._retried(lambda timeout: self.transport.unary(method, request, timeout))

    async def _retried(self, attempt: Callable[[float], Coroutine[Any, Any, T]]) -> T:
        """What `attempt` returns, given the seconds that are left; tried again where that may help and time allows."""
        last = time.monotonic() + self._timeout
        attempts = 0
        while True:
            attempts += 1
            try:
                return await attempt(last - time.monotonic())
            except (Unavailable, Overloaded) as error:
                delay = _delay(error, attempts)
                if attempts > self._retries or time.monotonic() + delay >= last:
                    raise
                await self.transport.sleep(delay)


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
