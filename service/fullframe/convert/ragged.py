"""A contract model -> the same in a file that takes images of different sizes together, proved before it is written."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import onnx

from fullframe.convert.metadata import get_contract, load_model, set_contract
from fullframe.engine.ort import OrtEngine
from fullframe.engine.ragged import RaggedEngine
from fullframe.errors import InvalidModel
from fullframe.files import write_atomically
from fullframe.image import Pixels
from fullframe.model.contract import Contract, Tiles
from fullframe.model.ragged import check_sizes, ragged_model

TOLERANCE: Final = 1e-4
_BATCHES: Final = 24
_IMAGES: Final = 4
_SPAN: Final = 192
"""Pixels between the smallest and the largest side that is tried; short ones come as often as long ones."""
_NO_TILES: Final = "a file for batches of different sizes is not cut into tiles; the model that it was made of may be"


def make_ragged(model: Path, output: Path, name: str = "") -> tuple[Contract, float]:
    """Write a model's copy for batches of images of different sizes (model/ragged).

    Args:
        output: written only when every image of many random batches has the answer that the model gives it alone.
        name: what the copy calls itself; none: as the model does.

    Returns:
        The copy's contract and the largest difference, relative to max(1, the largest value alone).

    Raises:
        InvalidModel: the file is no model of the contract, is for such batches already, has a node that no mask can
            help (named by the message), or a batch would change an answer.
    """
    source = load_model(model)
    contract = get_contract(source)
    if contract.ragged:
        raise InvalidModel(f"{model.name} is for batches of different sizes already")
    made = ragged_model(source)
    check_sizes(made, contract.smallest_size)
    tiles = Tiles(contract.tiles.alignment if contract.tiles else contract.stride, (_NO_TILES,))
    contract = replace(contract, name=name or contract.name, ragged=True, tiles=tiles)
    set_contract(made, contract)
    onnx.checker.check_model(made, full_check=True)
    with TemporaryDirectory() as folder:
        copy = Path(folder) / output.name
        onnx.save(made, copy)
        worst = _compare(OrtEngine(model), RaggedEngine(OrtEngine(copy)))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, made.SerializeToString())
    return contract, worst


def _compare(alone: OrtEngine, together: RaggedEngine) -> float:
    """The largest difference over random batches; raises InvalidModel where it passes TOLERANCE."""
    contract = alone.contract
    worst = 0.0
    for images in _batches(contract.smallest_size):
        sizes = ", ".join("{} x {}".format(*image.shape) for image in images)
        for image, found in zip(images, together.run(images, contract.outputs), strict=True):
            for name, wanted in alone.run(image, contract.outputs).items():
                if found[name].shape != wanted.shape:
                    raise InvalidModel(
                        f"{name!r} is {found[name].shape} beside others and {wanted.shape} alone ({sizes})"
                    )
                gap = float(np.abs(found[name] - wanted).max() / max(1.0, float(np.abs(wanted).max())))
                if not gap <= TOLERANCE:
                    raise InvalidModel(
                        f"{name!r} of an image of {image.shape[0]} x {image.shape[1]} pixels differs by {gap:.1e} from "
                        f"the lone image's in a batch of {sizes}; at most {TOLERANCE:.0e} is allowed"
                    )
                worst = max(worst, gap)
    return worst


def _batches(least: tuple[int, int]) -> Iterator[list[Pixels]]:
    """Noise; the first batch has the smallest image beside the largest."""
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(0, np.log(_SPAN), (_BATCHES, _IMAGES, 2))).astype(int) - 1
    sides[0, :2] = [0, 0], [_SPAN, _SPAN]
    for batch in sides + least:
        yield [rng.integers(0, 256, (height, width, 3), np.uint8) for height, width in batch]
