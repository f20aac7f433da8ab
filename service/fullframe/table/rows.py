"""The rows of a table, and of the parts that it is put together from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from fullframe.engine.query import Answer
from fullframe.table.recipe import Recipe

Stamp = tuple[int, int]
"""A file's size in bytes and its time of modification in nanoseconds: another stamp, another picture."""

_GROUP_BYTES: Final = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one image: an answer with one embedding, or why there is none.

    Attributes:
        path: relative to the table's root, with "/" between names.
        stamp: of the file before it was read; None where it has none.
    """

    path: str
    stamp: Stamp | None
    outcome: Answer | str


def table_schema(recipe: Recipe) -> pa.Schema:
    """Of the finished table. Where `error` is not null, the columns from height to probability are."""
    return pa.schema(
        [
            pa.field("path", pa.string(), nullable=False),
            pa.field("height", pa.int32()),
            pa.field("width", pa.int32()),
            pa.field("feature", pa.list_(pa.field("element", pa.float32()), recipe.length)),
            pa.field("label", pa.string()),
            pa.field("probability", pa.float32()),
            pa.field("error", pa.string()),
        ],
        metadata=recipe.to_metadata(),
    )


def part_schema(recipe: Recipe) -> pa.Schema:
    """Of a part: with the stamps."""
    return table_schema(recipe).append(pa.field("size", pa.int64())).append(pa.field("modified", pa.int64()))


def group_rows(recipe: Recipe) -> int:
    """Rows that are held, written and read together."""
    return max(1, _GROUP_BYTES // (4 * recipe.length))


def part_of(rows: Sequence[Row], recipe: Recipe) -> pa.Table:
    """The rows in the order of their paths."""
    rows = sorted(rows, key=lambda row: row.path)
    answers = [None if isinstance(row.outcome, str) else row.outcome for row in rows]
    best = [answer.classes[0] if answer and answer.classes else None for answer in answers]
    features = np.zeros((len(rows), recipe.length), np.float32)
    for feature, answer in zip(features, answers, strict=True):
        if answer:
            feature[:] = answer.embeddings[0]
    schema = part_schema(recipe)
    missing = pa.array([answer is None for answer in answers])
    columns: dict[str, Any] = {
        "path": [row.path for row in rows],
        "height": [answer and answer.height for answer in answers],
        "width": [answer and answer.width for answer in answers],
        "feature": pa.FixedSizeListArray.from_arrays(
            features.reshape(-1), type=schema.field("feature").type, mask=missing
        ),
        "label": [score and score.label for score in best],
        "probability": [score and score.probability for score in best],
        "error": [row.outcome if isinstance(row.outcome, str) else None for row in rows],
        "size": [row.stamp and row.stamp[0] for row in rows],
        "modified": [row.stamp and row.stamp[1] for row in rows],
    }
    return pa.table(columns, schema=schema)
