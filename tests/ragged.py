"""Batches of images of different sizes beside the same images alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from hypothesis import strategies as st
from numpy.typing import NDArray

Sizes = list[tuple[int, int]]
Images = list[NDArray[np.uint8]]


def images_of(sizes: Sizes, seed: int = 0) -> Images:
    """Noise of these heights and widths."""
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def drawn(least: Sequence[int], spread: int) -> st.SearchStrategy[Sizes]:
    """One to five sizes from the least on."""
    sides = [st.integers(each, each + spread) for each in least]
    return st.lists(st.tuples(*sides), min_size=1, max_size=5)


def padded(images: Images, garbage: int = 1) -> dict[str, NDArray[Any]]:
    """The inputs of a graph for batches; what lies beside the images is noise of its own."""
    sizes = np.array([image.shape[:2] for image in images], np.int64)
    batch = np.random.default_rng(garbage).integers(0, 256, (len(images), *sizes.max(0), 3), np.uint8)
    for place, image in zip(batch, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    return {"images": batch, "sizes": sizes}


def differences(lone: ort.InferenceSession, ragged: ort.InferenceSession, images: Images) -> dict[str, float]:
    """The largest difference of each output between the batch and its images alone, relative to max(1, the largest
    value alone); maps must have their own sizes and be 0 outside.

    Raises FloatingPointError where an image alone has an infinite value, as of a maximum over nothing but padding.
    """
    names = [output.name for output in lone.get_outputs()]
    *batch, map_sizes = ragged.run([*names, "map_sizes"], padded(images))
    worst = dict.fromkeys(names, 0.0)
    for number, image in enumerate(images):
        for name, found, wanted in zip(names, batch, lone.run(names, {"images": image[np.newaxis]}), strict=True):
            own = found[number]
            if name.endswith("map"):
                rows, columns = map_sizes[number]
                assert (rows, columns) == wanted.shape[2:], (name, image.shape)
                own = own.copy()
                found[number, :, :rows, :columns] = 0
                assert not found[number].any(), "padding is 0"
                own = own[:, :rows, :columns]
            if not np.isfinite(wanted).all():
                raise FloatingPointError(name)
            gap = float(np.abs(own - wanted[0]).max() / max(1.0, float(np.abs(wanted).max())))
            worst[name] = max(worst[name], gap if np.isfinite(gap) else np.inf)
    return worst
