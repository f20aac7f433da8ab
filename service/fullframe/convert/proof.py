"""A converted model beside its source: equal at the source's size, and as its metadata says at others."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import helper

from fullframe.convert.draft import words
from fullframe.convert.runtime import open_session, tensors
from fullframe.convert.tidy import in_inference, scores_before_softmax
from fullframe.engine.query import FloatArray
from fullframe.errors import InvalidModel, first_line
from fullframe.image import Pixels
from fullframe.model.contract import INPUT, Contract
from fullframe.model.geometry import Geometry

TOLERANCE: Final = 1e-4
_LEAST_SCALE: Final = 1e-3
"""Scores below it are taken for rounding errors of larger sums."""
_SAME: Final = 1e-6
_IMAGES: Final = 2
_LEAST_IR: Final = 4
"""From here on weights need be no inputs."""


class Source:
    """The classifier as it came.

    Args:
        model: changed: its scores become an output, should a softmax hide them, and nothing trains.
        prepare: makes what it takes, float32 [1, 3, H, W], of pixels uint8 [1, H, W, 3].
    """

    def __init__(self, model: onnx.ModelProto, prepare: Callable[[Pixels], FloatArray]) -> None:
        in_inference(model.graph.node)
        self._scores, _ = scores_before_softmax(model.graph)
        if self._scores != model.graph.output[0].name:
            model.graph.output.append(helper.make_empty_tensor_value_info(self._scores))
        model.ir_version = max(model.ir_version, _LEAST_IR)
        self._prepare = prepare
        self._session = open_session(model.SerializeToString(), "the source")
        self._input = self._session.get_inputs()[0].name

    def scores(self, image: Pixels) -> FloatArray:
        """Logits [1, K] of an image uint8 [1, H, W, 3]; raises InvalidModel where the source does not run."""
        try:
            (scores,) = self._session.run([self._scores], {self._input: self._prepare(image)})
        except Exception as error:
            raise InvalidModel(f"the source itself does not run: {first_line(error)}") from error
        if not np.isfinite(scores).all():
            raise InvalidModel("the source itself gives scores that are not finite; is its normalisation right?")
        found: FloatArray = scores.reshape(1, -1)
        return found


class Proof:
    """A converted model's file, opened once.

    Raises InvalidModel where it can't be loaded or its graph is not what its contract says.
    """

    def __init__(self, converted: Path, contract: Contract, geometry: Geometry) -> None:
        self._session = open_session(str(converted), "the converted graph")
        self._geometry, self._contract = geometry, contract
        inputs, outputs = tensors(self._session)
        contract.check_graph(inputs, outputs)
        self._names = [each.name for each in outputs]

    def difference(self, source: Source, size: tuple[int, int]) -> float:
        """The largest from the source's scores for random images of its size, relative to the largest score.

        Raises InvalidModel where it passes TOLERANCE, or images together do not get the scores that each gets alone.
        """
        images = np.stack([_image(number, *size) for number in range(_IMAGES)])
        worst, answers = 0.0, []
        together = self._run(images)["logits"]
        for number in range(_IMAGES):
            one = images[number : number + 1]
            answers.append(wanted := source.scores(one))
            for what, found in (
                ("alone", self._run(one)["logits"]),
                ("among others", together[number : number + 1]),
            ):
                if found.shape != wanted.shape:
                    raise InvalidModel(f"logits are {list(found.shape)}; the source's are {list(wanted.shape)}")
                relative = relative_difference(found, wanted)
                if not relative <= TOLERANCE:
                    raise InvalidModel(
                        f"logits of an image {what} differ from the source's by {relative:.1e} of the largest at "
                        f"{words(size)}; at most {TOLERANCE:.0e} is allowed"
                    )
                worst = max(worst, relative)
        if np.allclose(answers[0], answers[1], rtol=_SAME, atol=_SAME * float(np.abs(answers[0]).max())):
            raise InvalidModel(
                "the source gives different images the same scores, so nothing could be compared; has it its weights, "
                "and is its normalisation right?"
            )
        return worst

    def run_elsewhere(self, size: tuple[int, int]) -> int:
        """Run at other sizes than the source's; returns at how many.

        Raises InvalidModel where a map's size is not what the geometry says, or an output is not finite.
        """
        sizes = _other_sizes(self._contract.smallest_size, size)
        for number, (height, width) in enumerate(sizes):
            found = self._run(_image(number, height, width)[np.newaxis])
            cells = self._geometry.output_size(height, width)
            for name, values in found.items():
                wanted = cells if name.endswith("_map") else ()
                if values.shape[2:] != wanted or not np.isfinite(values).all():
                    raise InvalidModel(
                        f"{name!r} is {list(values.shape)} at {words((height, width))}; it must have {list(wanted)} "
                        "cells and be finite"
                    )
        return len(sizes)

    def _run(self, images: Pixels) -> dict[str, FloatArray]:
        try:
            return dict(zip(self._names, self._session.run(self._names, {INPUT: images}), strict=True))
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            size = words((images.shape[1], images.shape[2]))
            raise InvalidModel(f"the converted graph does not run at {size}: {first_line(error)}") from error


def relative_difference(found: FloatArray, wanted: FloatArray) -> float:
    """The largest difference between scores of one shape, relative to the largest of those wanted."""
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), _LEAST_SCALE))


def _other_sizes(least: tuple[int, int], size: tuple[int, int]) -> list[tuple[int, int]]:
    """The smallest, odd ones, tall, wide, a little off the source's."""
    (h, w), (height, width) = least, size
    wanted = [
        *((h, w), (h, w + 1), (h + 1, w), (h + 3, w + 2), (h, 2 * w + 5), (2 * h + 7, w)),
        *((height - 1, width), (height, width + 1), (height + 7, width - 3), (height + 33, width + 15)),
        *((height // 2 + 1, width + 65), (height + 49, width // 2 + 3)),
    ]
    return [(max(rows, h), max(columns, w)) for rows, columns in wanted]


def _image(seed: int, height: int, width: int) -> Pixels:
    """Noise in coarse and fine grain, so that neither averages out."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (-(-height // 16), -(-width // 16), 3)).repeat(16, 0).repeat(16, 1)[:height, :width]
    return (coarse + rng.integers(0, 56, (height, width, 3))).astype(np.uint8)
