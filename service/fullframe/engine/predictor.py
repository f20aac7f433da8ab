"""A model in this process, asked as a server would be: `fullframe.load("cifar10").classify("cat.jpg")`."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Self

from fullframe.engine.choice import Compute, EngineName, opener
from fullframe.engine.plane import Plane, Served, open_plane
from fullframe.engine.pooling import Pooling
from fullframe.engine.progress import OnProgress, OnStreamProgress, Progress, unheard
from fullframe.engine.query import Answer, ClassScore, FloatArray, Query, as_pooling, make_query
from fullframe.errors import FullframeError, InvalidInput, NotFound, Overloaded, first_line
from fullframe.image import ImageSource, Limits, open_source, own_limits
from fullframe.model.contract import Contract
from fullframe.model.repository import BUNDLED_NAME, Precision


class Predictor:
    """One model on this machine; an image is a path, bytes, a PIL image or a uint8 array [H, W, 3].

    `on_progress` hears, on another thread, how far an image is that is computed in pieces; what it raises ends that.

    Each call raises InvalidInput for what is no image, is beyond the limits or too small for the model.
    """

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._model: Served = plane.model()

    @property
    def served(self) -> Served:
        """The model, its name and version."""
        return self._model

    @property
    def contract(self) -> Contract:
        """The model's labels, geometry and training record."""
        return self._model.contract

    def classify(self, image: ImageSource, top_k: int = 5) -> list[ClassScore]:
        """The `top_k` most probable classes, best first."""
        return self.predict(image, top_k=top_k).classes

    def embed(self, image: ImageSource, pooling: str | Pooling = "avg", normalize: bool = False) -> FloatArray:
        """One feature vector, float32 [D]; `pooling` as Pooling.parse reads it."""
        return self.predict(image, top_k=0, poolings=[as_pooling(pooling, normalize)]).embeddings[0]

    def predict(
        self,
        image: ImageSource,
        *,
        top_k: int = 5,
        poolings: Sequence[str | Pooling] = (),
        logits: bool = False,
        feature_map: bool = False,
        class_map: bool = False,
        max_map_side: int = 0,
        on_progress: OnProgress | None = None,
    ) -> Answer:
        """Everything asked for, from one pass over the image; its maps have at most `max_map_side` cells a side."""
        query = make_query(top_k, poolings, logits, feature_map, class_map, max_map_side)
        return self._submit(image, query, on_progress).result()

    def stream(
        self,
        images: Iterable[ImageSource],
        *,
        top_k: int = 5,
        poolings: Sequence[str | Pooling] = (),
        logits: bool = False,
        feature_map: bool = False,
        class_map: bool = False,
        max_map_side: int = 0,
        in_flight: int = 16,
        on_progress: OnStreamProgress | None = None,
    ) -> Iterator[tuple[int, Answer | FullframeError]]:
        """Answers, or what went wrong, with each image's number, in order; at most `in_flight` are worked on at once.

        An image that finds no room in the engine waits for it.
        """
        if in_flight < 1:
            raise InvalidInput(f"in_flight is {in_flight}; it must be at least 1", "in_flight")
        query = make_query(top_k, poolings, logits, feature_map, class_map, max_map_side)
        waiting: deque[tuple[int, Future[Answer] | FullframeError]] = deque()
        numbered = enumerate(images)
        upcoming = next(numbered, None)
        while upcoming or waiting:
            while upcoming and len(waiting) < in_flight:
                number, image = upcoming
                try:
                    heard = on_progress and partial(on_progress, number)
                    waiting.append((number, self._submit(image, query, heard)))
                except Overloaded as full:
                    if waiting:
                        break
                    time.sleep(full.retry_after)  # the room is another thread's
                    continue
                except FullframeError as error:
                    waiting.append((number, error))
                upcoming = next(numbered, None)
            number, outcome = waiting.popleft()
            yield number, _outcome(outcome) if isinstance(outcome, Future) else outcome

    def close(self) -> None:
        """End the worker threads."""
        self._plane.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _submit(self, image: ImageSource, query: Query, on_progress: OnProgress | None) -> Future[Answer]:
        picture = open_source(image, self._plane.limits)
        hear = unheard if on_progress is None else lambda share: on_progress(Progress(0, 0, share))
        return self._plane.submit(self._model, [picture], query, on_progress=hear)[0]


def _outcome(future: Future[Answer]) -> Answer | FullframeError:
    """What came of an image; a failure of the runtime is this image's alone."""
    try:
        return future.result()
    except FullframeError as error:
        return error
    except Exception as error:
        return FullframeError(f"the model failed: {first_line(error)}")


def load(
    model: str | None = None,
    engine: EngineName = "auto",
    *,
    precision: Precision = "float32",
    compute: Compute = "float32",
    limits: Limits | None = None,
) -> Predictor:
    """Open a model in this process.

    Args:
        model: an .onnx file, a model's folder, or None or "cifar10" for the bundled default.
        engine: "onnx"; "torch" for PyTorch with fused kernels, of the gpu extra, which runs on a CPU too; "auto" for
            that where there is a CUDA or ROCm device.
        precision: "int8" for the copy that `fullframe quantize` made, "auto" for it where there is one. The promise is
            about "float32".
        compute: what the torch engine computes in.
        limits: what an image may be; by default as good as anything, since what is large is worked on in pieces.

    Raises:
        NotFound: no such model.
        InvalidModel: the file breaks the contract.
        InvalidInput: no such engine, or one that needs what is not installed.
    """
    opener(engine, compute)  # what it raises says more than that there is no such model
    specs = [] if model in (None, BUNDLED_NAME) else [str(model)]
    limits = limits or own_limits()
    try:
        return Predictor(open_plane(specs, limits=limits, precision=precision, engine=engine, compute=compute))
    except InvalidInput as error:
        raise NotFound(str(error)) from error
