"""`Client` and `AsyncClient`: the same questions, asked in plain code or on an asyncio event loop."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Final, Self

from fullframe.client.core import Core, finish
from fullframe.client.messages import ServedModel, model_ref
from fullframe.client.transports import connect, connect_on_loop
from fullframe.engine.pooling import Pooling
from fullframe.engine.progress import OnProgress, OnStreamProgress
from fullframe.engine.query import Answer, ClassScore, FloatArray, as_pooling, make_query
from fullframe.errors import FullframeError

if TYPE_CHECKING:
    from fullframe.image import ImageSource

DEFAULT_TIMEOUT: Final = 30.0
DEFAULT_RETRIES: Final = 6
"""Within about 15 s."""
DEFAULT_IN_FLIGHT: Final = 16


class Client:
    """Asks a fullframe server; may be shared by threads.

    An image is a path, a file's bytes, a uint8 array [H, W, 3] (RGB) or a PIL image. `model` and `version` name what
    answers: "" for the server's default and its newest version; a ServedModel is that very file, or NotFound. A file
    beyond what the server takes in a message is uploaded in pieces, read as they are sent; `on_progress` hears how far
    that and its computation are, in the caller's thread.

    Args:
        target: "host:port", or any name that gRPC resolves.
        timeout: seconds each call may take, retries included; in `stream`, the longest wait for the next answer; in an
            upload, which may take as long as it moves, the longest wait for news of it.
        retries: attempts after the first, where the server cannot be reached, is stopping or full. The waits between
            them grow, and are no shorter than a full server asks for.
        wait_for_ready: wait, up to the timeout, for a server that cannot be reached.

    Raises (every method):
        InvalidInput, NotFound: the request can never work as it is.
        Overloaded, Unavailable: it may work later.
        DeadlinePassed: it took longer than `timeout`.
        ServerError: anything else that a server says.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        retries: int = DEFAULT_RETRIES,
        wait_for_ready: bool = False,
    ) -> None:
        self._core = Core(connect(target, timeout, wait_for_ready), timeout, retries)

    def classify(
        self, image: "ImageSource", top_k: int = 5, *, model: str | ServedModel = "", version: str = ""
    ) -> list[ClassScore]:
        """The `top_k` most probable classes, best first."""
        return self.predict(image, top_k=top_k, model=model, version=version).classes

    def embed(
        self,
        image: "ImageSource",
        pooling: str | Pooling = "avg",
        normalize: bool = False,
        *,
        model: str | ServedModel = "",
        version: str = "",
    ) -> FloatArray:
        """One feature vector, float32 [D]; `pooling` as Pooling.parse reads it."""
        poolings = [as_pooling(pooling, normalize)]
        return self.predict(image, top_k=0, poolings=poolings, model=model, version=version).embeddings[0]

    def predict(
        self,
        image: "ImageSource",
        *,
        top_k: int = 5,
        poolings: Sequence[str | Pooling] = (),
        logits: bool = False,
        feature_map: bool = False,
        class_map: bool = False,
        max_map_side: int = 0,
        model: str | ServedModel = "",
        version: str = "",
        on_progress: OnProgress | None = None,
    ) -> Answer:
        """Everything asked for, from one pass over the image; its maps have at most `max_map_side` cells a side."""
        query = make_query(top_k, poolings, logits, feature_map, class_map, max_map_side)
        return finish(self._core.predict(image, query, model_ref(model, version), on_progress))

    def stream(
        self,
        images: "Iterable[ImageSource]",
        *,
        top_k: int = 5,
        poolings: Sequence[str | Pooling] = (),
        logits: bool = False,
        feature_map: bool = False,
        class_map: bool = False,
        max_map_side: int = 0,
        model: str | ServedModel = "",
        version: str = "",
        in_flight: int = DEFAULT_IN_FLIGHT,
        on_progress: OnStreamProgress | None = None,
    ) -> Iterator[tuple[int, Answer | FullframeError]]:
        """Answers, or what went wrong, with each image's number, as they come.

        `images` is read in the caller's thread, never more than `in_flight` ahead of the answers. A broken connection
        is taken up again; when that fails too, its error is raised.
        """
        query = make_query(top_k, poolings, logits, feature_map, class_map, max_map_side)
        answers = self._core.stream(images, query, model_ref(model, version), in_flight, on_progress)
        try:
            while True:
                try:
                    yield finish(answers.__anext__())
                except StopAsyncIteration:
                    return
        finally:
            finish(answers.aclose())

    def models(self) -> list[ServedModel]:
        """The models that the server answers with, and their contracts."""
        return finish(self._core.models())

    def model(self, name: str = "", version: str = "") -> ServedModel:
        """One of them."""
        return finish(self._core.model(model_ref(name, version)))

    def health(self, name: str = "") -> bool:
        """Whether the server, or one of its models, says that it can answer."""
        return finish(self._core.healthy(name))

    def close(self) -> None:
        """End the connection and what is under way on it."""
        finish(self._core.transport.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncClient:
    """`Client` for asyncio, made where an event loop runs; arguments, answers and errors are the same."""

    def __init__(
        self,
        target: str,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        retries: int = DEFAULT_RETRIES,
        wait_for_ready: bool = False,
    ) -> None:
        self._core = Core(connect_on_loop(target, timeout, wait_for_ready), timeout, retries)

    async def classify(
        self, image: "ImageSource", top_k: int = 5, *, model: str | ServedModel = "", version: str = ""
    ) -> list[ClassScore]:
        """See Client.classify."""
        return (await self.predict(image, top_k=top_k, model=model, version=version)).classes

    async def embed(
        self,
        image: "ImageSource",
        pooling: str | Pooling = "avg",
        normalize: bool = False,
        *,
        model: str | ServedModel = "",
        version: str = "",
    ) -> FloatArray:
        """See Client.embed."""
        poolings = [as_pooling(pooling, normalize)]
        return (await self.predict(image, top_k=0, poolings=poolings, model=model, version=version)).embeddings[0]

    async def predict(
        self,
        image: "ImageSource",
        *,
        top_k: int = 5,
        poolings: Sequence[str | Pooling] = (),
        logits: bool = False,
        feature_map: bool = False,
        class_map: bool = False,
        max_map_side: int = 0,
        model: str | ServedModel = "",
        version: str = "",
        on_progress: OnProgress | None = None,
    ) -> Answer:
        """See Client.predict."""
        query = make_query(top_k, poolings, logits, feature_map, class_map, max_map_side)
        return await self._core.predict(image, query, model_ref(model, version), on_progress)

    async def stream(
        self,
        images: "Iterable[ImageSource] | AsyncIterable[ImageSource]",
        *,
        top_k: int = 5,
        poolings: Sequence[str | Pooling] = (),
        logits: bool = False,
        feature_map: bool = False,
        class_map: bool = False,
        max_map_side: int = 0,
        model: str | ServedModel = "",
        version: str = "",
        in_flight: int = DEFAULT_IN_FLIGHT,
        on_progress: OnStreamProgress | None = None,
    ) -> AsyncIterator[tuple[int, Answer | FullframeError]]:
        """See Client.stream. Answers do not wait for the next of asynchronous `images`."""
        query = make_query(top_k, poolings, logits, feature_map, class_map, max_map_side)
        ref = model_ref(model, version)
        async with aclosing(self._core.stream(images, query, ref, in_flight, on_progress)) as answers:
            async for answer in answers:
                yield answer

    async def models(self) -> list[ServedModel]:
        """See Client.models."""
        return await self._core.models()

    async def model(self, name: str = "", version: str = "") -> ServedModel:
        """See Client.model."""
        return await self._core.model(model_ref(name, version))

    async def health(self, name: str = "") -> bool:
        """See Client.health."""
        return await self._core.healthy(name)

    async def close(self) -> None:
        """End the connection and what is under way on it."""
        await self._core.transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()
