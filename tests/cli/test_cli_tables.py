"""`embed -o FILE.parquet`: a folder tree becomes a table, however often the work is killed, and whatever lies there."""

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fullframe
from fullframe.table.journal import parts_folder
from tests.cli.command import COMMAND, environment, run, run_here
from tests.cli.test_cli_ask import on_a_terminal
from tests.models import write_model
from tests.pictures import encode, pixels
from tests.serving import Running, serving, start

COUNT = 60


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in folders whose order in a listing is not that of their paths."""
    folder = tmp_path_factory.mktemp("tree") / "photos"
    for number in range(COUNT):
        name = ("b", "b-c", "b/deeper/still", "", "ü")[number % 5]
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{number:03}.png").write_bytes(encode(pixels(1 + number % 37, 1 + number % 53, number)))
    return folder


@pytest.fixture(scope="module")
def expected(photos: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table, made in one go."""
    path = tmp_path_factory.mktemp("whole") / "whole.parquet"
    run_here("embed", photos, "-o", path, "--model", tiny_model)
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "features.parquet"


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def part_rows(output: Path) -> Counter[str]:
    """How often each path is in a part."""
    parts = parts_folder(output).glob("[0-9]*.parquet")
    return Counter(path for part in parts for path in pq.ParquetFile(part).read(["path"])["path"].to_pylist())


def check_once(table: pa.Table, folder: Path) -> None:
    """Every image of the folder has one row, in the order of paths."""
    files = [file for file in folder.rglob("*") if file.suffix in (".png", ".jpg")]
    assert table["path"].to_pylist() == sorted(file.relative_to(folder).as_posix() for file in files)


def check_equal(table: pa.Table, whole: pa.Table) -> None:
    """The same columns, to the last bit."""
    assert table.drop_columns(["feature"]).equals(whole.drop_columns(["feature"]))
    features = [np.array(each["feature"].combine_chunks().flatten()) for each in (table, whole)]
    assert features[0].tobytes() == features[1].tobytes()


def embed(photos: Path, output: Path, *options: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    return run_here("embed", photos, "-o", output, *options, code=code)


def begin(photos: Path, output: Path, *options: object) -> "subprocess.Popen[str]":
    """The command in a process of its own, which stores each image as it is done."""
    command = [*COMMAND, "embed", photos, "-o", output, "--save-every", 0, *options]
    return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=environment())


