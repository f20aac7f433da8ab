"""Images of different sizes in one padded batch: which go together, the run, and each one's own answer."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import log
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fullframe.engine.answer import answer_from
from fullframe.engine.base import Engine
from fullframe.engine.jobs import Batching, Job
from fullframe.engine.query import Answer, FloatArray, Query, Timings
from fullframe.errors import InvalidModel
from fullframe.image import Pixels
from fullframe.model.contract import INPUT, MAP_SIZES, MAPS, SIZES

MOST_WASTE: Final = 0.25
"""Pixels that a batch may pad, as a share of its images' own."""
MOST_PIXELS: Final = 2_000_000
"""Pixels of a batch, padding included."""
MASKS_SHARE: Final = 1.5
"""Memory for each pixel of a batch, as a multiple of a lone image's: masked maps are copies. The bundled model: 1.4."""

_CLASSES: Final = 8
"""Sides between a power of two and the next that batches are padded to."""

_WARM_UP_SIDES: Final = (32, 224, 512)

Size = tuple[int, int]
"""Height, width."""


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
        largest, alike = (max(h for h, _ in own), max(w for _, w in own)), len(own) > 1 == len(set(own))
        size = padded_size(largest, alike, self.engine.few_shapes)
        batch = padded(images, self.engine.zeros((len(images), *size, 3)))
        if all(each == size for each in own):
            found = self.engine.run_batch(batch, outputs)
            return [{name: each[n].copy() for name, each in zip(outputs, found, strict=True)} for n in range(len(own))]
        feeds = {INPUT: batch, SIZES: np.array(own, np.int64)}
        *found, map_sizes = self._session.run([*outputs, MAP_SIZES], feeds)
        return [
            {name: _own(name, each[number], map_sizes[number]) for name, each in zip(outputs, found, strict=True)}
            for number in range(len(images))
        ]


def padded(images: Sequence[Pixels], batch: Pixels) -> Pixels:
    """The images in the upper left corners of `batch`, uint8 [N, H, W, 3]; what lies beside one is of no account."""
    for place, image in zip(batch, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    return batch


def padded_size(largest: Size, alike: bool, few_shapes: bool) -> Size:
    """What a batch is padded to.

    Args:
        largest: height and width of its images.
        alike: they are several, of one size; such a size is likely to come again.
        few_shapes: as the engine's: where not alike, each side is padded to its side_class.
    """
    return largest if alike or not few_shapes else (side_class(largest[0]), side_class(largest[1]))


def side_class(side: int) -> int:
    """The least of the sides that batches are padded to that is not below: at most an eighth more."""
    step = max(1, (1 << (side - 1).bit_length()) // (2 * _CLASSES))
    return -(-side // step) * step


def companions(
    first: Size, others: Sequence[Size], most_pixels: int = MOST_PIXELS, *, few_shapes: bool = False
) -> list[int]:
    """Which of the others to run with the first: those of the most similar shapes, as long as little is padded.

    Args:
        few_shapes: as the engine's.

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
        size = padded_size((taller, wider), still, few_shapes)
        if (len(chosen) + 2) * size[0] * size[1] <= min(most_pixels, (1 + MOST_WASTE) * more):
            height, width, own, alike = taller, wider, more, still
            chosen.append(number)
    return chosen


@dataclass(frozen=True)
class Decoded:
    """An image that is ready to be computed, and what is asked of it.

    Attributes:
        outputs: of the graph, that the query needs.
        timings: of its decoding and its time in the queue.
    """

    pixels: Pixels
    query: Query
    outputs: Sequence[str]
    timings: Timings


class RaggedBatches:
    """One model's images worked on together: the scheduler's Together.

    Args:
        most_pixels: of one batch, padding included. A larger image is a batch by itself.
    """

    def __init__(self, engine: RaggedEngine, most_pixels: int = MOST_PIXELS) -> None:
        self.most_pixels, self._engine = most_pixels, engine

    def warm_up(self) -> None:
        """Run a few batches, with masks and without, so that no image waits for a kernel's compilation."""
        contract = self._engine.engine.contract
        for side, outputs in product(_WARM_UP_SIDES, (["logits"], ["features"], contract.outputs)):
            height, width = (max(side, least) for least in contract.smallest_size)
            for other in (height, height + 1):
                images = [np.zeros((rows, width, 3), np.uint8) for rows in (height, other)]
                self._engine.run(images, outputs)

    def choose(self, first: Job, others: Sequence[Job]) -> list[int]:
        """As `companions`."""
        few = self._engine.engine.few_shapes
        return companions(first.shape, [job.shape for job in others], self.most_pixels, few_shapes=few)

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
        answer.timings = replace(image.timings, compute=time.monotonic() - started)
        return answer


def ragged_engine(engine: Engine, batching: Batching) -> RaggedEngine | None:
    """What runs a model's images together, where they are to be; raises InvalidModel for "ragged" where they can't."""
    if batching == "one" or (batching == "auto" and not engine.accelerated):
        return None
    try:
        return RaggedEngine(engine)
    except InvalidModel as error:
        if batching == "auto":
            return None
        raise InvalidModel(f"{engine.path.name}: {error}") from error


def _own(name: str, found: NDArray[Any], size: NDArray[np.int64]) -> FloatArray:
    """An image's part of an output; copied, so that it does not keep its neighbours' alive."""
    return (found[:, : size[0], : size[1]] if name in MAPS else found).copy()
