"""Batches that are run before the first image comes, so that it waits for no compilation and for no search."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import log
from typing import Final

import numpy as np

from fullframe.engine.base import Engine
from fullframe.engine.size_classes import side_class
from fullframe.image import Pixels
from fullframe.model.contract import Contract

_SECONDS: Final = 10.0
"""That lone images of likely sizes are run for, once all kernels have been."""
_KERNEL_SIDES: Final = (512, 224, 32, 8, 1)
"""Of images for which each kernel is compiled in every form, for maps of many cells, few and one; the largest first,
so that others find its memory."""
_LIKELY_SIDES: Final = range(64, 1025)
_LIKELY_PIXELS: Final = 400 * 300
_MOST_ASPECT: Final = 2.0

Run = Callable[[Sequence[Pixels], Sequence[str]], object]
"""Runs images, uint8 [H, W, 3] each, in one batch, and asks for outputs: RaggedEngine.run."""


def warm_up_together(run: Run, contract: Contract, seconds: float = _SECONDS) -> None:
    """Run batches with masks and without, then lone images of all classes of sizes, the likely ones first.

    A kernel is compiled for the outputs that are asked for and for masks. A convolution's algorithm is chosen for each
    shape: as many are as there is time for.
    """
    for height, width, outputs in _of_each_kernel(contract):
        for rows in ([height], [height + 1], [height, height], [height, height + 1]):
            run([_image(each, width) for each in rows], outputs)
    _until(seconds, contract, lambda h, w: run([_image(h - 1, w)], ["logits"]))  # a row is padded: with a mask


def warm_up_alone(engine: Engine, seconds: float = _SECONDS) -> None:
    """The same for a model whose images are computed one by one, without masks: a side is odd or even."""
    for height, width, outputs in _of_each_kernel(engine.contract):
        for rows in (height, height + 1):
            engine.run(_image(rows, width), outputs)
    _until(seconds, engine.contract, lambda h, w: engine.run(_image(h, w), ["logits"]))


def _of_each_kernel(contract: Contract) -> Iterator[tuple[int, int, Sequence[str]]]:
    """Height, width and outputs of images for which, between them, each kernel is run."""
    for side, outputs in product(_KERNEL_SIDES, (contract.outputs, ["logits"], ["features"])):
        height, width = (max(side, least) for least in contract.smallest_size)
        yield height, width, outputs


def _until(seconds: float, contract: Contract, run: Callable[[int, int], object]) -> None:
    until = time.monotonic() + seconds
    for height, width in likely_sizes(contract.smallest_size):
        if time.monotonic() >= until:
            break
        run(height, width)


def likely_sizes(least: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The classes of sizes (height, width) of photographs, the likeliest first; images a row less are not below
    `least`."""
    sides = sorted({side_class(side) for side in _LIKELY_SIDES})
    pairs = [(h, w) for h, w in product(sides, sides) if max(h, w) <= _MOST_ASPECT * min(h, w)]
    usual = [(h, w) for h, w in pairs if h > least[0] and w >= least[1]]
    yield from sorted(usual, key=lambda size: abs(log(size[0] * size[1] / _LIKELY_PIXELS)))


def _image(height: int, width: int) -> Pixels:
    return np.zeros((height, width, 3), np.uint8)
