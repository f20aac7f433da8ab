"""Images of one call -> the engine's futures -> an answer or a status for each."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar

from google.rpc.status_pb2 import Status

from fullframe.engine.plane import EncodedImage, Plane, Served
from fullframe.engine.progress import OnShare, unheard
from fullframe.engine.query import Answer, Query
from fullframe.engine.schedule import SHUTTING_DOWN
from fullframe.errors import DeadlinePassed, InvalidInput, Overloaded, Unavailable
from fullframe.image import Limits, Picture
from fullframe.server import messages
from fullframe.server.calls import Call
from fullframe.server.status import status_of
from fullframe.v1 import vision_pb2 as pb

_LONGEST_WAIT: Final = 1.0  # seconds between looks for room

Outcome: TypeAlias = Answer | Status
T = TypeVar("T")


class Answering:
    """Waits on the event loop; images are opened and computed on the plane's threads.

    Args:
        plane: the engine.
        max_bytes: of a response.
    """

    def __init__(self, plane: Plane, max_bytes: int) -> None:
        self._plane, self._max_bytes = plane, max_bytes

    async def outcomes(
        self,
        call: Call,
        model: Served,
        images: Iterable[pb.Image | EncodedImage],
        query: Query,
        *,
        patient: bool = False,
        limits: Limits | None = None,
        on_progress: OnShare = unheard,
    ) -> list[Outcome]:
        """An answer or a status for every image.

        Cancelling this cancels what is queued, and what is computed in pieces.

        Args:
            patient: wait for room in the engine's queues instead of raising Overloaded.
            limits: in place of the plane's own.
            on_progress: as Plane.submit.
        """
        begin = partial(self._open_all, images, limits)
        begun = await when_room(begin, call.deadline) if patient else begin()
        reading = [item for item in begun if isinstance(item, Future)]
        read = await _results(reading)
        late = iter(read)
        opened = [next(late) if isinstance(item, Future) else item for item in begun]
        pictures = [picture for picture in opened if not isinstance(picture, BaseException)]
        submit = partial(self._plane.submit, model, pictures, query, call.deadline, on_progress)
        futures = await when_room(submit, call.deadline) if patient else submit()
        answered = await _results(futures)
        answers = iter(answered)
        results = [picture if isinstance(picture, BaseException) else next(answers) for picture in opened]
        for result in results:
            if isinstance(result, DeadlinePassed):
                raise result
        outcomes = self._sendable(results)
        for outcome in outcomes:
            call.count(model.name, outcome)
        return outcomes

    def _open_all(
        self, images: Iterable[pb.Image | EncodedImage], limits: Limits | None
    ) -> list[Picture | Future[Picture] | InvalidInput]:
        """All of them, or none; raises Overloaded."""
        begun: list[Picture | Future[Picture] | InvalidInput] = []
        try:
            for image in images:
                begun.append(self._open(image, limits))
        except Overloaded:
            for item in begun:
                if isinstance(item, Future):
                    item.cancel()
            raise
        return begun

    def _open(self, image: pb.Image | EncodedImage, limits: Limits | None) -> Picture | Future[Picture] | InvalidInput:
        try:
            return self._plane.open(messages.source_of(image) if isinstance(image, pb.Image) else image, limits)
        except InvalidInput as error:
            return error

    def _sendable(self, results: Sequence[Answer | BaseException]) -> list[Outcome]:
        """Errors as statuses, as are answers that would make the response longer than a message may be."""
        room = self._max_bytes
        outcomes: list[Outcome] = []
        for result in results:
            if isinstance(result, CancelledError):  # by the engine
                result = Unavailable(SHUTTING_DOWN)
            elif isinstance(result, Answer) and (size := messages.answer_bytes(result)) > room:
                result = InvalidInput(
                    f"the answer takes {size} bytes, and {room} are left in the response: "
                    "ask for pooled features instead of maps, smaller maps (max_map_side) or about fewer images",
                    "images",
                )
            elif isinstance(result, Answer):
                room -= size
            outcomes.append(result if isinstance(result, Answer) else status_of(result))
        return outcomes


async def _results(futures: Sequence[Future[T]]) -> list[T | BaseException]:
    """What became of each; cancelling this cancels them all.

    Awaited one by one: asyncio.gather would take the event loop several turns more for each request.
    """
    results: list[T | BaseException] = []
    try:
        for future in futures:
            if not future.done():
                await _settled(future)
            try:
                results.append(future.result())
            except Exception as error:  # each is one image's, and becomes its status
                results.append(error)
    finally:
        for future in futures:
            future.cancel()
    return results


async def _settled(future: Future[Any]) -> None:
    """Until another thread has settled `future`: asyncio.wrap_future without the copy of its result."""
    loop = asyncio.get_running_loop()
    settled = loop.create_future()

    def wake() -> None:
        if not settled.done():  # nobody waits any more
            settled.set_result(None)

    def tell(_: object) -> None:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(wake)

    future.add_done_callback(tell)
    await settled


async def when_room(action: Callable[[], T], deadline: float | None) -> T:
    """What `action` returns, tried again while it raises Overloaded; raises that if the deadline comes first."""
    while True:
        try:
            return action()
        except Overloaded as full:
            wait = min(full.retry_after, _LONGEST_WAIT)
            if deadline is not None and time.monotonic() + wait >= deadline:
                raise
            await asyncio.sleep(wait)
