"""VisionService: requests to the engine's futures, and their outcomes back."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar

from google.rpc.status_pb2 import Status
from grpc.aio import EOF

from fullframe.engine.plane import Plane, Served
from fullframe.engine.query import Answer, Query
from fullframe.errors import DeadlinePassed, FullframeError, InvalidInput, Overloaded, Unavailable
from fullframe.image import Picture
from fullframe.server import messages
from fullframe.server.calls import Call
from fullframe.server.status import status_of
from fullframe.server.streams import Intake
from fullframe.settings import Settings
from fullframe.v1 import vision_pb2 as pb

SERVICE: Final = pb.DESCRIPTOR.services_by_name["VisionService"]

_LONGEST_WAIT: Final = 1.0  # seconds between a stream's looks for room
_PROGRESS_BYTES: Final = 2**20  # of an upload, between two messages of progress

Outcome: TypeAlias = Answer | Status
T = TypeVar("T")


class VisionServicer:
    """Answers on the event loop; images are opened and computed on the plane's threads.

    Args:
        plane: the engine.
        intake: where streams read from.
        settings: the limits on requests.
    """

    def __init__(self, plane: Plane, intake: Intake, settings: Settings) -> None:
        self._plane, self._intake, self._settings = plane, intake, settings

    async def Classify(self, call: Call, request: pb.ClassifyRequest) -> pb.ClassifyResponse:
        """The most probable classes of each image."""
        model, outcomes = await self._answer_all(call, request, messages.classify_query(request))
        return pb.ClassifyResponse(model=model, results=map(messages.classification, outcomes))

    async def Embed(self, call: Call, request: pb.EmbedRequest) -> pb.EmbedResponse:
        """Pooled features of each image."""
        model, outcomes = await self._answer_all(call, request, messages.embed_query(request))
        return pb.EmbedResponse(model=model, results=map(messages.embedding, outcomes))

    async def Predict(self, call: Call, request: pb.PredictRequest) -> pb.PredictResponse:
        """Classes, features and maps from one pass over each image."""
        model, outcomes = await self._answer_all(call, request, messages.predict_query(request.options))
        return pb.PredictResponse(model=model, results=map(messages.prediction, outcomes))

    async def PredictStream(self, call: Call) -> None:
        """Many images over one call; no more are read than `max_stream_images` ahead of the answers sent."""
        room = asyncio.Semaphore(self._settings.max_stream_images)
        writing = asyncio.Lock()

        async def answer(request: pb.PredictStreamRequest) -> None:
            response = await self._answer_one(call, request)
            async with writing:
                await call.write(response)
            room.release()

        request: Any = None
        async with asyncio.TaskGroup() as answers:
            while await room.acquire() and isinstance(
                request := await self._intake.read(call), pb.PredictStreamRequest
            ):
                answers.create_task(answer(request))
        if isinstance(request, FullframeError):  # what was read before it has been answered
            raise request

    async def PredictUpload(self, call: Call) -> None:
        """One encoded image in chunks, answered once the caller has sent the last."""
        first = await call.read()
        if first is EOF or first.WhichOneof("part") != "start":
            raise InvalidInput("the first message must be start: it holds the options", "start")
        model = self._plane.model(first.start.model.name, first.start.model.version)
        query = messages.predict_query(first.start.options)
        image = pb.Image(encoded=await self._receive(call, first.start.total_bytes))
        [outcome] = await self._outcomes(call, model, [image], query, patient=True)
        done = pb.PredictUploadResponse.Done(model=messages.model_ref(model), result=messages.prediction(outcome))
        await call.write(pb.PredictUploadResponse(done=done))

    async def ListModels(self, call: Call, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """The models served here."""
        return pb.ListModelsResponse(models=map(messages.model_info, self._plane.models()))

    async def GetModel(self, call: Call, request: pb.GetModelRequest) -> pb.GetModelResponse:
        """One model's contract, and what this server takes."""
        model = self._plane.model(request.model.name, request.model.version)
        limits, settings = self._plane.limits, self._settings
        return pb.GetModelResponse(
            model=messages.model_info(model),
            limits=pb.Limits(
                max_pixels=limits.max_pixels,
                max_image_bytes=limits.max_bytes,
                max_message_bytes=settings.max_message_bytes,
                max_frames=limits.max_frames,
                max_images_per_request=settings.max_images_per_request,
                formats=sorted(limits.formats),
            ),
        )

    async def _answer_all(
        self, call: Call, request: pb.ClassifyRequest | pb.EmbedRequest | pb.PredictRequest, query: Query
    ) -> tuple[pb.ModelRef, list[Outcome]]:
        """The model that answered, and each image's outcome; raises what is wrong with the request as a whole."""
        most = self._settings.max_images_per_request
        if not 1 <= len(request.images) <= most:
            raise InvalidInput(f"the request holds {len(request.images)} images; it must hold 1 to {most}", "images")
        call.hold(request.ByteSize())
        model = self._plane.model(request.model.name, request.model.version)
        return messages.model_ref(model), await self._outcomes(call, model, request.images, query)

    async def _answer_one(self, call: Call, request: pb.PredictStreamRequest) -> pb.PredictStreamResponse:
        """One answer of a stream; whatever goes wrong is in it."""
        response = pb.PredictStreamResponse(request_id=request.request_id)
        size = request.ByteSize()
        try:
            await _when_room(partial(call.hold, size), call.deadline)
            try:
                model = self._plane.model(request.model.name, request.model.version)
                response.model.CopyFrom(messages.model_ref(model))
                query = messages.predict_query(request.options)
                [outcome] = await self._outcomes(call, model, [request.image], query, patient=True)
            finally:
                call.release(size)
        except Exception as error:  # the stream's other images have nothing to do with it
            outcome = status_of(error)
            call.count(response.model.name, outcome)
        response.result.CopyFrom(messages.prediction(outcome))
        return response

    async def _outcomes(
        self, call: Call, model: Served, images: Iterable[pb.Image], query: Query, patient: bool = False
    ) -> list[Outcome]:
        """An answer or a status for every image.

        Cancelling this cancels what is queued.

        Args:
            patient: wait for room in the engine's queue instead of raising Overloaded.
        """
        begun = [self._open(image) for image in images]
        reading = [item for item in begun if isinstance(item, Future)]
        read = await _results(reading)
        late = iter(read)
        opened = [next(late) if isinstance(item, Future) else item for item in begun]
        pictures = [picture for picture in opened if not isinstance(picture, BaseException)]
        submit = partial(self._plane.submit, model, pictures, query, call.deadline)
        futures = await _when_room(submit, call.deadline) if patient else submit()
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

    def _open(self, image: pb.Image) -> Picture | Future[Picture] | InvalidInput:
        try:
            return self._plane.open(messages.source_of(image))
        except InvalidInput as error:
            return error

    def _sendable(self, results: Sequence[Answer | BaseException]) -> list[Outcome]:
        """Errors as statuses, as are answers that would make the response longer than a message may be."""
        room = int(self._settings.max_message_bytes)
        outcomes: list[Outcome] = []
        for result in results:
            if isinstance(result, CancelledError):  # by the engine
                result = Unavailable("shutting down: ask another server, or this one later")
            elif isinstance(result, Answer) and (size := messages.answer_bytes(result)) > room:
                result = InvalidInput(
                    f"the answer takes {size} bytes, and {room} are left in the response: "
                    "ask for pooled features instead of maps, or about fewer images",
                    "images",
                )
            elif isinstance(result, Answer):
                room -= size
            outcomes.append(result if isinstance(result, Answer) else status_of(result))
        return outcomes

    async def _receive(self, call: Call, announced: int) -> bytes:
        """An upload's chunks as one file; `announced` is its size, 0 if not known."""
        limits = self._plane.limits
        limits.check_bytes(announced)
        chunks, received, reported = [], 0, 0
        while (request := await call.read()) is not EOF:
            if request.WhichOneof("part") != "chunk":
                raise InvalidInput("every message after the first must be a chunk", "chunk")
            call.hold(len(request.chunk), received)
            chunks.append(request.chunk)
            received += len(request.chunk)
            limits.check_bytes(received)
            if announced and received > announced:
                break
            if received - reported >= _PROGRESS_BYTES:
                reported = received
                progress = pb.PredictUploadResponse.Progress(received_bytes=received)
                await call.write(pb.PredictUploadResponse(progress=progress))
        if announced and received != announced:
            raise InvalidInput(f"{received} bytes came; total_bytes announced {announced}", "total_bytes")
        return b"".join(chunks)


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


async def _when_room(action: Callable[[], T], deadline: float | None) -> T:
    """What `action` returns, tried again while it raises Overloaded; raises that if the deadline comes first."""
    while True:
        try:
            return action()
        except Overloaded as full:
            wait = min(full.retry_after, _LONGEST_WAIT)
            if deadline is not None and time.monotonic() + wait >= deadline:
                raise
            await asyncio.sleep(wait)
