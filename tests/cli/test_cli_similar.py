"""`fullframe similar`: the nearest images of a table, printed and drawn, and what can't be compared is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import fullframe
from fullframe.image import open_source, own_limits, thumbnail
from fullframe.image.sheet import SIDE, corner
from tests.cli.command import run, run_here
from tests.models import write_model
from tests.pictures import encode, pixels
from tests.serving import Running

COUNT = 23


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, two of which are the same, and a file that is none."""
    folder = tmp_path_factory.mktemp("similar") / "photos"
    (folder / "deep").mkdir(parents=True)
    for number in range(COUNT):
        picture = encode(pixels(30 + number, 50 - number, number % (COUNT - 1)))
        (folder / ("deep" if number % 3 else ".") / f"{number:02}.png").write_bytes(picture)
    (folder / "same.png").write_bytes((folder / "deep/05.png").read_bytes())
    (folder / "text.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def table(photos: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "features.parquet"
    run_here("embed", photos, "-o", path, "--model", tiny_model, "--pooling", "max+std", "--normalize", code=1)
    return path


def found(*arguments: object) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run_here("similar", *arguments, "--json").stdout.splitlines()]


def brute_force(table: Path, query: np.ndarray[Any, Any]) -> list[tuple[str, float]]:
    rows = [row for row in pq.read_table(table).to_pylist() if row["feature"] is not None]
    features = np.array([row["feature"] for row in rows], np.float64)
    cosines = features @ query / np.linalg.norm(features, axis=1) / np.linalg.norm(query)
    order = np.argsort(-np.round(cosines, 12), kind="stable")
    return [(rows[number]["path"], cosines[number]) for number in order]


@pytest.mark.parametrize("where", ["here", "server", "table"])
def test_the_nearest_are_those_that_numpy_finds(
    photos: Path, table: Path, tiny_model: Path, server: Running, where: str
) -> None:
    file = photos / "deep/05.png"
    options = {
        "here": [file, table, "--model", tiny_model],
        "server": [file, table, "--server", server.target],
        "table": ["deep/05.png", table],
    }[where]
    with fullframe.load(str(tiny_model)) as predictor:
        expected = brute_force(table, predictor.embed(file, "max+std", normalize=True).astype(np.float64))
    nearest = found(*options, "--top", 9)
    assert [each["path"] for each in nearest] == [path for path, _ in expected[:9]]
    assert [each["path"] for each in nearest][:2] == ["deep/05.png", "same.png"]  # itself, and its equal by path
    assert nearest[0]["similarity"] == nearest[1]["similarity"] == pytest.approx(1, abs=1e-12)
    assert [each["rank"] for each in nearest] == list(range(1, 10))
    np.testing.assert_allclose([each["similarity"] for each in nearest], [cosine for _, cosine in expected[:9]], 1e-12)
    assert len(found(*options, "--top", 999)) == COUNT + 1  # not the text


def test_a_table_for_people(photos: Path, table: Path) -> None:
    lines = run_here("similar", "same.png", table, "-k", 3).stdout.splitlines()
    assert lines[0].split() == ["rank", "similarity", "image", "size", "class", "probability"]
    row = next(row for row in pq.read_table(table).to_pylist() if row["path"] == "same.png")
    assert lines[3].split() == ["2", "1.0000", "same.png", "45x35", row["label"], f"{row['probability']:.1%}"]
    assert len(lines) == 5


def test_a_query_of_another_folder(tmp_path: Path, table: Path, tiny_model: Path) -> None:
    file = tmp_path / "mine.jpg"
    file.write_bytes(encode(pixels(70, 80, 99), "JPEG"))
    with fullframe.load(str(tiny_model)) as predictor:
        expected = brute_force(table, predictor.embed(file, "max+std").astype(np.float64))
    assert [each["path"] for each in found(file, table, "--model", tiny_model, "-k", 3)] == [p for p, _ in expected[:3]]


def test_a_contact_sheet_shows_each_in_its_place(photos: Path, table: Path, tiny_model: Path, tmp_path: Path) -> None:
    sheet, query = tmp_path / "sheet.png", photos / "00.png"
    done = run("similar", query, table, "--model", tiny_model, "--top", 7, "--sheet", sheet)
    assert f"wrote {sheet}: 7 pictures" in done.stderr
    drawn = open_source(sheet, own_limits()).pixels()

    def check(row: int, column: int, file: Path) -> None:
        top, left = corner(row, column)
        small = thumbnail(open_source(file, own_limits()))
        top, left = top + (SIDE - small.shape[0]) // 2, left + (SIDE - small.shape[1]) // 2
        np.testing.assert_array_equal(drawn[top : top + small.shape[0], left : left + small.shape[1]], small)

    nearest = found(query, table, "--model", tiny_model, "--top", 7)
    check(0, 0, query)
    for number, each in enumerate(nearest):
        check(1 + number // 5, number % 5, photos / each["path"])
    with pytest.raises(AssertionError):
        check(1, 0, photos / nearest[1]["path"])


def test_pictures_that_have_gone_are_grey_and_named(table: Path, photos: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "same.png").write_bytes((photos / "same.png").read_bytes())
    sheet = tmp_path / "sheet.png"
    done = run_here("similar", "same.png", table, "--top", 2, "--sheet", sheet, "--root", moved)
    assert f"{moved}/deep/05.png: cannot read it: No such file or directory; its tile is grey\n" in done.stderr
    assert done.stderr.count("its tile is grey") == 1
    drawn = open_source(sheet, own_limits()).pixels()
    for column, grey in ((0, True), (1, False)):
        top, left = corner(1, column)
        assert (drawn[top : top + SIDE, left : left + SIDE] == 208).all() == grey


def test_what_can_t_be_compared_is_refused(photos: Path, table: Path, tiny_model: Path, tmp_path: Path) -> None:
    other_model = write_model(tmp_path / "tiny.onnx", seed=1)
    (tmp_path / "text.parquet").write_text("text")
    for arguments, complaint in (
        ([photos / "00.png", table], f"{table} was made with the model tiny version 1 ("),
        ([photos / "00.png", table, "--model", other_model], "): name that one with --model"),
        ([photos / "text.png", table, "--model", tiny_model], "this is text; supported are"),
        (["text.png", table], "text.png has no features in the table: this is text"),
        (["other.png", table], f"other.png is neither a file nor the path of an image in {table}"),
        (["same.png", tmp_path / "text.parquet"], "text.parquet is no Parquet file, or is damaged"),
        (["same.png", tmp_path / "missing.parquet"], "No such file or directory"),
    ):
        done = run_here("similar", *arguments, code=1)
        assert complaint in done.stderr
        assert len(done.stderr.splitlines()) == 1
    for options, complaint in (
        (["--sheet", "sheet.jpg"], "must end in .png"),
        (["--sheet", tmp_path / "sheet.png", "--top", 5000], "a sheet has room for 1000, not 5000"),
        (["--top", 0], "'--top' / '-k'"),
        (["--root", tmp_path / "missing"], "there is no folder"),
    ):
        assert complaint in run_here("similar", "same.png", table, *options, code=2).stderr


def test_a_table_without_features_has_nothing_near(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "text.png").write_text("no picture")
    query = tmp_path / "query.png"
    query.write_bytes(encode(pixels(9, 9)))
    run_here("embed", folder, "-o", tmp_path / "t.parquet", "--model", tiny_model, code=1)
    done = run_here("similar", query, tmp_path / "t.parquet", "--model", tiny_model, "--sheet", tmp_path / "sheet.png")
    assert "no image of the table has features" in done.stderr
    assert not done.stdout
