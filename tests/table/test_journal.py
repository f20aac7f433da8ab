"""Parts on disk: what was stored is in the table, once, the newest, in order, whatever happened on the way."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullframe.errors import InvalidInput
from fullframe.table import journal as journals
from fullframe.table import rows as row_module
from fullframe.table.journal import Journal, is_begun, parts_folder
from fullframe.table.recipe import PREFIX, Recipe
from fullframe.table.rows import Row
from tests.table.rows import RECIPE, feature, row


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "features.parquet"


def unheard(rows: int) -> None:
    pass


def finished(output: Path, *processes: list[list[Row]], recipe: Recipe = RECIPE) -> list[dict[str, Any]]:
    """The table's rows after processes that stored so many parts each."""
    for parts in processes:
        with Journal(output, recipe) as journal:
            for part in parts:
                journal.add(part)
    with Journal(output, recipe) as journal:
        journal.join(unheard)
        journal.discard()
    rows: list[dict[str, Any]] = pq.read_table(output).to_pylist()
    return rows


def test_rows_and_metadata_of_a_table(output: Path) -> None:
    with Journal(output, RECIPE) as journal:
        assert not journal.resumed
        journal.add([row("b/ü.png", 3), row("a.png", 4), row("broken.png", error="it is damaged")])
        joined = journal.join(unheard)
    assert (joined.rows, dict(joined.failures)) == (3, {"it is damaged": 1})
    assert joined.examples == {"it is damaged": ("broken.png", "it is damaged")}
    table = pq.read_table(output)
    assert [str(field.type) for field in table.schema] == [
        "string",
        "int32",
        "int32",
        "fixed_size_list<element: float>[5]",
        "string",
        "float",
        "string",
    ]
    first, second, third = table.to_pylist()
    np.testing.assert_array_equal(np.float32(first.pop("feature")), feature("a.png", 4))
    shown = {"height": 30, "width": 4, "label": "class 4", "probability": 0.25, "error": None}
    assert first == {"path": "a.png", **shown}
    assert second["path"] == "b/ü.png"
    nothing = dict.fromkeys(("height", "width", "feature", "label", "probability"))
    assert third == {"path": "broken.png", **nothing, "error": "it is damaged"}
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert metadata[PREFIX + "root"] == "/photos"
    assert Recipe.from_metadata(metadata) == RECIPE


PATHS = st.sampled_from(["a", "a-b", "a/b", "a/c", "b", "é", "z/z/z"])
PARTS = st.lists(st.dictionaries(PATHS, st.booleans(), min_size=1), max_size=4)


@settings(deadline=None, max_examples=20)
@given(processes=st.lists(PARTS, min_size=1, max_size=4), group_bytes=st.sampled_from([1, 45, 10**6]))
def test_the_newest_row_counts_and_errors_are_only_the_last_process_s(
    tmp_path_factory: pytest.TempPathFactory, processes: list[list[dict[str, bool]]], group_bytes: int
) -> None:
    output = tmp_path_factory.mktemp("journal") / "features.parquet"
    newest: dict[str, tuple[int, bool, int]] = {}
    seed = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_module, "_GROUP_BYTES", group_bytes)
        for process, parts in enumerate(processes):
            with Journal(output, RECIPE) as journal:
                assert list(journal.stored()) == [(p, (s, 7)) for p, (s, fine, _) in sorted(newest.items()) if fine]
                for part in parts:
                    seed += 1
                    journal.add([row(path, seed, error="" if fine else "bad") for path, fine in part.items()])
                    newest |= {path: (seed, fine, process) for path, fine in part.items()}
                joined = journal.join(unheard)
            expected = {p: (s, fine) for p, (s, fine, at) in newest.items() if fine or at == process}
            found = pq.read_table(output).to_pylist()
            assert [each["path"] for each in found] == sorted(expected)
            for each in found:
                seed_then, fine = expected[each["path"]]
                assert (each["error"] is None) is fine
                if fine:
                    assert each["width"] == seed_then
                    np.testing.assert_array_equal(np.float32(each["feature"]), feature(each["path"], seed_then))
            assert joined.rows == len(expected)
            assert joined.failures.total() == sum(not fine for _, fine in expected.values())


def test_the_file_does_not_depend_on_how_its_rows_came(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_module, "_GROUP_BYTES", 20 * 7)
    rows = [row(f"{number:02}", number) for number in range(50)]
    finished(output, [rows])
    whole = output.read_bytes()
    finished(output, [rows[40:], rows[5:9]], [[each] for each in rows[:30]], [rows[20:41]])
    assert output.read_bytes() == whole
    assert [pq.ParquetFile(output).metadata.row_group(n).num_rows for n in range(8)] == [7] * 7 + [1]


def test_parts_that_follow_each_other_are_open_one_at_a_time(output: Path) -> None:
    with Journal(output, RECIPE) as journal:
        for number in range(9):
            journal.add([row(f"{number}a"), row(f"{number}b")])
        assert len(journals._chains(journal._parts)) == 1
        journal.add([row("0aa"), row("8aa")])
        assert len(journals._chains(journal._parts)) == 2


