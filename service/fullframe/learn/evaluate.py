"""How often an exported model is right on images of each size, measured on the file that is served."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from fullframe.engine.ort import OrtEngine
from fullframe.engine.pooling import Pooling, pool
from fullframe.errors import InvalidInput
from fullframe.learn.data import Image, Pixels

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
_QUERIES = 1000  # compared with the whole bank at a time


def resize_shorter_side(pixels: Pixels, side: int) -> Pixels:
    """uint8 [H, W, 3] with its shorter side bicubically resized to `side`; unchanged where it has that size."""
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    if shorter == side:
        return pixels
    size = (max(1, round(width * side / shorter)), max(1, round(height * side / shorter)))
    return np.asarray(PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BICUBIC))


def resized(image: Image, side: int) -> Pixels:
    """The image's pixels with that shorter side, or at its own size where `side` is 0."""
    return resize_shorter_side(image.pixels(), side) if side else image.pixels()


class Answers(NamedTuple):
    """What a model says of images.

    Attributes:
        classes: its most probable class of each, as an index into the asked labels; -1 where it is none of them.
        pooled: float32 [images, D] for each asked pooling of the feature map.
    """

    classes: IntArray
    pooled: dict[str, FloatArray]


def ask(
    model: Path,
    images: Sequence[Image],
    labels: Sequence[str],
    size: int,
    poolings: Sequence[str] = (),
    on_image: Callable[[], None] = lambda: None,
) -> Answers:
    """Run an exported file on each image by itself.

    Args:
        model: the file.
        images: resized so that their shorter side is `size`; 0 leaves them as they are.
        labels: class names; raises InvalidInput where the model has not all of them.
        poolings: spelled as in requests: "avg", "max@1,2".
        on_image: called after each image.
    """
    engine = OrtEngine(model)
    known = engine.contract.labels
    if unknown := [label for label in labels if label not in known]:
        raise InvalidInput(f"the model has no class {_few(unknown)}; it has {_few(known)}", "data")
    if not images:
        raise InvalidInput("there are no images to evaluate", "data")
    place = [list(labels).index(label) if label in labels else -1 for label in known]
    kinds = [Pooling.parse(name) for name in poolings]
    outputs = ["logits", *(["feature_map"] if kinds else [])]

    def answer(image: Image) -> tuple[int, list[FloatArray]]:
        answered = engine.run(resized(image, size), outputs)
        on_image()
        vectors = [np.asarray(pool(answered["feature_map"], kind), np.float32) for kind in kinds]
        return place[answered["logits"].argmax()], vectors

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        classes, vectors = zip(*workers.map(answer, images), strict=True)
    columns = [np.stack(column) for column in zip(*vectors, strict=True)]
    return Answers(np.array(classes), dict(zip(poolings, columns, strict=True)))


def accuracy_by_size(
    model: Path,
    images: Sequence[Image],
    labels: Sequence[str],
    sizes: Sequence[int],
    on_image: Callable[[], None] = lambda: None,
) -> dict[int, float]:
    """Top-1 accuracy at each of `sizes`; the other arguments are those of `ask`."""
    truth = np.array([image.label for image in images])
    return {
        size: float((ask(model, images, labels, size, on_image=on_image).classes == truth).mean()) for size in sizes
    }


def compare(
    model: Path,
    copy: Path,
    images: Sequence[Image],
    labels: Sequence[str],
    sizes: Sequence[int],
    on_image: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """How far an int8 copy's answers are its model's, by size; the other arguments are those of `ask`.

    For each size the shares of images given the same class ("agreement") and, where all have labels, of those that
    each has right ("float32", "int8"); and the mean cosine between their average-pooled features ("cosine").
    """
    truth = np.array([image.label for image in images])
    found: dict[str, dict[str, float]] = {}
    for size in sizes:
        theirs, ours = (ask(path, images, labels, size, ["avg"], on_image) for path in (model, copy))
        a, b = theirs.pooled["avg"], ours.pooled["avg"]
        norms = np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
        found[str(size)] = {
            "agreement": float((theirs.classes == ours.classes).mean()),
            "cosine": float(((a * b).sum(1) / norms).mean()),
        }
        if truth.min() >= 0:
            found[str(size)] |= {
                "float32": float((theirs.classes == truth).mean()),
                "int8": float((ours.classes == truth).mean()),
            }
    return found


def neighbour_accuracy(
    bank: FloatArray, bank_labels: IntArray, queries: FloatArray, labels: IntArray, k: int = 20
) -> float:
    """Share of the queries whose k nearest of the bank, by cosine, are mostly of their class.

    Args:
        bank, queries: [images, D]; the bank has at least k images.
        bank_labels, labels: their classes, from 0. Of classes equally frequent the first counts.
    """
    bank, queries = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (bank, queries))
    classes = int(bank_labels.max()) + 1
    right = 0
    for first in range(0, len(queries), _QUERIES):
        part = slice(first, first + _QUERIES)
        nearest = np.argpartition(queries[part] @ bank.T, -k, axis=1)[:, -k:]
        votes = np.stack([(bank_labels[nearest] == label).sum(1) for label in range(classes)], 1)
        right += int((votes.argmax(1) == labels[part]).sum())
    return right / len(queries)


def _few(labels: Sequence[str]) -> str:
    return ", ".join(labels[:5]) + (f"... ({len(labels)})" if len(labels) > 5 else "")
