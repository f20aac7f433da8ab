"""Images in pieces: every cell once, the whole image's numbers, whatever the pieces; memory and work for a piece."""

import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from copy import copy
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullframe.engine import plane as planes
from fullframe.engine.maps import MAX_MAP_BYTES
from fullframe.engine.ort import OrtEngine, OrtSession
from fullframe.engine.plane import Plane, RawImage, Served, open_plane
from fullframe.engine.pooling import KINDS, Pooling
from fullframe.engine.query import Answer, FloatArray, Query
from fullframe.engine.tiles import Tiler
from fullframe.errors import DeadlinePassed, InvalidInput
from fullframe.image import Picture, Pixels, Regions
from fullframe.image.regions import HeldRegions
from fullframe.model.repository import BUNDLED
from tests.models import Head, write_model
from tests.pictures import pixels

MAPS = ("feature_map", "class_map")
PROMISE = 1e-4


def regions_of(picture: Pixels, random_access: bool = True) -> Regions:
    regions = HeldRegions(picture)
    regions.random_access = random_access
    return regions


def put_together(tiler: Tiler, regions: Regions, wanted: dict[str, FloatArray]) -> dict[str, FloatArray]:
    """The maps that the pieces make, each cell of which must come once."""
    found = {name: np.full_like(each, np.nan) for name, each in wanted.items()}
    for piece in tiler.pieces(regions, MAPS):
        for name, part in piece.maps.items():
            place = found[name][:, piece.top : piece.top + part.shape[1], piece.left : piece.left + part.shape[2]]
            assert place.shape == part.shape and np.isnan(place).all()
            place[:] = part
    return found


def difference(wanted: FloatArray, found: FloatArray) -> float:
    """As the promise counts it."""
    return float(np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max()))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> OrtEngine:
    """Convolutions and a pool, one after the other."""
    return OrtEngine(write_model(tmp_path_factory.mktemp("models") / "chain.onnx", channels=4, depth=4))


@pytest.fixture(scope="module")
def bundled() -> OrtEngine:
    """Several levels, residual sums, average pools that leave padding out."""
    return OrtEngine(BUNDLED)


@pytest.fixture(scope="module")
def chain_tiler(chain: OrtEngine) -> Tiler:
    return Tiler(chain)


@pytest.fixture(scope="module")
def bundled_tiler(bundled: OrtEngine) -> Tiler:
    return Tiler(bundled)


def cut_otherwise(tiler: Tiler, piece_pixels: int, band_width: int) -> Tiler:
    """The same graphs, other pieces."""
    other = copy(tiler)
    other._piece_pixels, other._band_width = piece_pixels, band_width
    return other


SIZES = st.tuples(st.integers(1, 300), st.integers(1, 300))


@settings(max_examples=150, deadline=None)
@given(SIZES, st.integers(1, 40_000), st.integers(30, 400), st.booleans())
def test_pieces_of_a_chain_are_the_whole_bit_for_bit(
    chain: OrtEngine, chain_tiler: Tiler, size: tuple[int, int], piece_pixels: int, band_width: int, random_access: bool
) -> None:
    picture = pixels(*size)
    wanted = chain.run(picture, MAPS)
    tiler = cut_otherwise(chain_tiler, piece_pixels, band_width)
    found = put_together(tiler, regions_of(picture, random_access), wanted)
    for name in MAPS:
        np.testing.assert_array_equal(found[name], wanted[name])


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.integers(1, 500), st.integers(1, 500)),
    st.integers(9_000, 90_000),
    st.integers(400, 700),
    st.booleans(),
)
def test_pieces_of_the_bundled_model_keep_the_promise(
    bundled: OrtEngine,
    bundled_tiler: Tiler,
    size: tuple[int, int],
    piece_pixels: int,
    band_width: int,
    random_access: bool,
) -> None:
    picture = pixels(*size)
    wanted = bundled.run(picture, MAPS)
    tiler = cut_otherwise(bundled_tiler, piece_pixels, band_width)
    found = put_together(tiler, regions_of(picture, random_access), wanted)
    for name in MAPS:
        # ONNX Runtime's optimiser alone moves this model's maps by up to 1.3e-5.
        assert difference(wanted[name], found[name]) <= PROMISE / 2


