"""Random images, models and cuts: what comes of pieces is what comes of the whole, whatever is asked."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from fullframe.engine.answer import answer_from, outputs_for
from fullframe.engine.merge import Merging
from fullframe.engine.ort import OrtEngine
from fullframe.engine.pooling import KINDS, Pooling
from fullframe.engine.query import Answer, FloatArray, Query
from fullframe.engine.tiles import Band, Tiler
from fullframe.image import Pixels
from fullframe.image.regions import HeldRegions
from fullframe.learn.export import write_model as export
from fullframe.model.repository import BUNDLED, int8_copy
from fullframe.model.strips import Place
from tests.learn.test_export import RECIPE, graph, network
from tests.models import write_model
from tests.pictures import pixels

PROMISE: Final = 1e-4
LARGEST: Final = 420  # pixels on a side
QUICK: Final = ("shallow", "deep", "head", "bundled", "int8")
"""The other models are written first, by torch, which takes longer than all cases."""
ROUNDED: Final = ("bundled", "residual")
"""Their residual sums ONNX Runtime computes within convolutions where the graph is whole, and not in strips: the last
bits of their maps differ between the two, and so between one strip and several."""
CUTS: Final = ((20_000, 10**6), (45_000, 10**6), (30_000, 200), (40_000, 150), (100_000, 10**6))
"""Pixels of a piece, and those by which a band is wider than the receptive field."""


def _exported(path: Path, **options: int | str) -> Path:
    """A network as `fullframe export` writes it."""
    net = network(**options)  # type: ignore[arg-type]
    export(graph(net), net, RECIPE, path)
    return path


MODELS: Final[dict[str, Callable[[Path], Path]]] = {
    "shallow": lambda path: write_model(path, channels=4, depth=1, seed=1),
    "deep": lambda path: write_model(path, channels=8, depth=6, seed=2),
    "head": lambda path: write_model(path, channels=4, depth=2, seed=3, head="windows"),
    "bundled": lambda path: BUNDLED,
    "int8": lambda path: int8_copy(BUNDLED),
    "inception": _exported,
    "inception, gem": lambda path: _exported(path, global_pooling="gem", block_pooling="avg"),
    "residual": lambda path: _exported(path, levels=2),
}


@pytest.fixture(scope="module")
def tilers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[OrtEngine, Tiler]]:
    folder = tmp_path_factory.mktemp("models")

    @cache
    def make(name: str) -> tuple[OrtEngine, Tiler]:
        engine = OrtEngine(MODELS[name](folder / f"{name}.onnx"))
        return engine, Tiler(engine)

    return make


class Case:
    """One image, one model, one way to cut it, one query, all from a seed."""

    def __init__(self, seed: int, models: Sequence[str]) -> None:
        draw = np.random.default_rng(seed)
        self.seed, self.model = seed, models[seed % len(models)]
        # Now and then a side of a few pixels.
        height, width = (int(draw.integers(1, LARGEST if draw.random() < 0.9 else 9)) for _ in range(2))
        self.picture: Pixels = pixels(height, width, seed)
        self.piece_pixels, self.band_width = int(draw.integers(1, 90_000)), int(draw.integers(1, 2 * LARGEST))
        self.random_access, self.crowded = bool(draw.integers(2)), bool(draw.integers(2))
        levels = ("", "@2", "@1,2,3", "@5")
        self.poolings = tuple(
            Pooling.parse(kind + str(draw.choice(levels)), l2_normalize=bool(draw.integers(2))) for kind in KINDS
        )
        self.max_map_side = int(draw.choice([0, 1, 2, 3, 7, 50]))

    def query(self, engine: OrtEngine) -> Query:
        has_map = engine.contract.has_class_map
        return Query(5, self.poolings, True, feature_map=True, class_map=has_map, max_map_side=self.max_map_side)

    def tiler(self, tiler: Tiler) -> Tiler:
        """The same graphs, this case's pieces."""
        cut = copy(tiler)
        cut._piece_pixels, cut._band_width = self.piece_pixels, self.band_width
        return cut

    def __repr__(self) -> str:
        height, width, _ = self.picture.shape
        return f"Case({self.seed}): {self.model} on {width}x{height}, maps of {self.max_map_side}"


def whole(case: Case, engine: OrtEngine) -> Answer:
    query = case.query(engine)
    outputs = engine.run(case.picture, outputs_for(query, engine.contract))
    return answer_from(outputs, query, engine.contract, *case.picture.shape[:2])


def in_pieces(case: Case, engine: OrtEngine, tiler: Tiler) -> Answer:
    regions = HeldRegions(case.picture)
    regions.random_access = case.random_access
    tiler = case.tiler(tiler)
    height, width, _ = case.picture.shape
    merging = Merging(case.query(engine), engine.contract, tiler.map_size(height, width), tiler.head)
    for piece in tiler.pieces(regions, merging.outputs, lambda: not case.crowded):
        merging.add(piece)
    return merging.answer(height, width)


def arrays(answer: Answer) -> dict[str, FloatArray]:
    """All numbers of an answer, by what they are."""
    found = {f"embedding {number}": each for number, each in enumerate(answer.embeddings)}
    maps = {"logits": answer.logits, "feature_map": answer.feature_map, "class_map": answer.class_map}
    return found | {name: each for name, each in maps.items() if each is not None}


