"""How often an exported model is right on images of each size, measured on the file that is served."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image

from fullframe.engine.ort import OrtEngine
from fullframe.errors import InvalidInput
from fullframe.learn.data import Image, Pixels


def resize_shorter_side(pixels: Pixels, side: int) -> Pixels:
    """uint8 [H, W, 3] with its shorter side bicubically resized to `side`; unchanged where it has that size."""
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    if shorter == side:
        return pixels
    size = (max(1, round(width * side / shorter)), max(1, round(height * side / shorter)))
    return np.asarray(PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BICUBIC))


def accuracy_by_size(
    model: Path,
    images: Sequence[Image],
    labels: Sequence[str],
    sizes: Sequence[int],
    on_image: Callable[[], None] = lambda: None,
) -> dict[int, float]:
    """Top-1 accuracy with the images' shorter sides resized to each of `sizes`; 0 leaves images as they are.

    Args:
        model: an exported file.
        images: with labels that index `labels`.
        labels: class names; raises InvalidInput where the model has not all of them.
        on_image: called after each image.
    """
    engine = OrtEngine(model)
    known = engine.contract.labels
    if unknown := [label for label in labels if label not in known]:
        raise InvalidInput(f"the model has no class {_few(unknown)}; it has {_few(known)}", "data")
    if not images:
        raise InvalidInput("there are no images to evaluate", "data")

    def right(image: Image, size: int) -> bool:
        pixels = resize_shorter_side(image.pixels(), size) if size else image.pixels()
        logits = engine.run(pixels, ["logits"])["logits"]
        on_image()
        return known[logits.argmax()] == labels[image.label]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {size: float(np.mean(list(pool.map(right, images, [size] * len(images))))) for size in sizes}


def _few(labels: Sequence[str]) -> str:
    return ", ".join(labels[:5]) + (f"... ({len(labels)})" if len(labels) > 5 else "")
