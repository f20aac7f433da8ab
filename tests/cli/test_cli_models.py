"""`fullframe models` and `inspect`: the contract, readable and as JSON, from files and from a server."""

import json
from pathlib import Path

import pytest

from tests.cli.command import run_here
from tests.models import LABELS, write_model
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
    ):
        assert part in text
    assert json.loads(run_here("inspect", *options, "--json").stdout)["contract"]["receptive_field"] == [15, 15]


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
