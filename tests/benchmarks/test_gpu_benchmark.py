"""The GPU benchmark's own logic, on a CPU and in miniature: what it measures, checks, keeps and refuses."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Fullframe, OneByOne, PaddedToLargest, main
from fullframe.engine.ort import OrtEngine
from fullframe.model.repository import ModelFile
from tests.pictures import encode, pixels


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


SIDES = ["fullframe", "pytorch one by one", "pytorch padded to the largest"]
COMPILED = "torch.compile one by one"


@pytest.mark.parametrize("sides", [SIDES, pytest.param([*SIDES[:2], COMPILED, SIDES[2]], marks=pytest.mark.slow)])
def test_every_side_is_measured_and_kept(tmp_path: Path, tiny_model: Path, sides: list[str]) -> None:
    words = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--images", "5", "--rounds", "1"]
    words += ["--sides", ",".join(sides), "--compute", "float32", "--model", str(tiny_model)]
    assert main(words) == 0
    kept = rows(tmp_path / "gpu.csv")
    assert [(row["workload"], row["side"]) for row in kept] == [
        (work, side) for work in ("same size", "mixed sizes") for side in sides
    ]
    for row in kept:
        assert float(row["images_per_s"]) > 0 and float(row["new_size_ms"]) > 0
        right = float(row["error"]) <= 1e-4
        assert right or (row["workload"], row["side"]) == ("mixed sizes", "pytorch padded to the largest"), row
    shares = [float(row["share"]) for row in rows(tmp_path / "gpu_kernels.csv")]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < sum(shares) <= 1.001
    assert (tmp_path / "gpu.png").stat().st_size > 0


def test_padding_without_masks_is_told_from_the_rest(tiny_model: Path) -> None:
    file, reference = ModelFile("tiny", "1", tiny_model), OrtEngine(tiny_model)
    images = gpu.noise([(9, 30), (31, 8), (20, 20)], 0)
    found = {kind.name: kind(file, "cpu", "float32") for kind in (Fullframe, OneByOne, PaddedToLargest)}
    errors = {name: float(gpu.error(side, reference, images)) for name, side in found.items()}
    found["fullframe"].close()
    assert errors.pop("pytorch padded to the largest") > 1e-2
    assert max(errors.values()) <= 1e-4


def test_a_side_that_cannot_run_is_left_out(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(OneByOne):
        name = "broken"

        def one(self, image: object) -> object:  # type: ignore[override]
            raise RuntimeError("no such kernel\nand more")

    file = ModelFile("tiny", "1", tiny_model)
    assert list(gpu.usable(Broken, file, "cpu", "float32", [pixels(8, 8)])) == []
    assert "broken is left out: no such kernel" in capsys.readouterr().err


def test_native_sizes_are_the_photographs(tmp_path: Path) -> None:
    for number, size in enumerate([(20, 30), (40, 10)]):
        (tmp_path / f"{number}.jpg").write_bytes(encode(pixels(*size), "JPEG"))
    assert gpu.native_sizes(tmp_path, 3) == [(20, 30), (40, 10), (20, 30)]


def test_one_size_has_the_pixels_of_the_mixed() -> None:
    mixed, same = gpu.workloads(gpu.parse(["--images", "40"]))
    assert len({image.shape for image in same.images}) == 1
    assert len({image.shape for image in mixed.images}) > 30
    assert np.isclose(mixed.megapixels, same.megapixels, rtol=0.01)


def test_without_a_gpu_it_refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert main(["--device", "cpu"]) == 2
    assert "--out" in capsys.readouterr().err
