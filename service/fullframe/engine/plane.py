"""The data plane under every transport: named models, images in, futures of answers out."""

import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Final

from fullframe.engine.answer import answer_from, outputs_for
from fullframe.engine.merge import Merging
from fullframe.engine.ort import OrtEngine, available_cores
from fullframe.engine.query import Answer, Query, Timings
from fullframe.engine.schedule import Counters, Job, Scheduler, Turn
from fullframe.engine.tiles import Tiler
from fullframe.errors import InvalidInput, InvalidModel, NotFound, quoted
from fullframe.image import Limits, Picture, open_encoded, open_raw
from fullframe.model.contract import Contract
from fullframe.model.repository import Precision, find_models, version_order

DEFAULT_PIXELS_IN_FLIGHT: Final = 256_000_000
DEFAULT_TILE_PIXELS: Final = 4_000_000

_making_tilers: Final = threading.Lock()
_STEP: Final = 0.1  # seconds that a huge image is worked on before others have their turn

# The header of such a file is read sooner than another thread could be told to; other formats have long ones.
_QUICK_BYTES: Final = 256 * 1024
_QUICK_SIGNATURES: Final = (b"\xff\xd8\xff", b"\x89PNG")


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image file's bytes."""

    data: bytes


@dataclass(frozen=True, slots=True)
class RawImage:
    """uint8 RGB pixels, row-major [height, width, 3]."""

    data: bytes
    height: int
    width: int


@dataclass(frozen=True)
class Served:
    """A model that is loaded and can be asked."""

    name: str
    version: str
    default: bool
    engine: OrtEngine

    @property
    def contract(self) -> Contract:
        """The model's own metadata."""
        return self.engine.contract

    @property
    def tiler(self) -> Tiler:
        """For huge images, made when the first one comes; raises InvalidInput where the model can't be tiled."""
        with _making_tilers:
            try:
                return self._tiler
            except InvalidModel as error:
                raise InvalidInput(
                    f"an image of this size must be computed in pieces, and this model {error}", "images"
                ) from error

    @cached_property
    def _tiler(self) -> Tiler:
        return Tiler(self.engine)


class Plane:
    """Answers queries about images; safe to call from any thread.

    Args:
        models: what to serve; an empty name means the newest of those that are `default`.
        limits: what an image may be.
        workers: images worked on at once; 0 for one on each core.
        max_pixels_in_flight: see Scheduler.
        tile_pixels: a larger image is computed in pieces; it counts for so many pixels in flight.
    """

    def __init__(
        self,
        models: Sequence[Served],
        *,
        limits: Limits,
        workers: int = 0,
        max_pixels_in_flight: int = DEFAULT_PIXELS_IN_FLIGHT,
        tile_pixels: int = DEFAULT_TILE_PIXELS,
    ) -> None:
        self.limits, self._tile_pixels = limits, tile_pixels
        self._models = list(models)
        self._scheduler = Scheduler(workers or available_cores(), max_pixels_in_flight)
        # Headers are read beside the queue, since admission needs their sizes.
        self._openers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="fullframe-open")

    def models(self) -> list[Served]:
        """Every model and version, in the order given at the start."""
        return list(self._models)

    def model(self, name: str = "", version: str = "") -> Served:
        """The model to ask; no name: the default, no version: the newest. Raises NotFound naming what there is."""
        named = [m for m in self._models if (m.name == name if name else m.default)]
        if not named:
            names = ", ".join(sorted({m.name for m in self._models}))
            raise NotFound(f"no model is named {quoted(name)}; served here: {names}")
        if not version:
            return max(named, key=lambda m: version_order(m.version))
        for model in named:
            if model.version == version:
                return model
        versions = ", ".join(m.version for m in named)
        raise NotFound(f"model {named[0].name!r} has no version {quoted(version)}; served here: {versions}")

    def open(self, source: EncodedImage | RawImage) -> Picture | Future[Picture]:
        """Read an image's header: at once where that is quick, or on another thread.

        Raises, now or from the future:
            InvalidInput: this is no image or is beyond the limits.
        """
        if isinstance(source, RawImage):
            return open_raw(source.data, source.height, source.width, self.limits)
        if len(source.data) <= _QUICK_BYTES and source.data.startswith(_QUICK_SIGNATURES):
            return open_encoded(source.data, self.limits)
        return self._openers.submit(open_encoded, source.data, self.limits)

    def submit(
        self, model: Served, pictures: Sequence[Picture], query: Query, deadline: float | None = None
    ) -> list[Future[Answer]]:
        """Queue every picture or none; each fails or succeeds on its own.

        Args, raises: as Scheduler.submit, and InvalidInput for a map that the model doesn't have. The futures may also
        raise InvalidInput, for a damaged or too small image.
        """
        outputs = outputs_for(query, model.contract)
        jobs = [self._job(model, picture, query, outputs) for picture in pictures]
        return self._scheduler.submit(jobs, deadline)

    def _job(self, model: Served, picture: Picture, query: Query, outputs: Sequence[str]) -> Job:
        pixels = picture.height * picture.width
        if pixels > self._tile_pixels:
            return Job(self._tile_pixels, partial(_answer_in_pieces, model, picture, query), in_steps=True)
        return Job(pixels, partial(_answer, model, picture, query, outputs))

    def counters(self) -> Counters:
        """What became of every image submitted."""
        return self._scheduler.counters()

    def healthy(self) -> bool:
        """Whether images can be worked on."""
        return self._scheduler.healthy()

    def drain(self, grace: float) -> bool:
        """Refuse new images and wait up to `grace` seconds for those in flight; returns whether all are done."""
        return self._scheduler.drain(grace)

    def close(self) -> None:
        """Cancel what is queued, finish what runs, end all threads."""
        self._openers.shutdown(cancel_futures=True)
        self._scheduler.close()


