"""PredictUpload: one image in chunks, kept in the spool, answered with news of how far it is."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

from grpc.aio import EOF

from fullframe.engine.plane import EncodedImage, Plane, Served
from fullframe.engine.query import Query
from fullframe.errors import FullframeError, InvalidInput
from fullframe.server import messages
from fullframe.server.calls import Call
from fullframe.server.outcomes import Answering, Outcome, when_room
from fullframe.server.spool import Spool, SpooledFile
from fullframe.server.streams import Intake
from fullframe.v1 import vision_pb2 as pb

_NEWS: Final = 0.5  # seconds between two messages of progress, at least


class Uploads:
    """Takes uploads in.

    Args:
        plane: the engine.
        answering: how images are answered.
        intake: where streams read from.
        spool: where files are kept.
    """

    def __init__(self, plane: Plane, answering: Answering, intake: Intake, spool: Spool) -> None:
        self._plane, self._answering, self._intake, self._spool = plane, answering, intake, spool
        self._limits = replace(plane.limits, max_bytes=spool.largest)

    async def predict(self, call: Call) -> None:
        """Receive, compute, answer; whatever happens, the file's space is free afterwards."""
        first = await self._next(call)
        if first is EOF or first.WhichOneof("part") != "start":
            raise InvalidInput("the first message must be start: it holds the options", "start")
        model = messages.asked_model(self._plane, first.start.model)
        query = messages.predict_query(first.start.options)
        async with self._file(first.start.total_bytes) as file:
            await _tell(call, 0, 0.0)  # there is room: send it
            await self._receive(call, file, first.start.total_bytes)
            outcome = await self._answer(call, model, file, query)
        done = pb.PredictUploadResponse.Done(model=messages.model_ref(model), result=messages.prediction(outcome))
        await call.write(pb.PredictUploadResponse(done=done))

    @asynccontextmanager
    async def _file(self, announced: int) -> AsyncIterator[SpooledFile]:
        file = SpooledFile(self._spool, announced)
        try:
            await asyncio.to_thread(file.open)
            yield file
        finally:
            # Shielded: a call that ends in a hurry frees its space too.
            await asyncio.shield(asyncio.to_thread(file.close))

    async def _receive(self, call: Call, file: SpooledFile, announced: int) -> None:
        told = time.monotonic()
        while (request := await self._next(call)) is not EOF:
            if request.WhichOneof("part") != "chunk":
                raise InvalidInput("every message after the first must be a chunk", "chunk")
            size = len(request.chunk)
            if announced and file.size + size > announced:
                raise _other_size(file.size + size, announced)
            await when_room(partial(call.hold, size), call.deadline)
            try:
                await asyncio.to_thread(file.write, request.chunk)
            finally:
                call.release(size)
            if time.monotonic() - told >= _NEWS:
                told = time.monotonic()
                await _tell(call, file.size, 0.0)
        if announced and file.size != announced:
            raise _other_size(file.size, announced)

    async def _answer(self, call: Call, model: Served, file: SpooledFile, query: Query) -> Outcome:
        computed, told = 0.0, -1.0

        def hear(share: float) -> None:
            nonlocal computed
            computed = share

        image = EncodedImage(await asyncio.to_thread(file.data))
        answering = asyncio.create_task(
            self._answering.outcomes(call, model, [image], query, patient=True, limits=self._limits, on_progress=hear)
        )
        try:
            while not answering.done():
                if computed != told:
                    told = computed
                    await _tell(call, file.size, told)
                await asyncio.wait({answering}, timeout=_NEWS)
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
        [outcome] = answering.result()
        return outcome

    async def _next(self, call: Call) -> Any:
        request = await self._intake.read(call)
        if isinstance(request, FullframeError):
            raise request
        return request


async def _tell(call: Call, received: int, computed: float) -> None:
    progress = pb.PredictUploadResponse.Progress(received_bytes=received, computed=computed)
    await call.write(pb.PredictUploadResponse(progress=progress))


def _other_size(received: int, announced: int) -> InvalidInput:
    return InvalidInput(f"{received} bytes came; total_bytes announced {announced}", "total_bytes")
