"""One call from arrival to status: let in or refused, its errors made statuses, logged and counted."""

import asyncio
import logging
import time
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Final, Self

import grpc
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status

from fullframe.engine.query import Answer
from fullframe.errors import FullframeError, InvalidInput, Overloaded
from fullframe.server.logs import event
from fullframe.server.metrics import Metrics
from fullframe.server.status import code_name, grpc_code, status_of, trailers_of

Context = grpc.aio.ServicerContext[Any, Any]

# A caller that gives up at its deadline may be heard before the one that it has sent, which gRPC rounds up to three
# digits (https://github.com/grpc/grpc/blob/master/src/core/lib/transport/timeout_encoding.cc).
_ROUNDED: Final = 0.01
_EARLY: Final = 0.02  # seconds

_RETRY_AFTER: Final = 0.25  # seconds until a budget that is not measured in pixels may have room


class Calls:
    """The calls that are being answered, and the bytes that their requests hold.

    Args:
        metrics: hears of every call that ends.
        max_calls: calls answered at once.
        max_bytes: bytes of requests held at once.
    """

    def __init__(self, metrics: Metrics, max_calls: int, max_bytes: int) -> None:
        self.metrics = metrics
        self.max_calls, self.max_bytes = max_calls, max_bytes
        self.calls = self.bytes = 0

    def enter(self, rpc: str, context: Context) -> "Call":
        """A call to be entered with `async with`."""
        return Call(self, rpc, context)


class Call(AbstractAsyncContextManager["Call"]):
    """One call; whatever its body raises becomes its status.

    Attributes:
        deadline: the time.monotonic() instant after which nobody waits for the answer, or None.
    """

    def __init__(self, calls: Calls, rpc: str, context: Context) -> None:
        self._models: set[str] = set()
        self._calls, self._rpc, self._context = calls, rpc, context
        self._held = self._images = self._failed = self._pixels = 0
        self._broken_off = False
        self._started = time.monotonic()
        remaining = context.time_remaining()
        self.deadline = None if remaining is None else self._started + remaining
        self._late = float("inf") if remaining is None else self._started + remaining * (1 - _ROUNDED) - _EARLY

    async def read(self) -> Any:
        """The stream's next request, or grpc.aio.EOF; raises InvalidInput if it is malformed."""
        request = await self._context.read()
        if isinstance(request, FullframeError):
            raise request
        return request

    async def write(self, response: Message) -> None:
        """Send one response of a stream; one at a time. Raises CancelledError if nobody is there to take it."""
        try:
            await self._context.write(response)
        except grpc.aio.InternalError:
            self._broken_off = True
            raise asyncio.CancelledError from None

    def hold(self, size: int) -> None:
        """Count `size` bytes as held until released or the call ends.

        Raises:
            InvalidInput: they are more than there ever is room for.
            Overloaded: there is no room now.
        """
        calls = self._calls
        if size > calls.max_bytes:
            raise InvalidInput(
                f"the request is of {size} bytes; at most {calls.max_bytes} can be held: "
                "send its images in several requests",
                "images",
            )
        if calls.bytes + size > calls.max_bytes:
            raise Overloaded(
                f"requests of {calls.bytes} bytes are held, of at most {calls.max_bytes}: no room for {size} now",
                _RETRY_AFTER,
            )
        calls.bytes += size
        self._held += size

    def release(self, size: int) -> None:
        """Give `size` held bytes back."""
        self._calls.bytes -= size
        self._held -= size

    def count(self, model: str, outcome: Answer | Status) -> None:
        """Hear of one image that a served model answered or that failed; "" if its model is not served."""
        self._images += 1
        self._models.add(model)
        if isinstance(outcome, Answer):
            self._pixels += outcome.height * outcome.width
            self._calls.metrics.answered(model, outcome)
        else:
            self._failed += 1
            self._calls.metrics.failed(model, code_name(outcome.code))

    async def __aenter__(self) -> Self:
        self._calls.calls += 1
        if self._calls.calls > self._calls.max_calls:
            full = Overloaded(f"{self._calls.max_calls} calls are being answered: no room for more now", _RETRY_AFTER)
            await self.__aexit__(Overloaded, full, None)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calls.calls -= 1
        self.release(self._held)
        if self._broken_off or isinstance(error, asyncio.CancelledError):
            self._ended("DEADLINE_EXCEEDED" if time.monotonic() >= self._late else "CANCELLED")
            raise asyncio.CancelledError  # there is nobody to send a status to
        elif error is None:
            self._ended("OK")
        else:
            status = status_of(error)
            self._ended(code_name(status.code), status.message)
            await self._context.abort(grpc_code(status), status.message, trailers_of(status))

    def _ended(self, code: str, message: str = "") -> None:
        seconds = time.monotonic() - self._started
        self._calls.metrics.request(self._rpc, code, seconds)
        event(
            "call",
            logging.DEBUG if code == "OK" else logging.INFO,
            rpc=self._rpc,
            code=code,
            models=sorted(self._models),
            images=self._images,
            failed=self._failed,
            pixels=self._pixels,
            ms=round(seconds * 1000, 2),
            **({"message": message} if message else {}),
        )
