"""The data plane under every transport: named models, images in, futures of answers out."""

import hashlib
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Final

from fullframe.defaults import MAX_PIXELS_IN_FLIGHT, TILE_PIXELS
from fullframe.engine.answer import answer_from, outputs_for
from fullframe.engine.base import Engine
from fullframe.engine.choice import Compute, EngineName, open_model, opener
from fullframe.engine.jobs import Batching, Budget, Counters, Job, Turn
from fullframe.engine.machine import available_cores, available_memory
from fullframe.engine.merge import Merging
from fullframe.engine.opening import Opening
from fullframe.engine.progress import OnShare, unheard
from fullframe.engine.query import Answer, Query, Timings
from fullframe.engine.ragged import MASKS_SHARE, MOST_PIXELS, Decoded, RaggedBatches, ragged_engine
from fullframe.engine.schedule import Scheduler
from fullframe.engine.tiles import Head, Tiler, memory_for_pieces
from fullframe.engine.warm_up import warm_up_alone
from fullframe.errors import InvalidInput, InvalidModel, NotFound, quoted
from fullframe.image import Limits, OnDisk, Picture, open_encoded, open_raw
from fullframe.model.contract import Contract
from fullframe.model.repository import Precision, find_models, version_order

_SHARE_OF_MEMORY: Final = 0.75  # that images may take, unless told

_making_tilers: Final = threading.Lock()
_DECODED_BYTES: Final = 6  # for each pixel, the decoder's own included
_ON_DEVICE: Final = 2  # batches at once: one is computed while the next one goes up and its launches are queued
_READY_BATCHES: Final = 2  # of which the images are decoded and wait
_STEP: Final = 0.1  # seconds that a huge image is worked on before others have their turn

# The header of such a file is read sooner than another thread could be told to; other formats have long ones.
_QUICK_BYTES: Final = 256 * 1024
_QUICK_SIGNATURES: Final = (b"\xff\xd8\xff", b"\x89PNG")


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image file."""

    data: bytes | OnDisk


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
    engine: Engine

    @property
    def contract(self) -> Contract:
        """The model's own metadata."""
        return self.engine.contract

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the model's file, which tells it from others of its name."""
        with self.engine.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def tiler(self) -> Tiler:
        """For huge images, made when the first one comes; raises InvalidInput where the model can't be tiled."""
        with _making_tilers:
            try:
                return self._tiler
            except InvalidModel as error:
                raise InvalidInput(
                    f"an image of this size must be computed in pieces, and this model can't do that: {error}", "images"
                ) from error

    @cached_property
    def _tiler(self) -> Tiler:
        return Tiler(self.engine)