def open_plane(
    specs: Sequence[str] = (),
    *,
    limits: Limits | None = None,
    workers: int = 0,
    max_pixels_in_flight: int = DEFAULT_PIXELS_IN_FLIGHT,
    tile_pixels: int = DEFAULT_TILE_PIXELS,
    precision: Precision = "float32",
) -> Plane:
    """Load the models that `specs` and `precision` choose (model.repository.find_models) and start the workers."""
    files = find_models(specs, precision)
    models = [Served(f.name, f.version, f.name == files[0].name, OrtEngine(f.path)) for f in files]
    return Plane(
        models,
        limits=limits or Limits(),
        workers=workers,
        max_pixels_in_flight=max_pixels_in_flight,
        tile_pixels=tile_pixels,
    )


def _answer(model: Served, picture: Picture, query: Query, outputs: Sequence[str], turn: Turn) -> Answer:
    """One image from header to answer, on a worker's thread."""
    model.engine.check_size(picture.height, picture.width)  # before paying for the decode
    started = time.monotonic()
    pixels = picture.pixels()
    decoded = time.monotonic()
    results = model.engine.run(pixels, outputs, alone=turn.alone)
    answer = answer_from(results, query, model.contract, picture.height, picture.width)
    answer.timings = Timings(decoded - started, turn.queued, time.monotonic() - decoded)
    return answer


def _answer_in_pieces(model: Served, picture: Picture, query: Query, turn: Turn) -> Generator[None, Turn, Answer]:
    """The same for an image that is never held whole, in steps."""
    model.engine.check_size(picture.height, picture.width)
    worked = decoded = 0.0
    started = time.monotonic()
    # Before the file is opened: some are decoded whole then.
    tiler = model.tiler
    merging = Merging(query, model.contract, tiler.map_size(picture.height, picture.width))
    with picture.regions() as regions:
        for piece in tiler.pieces(regions, merging.outputs):
            merging.add(piece)
            decoded += piece.read_seconds
            if (spent := time.monotonic() - started) > _STEP:
                worked += spent
                turn = yield
                started = time.monotonic()
    answer = merging.answer(picture.height, picture.width)
    worked += time.monotonic() - started
    answer.timings = Timings(decoded, turn.queued, worked - decoded)
    return answer