@pytest.mark.parametrize("alone", [True, False])
def test_a_huge_image_alone_is_computed_on_all_cores(
    chain: OrtEngine, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    monkeypatch.setattr("fullframe.engine.ort.available_cores", lambda: 3)
    opened: list[int] = []
    on = OrtSession.on

    def noted(session: OrtSession, threads: int) -> ort.InferenceSession:
        opened.append(threads)
        return on(session, threads)

    monkeypatch.setattr(OrtSession, "on", noted)
    tiler = Tiler(chain, piece_pixels=4000)
    pieces = list(tiler.pieces(regions_of(pixels(300, 100)), MAPS, lambda: alone))
    assert opened == [3 if alone else 1] * len(pieces) and len(pieces) > 2


def test_without_what_is_carried_the_whole_is_not_met(chain: OrtEngine) -> None:
    """The control: strips that see nothing of the one before."""
    picture = pixels(200, 60)
    wanted = chain.run(picture, MAPS)
    tiler = Tiler(chain, piece_pixels=60 * 40)
    tops = tiler.rows(200, 60)
    parts = [chain.run(picture[top:bottom], MAPS) for top, bottom in pairwise(tops)]
    found = np.concatenate([part["feature_map"] for part in parts], axis=1)
    assert found.shape == wanted["feature_map"].shape
    assert difference(wanted["feature_map"], found) > PROMISE


# -- answers


def raw(picture: Pixels) -> RawImage:
    return RawImage(picture.tobytes(), *picture.shape[:2])


def ask(plane: Plane, picture: Pixels, query: Query) -> Answer:
    opened = plane.open(raw(picture))
    assert not isinstance(opened, Future)
    return plane.submit(plane.model(), [opened], query)[0].result()


@pytest.fixture(params=["chain", "bundled"])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Plane, Plane]:
    """A model that sees images whole, and one that sees those from 500 pixels on in small pieces."""
    engine: OrtEngine = request.getfixturevalue(request.param)
    monkeypatch.setattr(planes, "Tiler", lambda it: Tiler(it, piece_pixels=20_000, band_width=400))
    opened = []
    for tile_pixels in (10**9, 500):
        made = open_plane([str(engine.path)], workers=2, tile_pixels=tile_pixels)
        request.addfinalizer(made.close)
        opened.append(made)
    return opened[0], opened[1]


@pytest.mark.parametrize("size", [(20, 24), (21, 25), (1, 900), (900, 1), (350, 420)])
def test_answers_from_pieces_are_the_answers(pair: tuple[Plane, Plane], size: tuple[int, int]) -> None:
    picture = pixels(*size)
    poolings = [Pooling.parse(kind, l2_normalize=norm) for kind in (*KINDS, "avg+max@1,2,3") for norm in (False, True)]
    query = Query(7, tuple(poolings), logits=True, feature_map=True, class_map=True)
    whole, pieces = (ask(plane, picture, query) for plane in pair)
    assert (pieces.height, pieces.width) == size
    arrays = [
        *zip(map(str, poolings), whole.embeddings, pieces.embeddings, strict=True),
        ("logits", whole.logits, pieces.logits),
        ("feature_map", whole.feature_map, pieces.feature_map),
        ("class_map", whole.class_map, pieces.class_map),
    ]
    for name, wanted, found in arrays:
        assert wanted is not None and found is not None
        assert wanted.shape == found.shape
        assert difference(wanted, found) <= PROMISE, name
    for theirs, ours in zip(whole.classes, pieces.classes, strict=True):
        assert ours.probability == pytest.approx(theirs.probability, abs=PROMISE)
    assert pieces.timings.compute > 0


def test_max_from_pieces_of_a_chain_has_the_same_bits(chain: OrtEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "Tiler", lambda it: Tiler(it, piece_pixels=3000, band_width=100))
    query = Query(0, (Pooling.parse("max+min@1,2,4"),))
    vectors = []
    for tile_pixels in (10**9, 500):
        plane = open_plane([str(chain.path)], tile_pixels=tile_pixels)
        vectors.append(ask(plane, pixels(301, 277), query).embeddings[0])
        plane.close()
    whole, pieces = vectors
    np.testing.assert_array_equal(pieces, whole)


def test_a_map_too_large_to_return_is_refused_with_its_size(chain: OrtEngine) -> None:
    plane = open_plane([str(chain.path)], tile_pixels=500)
    huge = Huge(40_000, 40_000)
    with pytest.raises(
        InvalidInput, match=rf"feature_map of this image is \[4, 10000, 10000\].*{MAX_MAP_BYTES}.*max_map_side"
    ):
        plane.submit(plane.model(), [huge], Query(0, feature_map=True))[0].result()
    assert not huge.reads
    plane.close()


