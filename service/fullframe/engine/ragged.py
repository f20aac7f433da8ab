"""Images of different sizes in one padded batch: which go together, the run, and each one's own answer."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import log
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fullframe.engine.answer import answer_from
from fullframe.engine.base import Engine
from fullframe.engine.jobs import Batching, Job
from fullframe.engine.query import Answer, FloatArray, Query, Timings
from fullframe.engine.warm_up import warm_up_together
from fullframe.errors import InvalidModel
from fullframe.image import Pixels
from fullframe.model.contract import INPUT, MAP_SIZES, MAPS, SIZES

MOST_WASTE: Final = 0.25
"""Pixels that a batch may pad, as a share of its images' own."""
MOST_PIXELS: Final = 2_000_000
"""Pixels of a batch, padding included."""
MASKS_SHARE: Final = 1.5
"""Memory for each pixel of a batch, as a multiple of a lone image's: masked maps are copies. The bundled model: 1.4."""

_ONE_BY_ONE: Final = "the images of model %s are computed one by one, not in batches: %s"
_LOG: Final = logging.getLogger(__name__)

Size = tuple[int, int]
"""Height, width."""
BatchSize = Callable[[int, int, bool], Size]
"""As Engine.batch_size."""


class RaggedEngine:
    """Runs a model on images of different sizes at once (model/ragged); from any thread.

    An image's answer is within the promise of the one that it gets alone, whatever is beside it: the same sums, in an
    order that may depend on the padded size. Several images of one size are not padded, and run without masks.

    Raises:
        InvalidModel: the model can't be run so; the message names the node that stands against it.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        if engine.contract.ragged:
            self._session = engine.open_session(engine.path)
            return
        from fullframe.model.ragged import ragged_graph  # the onnx package takes a while

        self._session = engine.open_session(ragged_graph(engine.path))

    def run(self, images: Sequence[Pixels], outputs: Sequence[str]) -> list[dict[str, FloatArray]]:
        """Run the graph on images, uint8 [H, W, 3] each, none below the model's smallest size.

        Returns:
            For each image the outputs, names from the contract, without their batch axis; maps of its own size.

        Raises:
            InvalidInput: an image is too small.
        """
        for image in images:
            self.engine.check_size(image.shape[0], image.shape[1])
        own = [(image.shape[0], image.shape[1]) for image in images]
        alike = len(own) > 1 == len(set(own))
        size = self.engine.batch_size(max(h for h, _ in own), max(w for _, w in own), alike)
        batch = padded(images, self.engine.zeros((self._count(own, size), *size, 3)))
        if all(each == size for each in own):
            found = self.engine.run_batch(batch, outputs)
            return [{name: each[n].copy() for name, each in zip(outputs, found, strict=True)} for n in range(len(own))]
        others = [min(own)] * (len(batch) - len(own))
        feeds = {INPUT: batch, SIZES: np.array(own + others, np.int64)}
        *found, map_sizes = self._session.run([*outputs, MAP_SIZES], feeds)
        return [
            {name: _own(name, each[number], map_sizes[number]) for name, each in zip(outputs, found, strict=True)}
            for number in range(len(images))
        ]

    def _count(self, own: Sequence[Size], size: Size) -> int:
        """Of how many images the batch is: those behind the last are of no account, and within what it may pad."""
        count = self.engine.batch_count(len(own))
        paid = count * size[0] * size[1]
        return count if paid <= min(MOST_PIXELS, (1 + MOST_WASTE) * sum(h * w for h, w in own)) else len(own)


def padded(images: Sequence[Pixels], batch: Pixels) -> Pixels:
    """The images in the upper left corners of `batch`, uint8 [N, H, W, 3], N their number or more; what lies beside one
    is of no account."""
    for place, image in zip(batch, images, strict=False):
        place[: image.shape[0], : image.shape[1]] = image
    return batch


def companions(
    first: Size, others: Sequence[Size], most_pixels: int = MOST_PIXELS, batch_size: BatchSize = lambda h, w, _: (h, w)
) -> list[int]:
    """Which of the others to run with the first: those of the most similar shapes, as long as little is padded.

    Args:
        batch_size: the engine's.

    Returns:
        Their numbers, such that the batch pads at most MOST_WASTE and has at most `most_pixels`.
    """

    def difference(number: int) -> float:
        return sum(abs(log(side / own)) for side, own in zip(others[number], first, strict=True))

    chosen: list[int] = []
    (height, width), own, alike = first, first[0] * first[1], True
    for number in sorted(range(len(others)), key=difference):
        rows, columns = others[number]
        taller, wider, more = max(height, rows), max(width, columns), own + rows * columns
        still = alike and (rows, columns) == first
        size = batch_size(taller, wider, still)
        if (len(chosen) + 2) * size[0] * size[1] <= min(most_pixels, (1 + MOST_WASTE) * more):
            height, width, own, alike = taller, wider, more, still
            chosen.append(number)
    return chosen


@dataclass(frozen=True)
class Decoded:
    """An image that is ready to be computed, and what is asked of it.

    Attributes:
        outputs: of the graph, that the query needs.
        timings: of its decoding and its time in the queue until then.
        since: the time.monotonic() instant from which it waits to be computed.
    """

    pixels: Pixels
    query: Query
    outputs: Sequence[str]
    timings: Timings
    since: float = field(default_factory=time.monotonic)


class RaggedBatches:
    """One model's images worked on together: the scheduler's Together.

    Args:
        most_pixels: of one batch, padding included. A larger image is a batch by itself.
    """

    def __init__(self, engine: RaggedEngine, most_pixels: int = MOST_PIXELS) -> None:
        self.most_pixels, self._engine = most_pixels, engine

    def warm_up(self) -> None:
        """Run what no image should wait for."""
        warm_up_together(self._engine.run, self._engine.engine.contract)

    def choose(self, first: Job, others: Sequence[Job]) -> list[int]:
        """As `companions`."""
        batch_size = self._engine.engine.batch_size
        return companions(first.shape, [job.shape for job in others], self.most_pixels, batch_size)

    def work(self, prepared: Sequence[Decoded]) -> list[Answer | Exception]:
        """Each image's answer, or why there is none.

        A batch that fails, for want of memory or whatever else, is tried again as two halves.
        """
        started = time.monotonic()
        outputs = list(dict.fromkeys(name for image in prepared for name in image.outputs))
        try:
            found = self._engine.run([image.pixels for image in prepared], outputs)
        except Exception as error:
            if len(prepared) == 1:
                return [error]
            found = None  # and only then the halves: until the error is gone, so is not what it holds of the batch
        if found is None:
            half = len(prepared) // 2
            return self.work(prepared[:half]) + self.work(prepared[half:])
        return [self._answer(*each, started) for each in zip(prepared, found, strict=True)]

    def _answer(self, image: Decoded, found: dict[str, FloatArray], started: float) -> Answer | Exception:
        height, width, _ = image.pixels.shape
        own = {name: found[name] for name in image.outputs}
        try:
            answer = answer_from(own, image.query, self._engine.engine.contract, height, width)
        except Exception as error:
            return error
        queue = image.timings.queue + started - image.since
        answer.timings = replace(image.timings, queue=queue, compute=time.monotonic() - started)
        return answer


def ragged_engine(engine: Engine, batching: Batching, name: str) -> RaggedEngine | None:
    """What runs a model's images together, where they are to be; raises InvalidModel for "ragged" where they can't.

    It is logged why a device computes them one by one, under the model's name.
    """
    if batching == "auto" and not engine.accelerated:
        return None
    if batching == "one":
        if engine.accelerated:
            _LOG.info(_ONE_BY_ONE, name, 'batching is "one"')
        return None
    try:
        return RaggedEngine(engine)
    except InvalidModel as error:
        if batching == "auto":
            _LOG.info(_ONE_BY_ONE, name, error)
            return None
        raise InvalidModel(f"{engine.path.name}: {error}") from error


def _own(name: str, found: NDArray[Any], size: NDArray[np.int64]) -> FloatArray:
    """An image's part of an output; copied, so that it does not keep its neighbours' alive."""
    return (found[:, : size[0], : size[1]] if name in MAPS else found).copy()
