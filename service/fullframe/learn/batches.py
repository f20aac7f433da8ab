"""Images -> batches: shuffled and augmented to train on, grouped by size to validate."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fullframe.learn.augment import cut_mix, random_crop
from fullframe.learn.data import Image
from fullframe.learn.settings import Recipe

VALIDATION_PIXELS = 1 << 20

Batch = tuple[Tensor, Tensor]
"""uint8 [N, 3, H, W] and int64 labels [N]."""


class TrainingBatch(NamedTuple):
    """What a step learns from: `share` of each picture shows an image of class `labels`, the rest one of `others`.

    uint8 [N, 3, H, W], int64 [N], int64 [N], float32 [N].
    """

    images: Tensor
    labels: Tensor
    others: Tensor
    share: Tensor


Plan = list[tuple[int, NDArray[np.int64]]]
"""Each batch's side in pixels and its images' indices."""


def epoch_plan(count: int, recipe: Recipe, epoch: int) -> Plan:
    """How an epoch shares `count` images out: each once, in an order that depends on (seed, epoch) alone.

    The last images of the order, too few for a batch, are left out.
    """
    rng = np.random.default_rng((recipe.seed, epoch))
    order = rng.permutation(count)
    full = min(recipe.batch_size, count)
    plan: Plan = []
    first = 0
    while True:
        side = recipe.augmentation.draw_size(rng)
        size = min(full, max(2, recipe.batch_pixels // side**2)) if recipe.batch_pixels else full
        if first + size > count:
            return plan
        plan.append((side, order[first : first + size]))
        first += size


def training_batches(
    images: Sequence[Image], plan: Plan, recipe: Recipe, epoch: int, first: int = 0
) -> Iterator[TrainingBatch]:
    """The plan's batches from the one numbered `first`, each prepared while its predecessor is worked on.

    They depend on (seed, epoch, number) alone, so an epoch can be taken up anywhere.
    """

    def prepare(number: int) -> TrainingBatch:
        rng = np.random.default_rng((recipe.seed, epoch, number + 1))  # with a 0 it would be the plan's generator
        side, indices = plan[number]
        chosen = [images[index] for index in indices]
        crops = torch.stack([random_crop(image.pixels(), side, recipe.augmentation, rng) for image in chosen])
        labels = torch.tensor([image.label for image in chosen])
        if rng.random() >= recipe.augmentation.cut_mix:
            return TrainingBatch(crops, labels, labels, torch.ones(len(labels)))
        mixed, other, share = cut_mix(crops, rng)
        return TrainingBatch(mixed, labels, labels[other], share)

    with ThreadPoolExecutor(1) as worker:
        upcoming = worker.submit(prepare, first) if first < len(plan) else None
        for number in range(first + 1, len(plan) + 1):
            assert upcoming is not None
            batch = upcoming.result()
            upcoming = worker.submit(prepare, number) if number < len(plan) else None
            yield batch


def validation_batches(images: Sequence[Image], largest: int) -> Iterator[Batch]:
    """All images, those of one size together, within VALIDATION_PIXELS.

    An image keeps its size unless its shorter side exceeds `largest`: then it is shrunk to it.
    """
    waiting: dict[tuple[int, ...], list[tuple[Tensor, int]]] = defaultdict(list)

    def batch(group: list[tuple[Tensor, int]]) -> Batch:
        pixels, labels = zip(*group, strict=True)
        group.clear()
        return torch.stack(pixels), torch.tensor(labels)

    for image in images:
        pixels = torch.from_numpy(image.pixels()).permute(2, 0, 1)
        shorter = min(pixels.shape[1:])
        if shorter > largest:
            size = [max(1, round(side * largest / shorter)) for side in pixels.shape[1:]]
            pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
        height, width = pixels.shape[1:]
        group = waiting[height, width]
        group.append((pixels, image.label))
        if (len(group) + 1) * height * width > VALIDATION_PIXELS:
            yield batch(group)
    yield from (batch(group) for group in waiting.values() if group)
