"""`fullframe models` and `inspect`: the contract, readable and as JSON, from files and from a server."""

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from fullframe.convert.metadata import get_contract, load_model, set_contract
from fullframe.model.contract import Tiles
from tests.cli.command import run_here
from tests.model.graphs import Branches, Window, build
from tests.models import LABELS, Head, write_model
from tests.serving import Running


@pytest.mark.parametrize("where", ["here", "server"])
def test_models(tiny_model: Path, server: Running, where: str) -> None:
    options = [tiny_model] if where == "here" else ["--server", server.target]
    table = run_here("models", *options).stdout.splitlines()
    assert table[2].split() == ["tiny", "1", "default", "7", "16", "4x4", "1x1"]
    [line] = run_here("models", *options, "--json").stdout.splitlines()
    listed = json.loads(line)
    assert (listed["name"], listed["version"], listed["default"]) == ("tiny", "1", True)
    assert listed["contract"]["labels"] == list(LABELS)


@pytest.mark.parametrize("where", ["here", "server"])
def test_inspect(tiny_model: Path, server: Running, where: str) -> None:
    options = [tiny_model] if where == "here" else ["tiny", "--server", server.target]
    text = run_here("inspect", *options).stdout
    for part in (
        "tiny, version 1",
        f"7: {', '.join(LABELS)}",
        "16 channels, pooled by avg",
        "mean(class_map)",
        "4x4 pixels",
        "15x15 pixels",
        "1x1 pixels",
        "127.5, 127.5, 127.5",
        "none: random weights",
        "possible, from multiples of 4x4 pixels" if where == "here" else "not known: the file does not say",
    ):
        assert part in text
    assert json.loads(run_here("inspect", *options, "--json").stdout)["contract"]["receptive_field"] == [15, 15]


@pytest.mark.parametrize(
    ("tiles", "words"),
    [
        (Tiles((4, 8)), "possible, from multiples of 8x4 pixels"),
        (Tiles((4, 4), ("Mul 'm' [weighs]", "Add 'a' fails")), "not possible: Mul 'm' [weighs]; Add 'a' fails"),
    ],
)
def test_inspect_says_whether_there_are_tiles(tiny_model: Path, tmp_path: Path, tiles: Tiles, words: str) -> None:
    model = load_model(tiny_model)
    set_contract(model, replace(get_contract(model), tiles=tiles))
    onnx.save(model, tmp_path / "net.onnx")
    lines = run_here("inspect", tmp_path / "net.onnx").stdout.splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("tiles")] == [words]
    listed = json.loads(run_here("inspect", tmp_path / "net.onnx", "--json").stdout)
    assert listed["contract"]["tiles"] == {"alignment": list(tiles.alignment), "obstacles": list(tiles.obstacles)}


@pytest.mark.parametrize(("head", "words"), [("layers", "merged features too"), ("peeks", "not of an image in pieces")])
def test_inspect_says_whether_huge_images_have_logits(tmp_path: Path, head: Head, words: str) -> None:
    path = write_model(tmp_path / "m.onnx", head=head)
    [line] = [line for line in run_here("inspect", path).stdout.splitlines() if line.startswith("logits")]
    assert words in line
    [told] = [json.loads(line) for line in run_here("inspect", path, "--json").stdout.splitlines()]
    assert told["logits_obstacle"][:26] == ("its 'logits' are computed " if head == "peeks" else "")


def test_inspect_says_what_stands_against_tiles_in_the_graph(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.onnx", breaks_above=10**6)
    assert "not possible: Shape 'height' takes the image's size" in run_here("inspect", path).stdout


def test_inspect_graph_lists_every_map(tiny_model: Path) -> None:
    lines = [line.split() for line in run_here("inspect", tiny_model, "--graph", "--size", "21x10").stdout.splitlines()]
    assert lines[0] == ["tiny,", "version", "1"]
    assert ["images", "N,h,w,3", "1x1", "1x1", "0,", "0", "21x10"] in lines
    assert ["pooled", "N,16,h,w", "4x4", "7x7", "-3,", "-3", "6x3", "MaxPool", "'pooled'"] in lines
    assert ["class_map", "N,7,h,w", "4x4", "15x15", "-7,", "-7", "6x3", "Conv", "'class_map'"] in lines
    assert "features" not in {line[0] for line in lines if line}, "no map"
    assert lines[-1] == ["smallest", "image", "1x1", "pixels"]
    told = [json.loads(line) for line in run_here("inspect", tiny_model, "--graph", "--json").stdout.splitlines()]
    assert told[-1] == {
        "model": "tiny",
        "version": "1",
        "tensor": "class_map",
        "node": "Conv 'class_map'",
        "shape": ["N", 7, "h", "w"],
        "jump": [4, 4],
        "receptive_field": [15, 15],
        "start": [-7, -7],
        "obstacles": [],
    }


def test_inspect_graph_takes_any_onnx_file_and_says_what_fails(tmp_path: Path) -> None:
    onnx.save(
        build(
            Window("Conv", (3, 3), (2, 2), auto_pad="SAME_UPPER"),
            Branches((Window("Conv", (3, 3), (2, 2)), Window("MaxPool", (2, 2), (2, 2))), "Concat"),
            "Relu",
        ),
        tmp_path / "any.onnx",
    )
    text = run_here("inspect", tmp_path / "any.onnx", "--graph").stdout
    assert "3x3+" not in text and "4x4+" in text
    assert "+ sees more       Conv 'node_conv_3' has auto_pad SAME_UPPER with a stride of 2" in text
    assert "sizes that fail   Concat 'node_concat_6' joins branches of different sizes: 1 and 2 cells" in text
    assert (
        "needs at least 5 x 5" in run_here("inspect", tmp_path / "any.onnx", "--graph", "--size", "4x9", code=1).stderr
    )
    for size in ("9", "0x0x0", "x", "3 x 4", "-1x5"):
        assert (
            "is no size; write 640x480"
            in run_here("inspect", tmp_path / "any.onnx", "--graph", f"--size={size}", code=2).stderr
        )


def test_inspect_graph_is_of_files(tiny_model: Path, server: Running) -> None:
    asked = run_here("inspect", "tiny", "--graph", "--server", server.target, code=2)
    assert "a server does not tell its models' graphs; give a file" in asked.stderr
    assert "shown with --graph" in run_here("inspect", tiny_model, "--size", "3x4", code=2).stderr


def test_a_repository_and_its_versions(tmp_path: Path) -> None:
    for version in (2, 10):
        (tmp_path / "net" / str(version)).mkdir(parents=True)
        write_model(tmp_path / "net" / str(version) / "model.onnx", name="net")
    rows = run_here("models", tmp_path).stdout.splitlines()[2:]
    assert [row.split()[:2] for row in rows] == [["net", "2"], ["net", "10"]]


def test_what_is_not_there(server: Running, tmp_path: Path) -> None:
    assert "no model at 'missing.onnx'" in run_here("inspect", "missing.onnx", code=1).stderr
    assert "no model is named 'other'" in run_here("inspect", "other", "--server", server.target, code=1).stderr
    (tmp_path / "text.onnx").write_text("no model")
    assert "text.onnx can't be loaded" in run_here("inspect", tmp_path / "text.onnx", code=1).stderr
    assert "either a server or files" in run_here("models", tmp_path, "--server", server.target, code=2).stderr
