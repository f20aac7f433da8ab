"""The model that everyone meets first: there, of every size, described, and sure of a cat."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import fullframe
from fullframe.engine.predictor import Predictor
from fullframe.model.repository import BUNDLED
from tests.pictures import pixels

LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="module")
def bundled() -> Iterator[Predictor]:
    with fullframe.load() as predictor:
        yield predictor


def photograph(name: str) -> Path:
    spec = find_spec("skimage")
    assert spec and spec.origin
    return Path(spec.origin).parent / "data" / name


def test_its_contract_is_that_of_the_card(bundled: Predictor) -> None:
    contract = bundled.contract
    assert contract.labels == LABELS
    assert contract.smallest_size == (1, 1)
    accuracy = contract.training["accuracy"]["by_size"]
    assert min(accuracy.values()) > 0.8, "no size is much worse than another"
    card = BUNDLED.with_suffix(".md").read_text()
    for size, share in accuracy.items():
        assert size in card and f"{100 * share:.2f}" in card
    for picture in ("cifar10-curve.png", "cifar10-confusion.png"):
        assert picture in card and BUNDLED.with_name(picture).exists()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (7, 5), (31, 33), (300, 451)])
def test_it_takes_every_size(bundled: Predictor, height: int, width: int) -> None:
    answer = bundled.predict(pixels(height, width), poolings=["avg"], logits=True, class_map=True)
    assert answer.embeddings[0].shape == (bundled.contract.feature_channels,)
    assert answer.logits is not None and answer.class_map is not None
    np.testing.assert_allclose(answer.class_map.mean((1, 2)), answer.logits, atol=1e-4)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_a_photograph_of_a_cat_is_a_cat_and_one_of_a_rocket_is_not(bundled: Predictor, scale: float) -> None:
    def best(name: str) -> str:
        with PIL.Image.open(photograph(name)) as picture:
            size = round(picture.width * scale), round(picture.height * scale)
            pixels = np.asarray(picture.convert("RGB").resize(size, PIL.Image.Resampling.BICUBIC))
        return bundled.classify(pixels)[0].label

    assert best("chelsea.png") == "cat"
    assert best("rocket.jpg") != "cat"
