"""`fullframe classify` and `embed`: what comes out, where, and how a run ends that met bad files."""

import json
import os
import pty
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import fullframe
from fullframe.engine.predictor import Predictor
from fullframe.image import Limits, open_source
from fullframe.image.overlay import draw_class_map
from tests.cli.command import COMMAND, environment, run, run_here
from tests.pictures import encode, pixels
from tests.serving import Running, serving, start

SIZES = {"a/first.png": (30, 40), "a/second.JPG": (1, 1), "b/third.png": (7, 500)}


@pytest.fixture(scope="module")
def predictor(tiny_model: Path) -> Iterator[Predictor]:
    with fullframe.load(str(tiny_model)) as predictor:
        yield predictor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures in two folders, among files that are none."""
    for name, (height, width) in SIZES.items():
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(pixels(height, width), "JPEG" if name.endswith("JPG") else "PNG"))
    (tmp_path / "photos" / "README.txt").write_text("no picture")
    (tmp_path / "photos" / ".hidden.png").write_text("no picture either")
    return tmp_path / "photos"


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_table_of_classes(folder: Path, tiny_model: Path, predictor: Predictor) -> None:
    file = folder / "a/first.png"
    table = run("classify", file, "--model", tiny_model, "-k", 2).stdout.splitlines()
    best, second = predictor.classify(file, 2)
    assert table[0].split() == ["image", "size", "class", "probability"]
    assert table[2].split() == [str(file), "40x30", best.label, f"{best.probability:.1%}"]
    assert table[3].split() == [second.label, f"{second.probability:.1%}"]
    assert len(table) == 4


def test_folders_and_globs_in_order(folder: Path, tiny_model: Path) -> None:
    expected = [str(folder / name) for name in SIZES]
    for where in (folder, f"{folder}/**/*.[pJ]*"):
        found = lines(run_here("classify", where, "--model", tiny_model, "--json").stdout)
        assert [line["image"] for line in found] == expected
        assert [(line["height"], line["width"]) for line in found] == list(SIZES.values())


def test_json_in_process_and_from_a_server(
    folder: Path, tiny_model: Path, server: Running, predictor: Predictor
) -> None:
    here = lines(run("classify", folder, "--model", tiny_model, "--json").stdout)
    there = lines(run("classify", folder, "--server", server.target, "--model", "tiny/1", "--json").stdout)
    for mine, theirs, name in zip(here, there, SIZES, strict=True):
        expected = predictor.classify(folder / name)
        for line in (mine, theirs):
            classes = line["classes"]
            assert isinstance(classes, list)
            assert [c["label"] for c in classes] == [c.label for c in expected]
            assert [c["index"] for c in classes] == [c.index for c in expected]
            assert [np.float32(c["probability"]) for c in classes] == [np.float32(c.probability) for c in expected]
            assert [np.float32(c["logit"]) for c in classes] == [np.float32(c.logit) for c in expected]


@pytest.mark.parametrize("where", ["here", "server"])
def test_bad_files_are_named_and_the_rest_goes_on(folder: Path, tiny_model: Path, server: Running, where: str) -> None:
    (folder / "b/broken.png").write_bytes(encode(pixels(50, 50))[:-200])
    options = ["--model", tiny_model] if where == "here" else ["--server", server.target]
    done = run_here("classify", "missing.png", folder, *options, "--json", code=1)
    assert "fullframe: missing.png: cannot read missing.png: No such file or directory\n" in done.stderr
    assert f"fullframe: {folder}/b/broken.png: " in done.stderr
    assert done.stderr.endswith("fullframe: 2 of 5 images failed\n")
    found = lines(done.stdout)
    assert ["error" in line for line in found] == [True, False, False, True, False]
    table = run_here("classify", "missing.png", folder, *options, code=1).stdout
    assert "third.png" in table
    assert "missing.png" not in table
    assert not run_here("classify", "missing.png", *options, code=1).stdout


def test_wrong_use_ends_with_2(folder: Path, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, complaint in (
        (["classify"], "Missing argument"),
        (["classify", tmp_path / "empty"], "no images in the folder"),
        (["classify", f"{tmp_path}/*.xyz"], "no file matches"),
        (["classify", folder, "-k", 0], "'--top-k' / '-k'"),
        (["classify", folder, "--explain", "why.png"], "takes one image"),
        (["classify", folder / "a/first.png", "--explain", "why.jpg"], "must end in .png"),
        (["classify", folder, "--engine", "magic"], "'--engine': 'magic' is not one of 'auto', 'onnx', 'torch'"),
        (["embed", folder, "--pooling", "median"], "unknown kind 'median'"),
        (["embed", folder, "-o", "features.csv"], "must end in .npz"),
        (["embed", folder, "-o", "features.npz", "--json"], "goes without --json"),
        (["clasify"], "Did you mean 'classify'?"),
    ):
        assert complaint in run_here(*arguments, code=2).stderr


def test_failures_end_with_1_and_one_line(folder: Path) -> None:
    for options, complaint in (
        (["--model", "missing.onnx"], "no model at 'missing.onnx'"),
        (["--server", "127.0.0.1:1", "--timeout", "0.5"], "no server can be reached at 127.0.0.1:1"),
    ):
        done = run_here("classify", folder / "a/first.png", *options, code=1)
        assert complaint in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not done.stdout


def test_a_larger_image_needs_leave(tiny_model: Path, folder: Path) -> None:
    refused = run_here("classify", folder / "a", "--model", tiny_model, "--max-megapixels", "0.001", code=1)
    assert "40x30 (width x height) is 0.0 megapixels; the limit is 0.001" in refused.stderr
    assert "second.JPG" in refused.stdout


@pytest.mark.parametrize("where", ["here", "server"])
def test_features_as_npz(
    folder: Path, tmp_path: Path, tiny_model: Path, server: Running, predictor: Predictor, where: str
) -> None:
    options = ["--model", tiny_model] if where == "here" else ["--server", server.target]
    output = tmp_path / "features.npz"
    wish = ["--pooling", "gem(3)+max@1,2", "--normalize", "-o", output]
    done = run("embed", folder, "missing.png", *wish, *options, code=1)
    assert not done.stdout
    assert f"wrote {output}: 4 x 160 features" in done.stderr
    with np.load(output) as arrays:
        found = dict(arrays)
    assert list(found["path"]) == [*(str(folder / name) for name in SIZES), "missing.png"]
    assert list(zip(found["height"], found["width"], strict=True)) == [*SIZES.values(), (0, 0)]
    assert list(found["error"][:3]) == ["", "", ""]
    assert "No such file" in found["error"][3]
    assert found["features"].dtype == np.float32
    for row, name in zip(found["features"], SIZES, strict=False):
        np.testing.assert_array_equal(row, predictor.embed(folder / name, "gem(3)+max@1,2", normalize=True))
    assert np.isnan(found["features"][3]).all()
    assert not list(tmp_path.glob("*.part"))


def test_features_as_json_keep_every_bit(folder: Path, tiny_model: Path, predictor: Predictor) -> None:
    file = folder / "a/first.png"
    [line] = lines(run_here("embed", file, "--model", tiny_model, "--json").stdout)
    np.testing.assert_array_equal(np.array(line["features"], np.float32), predictor.embed(file))
    table = run_here("embed", file, "--model", tiny_model).stdout
    assert "40x30" in table
    assert "16" in table


def test_explained_at_the_picture_s_own_resolution(
    tmp_path: Path, tiny_model: Path, server: Running, predictor: Predictor
) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(encode(pixels(61, 83)))
    drawings = []
    for name, options in (("here.png", ["--model", tiny_model]), ("server.png", ["--server", server.target])):
        done = run_here("classify", file, "--explain", tmp_path / name, *options)
        assert f"wrote {tmp_path / name}: where it looks like" in done.stderr
        drawings.append(open_source(tmp_path / name, Limits()).pixels())
    answer, contract = predictor.predict(file, class_map=True), predictor.contract
    assert answer.class_map is not None
    picture = open_source(file, Limits()).pixels()
    expected = draw_class_map(
        # The first cell sees pixels -7 to 7.
        picture,
        answer.class_map[answer.classes[0].index],
        stride=contract.stride,
        start=(0, 0),
    )
    for drawing in drawings:
        np.testing.assert_array_equal(drawing, expected)
    assert not np.array_equal(expected, picture)


def on_a_terminal(*arguments: object) -> bytes:
    """What the command shows on stderr where that is a terminal."""
    terminal, stderr = pty.openpty()
    shown = bytearray()

    def read() -> None:
        with suppress(OSError):  # that is how it ends
            while data := os.read(terminal, 1 << 16):
                shown.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    subprocess.run(
        [*COMMAND, *map(str, arguments)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        env=environment(TERM="xterm", COLUMNS="120"),
        timeout=60,
    )
    os.close(stderr)
    reader.join()
    os.close(terminal)
    return bytes(shown)


def test_a_progress_bar_only_on_a_terminal(folder: Path, tiny_model: Path) -> None:
    assert not run("classify", folder, "--model", tiny_model).stderr
    assert b"3/3" in on_a_terminal("classify", folder, "--model", tiny_model)


def test_an_image_in_pieces_has_a_bar_of_its_own(tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "huge.jpg"
    file.write_bytes(encode(pixels(2100, 2000), "JPEG"))
    assert not run("classify", file, "--model", tiny_model).stderr
    assert re.search(rb"huge.jpg: [0-9]+% computed", on_a_terminal("classify", file, "--model", tiny_model))


def test_an_upload_has_a_bar_of_its_own(tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "huge.png"
    file.write_bytes(encode(np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8)))
    with serving(models=tiny_model, max_image_bytes=2**20, tile_pixels=100_000) as server:
        shown = on_a_terminal("classify", file, "--server", server.target)
    assert b"huge.png: 0 bytes of 1.9 MB sent" in shown
    assert re.search(rb"huge.png: [0-9]+% computed", shown)


def test_interrupted_without_a_traceback(tmp_path: Path, slow_model: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02}.jpg").write_bytes(encode(pixels(500, 500), "JPEG"))
    process = subprocess.Popen(
        [*COMMAND, "classify", str(tmp_path), "--model", str(slow_model), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout and process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == ""


def test_a_server_that_dies_fails_what_is_left_and_keeps_the_rest(
    folder: Path, tmp_path: Path, tiny_model: Path
) -> None:
    fifo = folder / "z.png"  # reading it waits for us
    os.mkfifo(fifo)
    (folder / "zz.png").write_bytes(encode(pixels(3, 3)))
    output = tmp_path / "features.npz"
    server = start(models=str(tiny_model))
    try:
        arguments = ["embed", str(folder), "--server", server.target, "-o", str(output), "--timeout", "2"]
        process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True, env=environment())
        with fifo.open("wb") as writer:  # opens once the first three are sent
            server.process.kill()
            server.process.wait()
            writer.write(encode(pixels(4, 4)))
        _, stderr = process.communicate(timeout=60)
    finally:
        server.process.kill()
        server.process.wait()
    assert process.returncode == 1
    assert stderr.count("no server can be reached") == 1  # not once for each image
    with np.load(output) as arrays:
        errors = list(arrays["error"])
        assert len(errors) == 5
        assert all("no server can be reached" in error for error in errors[3:])
