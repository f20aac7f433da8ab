"""VisionService: requests to the engine's futures, and their outcomes back."""

import asyncio
from functools import partial
from typing import Any, Final

from fullframe.engine.plane import Plane
from fullframe.engine.query import Query
from fullframe.errors import FullframeError, InvalidInput
from fullframe.server import messages
from fullframe.server.calls import Call
from fullframe.server.outcomes import Answering, Outcome, when_room
from fullframe.server.spool import Spool
from fullframe.server.status import status_of
from fullframe.server.streams import Intake
from fullframe.server.uploads import Uploads
from fullframe.settings import Settings
from fullframe.v1 import vision_pb2 as pb

SERVICE: Final = pb.DESCRIPTOR.services_by_name["VisionService"]


class VisionServicer:
    """Answers on the event loop; images are opened and computed on the plane's threads.

    Args:
        plane: the engine.
        intake: where streams read from.
        spool: where uploads are kept.
        settings: the limits on requests.
    """

    def __init__(self, plane: Plane, intake: Intake, spool: Spool, settings: Settings) -> None:
        self._plane, self._intake, self._spool, self._settings = plane, intake, spool, settings
        self._answering = Answering(plane, int(settings.max_message_bytes))
        self._uploads = Uploads(plane, self._answering, intake, spool)

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
        await self._uploads.predict(call)

    async def ListModels(self, call: Call, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """The models served here."""
        return pb.ListModelsResponse(models=map(messages.model_info, self._plane.models()))

    async def GetModel(self, call: Call, request: pb.GetModelRequest) -> pb.GetModelResponse:
        """One model's contract, and what this server takes."""
        model = messages.asked_model(self._plane, request.model)
        limits, settings = self._plane.limits, self._settings
        return pb.GetModelResponse(
            model=messages.model_info(model),
            limits=pb.Limits(
                max_pixels=limits.max_pixels,
                max_image_bytes=limits.max_bytes,
                max_upload_bytes=self._spool.largest,
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
        model = messages.asked_model(self._plane, request.model)
        return messages.model_ref(model), await self._answering.outcomes(call, model, request.images, query)

    async def _answer_one(self, call: Call, request: pb.PredictStreamRequest) -> pb.PredictStreamResponse:
        """One answer of a stream; whatever goes wrong is in it."""
        response = pb.PredictStreamResponse(request_id=request.request_id)
        size = request.ByteSize()
        try:
            await when_room(partial(call.hold, size), call.deadline)
            try:
                model = messages.asked_model(self._plane, request.model)
                response.model.CopyFrom(messages.model_ref(model))
                query = messages.predict_query(request.options)
                [outcome] = await self._answering.outcomes(call, model, [request.image], query, patient=True)
            finally:
                call.release(size)
        except Exception as error:  # the stream's other images have nothing to do with it
            outcome = status_of(error)
            call.count(response.model.name, outcome)
        response.result.CopyFrom(messages.prediction(outcome))
        return response