class Huge(Picture):
    """A picture of any size that costs nothing to read, and says how far it was."""

    def __init__(self, height: int, width: int, on_read: Callable[[], None] = lambda: None) -> None:
        self.height, self.width, self.format = height, width, "raw"
        self.random_access, self.opening_bytes = True, 0
        self.reads, self.closed, self._on_read = 0, False, on_read

    def pixels(self) -> Pixels:
        raise AssertionError("it is never held whole")

    def regions(self, checkpoint: Callable[[], object] = lambda: None) -> Regions:
        return _HugeRegions(self)

    def reading_bytes(self, rows: int) -> int:
        return 0

    def read(self, height: int, width: int) -> Pixels:
        self.reads += 1
        self._on_read()
        return np.zeros((height, width, 3), np.uint8)


class _HugeRegions(Regions):
    def __init__(self, picture: Huge) -> None:
        super().__init__(picture.height, picture.width)
        self._picture = picture

    def _read(self, area: tuple[int, int, int, int]) -> Pixels:
        return self._picture.read(*area[2:])

    def close(self) -> None:
        self._picture.closed = True


def test_a_huge_image_can_be_cancelled_and_its_deadline_passes_between_pieces(chain: OrtEngine) -> None:
    plane = open_plane([str(chain.path)], workers=1)
    huge = Huge(100_000, 100_000)
    [future] = plane.submit(plane.model(), [huge], Query())
    while huge.reads < 3:
        time.sleep(0.01)
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result()
    late = Huge(100_000, 100_000)
    with pytest.raises(DeadlinePassed, match="worked on"):
        plane.submit(plane.model(), [late], Query(), deadline=time.monotonic() + 0.3)[0].result()
    plane.close()
    assert huge.closed and late.closed
    counters = plane.counters()
    assert (counters.created, counters.cancelled, counters.expired) == (2, 1, 1)
    assert (counters.queued, counters.running, counters.pixels_in_flight) == (0, 0, 0)


def test_small_images_have_their_turn_while_a_huge_one_is_worked_on(chain: OrtEngine) -> None:
    """With one worker, so that without steps they would wait to its end."""
    plane = open_plane([str(chain.path)], workers=1)
    huge = Huge(100_000, 100_000)
    [future] = plane.submit(plane.model(), [huge], Query())
    while not huge.reads:
        time.sleep(0.01)
    for _ in range(3):
        assert ask(plane, pixels(30, 30), Query()).classes
    assert not future.done()
    future.cancel()
    plane.close()
    assert huge.closed


def test_a_failure_half_way_is_told_and_lets_go_of_the_picture(chain: OrtEngine) -> None:
    def fail() -> None:
        if huge.reads > 4:
            raise InvalidInput("it ends after row 17")

    plane = open_plane([str(chain.path)], workers=1)
    huge = Huge(9000, 9000, fail)
    with pytest.raises(InvalidInput, match="row 17"):
        plane.submit(plane.model(), [huge], Query())[0].result()
    plane.close()
    assert huge.closed
    assert plane.counters().failed == 1


def test_a_model_that_cannot_be_tiled_says_why(tmp_path: Path) -> None:
    path = write_model(tmp_path / "shaped.onnx", breaks_above=10**6)
    plane = open_plane([str(path)], tile_pixels=500)
    assert ask(plane, pixels(20, 20), Query()).classes
    with pytest.raises(
        InvalidInput, match="must be computed in pieces, and this model can't do that: Shape 'height' takes"
    ):
        ask(plane, pixels(40, 40), Query())
    plane.close()
    assert isinstance(plane.model(), Served)


@pytest.mark.parametrize("head", ["layers", "windows"])
def test_a_head_that_is_not_linear_finishes_merged_features(tmp_path: Path, head: Head) -> None:
    path = write_model(tmp_path / "m.onnx", depth=2, head=head)
    picture, answers = pixels(90, 120), []
    for tile_pixels in (10**9, 500):
        plane = open_plane([str(path)], tile_pixels=tile_pixels)
        answers.append(ask(plane, picture, Query(7, (Pooling(),), logits=True)))
        plane.close()
    whole, pieces = answers
    assert whole.logits is not None and pieces.logits is not None
    assert difference(whole.logits, pieces.logits) <= PROMISE / 10
    assert [score.label for score in pieces.classes] == [score.label for score in whole.classes]


def test_a_head_that_sees_more_than_the_features_refuses_logits_and_nothing_else(tmp_path: Path) -> None:
    plane = open_plane([str(write_model(tmp_path / "m.onnx", head="peeks"))], tile_pixels=500)
    with pytest.raises(InvalidInput, match=r"logits can't be, as its 'logits' are computed from more.*and no classes$"):
        ask(plane, pixels(90, 120), Query())
    assert len(ask(plane, pixels(90, 120), Query(0, (Pooling(),))).embeddings[0]) == 16
    with pytest.raises(InvalidInput, match="has no class map"):
        ask(plane, pixels(90, 120), Query(0, class_map=True))
    plane.close()
