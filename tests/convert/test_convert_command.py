"""`convert` from the shell: a file that serves, or one line that says why not."""

import json
import os
import shlex
from pathlib import Path

import numpy as np
import onnx
import pytest

from fullframe.engine.ort import OrtEngine
from fullframe.model.repository import find_models
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
        (("--std", "1,-1,1"), "std is 1, -1, 1; each must be above 0"),
        (("--std", "1,inf,1"), "std is 1, inf, 1; it must be three numbers"),
        (("--mean", "124,116,104", "--std", "0.2,0.2,0.2"), "mean is 124, 116, 104; it must be of pixels from 0 to 1"),
        (("--mean", "0,0,-0.1"), "mean is 0, 0, -0.1; it must be of pixels from 0 to 1"),
        (("--mean", "0.5,0.5,0.5", "--std", "58,57,57"), "std is 58, 57, 57; it must be of pixels from 0 to 1"),
        (("--name", "my net"), "'my net' can't name a model"),
        (("--size", "64x48"), "fixed to 32 x 32"),
        (("--weights", "w.safetensors"), "--weights is for"),
    ],
)
def test_wrong_options_are_told(classifier: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    done = run_here("convert", classifier, "-o", tmp_path / "net.onnx", *options, code=1)
    assert message in done.stderr
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.parametrize("ending", ["", "\n", "\r\n \n\n"])
def test_labels_are_taken_line_by_line(classifier: Path, tmp_path: Path, ending: str) -> None:
    output, labels = tmp_path / "net.onnx", tmp_path / "labels.txt"
    labels.write_bytes(("\ufeffchat\r\nâne \r\nsea\u00a0lion\r\n鯨\r\ne" + ending).encode())
    run_here("convert", classifier, "-o", output, "--labels", labels)
    assert OrtEngine(output).contract.labels == ("chat", "âne", "sea\u00a0lion", "鯨", "e")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\nâne\nd\ne\n".encode("latin-1"), "labels.txt is not UTF-8 at line 3"),
        ("a\nb\n".encode("utf-16"), "labels.txt is not UTF-8 at line 1"),
        (b"a\nb\x1b[2J\nc\nd\ne\n", "line 2 of labels.txt has a control character: 'b\\x1b[2J'"),
        ("a\nb\u2028c\nd\ne\n".encode(), "line 2 of labels.txt has a control character"),
        (b"a\nb\n\nc\nd\ne\n", "line 3 of labels.txt is blank"),
        (b"\na\nb\nc\nd\ne\n", "line 1 of labels.txt is blank"),
        (b"\n \n", "labels.txt has no names"),
        (b"a\nb\n", "there are 2 labels for 5 classes"),
    ],
)
def test_wrong_labels_are_told(classifier: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "labels.txt").write_bytes(content)
    options = ("--labels", tmp_path / "labels.txt")
    assert message in run_here("convert", classifier, "-o", tmp_path / "net.onnx", *options, code=1).stderr


def test_the_closing_hint_is_a_command_that_works(classifier: Path, tmp_path: Path) -> None:
    output = tmp_path / "it's (my) net=1.onnx"
    said = run_here("convert", classifier, "-o", output).stderr
    command = shlex.split(said.partition("; ")[2])
    assert command[:3] == ["fullframe", "serve", "--model"] and command[4:] == ["serves", "it"]
    (found,) = find_models([command[3]])
    assert (found.path, found.name) == (output, OrtEngine(output).contract.name)


def test_an_output_that_can_t_be_written_is_told_before_the_work(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source.onnx"
    source.write_bytes(b"opening it would fail")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "link.onnx").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    for output, message in (
        (source, "is the source; name another file"),
        ("source.onnx", "is the source"),
        ("link.onnx", "is the source"),
        ("folder.onnx", "is a folder"),
        ("absent/net.onnx", "there is no folder 'absent'"),
    ):
        assert message in " ".join(run_here("convert", source, "-o", output, code=2).stderr.split())
    assert source.read_bytes() == b"opening it would fail"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_can_t_be_written_to_is_told_before_the_work(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    (tmp_path / "source.onnx").write_bytes(b"opening it would fail")
    done = run_here("convert", tmp_path / "source.onnx", "-o", folder / "net.onnx", code=2)
    assert "can't be written to" in " ".join(done.stderr.split())


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
