"""`convert` from the shell: a file that serves, or one line that says why not."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from fullframe.engine.ort import OrtEngine
from tests.cli.command import run, run_here
from tests.convert.classifiers import HEAD, STEM, plain
from tests.convert.light import light_model
from tests.pictures import encode, pixels


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources") / "classifier.onnx"
    onnx.save(plain(), path)
    return path


def test_it_writes_a_model_that_names_classes(tmp_path: Path) -> None:
    source, output, picture = tmp_path / "squeezenet.onnx", tmp_path / "any-size.onnx", tmp_path / "picture.png"
    onnx.save(light_model("squeezenet"), source)
    picture.write_bytes(encode(pixels(61, 130)))
    (tmp_path / "labels.txt").write_text("\n".join(f"class {number}" for number in range(1000)) + "\n")
    done = run(
        *("convert", source, "-o", output, "--labels", tmp_path / "labels.txt", "--license", "BSD-3-Clause"),
        *("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225", "--name", "squeeze"),
    )
    for step in (
        "opset 9 -> 18",
        "at the end taken off",
        "preprocessing inside",
        "proved: the source's scores",
        "31x31",
    ):
        assert step in done.stdout
    assert str(output) in done.stderr
    answer = json.loads(run_here("classify", "--json", "--model", output, picture).stdout)
    assert answer["classes"][0]["label"].startswith("class ")
    contract = OrtEngine(output).contract
    assert (contract.name, contract.training["license"]) == ("squeeze", "BSD-3-Clause")
    assert contract.normalisation["mean"] == [0.485, 0.456, 0.406]


def test_raw_pixels_in_another_order(classifier: Path, tmp_path: Path) -> None:
    output = tmp_path / "net.onnx"
    run_here(
        "convert", classifier, "-o", output, "--input-range", "255", "--bgr", "--mean", "0.4,0.5,0.6", "--std", "1,1,1"
    )
    assert OrtEngine(output).contract.normalisation == {
        "mean": [0.4, 0.5, 0.6],
        "std": [1, 1, 1],
        "input_range": 255,
        "order": "blue, green, red",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mean", "0.5"), "mean is 0.5; it must be three numbers"),
        (("--std", "1,0,1"), "std is 1, 0, 1; each must be above 0"),
        (("--size", "64x48"), "fixed to 32 x 32"),
        (("--weights", "w.safetensors"), "--weights is for"),
    ],
)
def test_wrong_options_are_told(classifier: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    done = run_here("convert", classifier, "-o", tmp_path / "net.onnx", *options, code=1)
    assert message in done.stderr
    assert not (tmp_path / "net.onnx").exists()


def test_a_failure_names_the_node_and_leaves_what_was_there(tmp_path: Path) -> None:
    source, output = tmp_path / "sigmoid.onnx", tmp_path / "net.onnx"
    onnx.save(plain(STEM + HEAD.replace("y =", "s =") + "\n y = Sigmoid (s)"), source)
    output.write_bytes(b"before")
    done = run_here("convert", source, "-o", output, code=1)
    assert "Sigmoid 'y'" in done.stderr and done.stdout == ""
    assert output.read_bytes() == b"before" and sorted(tmp_path.iterdir()) == [output, source]


def test_the_file_runs_in_onnx_runtime_alone(classifier: Path, tmp_path: Path) -> None:
    import onnxruntime

    output = tmp_path / "net.onnx"
    run_here("convert", classifier, "-o", output)
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    images = np.stack([pixels(45, 37, seed) for seed in range(3)])
    assert session.run(["logits"], {"images": images})[0].shape == (3, 5)
