"""The model that everyone meets first: there, of every size, described, and sure of a cat."""

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import PIL.Image
import pytest

import fullframe
from fullframe.engine.predictor import Predictor
from fullframe.model.repository import BUNDLED, Precision
from tests.pictures import Pixels, pixels

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
    assert min(accuracy[size] for size in ("24", "32", "40", "48", "64", "96", "128")) > 0.84
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


SCALES = (0.125, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
CROPS = ((0, 0, 451, 300), (60, 0, 360, 300), (100, 30, 320, 250))  # left, top, right, bottom


def views(name: str) -> Iterator[Pixels]:
    """A photograph's crops at many sizes, as they are and mirrored."""
    with PIL.Image.open(photograph(name)) as opened:
        picture = opened.convert("RGB")
    for scale, crop in product(SCALES, CROPS):
        part = picture.crop(crop)
        size = max(1, round(part.width * scale)), max(1, round(part.height * scale))
        view = np.asarray(part.resize(size, PIL.Image.Resampling.BICUBIC))
        yield from (view, view[:, ::-1])


@pytest.mark.parametrize("precision", get_args(Precision))
def test_photographs_of_a_cat_are_cats_at_every_size(precision: Precision) -> None:
    with fullframe.load(precision=precision) as model:
        answers = [model.classify(view)[0].label for view in views("chelsea.png")]
        assert len(answers) == 48
        assert answers.count("cat") >= 42
        rockets = [model.classify(view)[0].label for view in views("rocket.jpg")]
        assert rockets.count("cat") <= 5, "the control: it does not say so of everything"


def test_the_int8_copy_is_nearly_as_often_right_at_every_size(bundled: Predictor) -> None:
    with fullframe.load(precision="int8") as copy:
        assert copy.contract.precision == "int8" and bundled.contract.precision == "float32"
        measured = [model.contract.training["accuracy"]["by_size"] for model in (bundled, copy)]
    assert measured[0].keys() == measured[1].keys()
    for size, right in measured[0].items():
        assert measured[1][size] >= right - 0.005, size
    facts = bundled.contract.training
    assert facts["int8"]["by_size"] == measured[1]