class Plane:
    """Answers queries about images; safe to call from any thread.

    Args:
        models: what to serve; an empty name means the newest of those that are `default`.
        limits: what an image may be.
        workers: images worked on at once, batches counted as one; 0 for one on each core, and two more for batches on
            a device.
        max_pixels_in_flight: pixels queued and computed together; what would be more is refused.
        memory_budget: bytes that images may take at once, by an estimate; what would be more is refused. 0: three
            quarters of the machine's or the container's, or of what is free on the device, if that is less.
        tile_pixels: a larger image is computed in pieces, and so is one that takes more than the memory budget; it
            counts for so many pixels in flight.
        batching: whether smaller ones are computed one by one or together; see jobs.Batching.

    Raises:
        InvalidModel: they are to be computed together, and a model's can't be.
    """

    def __init__(
        self,
        models: Sequence[Served],
        *,
        limits: Limits,
        workers: int = 0,
        max_pixels_in_flight: int = MAX_PIXELS_IN_FLIGHT,
        memory_budget: int = 0,
        tile_pixels: int = TILE_PIXELS,
        batching: Batching = "auto",
    ) -> None:
        self.limits, self._tile_pixels = limits, tile_pixels
        self._models = list(models)
        least = min((model.engine.available_memory() for model in models), default=available_memory())
        memory = memory_budget or round(_SHARE_OF_MEMORY * least)
        budget = Budget(max_pixels_in_flight, memory)
        accelerated = any(model.engine.accelerated for model in models)
        workers = workers or available_cores() + (_ON_DEVICE if accelerated else 0)
        # On a CPU each worker computes; on a device a few do, so that the others decode meanwhile.
        batches = min(_ON_DEVICE, max(1, workers - 1)) if accelerated else workers
        # They take half of the memory, so that other images find room.
        self._together = dict(_batches(models, batching, budget.memory // 2, batches))
        most_pixels = max((each.most_pixels for each in self._together.values()), default=0)
        ready = _READY_BATCHES * _DECODED_BYTES * most_pixels
        self._memory_budget = budget.memory
        self._scheduler = Scheduler(workers, budget, batches=batches, ready=ready)
        self._opening = Opening()

    def models(self) -> list[Served]:
        """Every model and version, in the order given at the start."""
        return list(self._models)

    def model(self, name: str = "", version: str = "", digest: str = "") -> Served:
        """The model to ask; no name: the default, no version: the newest, no digest: whatever its file.

        Raises NotFound naming what there is.
        """
        model = self._named(name, version)
        if digest not in ("", model.digest):
            raise NotFound(
                f"model {model.name!r} version {model.version} is of another file here, of SHA-256 "
                f"{model.digest[:12]}..., not {quoted(digest)}"
            )
        return model

    def _named(self, name: str, version: str) -> Served:
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

    def open(self, source: EncodedImage | RawImage, limits: Limits | None = None) -> Picture | Future[Picture]:
        """Read an image's header: at once where that is quick, or on another thread.

        Args:
            limits: in place of the plane's own.

        Raises, now or from the future:
            InvalidInput: this is no image or is beyond the limits.
            Overloaded: too many wait for such a thread.
        """
        limits = limits or self.limits
        if isinstance(source, RawImage):
            return open_raw(source.data, source.height, source.width, limits)
        data = source.data
        if isinstance(data, bytes) and len(data) <= _QUICK_BYTES and data.startswith(_QUICK_SIGNATURES):
            return open_encoded(data, limits)
        return self._opening.submit(data, limits)

    def submit(
        self,
        model: Served,
        pictures: Sequence[Picture],
        query: Query,
        deadline: float | None = None,
        on_progress: OnShare = unheard,
    ) -> list[Future[Answer]]:
        """Queue every picture or none; each fails or succeeds on its own.

        Args, raises: as Scheduler.submit, and InvalidInput for a map that the model doesn't have; `on_progress` hears
        of images computed in pieces. The futures may also raise InvalidInput, for a damaged or too small image.
        """
        outputs = outputs_for(query, model.contract)
        jobs = [self._job(model, picture, query, outputs, on_progress) for picture in pictures]
        return self._scheduler.submit(jobs, deadline)

    def _job(self, model: Served, picture: Picture, query: Query, outputs: Sequence[str], on_progress: OnShare) -> Job:
        pixels = picture.height * picture.width
        memory = round(pixels * _DECODED_BYTES + model.engine.bytes_for(picture.height, picture.width))
        huge = pixels > self._tile_pixels
        if huge or memory > self._memory_budget:
            in_pieces = memory_for_pieces(model.engine, picture)
            if huge or memory > in_pieces:
                pieces = partial(_answer_in_pieces, model, picture, query, on_progress)
                return Job(min(pixels, self._tile_pixels), pieces, in_steps=True, memory=in_pieces)
        large = pixels >= model.engine.large_pixels
        together = self._together.get(model)
        if together is not None and not large and pixels <= together.most_pixels:
            return Job(
                pixels,
                partial(_decode, model, picture, query, outputs),
                memory=round(together.most_pixels * _batch_bytes(model)),  # of all that it may go with
                together=together,
                shape=(picture.height, picture.width),
                held=_DECODED_BYTES * pixels,
            )
        return Job(pixels, partial(_answer, model, picture, query, outputs), wide=large, memory=memory)

    def warm_up(self) -> None:
        """Do what the first image would otherwise wait for: read the models' graphs for their memory, run them."""
        for model in self._models:
            _ = model.engine.bytes_for(1, 1), model.engine.carried_bytes
            if model.engine.accelerated:
                together = self._together.get(model)
                together.warm_up() if together is not None else warm_up_alone(model.engine)

    def counters(self) -> Counters:
        """What became of every image submitted, and how many are on their way to be."""
        counters, (opening, refused) = self._scheduler.counters(), self._opening.counts()
        return replace(counters, opening=opening, refused=counters.refused + refused)

    def healthy(self) -> bool:
        """Whether images can be worked on."""
        return self._scheduler.healthy() and not any(model.engine.lost for model in self._models)

    def drain(self, grace: float) -> bool:
        """Refuse new images and wait up to `grace` seconds for those in flight; returns whether all are done."""
        return self._scheduler.drain(grace)

    def close(self) -> None:
        """Cancel what is queued, finish what runs, end all threads."""
        self._opening.close()
        self._scheduler.close()


def open_plane(
    specs: Sequence[str] = (),
    *,
    limits: Limits | None = None,
    workers: int = 0,
    max_pixels_in_flight: int = MAX_PIXELS_IN_FLIGHT,
    memory_budget: int = 0,
    tile_pixels: int = TILE_PIXELS,
    precision: Precision = "float32",
    batching: Batching = "auto",
    engine: EngineName = "auto",
    compute: Compute = "float32",
) -> Plane:
    """Load the models that `specs` and `precision` choose (model.repository.find_models) into what `engine` and
    `compute` choose (engine.choice.opener) and start the workers."""
    open_engine = opener(engine, compute)
    files = find_models(specs, precision)
    models = [Served(f.name, f.version, f.name == files[0].name, open_model(f, open_engine)) for f in files]
    for model in models:
        _ = model.digest  # while the file is still what was loaded
    return Plane(
        models,
        limits=limits or Limits(),
        workers=workers,
        max_pixels_in_flight=max_pixels_in_flight,
        memory_budget=memory_budget,
        tile_pixels=tile_pixels,
        batching=batching,
    )


def _batches(
    models: Sequence[Served], batching: Batching, memory: int, count: int
) -> Iterator[tuple[Served, RaggedBatches]]:
    """Those models whose images are computed together, in batches of which `count`, and the images decoded for the
    next ones, take so many bytes at most."""
    for model in models:
        if (engine := ragged_engine(model.engine, batching, f"{model.name} {model.version}")) is not None:
            bytes_per_pixel = count * _batch_bytes(model) + _READY_BATCHES * _DECODED_BYTES
            yield model, RaggedBatches(engine, min(MOST_PIXELS, int(memory / bytes_per_pixel)))


def _batch_bytes(model: Served) -> float:
    """For each pixel of a batch, padding included."""
    return _DECODED_BYTES + MASKS_SHARE * model.engine.bytes_per_pixel


def _decode(model: Served, picture: Picture, query: Query, outputs: Sequence[str], turn: Turn) -> Decoded:
    """One image's part of a batch, on a worker's thread."""
    model.engine.check_size(picture.height, picture.width)
    started = time.monotonic()
    pixels = picture.pixels()
    return Decoded(pixels, query, outputs, Timings(time.monotonic() - started, turn.queued))


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


def _answer_in_pieces(
    model: Served, picture: Picture, query: Query, on_progress: OnShare, turn: Turn
) -> Generator[None, Turn, Answer]:
    """The same for an image that is never held whole, in steps."""
    model.engine.check_size(picture.height, picture.width)
    worked = decoded = 0.0
    cells = 0
    started = time.monotonic()
    # Before the file is opened: some are decoded whole then.
    tiler = model.tiler
    rows, columns = tiler.map_size(picture.height, picture.width)
    merging = Merging(query, model.contract, (rows, columns), _head(tiler, query))

    def is_alone() -> bool:
        return turn.alone

    with picture.regions() as regions:
        for piece in tiler.pieces(regions, merging.outputs, is_alone):
            merging.add(piece)
            decoded += piece.read_seconds
            cells += piece.cells
            on_progress(cells / (rows * columns))
            if (spent := time.monotonic() - started) > _STEP:
                worked += spent
                turn = yield
                started = time.monotonic()
    answer = merging.answer(picture.height, picture.width)
    worked += time.monotonic() - started
    answer.timings = Timings(decoded, turn.queued, worked - decoded)
    return answer


def _head(tiler: Tiler, query: Query) -> Head | None:
    """What finishes the logits, if any are asked for and they are not the class map's mean."""
    try:
        return tiler.head if query.wants_logits else None
    except InvalidModel as error:
        raise InvalidInput(
            f"an image of this size must be computed in pieces, and this model's logits can't be, as {error}: "
            "ask for embeddings and no classes",
            "top_k",
        ) from error
