"""`quantize` from the shell, and `--precision` in every place that takes it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fullframe.engine.ort import OrtEngine
from tests.cli.command import run, run_here
from tests.models import LABELS
from tests.pictures import encode, pixels
from tests.serving import serving


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in class folders, to train on and held out."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(24):
        split, label = ("train", "test")[number % 2], LABELS[number % 3]
        place = folder / split / label
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(encode(pixels(20 + number, 44 - number, number)))
    return folder


@pytest.fixture(scope="module")
def model(tiny_model: Path, classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its int8 copy beside it."""
    path = tmp_path_factory.mktemp("models") / "net.onnx"
    shutil.copy(tiny_model, path)
    done = run("quantize", path, "--calibrate", classes, "--sizes", "0,32", "--images", 7, "--evaluate", classes)
    assert "int8 right, %" in done.stdout and "own" in done.stdout
    assert "net.int8.onnx" in done.stderr
    return path


def test_the_copy_records_what_it_was_made_from_and_how_it_compares(model: Path) -> None:
    contract = OrtEngine(model.with_name("net.int8.onnx")).contract
    assert contract.training["calibration_images"] == 14, "7 images at 2 sizes"
    compared = contract.training["compared"]
    assert compared["images"] == 12, "the held-out ones"
    assert list(compared["by_size"]) == ["0", "32"]
    for found in compared["by_size"].values():
        assert set(found) == {"agreement", "cosine", "float32", "int8"}
        assert 0.9 < found["cosine"] <= 1


def test_without_labels_only_the_answers_are_compared(model: Path, classes: Path, tmp_path: Path) -> None:
    done = run("quantize", model, "--calibrate", classes / "train" / LABELS[0], "-o", tmp_path / "copy.onnx")
    assert "same class, %" in done.stdout and "right" not in done.stdout
    assert OrtEngine(tmp_path / "copy.onnx").contract.precision == "int8"


@pytest.mark.parametrize(
    ("precision", "stem"), [("float32", "net"), ("int8", "net.int8"), ("auto", "net.int8"), (None, "net")]
)
def test_precision_chooses_the_file(model: Path, tmp_path: Path, precision: str | None, stem: str) -> None:
    picture = pixels(50, 60)
    (tmp_path / "a.png").write_bytes(encode(picture))
    chosen = [] if precision is None else ["--precision", precision]
    [line] = run_here("embed", tmp_path / "a.png", "--model", model, "--json", *chosen).stdout.splitlines()
    expected = OrtEngine(model.with_name(f"{stem}.onnx")).run(picture, ["features"])["features"]
    np.testing.assert_array_equal(np.float32(json.loads(line)["features"]), expected)


def test_auto_is_content_without_a_copy_and_int8_is_not(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(pixels(9, 9)))
    run_here("classify", tmp_path / "a.png", "--model", tiny_model, "--precision", "auto")
    done = run_here("classify", tmp_path / "a.png", "--model", tiny_model, "--precision", "int8", code=1)
    assert "there is no" in done.stderr and "tiny.int8.onnx" in done.stderr and "fullframe quantize" in done.stderr


def test_a_server_serves_the_copy_and_says_so(model: Path, tmp_path: Path) -> None:
    picture = pixels(50, 60)
    (tmp_path / "a.png").write_bytes(encode(picture))
    with serving(models=f"net={model}", precision="int8") as server:
        [line] = run("embed", tmp_path / "a.png", "--server", server.target, "--json").stdout.splitlines()
        assert "int8" in run("inspect", "--server", server.target).stdout
    expected = OrtEngine(model.with_name("net.int8.onnx")).run(picture, ["features"])["features"]
    np.testing.assert_array_equal(np.float32(json.loads(line)["features"]), expected)


def test_bad_arguments_are_told(model: Path, classes: Path, tmp_path: Path) -> None:
    itself = run_here("quantize", model, "--calibrate", classes, "-o", model, code=2).stderr
    assert "is the source; name another file" in " ".join(itself.split())
    copy = model.with_name("net.int8.onnx")
    assert "is int8 already" in run_here("quantize", copy, "--calibrate", classes, code=1).stderr
    (tmp_path / "empty").mkdir()
    assert "readable images" in run_here("quantize", model, "--calibrate", tmp_path / "empty", code=1).stderr
    assert "must end in .onnx" in run_here("quantize", model, "--calibrate", classes, "-o", "x.txt", code=2).stderr
