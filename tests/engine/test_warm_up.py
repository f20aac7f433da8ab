"""Warming up: every kind of batch is run, so that what comes later compiles nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fullframe.engine.ort import OrtEngine
from fullframe.engine.size_classes import side_class
from fullframe.engine.warm_up import _KERNEL_SIDES, likely_sizes, warm_up_alone, warm_up_together
from fullframe.image import Pixels
from tests.models import write_model


def test_every_kind_of_batch_is_run(tmp_path: Path) -> None:
    contract = OrtEngine(write_model(tmp_path / "picky.onnx", channels=4, least=40)).contract
    seen: list[tuple[tuple[str, ...], tuple[tuple[int, int], ...]]] = []

    def run(images: Sequence[Pixels], outputs: Sequence[str]) -> None:
        seen.append((tuple(sorted(outputs)), tuple((image.shape[0], image.shape[1]) for image in images)))

    warm_up_together(run, contract, seconds=0)
    asked = [("logits",), ("features",), tuple(sorted(contract.outputs))]
    assert set(seen) == {
        (names, tuple((side + more, side) for more in rows))
        for names in asked
        for side in (512, 224, 40)
        for rows in ([0], [1], [0, 0], [0, 1])
    }
    kernels = len(seen)
    warm_up_together(run, contract, seconds=60)
    later = [sizes for names, sizes in seen[2 * kernels :]]
    assert len(later) > 300
    assert all(len(sizes) == 1 and min(sizes[0]) >= 40 for sizes in later), "lone images that the model takes"


def test_a_model_that_is_run_image_by_image_is_warmed_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OrtEngine(write_model(tmp_path / "picky.onnx", channels=4, least=40))
    seen: list[tuple[tuple[str, ...], tuple[int, int]]] = []

    def run(images: Pixels, outputs: Sequence[str]) -> list[np.ndarray]:
        seen.append((tuple(sorted(outputs)), (images.shape[1], images.shape[2])))
        return [np.zeros((1, 1), np.float32) for _ in outputs]

    monkeypatch.setattr(engine, "run_batch", lambda images, outputs, **_: run(images, outputs))
    warm_up_alone(engine, seconds=0)
    asked = [("logits",), ("features",), tuple(sorted(engine.contract.outputs))]
    assert set(seen) == {(names, (side + more, side)) for names in asked for side in (512, 224, 40) for more in (0, 1)}
    kernels = len(seen)
    warm_up_alone(engine, seconds=60)
    assert len(seen[2 * kernels :]) > 300, "of the likely sizes"


def test_likely_sizes_are_those_of_photographs_by_classes() -> None:
    sizes = list(likely_sizes((1, 1)))
    assert len(set(sizes)) == len(sizes)
    assert {(320, 384), (384, 320), (256, 480)} <= set(sizes[:100])
    assert all(side_class(side) == side_class(side - 1) == side for size in sizes for side in size), (
        "both are one class"
    )
    assert (64, 64) not in list(likely_sizes((64, 1)))


COMPILED = """
import json, sys
import torch
from fullframe.engine.fused import TorchEngine
from fullframe.engine.ragged import RaggedEngine
from fullframe.engine import warm_up
from fullframe.model.repository import BUNDLED
from tests.kernels.compiling import captured
from tests.pictures import pixels

engine = TorchEngine(BUNDLED, device="cpu")
together = RaggedEngine(engine)
for session in (engine._session, together._session):
    session.graph._fused = True
TorchEngine.batch_size = lambda self, *size: (warm_up.side_class(size[0]), warm_up.side_class(size[1]))
warm_up._KERNEL_SIDES = json.loads(sys.argv[1])
seen = []
with captured("sm_90") as launches:
    def later():
        new = {(each.kernel, each.key) for each in launches} - set(seen)
        seen.extend(new)
        launches.clear()
        return sorted(kernel for kernel, _ in new)
    warm_up.warm_up_together(together.run, engine.contract, seconds=0)
    first = later()
    for sizes in json.loads(sys.argv[2]):
        for outputs in (["logits"], ["features"], engine.contract.outputs):
            together.run([pixels(*size) for size in sizes], outputs)
    print(json.dumps([len(first), later()]))
"""
LATER = [
    [[13, 29]],
    [[7, 4], [6, 4]],
    [[100, 75]],
    [[31, 300], [30, 290], [29, 300]],
    [[129, 127]] * 5,
    [[64, 64], [60, 61], [63, 64], [64, 62]],
    [[160, 256], [150, 250]],
    [[333, 250]],
]
"""Sizes of batches: odd and even, wide and high, alike and not, lone and many."""


@pytest.mark.slow
def test_no_later_size_compiles_a_kernel(tmp_path: Path) -> None:
    """For a GPU that need not be there. The control: one side is not enough."""

    def compiled(sides: Sequence[int]) -> tuple[int, list[str]]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", COMPILED, json.dumps(sides), json.dumps(LATER)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        first, later = json.loads(done.stdout.splitlines()[-1])
        return first, later

    first, later = compiled(_KERNEL_SIDES)
    assert first > 10
    assert later == []
    assert compiled([32])[1], "kernels for many cells are others"
