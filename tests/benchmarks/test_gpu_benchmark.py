"""The GPU benchmark's own logic, on a CPU and in miniature: what it measures, checks, keeps and refuses."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import main, parse
from benchmarks.gpu_sides import SIDES, TURNS, Fullframe, OneByOne, PaddedToLargest, usable
from benchmarks.workloads import CLASS, CLASS_SIDES, MIXED, SAME, native_sizes, noise, workloads
from fullframe.engine.ort import OrtEngine
from fullframe.engine.query import Query
from fullframe.model.repository import ModelFile
from tests.pictures import encode, pixels


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


QUICK = ["fullframe", "pytorch one by one", "pytorch padded to the largest", "onnxruntime one by one"]


@pytest.mark.parametrize("sides", [QUICK, pytest.param([each.name for each in SIDES], marks=pytest.mark.slow)])
def test_every_side_is_measured_and_kept(tmp_path: Path, tiny_model: Path, sides: list[str]) -> None:
    words = ["--device", "cpu", "--tiny", "--out", str(tmp_path / "new"), "--images", "5", "--rounds", "1"]
    words += ["--sides", ",".join(sides), "--model", str(tiny_model)]
    assert main(words) == 0
    kept = rows(tmp_path / "new" / "gpu.csv")
    assert [(row["workload"], row["side"]) for row in kept] == [
        (work, each.name) for turn in TURNS for work in (SAME, MIXED, CLASS) for each in turn if each.name in sides
    ]
    for row in kept:
        assert float(row["images_per_s"]) > 0 and float(row["new_size_ms"]) > 0
        for column, ones in (("times_one_by_one", QUICK[1]), ("times_padded", QUICK[2])):
            assert float(row[column]) > 0 and (row["side"] != ones or row[column] == "1.00")
        right = float(row["error"]) <= 1e-4
        assert right or (row["workload"] != SAME and row["side"] == "pytorch padded to the largest"), row
    parts = rows(tmp_path / "new" / "gpu_kernels.csv")
    shares = [float(row["share"]) for row in parts]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < sum(shares) <= 1.001
    assert any("conv" in row["kernel"] for row in parts)
    assert (tmp_path / "new" / "gpu.png").stat().st_size > 0


def test_padding_without_masks_is_told_from_the_rest(tiny_model: Path) -> None:
    file, reference = ModelFile("tiny", "1", tiny_model), OrtEngine(tiny_model)
    images = noise([(9, 30), (31, 8), (20, 20)], 0)
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
    assert list(usable(Broken, file, "cpu", "float32", [pixels(8, 8)])) == []
    assert "broken, float32, is left out: no such kernel" in capsys.readouterr().err


def test_native_sizes_are_the_photographs(tmp_path: Path) -> None:
    for number, size in enumerate([(20, 30), (40, 10)]):
        (tmp_path / f"{number}.jpg").write_bytes(encode(pixels(*size), "JPEG"))
    assert native_sizes(tmp_path, 3) == [(20, 30), (40, 10), (20, 30)]


def test_one_size_has_the_pixels_of_the_mixed() -> None:
    same, mixed, around = workloads(40)
    assert (same.name, mixed.name, around.name) == (SAME, MIXED, CLASS)
    assert len({image.shape for image in same.images}) == 1
    assert len({image.shape for image in mixed.images}) > 30
    assert np.isclose(mixed.megapixels, same.megapixels, rtol=0.01)
    lengths = [length for image in around.images for length in image.shape[:2]]
    assert CLASS_SIDES[0] <= min(lengths) < 224 < max(lengths) <= CLASS_SIDES[1]


def test_images_without_an_answer_are_no_figures(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    side = Fullframe(ModelFile("tiny", "1", tiny_model), "cpu", "float32")
    images = side.ready(noise([(20, 20), (9, 8)], 0))
    assert len(side.run(images)) == 2
    monkeypatch.setattr("benchmarks.gpu_sides.Query", lambda **_: Query(top_k=1))
    with pytest.raises(RuntimeError, match="2 of 2 images came back without logits"):
        side.run(images)
    side.close()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--compute", "float32,foo"], "'foo' is none of float32, bfloat16, float16"),
        (["--sides", "fullframe,one"], "'one' is none of fullframe, pytorch one by one, "),
        (["--sides", ","], "'' is none of fullframe, "),
        (["--rounds", "0"], "'0' is no whole number of 1 or more"),
        (["--images", "x"], "'x' is no whole number of 1 or more"),
        (["--device", "cuda"], "PyTorch sees no GPU here"),
    ],
)
def test_what_can_t_be_measured_is_refused_first(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--photos=/nonexistent", "/nonexistent can't be read as a folder or tar of photographs: "),
        ("--photos={here}", "{here} can't be read as a folder or tar of photographs: "),
        ("--photos={empty}", "{empty} has no photographs"),
        ("--model=/nonexistent.onnx", "no model at '/nonexistent.onnx'"),
    ],
)
def test_files_that_are_not_there_are_named(
    tmp_path: Path, option: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {"here": __file__, "empty": str(tmp_path)}
    assert main(["--device", "cpu", "--tiny", option.format(**there)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[1].startswith(f"benchmarks.gpu: {reason.format(**there)}")


@pytest.mark.parametrize("end", [gpu.OutOfTime, KeyboardInterrupt])
def test_what_was_measured_before_the_end_is_kept(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    def begin(run: gpu.Run, what: str) -> None:
        if what.endswith(CLASS):
            assert len(rows(tmp_path / "gpu.csv")) == len(run.rows) == 2
            raise end(what)

    monkeypatch.setattr(gpu.Run, "begin", begin)
    words = ["--device", "cpu", "--tiny", "--images", "3", "--sides", "fullframe", "--model", str(tiny_model)]
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert [row["workload"] for row in rows(tmp_path / "gpu.csv")] == [SAME, MIXED]
    assert (tmp_path / "gpu.png").stat().st_size > 0


def test_out_of_time_nothing_new_begins(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--tiny", "--images", "3", "--model", str(tiny_model), "--out", str(tmp_path)]
    assert main([*words, "--minutes", "0"]) == 1
    assert "no time is left for fullframe, float32: its first images; 0 rows" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_nothing_is_kept_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = parse([])
    assert (found.device, found.out, found.compute) == ("cpu", None, ["float32"])
    assert parse(["--out", "there"]).out == Path("there")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = parse([])
    assert (found.device, found.out, found.images) == ("cuda", gpu.RESULTS, 256)


def test_fullframe_is_held_to_its_aims() -> None:
    row = {"compute": "float32", "side": "fullframe", "workload": MIXED, "of_same_size": "0.75"}
    row |= {"times_one_by_one": "9.00", "times_seen_size": "1.20"}
    told = list(gpu.aims([row, row | {"side": "pytorch one by one"}, row | {"workload": CLASS}]))
    assert [each.split("; ")[0] for each in told] == [
        "float32: mixed sizes have 0.75 of the pixels a second of one size",
        "float32: the first image of a new size takes 1.20 times a later one's",
        "float32: around 224 pixels it is 9.00 times as fast as PyTorch one by one",
    ]
