from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from fullframe.learn.batches import (
    VALIDATION_PIXELS,
    Batch,
    TrainingBatch,
    epoch_plan,
    training_batches,
    validation_batches,
)
from fullframe.learn.data import Image
from fullframe.learn.settings import Augmentation, Recipe

RECIPE = Recipe(batch_size=8, augmentation=Augmentation(sizes=(8, 12, 16)))


@pytest.fixture(scope="module")
def images() -> list[Image]:
    """Each image's label is its grey."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(4, 30, (50, 2))
    return [Image(str(i), b"", i, np.full((h, w, 3), i, np.uint8)) for i, (h, w) in enumerate(sizes)]


def epoch_of(images: list[Image], recipe: Recipe, epoch: int, first: int = 0) -> list[TrainingBatch]:
    return list(training_batches(images, epoch_plan(len(images), recipe, epoch), recipe, epoch, first))


def same(a: Sequence[Batch | TrainingBatch], b: Sequence[Batch | TrainingBatch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)
    )


def test_an_epoch_shows_each_image_once_at_one_size_a_batch(images: list[Image]) -> None:
    batches = epoch_of(images, RECIPE, 0)
    assert len(batches) == 6
    labels = torch.cat([batch.labels for batch in batches])
    assert len(set(labels.tolist())) == 48
    assert len({batch.images.shape[2:] for batch in batches}) > 1
    for pixels, grey, *_ in batches:
        assert pixels.shape[2] == pixels.shape[3] in RECIPE.augmentation.sizes
        assert (pixels == grey.view(-1, 1, 1, 1)).all(), "labels follow their images"


def test_mixed_batches_know_whose_rectangle_each_image_got(images: list[Image]) -> None:
    recipe = replace(RECIPE, augmentation=replace(RECIPE.augmentation, cut_mix=1))
    for batch in epoch_of(images, recipe, 0):
        grey = batch.images[:, 0].flatten(1)
        own, other = grey == batch.labels[:, None], grey == batch.others[:, None]
        assert (own | other).all()
        alone = batch.labels == batch.others
        assert torch.allclose(own.float().mean(1)[~alone], batch.share[~alone])
    half = replace(RECIPE, augmentation=replace(RECIPE.augmentation, cut_mix=0.5))
    mixed = [bool((batch.share < 1).any()) for epoch in range(5) for batch in epoch_of(images, half, epoch)]
    assert 0 < sum(mixed) < len(mixed)
    assert all((batch.share == 1).all() for batch in epoch_of(images, RECIPE, 0))


def test_an_epoch_can_be_taken_up_anywhere(images: list[Image]) -> None:
    whole = epoch_of(images, RECIPE, 3)
    for first in range(7):
        assert same(epoch_of(images, RECIPE, 3, first), whole[first:])
    assert not same(epoch_of(images, RECIPE, 4), whole)
    assert not same(epoch_of(images, replace(RECIPE, seed=1), 3), whole)


def test_a_batch_s_pixels_are_bounded(images: list[Image]) -> None:
    plan = epoch_plan(50, replace(RECIPE, batch_pixels=600), 0)
    assert {(side, len(indices)) for side, indices in plan} == {(8, 8), (12, 4), (16, 2)}
    shown = [index for _, indices in plan for index in indices]
    assert len(shown) == len(set(shown)) >= 50 - 8


def test_few_images_are_one_batch() -> None:
    assert [len(indices) for _, indices in epoch_plan(5, RECIPE, 0)] == [5]


def test_validation_shows_all_and_enlarges_none(images: list[Image]) -> None:
    seen = {}
    for pixels, labels in validation_batches(images, 16):
        for label in labels.tolist():
            seen[label] = pixels.shape[2:]
        assert (pixels == labels.view(-1, 1, 1, 1)).all()
    assert len(seen) == 50
    for image in images:
        height, width = image.pixels().shape[:2]
        shrunk = max(1.0, min(height, width) / 16)
        assert seen[image.label] == (round(height / shrunk), round(width / shrunk))


def test_validation_batches_are_bounded() -> None:
    side = 400
    images = [Image(str(i), b"", 0, np.zeros((side, side, 3), np.uint8)) for i in range(15)]
    sizes = [len(labels) for _, labels in validation_batches(images, side)]
    assert sum(sizes) == 15
    assert max(sizes) == VALIDATION_PIXELS // side**2
