"""The nine classifiers of onnx's own light set: converted, the same at 224, of any size, whole or in strips."""

import re
from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from fullframe.convert.options import Options
from fullframe.convert.pipeline import convert
from fullframe.engine.ort import OrtEngine
from fullframe.engine.query import FloatArray
from fullframe.engine.tiles import Tiler
from fullframe.errors import InvalidInput
from fullframe.image.regions import HeldRegions
from fullframe.model.geometry import graph_geometry
from tests.convert.light import NAMES, light_model, of_any_size
from tests.pictures import pixels

QUICK = ("shufflenet", "squeezenet")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAPS = ("feature_map", "class_map")
# Name: the smallest image's sides, and what the head's layers became.
EXPECTED: dict[str, tuple[int, tuple[str, ...]]] = {
    "bvlc_alexnet": (211, ("6x6", "1x1", "1x1")),
    "densenet121": (29, ("1x1",)),
    "inception_v1": (61, ("1x1",)),
    "inception_v2": (7, ("1x1",)),
    "resnet50": (1, ("1x1",)),
    "shufflenet": (1, ("1x1",)),
    "squeezenet": (31, ()),
    "vgg19": (224, ("7x7", "1x1", "1x1")),
    "zfnet512": (219, ("6x6", "1x1", "1x1")),
}
every_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES]
)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], OrtEngine]:
    folder = tmp_path_factory.mktemp("light")

    @cache
    def engine(name: str) -> OrtEngine:
        path = folder / f"{name}.onnx"
        onnx.save(convert(light_model(name), Options(name, mean=MEAN, std=STD)).model, path)
        return OrtEngine(path)

    return engine


def probabilities(model: onnx.ModelProto, picture: NDArray[np.float32]) -> FloatArray:
    """What the source itself says of pixels of 0 to 1, [H, W, 3]."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.moveaxis((picture - np.array(MEAN, np.float32)) / np.array(STD, np.float32), -1, 0)[np.newaxis]
    found: FloatArray = session.run(None, {session.get_inputs()[0].name: image})[0].reshape(-1)
    return found


def softmax(logits: FloatArray) -> FloatArray:
    powers: FloatArray = np.exp(logits - logits.max())
    shares: FloatArray = powers / powers.sum()
    return shares


def difference(found: FloatArray, wanted: FloatArray) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_all_nine_are_there() -> None:
    assert set(NAMES) == set(EXPECTED)


@every_model
def test_the_answer_at_its_own_size_is_the_source_s(engines: Callable[[str], OrtEngine], name: str) -> None:
    source, picture = light_model(name), pixels(224, 224, seed=5)
    wanted = probabilities(source, picture.astype(np.float32) / np.float32(255))
    logits = engines(name).run(picture, ["logits"])["logits"]
    found = logits if name == "densenet121" else softmax(logits)  # the one without a softmax
    assert difference(found, wanted) <= 1e-4
    assert np.ptp(logits) > 0.5 and softmax(logits).max() < 0.9, "classes differ, and none is all"
    other = engines(name).run(pixels(224, 224, seed=6), ["logits"])["logits"]
    assert difference(other, logits) > 1e-3, "and from image to image"


@every_model
def test_other_sizes_run_and_are_as_the_geometry_says(engines: Callable[[str], OrtEngine], name: str) -> None:
    engine = engines(name)
    contract, geometry = engine.contract, graph_geometry(onnx.load(engine.path))
    side, layers = EXPECTED[name]
    assert contract.smallest_size == geometry.smallest_size == (side, side)
    steps = " ".join(contract.training["conversion"])
    assert tuple(re.findall(r"-> convolution of (\dx\d)", steps)) == layers
    for number, (rows, columns) in enumerate(((0, 0), (0, 1), (1, 0), (9, 30), (37, 4), (64, 64))):
        height, width = side + rows, side + columns
        found = engine.run(pixels(height, width, seed=number), ["features", "logits", *MAPS])
        cells = geometry.output_size(height, width)
        assert found["feature_map"].shape[1:] == found["class_map"].shape[1:] == cells
        assert difference(found["features"], found["feature_map"].mean((1, 2))) <= 1e-5
        assert difference(found["logits"], found["class_map"].mean((1, 2))) <= 1e-5
    if side > 1:
        with pytest.raises(InvalidInput, match=f"at least {side}x{side}"):
            engine.check_size(side - 1, side)


@pytest.mark.parametrize("name", ["squeezenet", pytest.param("densenet121", marks=pytest.mark.slow)])
def test_sources_that_could_take_any_size_give_the_same_answers_there(
    engines: Callable[[str], OrtEngine], name: str
) -> None:
    source = of_any_size(light_model(name))
    for height, width in ((97, 41), (225, 300)):
        picture = pixels(height, width)
        wanted = probabilities(source, picture.astype(np.float32) / np.float32(255))
        logits = engines(name).run(picture, ["logits"])["logits"]
        assert difference(logits if name == "densenet121" else softmax(logits), wanted) <= 1e-4


@every_model
def test_strips_are_the_whole(engines: Callable[[str], OrtEngine], name: str) -> None:
    engine = engines(name)
    assert engine.contract.tiles is not None and engine.contract.tiles.possible
    least, sees = engine.contract.smallest_size, engine.contract.receptive_field
    picture = pixels(least[0] + max(641, 2 * sees[0]), least[1] + 57)
    wanted = engine.run(picture, MAPS)
    found = {map: np.full_like(each, np.nan) for map, each in wanted.items()}
    pieces = list(Tiler(engine, piece_pixels=8_000, band_width=10_000).pieces(HeldRegions(picture), MAPS))
    for piece in pieces:
        for map, part in piece.maps.items():
            found[map][:, piece.top : piece.top + part.shape[1], piece.left : piece.left + part.shape[2]] = part
    assert len(pieces) > 2
    for map in MAPS:
        assert difference(found[map], wanted[map]) <= 1e-5


@pytest.mark.slow
def test_branches_of_odd_sizes_agree_where_the_source_s_do_not(engines: Callable[[str], OrtEngine]) -> None:
    """Inception v2's poolings are padded behind by one, beside convolutions padded on both sides."""
    with pytest.raises(Exception, match="Concat"):
        probabilities(of_any_size(light_model("inception_v2")), np.zeros((231, 231, 3), np.float32))
    engine = engines("inception_v2")
    assert "branches of odd sizes made equal" in " ".join(engine.contract.training["conversion"])
    assert np.isfinite(engine.run(pixels(231, 231), ["logits"])["logits"]).all()