def difference(expected: Answer, found: Answer) -> tuple[float, str]:
    """The largest, as the promise counts it, and of what."""
    ours, theirs = arrays(expected), arrays(found)
    assert {name: each.shape for name, each in ours.items()} == {name: each.shape for name, each in theirs.items()}
    probabilities = ({score.index: score.probability for score in answer.classes} for answer in (expected, found))
    return max(
        (difference_of_classes(*probabilities), "probabilities"),
        *(
            (float(np.abs(wanted - theirs[name]).max() / max(1.0, np.abs(wanted).max())), name)
            for name, wanted in ours.items()
        ),
    )


def difference_of_classes(expected: dict[int, float], found: dict[int, float]) -> float:
    """Of classes that both have: equal ones may change places."""
    return max(abs(expected[index] - found[index]) for index in expected.keys() & found.keys())


def check(case: Case, engine: OrtEngine, tiler: Tiler) -> None:
    expected, found = whole(case, engine), in_pieces(case, engine, tiler)
    worst, of = difference(expected, found)
    assert worst <= PROMISE, (case, worst, of)
    if found.class_map is not None:
        assert found.logits is not None
        np.testing.assert_allclose(found.class_map.mean(axis=(1, 2)), found.logits, atol=1e-4, err_msg=str(case))
    if case.model in ROUNDED:
        return
    for pooling, wanted, vector in zip(case.poolings, expected.embeddings, found.embeddings, strict=True):
        if pooling.terms[0].kind in ("max", "min"):
            np.testing.assert_array_equal(vector, wanted, err_msg=f"{case}, {pooling}")


def test_random_cases_agree(tilers: Callable[[str], tuple[OrtEngine, Tiler]]) -> None:
    for seed in range(60):
        case = Case(seed, QUICK)
        check(case, *tilers(case.model))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_five_hundred_random_cases_agree(tilers: Callable[[str], tuple[OrtEngine, Tiler]]) -> None:
    for seed in range(500):
        case = Case(seed, list(MODELS))
        check(case, *tilers(case.model))


def answers(case: Case, engine: OrtEngine, tiler: Tiler) -> Iterator[Answer]:
    """Of all cuts, in each of which bands have several strips."""
    height, width, _ = case.picture.shape
    for case.piece_pixels, beyond in CUTS:
        case.band_width = beyond + engine.contract.receptive_field[1]
        cut = case.tiler(tiler)
        assert len(cut.rows(height, max(band.right - band.left for band in cut.bands(width)))) > 2
        yield in_pieces(case, engine, tiler)


def assert_same_bits(case: Case, engine: OrtEngine, tiler: Tiler) -> None:
    """Of maps and extreme values; the other poolings are sums in float64, in another order."""
    first, *others = map(arrays, answers(case, engine, tiler))
    kinds = {f"embedding {number}": pooling.terms[0].kind for number, pooling in enumerate(case.poolings)}
    for other in others:
        assert other.keys() == first.keys()
        for name, wanted in first.items():
            if kinds.get(name) in ("max", "min") or name.endswith("map"):
                np.testing.assert_array_equal(other[name], wanted, err_msg=name)
            else:
                np.testing.assert_allclose(other[name], wanted, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("model", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in MODELS])
def test_the_cut_does_not_change_a_bit(tilers: Callable[[str], tuple[OrtEngine, Tiler]], model: str) -> None:
    """Where ONNX Runtime multiplies convolutions as matrices, as it does unless channels are multiples of 16, it adds
    sums of more than 128 terms in other parts for 64 cells or fewer; none of these models has such."""
    case = Case(1, [model])
    case.picture, case.max_map_side = pixels(411, 405), 0
    assert_same_bits(case, *tilers(model))


class Forgetful(Tiler):
    """Its strips see zeros where the rows of the strip before should be."""

    def _strip(
        self, place: Place, pixels: Pixels, carried: Sequence[Any], outputs: Sequence[str], alone: bool
    ) -> tuple[Mapping[str, FloatArray], list[Any]]:
        return super()._strip(place, pixels, [np.zeros_like(each) for each in carried], outputs, alone)


class ShortSighted(Tiler):
    """Its bands end a few pixels short of what their last cells see."""

    def bands(self, width: int) -> Iterator[Band]:
        for band in super().bands(width):
            yield band if band.right == width else band._replace(right=band.right - self._engine.contract.stride[1])


@pytest.mark.parametrize(("wrong", "piece_pixels", "band_width"), [(Forgetful, 9000, 1000), (ShortSighted, 10**6, 90)])
@pytest.mark.parametrize("model", ["shallow", "deep", "head"])
def test_a_cut_that_loses_what_cells_see_is_found(
    tilers: Callable[[str], tuple[OrtEngine, Tiler]],
    wrong: type[Tiler],
    piece_pixels: int,
    band_width: int,
    model: str,
) -> None:
    """The controls."""
    engine, _ = tilers(model)
    case = Case(0, [model])
    case.picture = pixels(300, 280)
    case.piece_pixels, case.band_width, case.max_map_side = piece_pixels, band_width, 0
    check(case, engine, Tiler(engine))
    with pytest.raises(AssertionError):
        check(case, engine, wrong(engine))
    case.picture = pixels(411, 405)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        assert_same_bits(case, engine, wrong(engine))