@pytest.fixture(scope="module")
def half(photos: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts that a process had stored when it was killed."""
    output = tmp_path_factory.mktemp("half") / "features.parquet"
    process = begin(photos, output, "--model", tiny_model)
    wait_for_parts(process, output, 10)
    process.kill()
    process.communicate()
    return parts_folder(output)


def wait_for_parts(process: "subprocess.Popen[str]", output: Path, count: int) -> None:
    while process.poll() is None and len(list(parts_folder(output).glob("[0-9]*.parquet"))) < count:
        time.sleep(0.002)


def test_a_table_of_a_tree(photos: Path, tiny_model: Path, expected: Path) -> None:
    table = pq.read_table(expected)
    check_once(table, photos)
    with fullframe.load(str(tiny_model)) as predictor:
        for row in rows(expected)[::10]:
            answer = predictor.predict(photos / row["path"], top_k=1, poolings=["avg"])
            assert (row["height"], row["width"], row["error"]) == (answer.height, answer.width, None)
            assert np.float32(row["feature"]).tobytes() == answer.embeddings[0].tobytes()
            assert (row["label"], row["probability"]) == (answer.classes[0].label, answer.classes[0].probability)
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert metadata["fullframe.root"] == str(photos)
    assert metadata["fullframe.model"] == "tiny"
    assert metadata["fullframe.pooling"] == "avg"
    assert not parts_folder(expected).exists()


def test_killed_again_and_again_no_image_is_lost_or_done_twice(
    photos: Path, output: Path, tiny_model: Path, expected: Path
) -> None:
    choice = random.Random(1)
    stored: Counter[str] = Counter()
    for _ in range(3):
        process = begin(photos, output, "--model", tiny_model)
        wait_for_parts(process, output, len(stored) + choice.randint(1, 25))
        time.sleep(choice.uniform(0, 0.01))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not output.exists()
        before, stored = stored, part_rows(output)
        assert stored.keys() > before.keys()
        assert set(stored.values()) == {1}
    done = embed(photos, output, "--model", tiny_model)
    assert f"wrote {output}: {COUNT} x 16 features, {len(stored)} of them from before" in done.stderr
    table = pq.read_table(output)
    check_once(table, photos)
    check_equal(table, pq.read_table(expected))
    assert output.read_bytes() == expected.read_bytes()
    assert list(output.parent.iterdir()) == [output]


def test_a_lost_or_doubled_image_would_be_noticed(photos: Path, expected: Path) -> None:
    table = pq.read_table(expected)
    check_once(table, photos)
    lost = pa.concat_tables([table.slice(0, 40), table.slice(41)])
    doubled = pa.concat_tables([table.slice(0, 41), table.slice(40)])
    for wrong in (lost, doubled, pa.concat_tables([table.slice(40), table.slice(0, 40)])):
        with pytest.raises(AssertionError):
            check_once(wrong, photos)
    feature = table["feature"].combine_chunks().flatten().to_numpy().copy()
    feature[5] = np.nextafter(feature[5], np.float32(9))
    other = pa.FixedSizeListArray.from_arrays(feature, type=table.schema.field("feature").type)
    with pytest.raises(AssertionError):
        check_equal(table.set_column(3, "feature", other), table)


def test_killed_while_the_table_is_written_or_the_parts_are_removed(
    photos: Path, output: Path, tiny_model: Path, expected: Path
) -> None:
    folder = parts_folder(output)
    process = begin(photos, output, "--model", tiny_model)
    while process.poll() is None and not output.exists() and not list(folder.glob(".features.parquet.*.tmp")):
        pass
    process.kill()
    process.communicate()
    if (folder / "recipe.json").exists():
        embed(photos, output, "--model", tiny_model)
    assert output.read_bytes() == expected.read_bytes()
    folder.mkdir(exist_ok=True)
    (folder / "000007.parquet").write_text("a rest")  # the recipe is removed first
    assert "is finished; --restart computes it anew" in embed(photos, output, code=2).stderr
    embed(photos, output, "--model", tiny_model, "--restart")
    assert output.read_bytes() == expected.read_bytes()
    assert not folder.exists()


def test_bad_files_are_skipped_named_and_asked_about_again(output: Path, tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for name in ("good.png", "deep/z.png"):
        (folder / name).write_bytes(encode(pixels(20, 30)))
    (folder / "deep/cut.png").write_bytes(encode(pixels(50, 50))[:-200])
    (folder / "text.jpg").write_text("no picture")
    (folder / "link.png").symlink_to("nowhere")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "around").symlink_to(".")
    (folder / "around.png").symlink_to(".")
    os.mkfifo(folder / "pipe.png")
    strange = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))
    strange.write_bytes(encode(pixels(9, 9)))
    (folder / "caf\\xe9.png").write_bytes(encode(pixels(9, 10)))
    done = embed(folder, output, "--model", tiny_model, code=1)
    found = {row["path"]: row for row in rows(output)}
    assert list(found) == [
        "caf\\x5cxe9.png",
        "caf\\xe9.png",
        "deep/cut.png",
        "deep/z.png",
        "good.png",
        "link.png",
        "loop.png",
        "pipe.png",
        "text.jpg",
    ]
    assert found["caf\\xe9.png"]["width"] == 9
    assert found["caf\\x5cxe9.png"]["width"] == 10
    errors = {path: row["error"] for path, row in found.items() if row["error"]}
    assert list(errors) == ["deep/cut.png", "link.png", "loop.png", "pipe.png", "text.jpg"]
    assert errors["link.png"] == "cannot read it: No such file or directory"
    assert errors["pipe.png"] == "it is no regular file"
    assert errors["text.jpg"].startswith("this is text; supported are")
    for path, error in errors.items():
        assert f"fullframe: {folder}/{path}: {error}\n" in done.stderr
        assert {found[path][name] for name in ("height", "width", "feature", "label", "probability")} == {None}
    assert "fullframe: 5 of 9 images failed; the table's errors tell of each:\n" in done.stderr
    strange.unlink()


def test_what_failed_changed_came_or_went_before_it_goes_on(
    photos: Path, output: Path, tmp_path: Path, tiny_model: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02}.png").write_bytes(encode(pixels(40, 40, number)))
    (folder / "00.png").write_text("not yet")
    (folder / "01.png").write_text("to be removed")
    process = begin(folder, output, "--model", tiny_model)
    wait_for_parts(process, output, 8)
    process.kill()
    process.communicate()
    stored = part_rows(output)
    assert {"00.png", "01.png", "02.png", "03.png", "04.png"} <= stored.keys()
    was = (folder / "04.png").stat()
    (folder / "00.png").write_bytes(encode(pixels(8, 8)))  # it had failed
    (folder / "01.png").unlink()
    (folder / "02.png").unlink()  # it had not
    (folder / "03.png").write_bytes(encode(pixels(9, 9)))
    os.utime(folder / "04.png", ns=(was.st_atime_ns, was.st_mtime_ns + 1))
    (folder / "03b.png").write_bytes(encode(pixels(10, 10)))
    done = embed(folder, output, "--model", tiny_model)
    assert f"30 x 16 features, {len(stored) - 4} of them from before" in done.stderr
    assert "changed since, and computed again: 2\n" in done.stderr
    assert "not found any more, but in the table as they were: 1\n" in done.stderr
    found = {row["path"]: (row["height"], row["error"]) for row in rows(output)}
    assert list(found) == sorted([*(f"{n:02}.png" for n in range(30) if n != 1), "03b.png"])
    assert {height_error for path, height_error in found.items() if path not in ("00.png", "03.png", "03b.png")} == {
        (40, None)
    }
    assert [found[path] for path in ("00.png", "03.png", "03b.png")] == [(8, None), (9, None), (10, None)]


def test_other_options_are_refused_until_told_to_begin_anew(
    photos: Path, output: Path, tmp_path: Path, tiny_model: Path, half: Path
) -> None:
    shutil.copytree(half, parts_folder(output))
    stored = part_rows(output)
    other_model = write_model(tmp_path / "tiny.onnx", seed=1)
    for folder, options, difference in (
        (photos, ["--model", tiny_model, "--pooling", "max"], "pooling avg, not max"),
        (photos, ["--model", tiny_model, "--normalize"], "normalize False, not True"),
        (photos, ["--model", other_model], "model tiny version 1 ("),
        (photos, [], ", not cifar10 version 1 ("),
        (photos / "b", ["--model", tiny_model], f"root {photos}, not {photos}/b"),
    ):
        refused = embed(folder, output, *options, code=1)
        assert difference in refused.stderr
        assert "--restart to begin anew" in refused.stderr
    assert part_rows(output) == stored
    embed(photos, output, "--model", other_model, "--pooling", "max", "--normalize", "--restart")
    with fullframe.load(str(other_model)) as predictor:
        for row in rows(output)[::30]:
            feature = predictor.embed(photos / row["path"], "max", normalize=True)
            assert np.float32(row["feature"]).tobytes() == feature.tobytes()


@pytest.mark.parametrize(("options", "command"), [([], "command"), (["--restart"], "command without --restart")])
def test_interrupted_it_says_how_to_go_on(
    photos: Path, output: Path, tiny_model: Path, expected: Path, options: list[str], command: str
) -> None:
    process = begin(photos, output, "--model", tiny_model, *options)
    wait_for_parts(process, output, 5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    stored = part_rows(output)
    assert stderr == (
        f"fullframe: stopped; {len(stored)} of {COUNT} images are stored in {parts_folder(output)}: "
        f"the same {command} goes on\n"
    )
    embed(photos, output, "--model", tiny_model)
    assert output.read_bytes() == expected.read_bytes()


def test_a_damaged_part_is_computed_again(
    photos: Path, output: Path, tiny_model: Path, expected: Path, half: Path
) -> None:
    shutil.copytree(half, parts_folder(output))
    part = parts_folder(output) / "000002.parquet"
    part.write_bytes(part.read_bytes()[:-50])
    done = embed(photos, output, "--model", tiny_model)
    assert f"{part} is damaged: its images are computed again" in done.stderr
    assert output.read_bytes() == expected.read_bytes()


def test_a_disk_that_takes_no_more_loses_nothing(photos: Path, output: Path, tiny_model: Path, expected: Path) -> None:
    def limited(size: int) -> str:
        arguments = ("embed", photos, "-o", output, "--model", tiny_model, "--save-every", 0)
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        return run(*arguments, code=1, preexec_fn=limit).stderr

    message = f"File too large; what was done before is stored in {parts_folder(output)}: the same command goes on\n"
    assert limited(2000).endswith(message)  # room for the recipe alone
    assert not part_rows(output)
    assert limited(6000).endswith(message)  # and for parts, not for the table
    assert part_rows(output).keys() == set(pq.read_table(expected)["path"].to_pylist())
    assert not output.exists()
    assert f"{COUNT} of them from before" in embed(photos, output, "--model", tiny_model).stderr
    assert output.read_bytes() == expected.read_bytes()


def test_a_folder_that_can_t_be_read_is_named(output: Path, tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "z.png").write_bytes(encode(pixels(9, 9)))
    above = os.open(folder, os.O_RDONLY)
    for _ in range(17):  # beyond the longest path: root may read anything else
        os.mkdir("d" * 250, dir_fd=above)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=above)
        os.close(above)
        above = below
    os.close(above)
    try:
        done = embed(folder, output, "--model", tiny_model, code=1)
    finally:
        shutil.rmtree(folder)  # pytest can't
    assert done.stderr.count("d: cannot read the folder: File name too long\n") == 1
    assert "folders that could not be read, so that nothing new in them is in the table: 1\n" in done.stderr
    assert [row["path"] for row in rows(output)] == ["z.png"]


def test_from_a_server_that_dies_and_another(
    photos: Path, output: Path, tiny_model: Path, expected: Path, server: Running
) -> None:
    dying = start(models=f"tiny={tiny_model}")
    try:
        process = begin(photos, output, "--server", dying.target, "--timeout", 1)
        wait_for_parts(process, output, 10)
        dying.process.kill()
        _, stderr = process.communicate(timeout=60)
    finally:
        dying.process.kill()
        dying.process.wait()
    assert process.returncode == 1
    assert "no server can be reached at" in stderr
    assert stderr.endswith(f"; what was done before is stored in {parts_folder(output)}: the same command goes on\n")
    assert len(stderr.splitlines()) == 1
    stored = part_rows(output)
    assert 10 <= len(stored) < COUNT
    done = embed(photos, output, "--server", server.target, "--model", "tiny")
    assert f"{len(stored)} of them from before" in done.stderr
    check_equal(pq.read_table(output), pq.read_table(expected))


def test_a_server_that_comes_back_with_another_model_is_not_asked(
    photos: Path, output: Path, tiny_model: Path, expected: Path, tmp_path: Path
) -> None:
    first = start(models=f"tiny={tiny_model}")
    try:
        process = begin(photos, output, "--server", first.target)
        wait_for_parts(process, output, 10)
    finally:
        first.process.kill()
        first.process.wait()
    other = write_model(tmp_path / "other.onnx", name="tiny", seed=9)
    with serving(models=f"tiny={other}", port=first.target.rpartition(":")[2]):
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "model 'tiny' version 1 is of another file here" in stderr
    assert 10 <= len(part_rows(output)) < COUNT
    embed(photos, output, "--model", tiny_model)  # what was stored is the first one's
    check_equal(pq.read_table(output), pq.read_table(expected))


def test_the_server_s_model_and_the_file_are_known_to_be_the_same(
    photos: Path, output: Path, expected: Path, server: Running, half: Path
) -> None:
    shutil.copytree(half, parts_folder(output))
    done = embed(photos, output, "--server", server.target)
    assert f"{len(part_rows(half.with_suffix('')))} of them from before" in done.stderr
    check_equal(pq.read_table(output), pq.read_table(expected))


def test_an_image_that_the_runtime_fails_on_does_not_end_the_run(photos: Path, output: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "breaks.onnx", breaks_above=30)
    embed(photos, output, "--model", model, code=1)
    found = rows(output)
    assert len(found) == COUNT
    tall = [row for row in found if row["error"]]
    assert all(row["error"].startswith("the model failed: ") for row in tall)
    assert len(tall) == sum(1 + number % 37 > 30 for number in range(COUNT))


@pytest.mark.parametrize("where", ["here", "server"])
def test_an_image_too_large_for_classes_has_features(output: Path, tmp_path: Path, where: str) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    small_one = pixels(210, 200)
    (folder / "huge.jpg").write_bytes(encode(np.tile(small_one, (10, 10, 1)), "JPEG"))
    (folder / "small.jpg").write_bytes(encode(small_one, "JPEG"))
    model = write_model(tmp_path / "peeks.onnx", head="peeks")
    if where == "here":
        embed(folder, output, "--model", model)
    else:
        with serving(models=model) as running:
            embed(folder, output, "--server", running.target)
    huge, small = rows(output)
    assert (huge["label"], huge["probability"], huge["error"]) == (None, None, None)
    assert small["label"]
    with fullframe.load(str(model)) as predictor:
        assert np.float32(huge["feature"]).tobytes() == predictor.embed(folder / "huge.jpg").tobytes()


def test_bars_only_on_a_terminal(photos: Path, output: Path, tiny_model: Path) -> None:
    shown = on_a_terminal("embed", photos, "-o", output, "--model", tiny_model)
    for bar in (f"images found: {COUNT}/?", f"{COUNT}/{COUNT}", f"writing the table: {COUNT}/{COUNT}"):
        assert bar.encode() in shown


def test_wrong_use_is_told_before_any_work(photos: Path, output: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    output.with_name("done.parquet").write_text("")
    for arguments, complaint in (
        ([next(photos.rglob("*.png")), "-o", output], "a .parquet takes one folder"),
        ([photos, photos, "-o", output], "a .parquet takes one folder"),
        ([tmp_path / "missing", "-o", output], "there is no folder"),
        ([tmp_path / "empty", "-o", output], "no images in the folder"),
        ([photos, "-o", output.with_name("done.parquet")], "is finished; --restart computes it anew"),
        ([photos, "-o", output.with_suffix(".csv")], "must end in .npz or .parquet"),
        ([photos, "-o", tmp_path / "none/x.parquet"], "there is no folder"),
        ([photos, "-o", output, "--json"], "goes without --json"),
        ([photos, "-o", output.with_suffix(".npz"), "--restart"], "goes with a .parquet"),
    ):
        assert complaint in run_here("embed", *arguments, code=2).stderr
    assert not parts_folder(output).exists()


def test_without_pyarrow_the_extra_is_named(photos: Path, output: Path, tmp_path: Path) -> None:
    (tmp_path / "pyarrow.py").write_text("raise ModuleNotFoundError('No module named pyarrow', name='pyarrow')")
    without = environment(PYTHONPATH=str(tmp_path))
    for arguments in (["embed", photos, "-o", output], ["similar", photos / "000.png", output]):
        done = run(*arguments, code=1, env=without)
        assert done.stderr == "fullframe: this needs pyarrow, of the table extra: pip install 'fullframe[table]'\n"