def damaged(data: bytes) -> Iterator[bytes]:
    yield data[:-1]
    yield data[: len(data) // 2]
    yield b""
    for position in (data.index(feature("b").tobytes()[:4]) if feature("b").tobytes()[:4] in data else 60, 5):
        yield data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def test_a_damaged_part_is_named_and_its_images_are_to_be_done_again(output: Path) -> None:
    with Journal(output, RECIPE) as journal:
        journal.add([row("a")])
        journal.add([row("b"), row("c")])
        journal.add([row("d")])
    part = journal.folder / "000001.parquet"
    data = part.read_bytes()
    for broken in damaged(data):
        part.write_bytes(broken)
        with Journal(output, RECIPE) as journal:
            assert journal.damaged == [part.name]
            assert [path for path, _ in journal.stored()] == ["a", "d"]
        assert not part.exists()
    part.write_bytes(data)  # the control
    with Journal(output, RECIPE) as journal:
        assert journal.damaged == []
        assert [path for path, _ in journal.stored()] == ["a", "b", "c", "d"]


def test_a_table_that_can_t_be_joined_stays_as_it_was(output: Path) -> None:
    output.write_text("the old table")
    with Journal(output, RECIPE) as journal:
        journal.add([row("a")])
        journal.add([row("b")])
        part = journal.folder / "000001.parquet"
        data = part.read_bytes()
        part.write_bytes(data[: len(data) // 2])
        with pytest.raises(InvalidInput, match=r"000001\.parquet is no Parquet file, or is damaged"):
            journal.join(unheard)
        assert output.read_text() == "the old table"
        assert sorted(file.name for file in journal.folder.iterdir()) == ["000000.parquet", part.name, "recipe.json"]
        part.write_bytes(data)
        assert journal.join(unheard).rows == 2


def test_another_recipe_is_refused_and_says_what_differs(output: Path) -> None:
    with Journal(output, RECIPE) as journal:
        journal.add([row("a")])
    other = replace(RECIPE, digest="e" * 64, pooling="max", normalize=True, root="/more", compute="bfloat16")
    with pytest.raises(InvalidInput) as raised:
        Journal(output, other)
    assert (
        f"{journal.folder} holds the work of a run with model tiny version 1 (dddddddddddd), not tiny version 1 "
        "(eeeeeeeeeeee); pooling avg, not max; normalize False, not True; root /photos, not /more; compute float32, "
        "not bfloat16: " in str(raised.value)
    )
    for same in (RECIPE, replace(RECIPE, model="mine", version="3"), replace(RECIPE, compute="")):
        with Journal(output, same) as journal:
            assert journal.resumed
            assert list(journal.stored()) == [("a", (0, 7))]
    with Journal(output, other, restart=True) as journal:
        assert not journal.resumed
        assert list(journal.stored()) == []


def test_an_unreadable_recipe_is_not_taken_for_none(output: Path) -> None:
    with Journal(output, RECIPE) as journal:
        journal.add([row("a")])
    recipe = journal.folder / "recipe.json"
    for content in ("", "{", "[]", '{"fullframe.table": "2"}', '{"fullframe.table": "1"}'):
        recipe.write_text(content)
        with pytest.raises(InvalidInput, match=r"recipe\.json can't be read .* --restart begins anew"):
            Journal(output, RECIPE)
    assert (journal.folder / "000000.parquet").exists()


def test_only_one_process_writes_a_table_and_a_killed_one_does_not_hold_it(output: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom fullframe.table.journal import Journal\n"
        "from tests.table.rows import RECIPE, row\njournal = Journal(Path(sys.argv[1]), RECIPE)\n"
        "journal.add([row('a')])\nprint('stored', flush=True)\ntime.sleep(600)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(output)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout and other.stdout.readline() == "stored\n"
        with pytest.raises(InvalidInput, match="another process is writing to"):
            Journal(output, RECIPE)
        with pytest.raises(InvalidInput, match="another process is writing to"):
            Journal(output, RECIPE, restart=True)
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    with Journal(output, RECIPE) as journal:
        assert list(journal.stored()) == [("a", (0, 7))]


def test_nothing_is_removed_but_what_a_journal_wrote(output: Path) -> None:
    folder = parts_folder(output)
    folder.mkdir()
    mine = {folder / "notes.txt", folder / "table.parquet", folder / "12.parquet"}
    for file in mine:
        file.write_text("mine")
    assert len(finished(output, [[row("a")]])) == 1
    assert set(folder.iterdir()) == mine
    assert not is_begun(output)
    for file in mine:
        file.unlink()
    finished(output, [[row("a")]])
    assert not folder.exists()


def test_what_a_killed_process_left_half_written_is_removed(output: Path) -> None:
    with Journal(output, RECIPE) as journal:
        journal.add([row("a")])
    (journal.folder / ".000001.parquet.x8k_2.tmp").write_text("half a part")
    with Journal(output, RECIPE) as journal:
        assert sorted(file.name for file in journal.folder.iterdir()) == ["000000.parquet", "recipe.json"]
