"""What is computed twice of a huge image: counted cell by cell, and by geometry at the default settings."""

from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullframe.engine.base import Session
from fullframe.engine.ort import OrtEngine
from fullframe.engine.tiles import BAND_WIDTH, Tiler
from fullframe.image.regions import HeldRegions
from fullframe.model.repository import BUNDLED
from fullframe.model.strips import Place
from tests.models import write_model
from tests.pictures import pixels

MOST = 1.05
"""Work done, of the whole image's, at a receptive field of about 200 pixels."""
MOST_BUNDLED = 1.25
"""By the bundled model, whatever its receptive field."""


class CountingTiler(Tiler):
    """Counts the multiply-adds of the convolutions that it runs."""

    multiply_adds = 0

    def _session(self, place: Place) -> Session:
        model = onnx.load_from_string(self._strips.graphs[place])
        weights = {each.name: prod(each.dims) // each.dims[0] for each in model.graph.initializer}
        made = {node.output[0]: weights[node.input[1]] for node in model.graph.node if node.op_type == "Conv"}
        given = {each.name for each in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in given)
        opened, tiler = self._engine.open_session(model.SerializeToString()), self

        class Counting:
            def run(
                self,
                outputs: Sequence[str],
                feeds: Mapping[str, Any],
                *,
                held: Collection[str] = (),
                alone: bool = False,
            ) -> list[Any]:
                found = opened.run([*outputs, *made], feeds)
                cells = (each.size for each in found[len(outputs) :])
                tiler.multiply_adds += sum(count * each for count, each in zip(cells, made.values(), strict=True))
                return found[: len(outputs)]

        return Counting()


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> OrtEngine:
    """A receptive field of 207 pixels."""
    return OrtEngine(write_model(tmp_path_factory.mktemp("models") / "deep.onnx", channels=2, depth=25))


def work(tiler: CountingTiler, height: int, width: int) -> float:
    """Of an image in pieces, as a multiple of the whole one's."""
    tiler.multiply_adds = 0
    for _ in tiler.pieces(HeldRegions(pixels(height, width)), ["class_map"]):
        pass
    return tiler.multiply_adds / tiler._strips.geometry.graph.multiply_adds("class_map", height, width)


def test_within_a_band_nothing_is_computed_twice(deep: OrtEngine) -> None:
    """To the last multiply-add."""
    tiler = CountingTiler(deep, piece_pixels=20_000)
    assert len(tiler.rows(901, 301)) > 5
    assert work(tiler, 901, 301) == 1


def test_the_default_settings_compute_less_than_a_twentieth_twice(deep: OrtEngine) -> None:
    tiler = CountingTiler(deep)
    assert tiler._engine.contract.receptive_field == (207, 207)
    for width, bands in ((BAND_WIDTH, 2), (2 * BAND_WIDTH, 3)):
        assert len(list(tiler.bands(width))) == bands
        measured = work(tiler, 400, width)
        graph = tiler._strips.geometry.graph
        parts = sum(graph.multiply_adds("class_map", 400, b.right - b.left) for b in tiler.bands(width))
        assert measured == parts / graph.multiply_adds("class_map", 400, width)
        assert 1 < measured <= MOST


def test_narrow_bands_compute_more_twice(deep: OrtEngine) -> None:
    """The control."""
    assert work(CountingTiler(deep, band_width=1000), 400, 2 * BAND_WIDTH) > 1.2


@pytest.fixture(scope="module")
def tilers(deep: OrtEngine) -> list[tuple[Tiler, float]]:
    return [(Tiler(deep), MOST), (Tiler(OrtEngine(BUNDLED)), MOST_BUNDLED)]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 200_000))
def test_bands_of_any_width_have_every_cell_once_and_little_twice(
    tilers: list[tuple[Tiler, float]], width: int
) -> None:
    """At the default settings; the work goes with the columns, as the bands have the same rows."""
    for tiler, most in tilers:
        bands = list(tiler.bands(width))
        firsts = np.cumsum([0] + [band.cells for band in bands])
        assert [band.first for band in bands] == list(firsts[:-1])
        assert firsts[-1] == tiler.map_size(400, width)[1]
        columns = [band.right - band.left for band in bands]
        assert max(columns) <= BAND_WIDTH
        assert sum(columns) <= most * width
