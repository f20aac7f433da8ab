"""The nearest rows of a table: those that comparing with every row in numpy finds, however the table is read."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullframe.engine.query import FloatArray
from fullframe.errors import InvalidInput
from fullframe.table import rows as row_module
from fullframe.table.journal import Journal
from fullframe.table.nearest import Table
from fullframe.table.recipe import Recipe
from fullframe.table.rows import Row
from tests.table.rows import RECIPE, row


def write(path: Path, rows: list[Row], recipe: Recipe = RECIPE) -> Path:
    with Journal(path, recipe, restart=True) as journal:
        journal.add(rows)
        journal.join(lambda rows: None)
        journal.discard()
    return path


def brute_force(features: FloatArray, query: FloatArray, top: int) -> list[tuple[int, float]]:
    """Row and similarity; equal ones in the rows' order."""
    wide, point = features.astype(np.float64), query.astype(np.float64)
    cosines = wide @ point / np.linalg.norm(wide, axis=1) / np.linalg.norm(point)
    order = np.argsort(-np.round(cosines, 12), kind="stable")[:top]
    return [(int(number), float(cosines[number])) for number in order]


@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 120),
    top=st.integers(1, 130),
    copies=st.integers(1, 9),
    group_bytes=st.sampled_from([1, 100, 10**7]),
)
def test_as_numpy_finds_them(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, top: int, copies: int, group_bytes: int
) -> None:
    random = np.random.default_rng(seed)
    some = random.normal(size=(count, 5)).astype(np.float32)
    features = some[random.integers(0, count, count * copies)]  # many are equal
    query = random.normal(size=5).astype(np.float32)
    rows = [row(f"{number:04}", number, values=values) for number, values in enumerate(features)]
    path = tmp_path_factory.mktemp("nearest") / "table.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_module, "_GROUP_BYTES", group_bytes)
        with Table(write(path, rows)) as table:
            found = table.nearest(query, top)
    expected = brute_force(features, query, top)
    assert [each.path for each in found] == [f"{number:04}" for number, _ in expected]
    assert [each.width for each in found] == [number for number, _ in expected]
    np.testing.assert_allclose([each.similarity for each in found], [cosine for _, cosine in expected], atol=1e-12)


def test_equal_features_are_equally_similar_wherever_they_lie(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    length, count = 193, 1001
    feature = random.normal(size=length).astype(np.float32)
    rows = [row(f"{number:04}", number, values=feature) for number in reversed(range(count))]
    recipe = replace(RECIPE, length=length)
    with Table(write(tmp_path / "table.parquet", rows, recipe)) as table:
        found = table.nearest(random.normal(size=length).astype(np.float32), count)
        assert len({each.similarity for each in found}) == 1
        assert [each.path for each in found] == [f"{number:04}" for number in range(count)]
        assert [each.similarity for each in table.nearest(feature, 3)] == pytest.approx([1, 1, 1], abs=1e-15)
        assert [each.similarity for each in table.nearest(-feature, 3)] == pytest.approx([-1, -1, -1], abs=1e-15)


def test_rows_that_point_nowhere_are_left_out(tmp_path: Path) -> None:
    fine = [1.0, 2.0, 3.0, 4.0, 5.0]
    rows = [
        row("broken", error="it is damaged"),
        row("fine", values=fine),
        row("infinite", values=[np.inf, 0, 1, 1, 1]),
        row("large", values=[3e38] * 5),
        row("nan", values=[np.nan, 1, 1, 1, 1]),
        row("small", values=[1e-45] * 5),
        row("zero", values=[0.0] * 5),
    ]
    with Table(write(tmp_path / "table.parquet", rows)) as table:
        found = table.nearest(np.ones(5, np.float32), 10)
        assert [each.path for each in found] == ["large", "small", "fine"]
        assert [each.similarity for each in found] == pytest.approx([1, 1, 15 / np.sqrt(5 * 55)])
        for values in ([0.0] * 5, [np.nan] * 5, [np.inf, 0, 0, 0, 0]):
            with pytest.raises(InvalidInput, match="nothing is similar to it"):
                table.nearest(np.array(values, np.float32), 1)
        np.testing.assert_array_equal(table.feature("fine"), np.array(fine, np.float32))
        with pytest.raises(InvalidInput, match="broken has no features in the table: it is damaged"):
            table.feature("broken")
        with pytest.raises(InvalidInput, match="other is neither a file nor the path of an image in"):
            table.feature("other")


def test_a_few_rows_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_module, "_GROUP_BYTES", 100_000)
    random = np.random.default_rng(0)
    rows = [row(f"{number:04}", values=values) for number, values in enumerate(random.normal(size=(3000, 500)))]
    path = write(tmp_path / "table.parquet", rows, replace(RECIPE, length=500))
    with Table(path) as table:
        before = pa.total_allocated_bytes()
        held = [pa.total_allocated_bytes() - before for _ in table._batches(["path", "feature"])]
        assert len(held) == 60
        assert max(held) < 1_000_000
        batches = list(table._batches(["path", "feature"]))  # the control
        assert pa.total_allocated_bytes() - before > 5_000_000
        assert len(batches) == 60


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "table.parquet", [row("a"), row("b")])
    whole = path.read_bytes()
    (tmp_path / "text.parquet").write_text("text")
    (tmp_path / "short.parquet").write_bytes(whole[:-9])
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({}), tmp_path / "foreign.parquet")
    pq.write_table(table.drop_columns(["label"]), tmp_path / "columns.parquet")
    pq.write_table(
        table.replace_schema_metadata({**table.schema.metadata, b"fullframe.length": b"6"}), tmp_path / "length.parquet"
    )
    for name, complaint in (
        ("text", "is no Parquet file, or is damaged"),
        ("short", "is no Parquet file, or is damaged"),
        ("foreign", "it is no table that `fullframe embed` made"),
        ("columns", "its columns are not those that `fullframe embed` writes"),
        ("length", "its columns are not those that `fullframe embed` writes"),
    ):
        with pytest.raises(InvalidInput, match=f"{name}.parquet:? {complaint}"):
            Table(tmp_path / f"{name}.parquet")
    with pytest.raises(FileNotFoundError):
        Table(tmp_path / "missing.parquet")
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(3)
    last = chunk.data_page_offset + chunk.total_compressed_size - 1
    path.write_bytes(whole[:last] + bytes([whole[last] ^ 1]) + whole[last + 1 :])
    with Table(path) as opened, pytest.raises(InvalidInput, match="is damaged"):
        opened.nearest(np.ones(5, np.float32), 1)
