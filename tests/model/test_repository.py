"""Model specs: files, folders of versions, repositories, and what is refused."""

from pathlib import Path
from typing import cast, get_args

import pytest

from fullframe.errors import InvalidInput, InvalidModel
from fullframe.model.repository import BUNDLED, Precision, find_models


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for place in ("birds/1", "birds/2", "birds/10", "fish/nightly", "notes"):
        (tmp_path / place).mkdir(parents=True)
        if place != "notes":
            (tmp_path / place / "model.onnx").touch()
    (tmp_path / "flat.onnx").touch()
    return tmp_path


def found(*specs: str) -> list[tuple[str, str]]:
    return [(file.name, file.version) for file in find_models(specs)]


def test_no_spec_is_the_bundled_model() -> None:
    [file] = find_models([])
    assert file.path == BUNDLED


def test_files_and_folders(repository: Path) -> None:
    assert found(str(repository / "flat.onnx")) == [("flat", "1")]
    assert found(f"pets={repository / 'flat.onnx'}") == [("pets", "1")]
    assert found(str(repository / "birds")) == [("birds", "1"), ("birds", "2"), ("birds", "10")]
    assert found(f"pets={repository / 'fish'}") == [("pets", "nightly")]
    assert found(str(repository)) == [("birds", "1"), ("birds", "2"), ("birds", "10"), ("fish", "nightly")]


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "x" * 200, "naïve"])
def test_names_that_could_be_paths_are_refused(repository: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="can't name a model"):
        find_models([f"{name}={repository / 'flat.onnx'}"])


def test_specs_that_name_nothing_say_so(repository: Path) -> None:
    with pytest.raises(InvalidInput, match="no model at"):
        find_models([str(repository / "absent.onnx")])
    with pytest.raises(InvalidInput, match="holds no NAME/VERSION"):
        find_models([str(repository / "notes")])
    with pytest.raises(InvalidInput, match="holds no VERSION"):
        find_models([f"pets={repository / 'notes'}"])
    with pytest.raises(InvalidModel, match="given twice"):
        find_models([f"birds={repository / 'flat.onnx'}", str(repository / "birds")])


def test_a_copy_beside_a_model_is_served_when_asked_for(repository: Path) -> None:
    flat, copy = repository / "flat.onnx", repository / "flat.int8.onnx"
    assert [file.path for file in find_models([str(flat)], "auto")] == [flat]
    with pytest.raises(InvalidInput, match=r"there is no .*flat\.int8\.onnx"):
        find_models([str(flat)], "int8")
    copy.touch()
    newest = repository / "birds" / "10"
    (newest / "model.int8.onnx").touch()
    copies: tuple[Precision, ...] = ("auto", "int8")
    for precision in copies:
        assert [(file.name, file.path) for file in find_models([str(flat)], precision)] == [("flat", copy)]
    paths = [file.path for file in find_models([str(repository / "birds")], "auto")]
    assert [path.name for path in paths] == ["model.onnx", "model.onnx", "model.int8.onnx"]
    assert [file.path for file in find_models([str(flat)])] == [flat]
    for precision in get_args(Precision):
        assert [file.path for file in find_models([str(copy)], precision)] == [copy], "named itself"
    with pytest.raises(InvalidInput, match="precision is 'half'"):
        find_models([str(flat)], cast("Precision", "half"))
