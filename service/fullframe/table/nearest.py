"""The rows of a table whose features point the way that a query's do: all are compared, a few held at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fullframe.engine.query import FloatArray
from fullframe.errors import InvalidInput
from fullframe.table.damage import reading
from fullframe.table.recipe import Recipe
from fullframe.table.rows import table_schema

_SHOWN: Final = ["path", "height", "width", "label", "probability"]


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A row of a table; `similarity` is the cosine between its feature and the query's, -1 to 1."""

    path: str
    similarity: float
    height: int
    width: int
    label: str | None
    probability: float | None


class Table:
    """A finished table, read in pieces; to be closed.

    Attributes:
        recipe: how it was made.

    Raises (every method too):
        InvalidInput: the file is no table of ours, or is damaged.
        OSError: it can't be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.open("rb").close()  # its own words where it is not there
        with reading(path):
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
        try:
            metadata = self._file.schema_arrow.metadata or {}
            self.recipe = Recipe.from_metadata({key.decode(): value.decode() for key, value in metadata.items()})
            if not self._file.schema_arrow.equals(table_schema(self.recipe)):
                raise InvalidInput("its columns are not those that `fullframe embed` writes", "table")
        except (InvalidInput, UnicodeError) as error:
            self.close()
            raise InvalidInput(f"{path}: {error}", "table") from error

    def feature(self, path: str) -> FloatArray:
        """The feature of an image, float32 [D]. Raises InvalidInput where it has no row or none in it."""
        for batch in self._batches(["path", "feature", "error"]):
            row = pc.index(batch["path"], path).as_py()
            if row >= 0:
                if not batch["feature"][row].is_valid:
                    raise InvalidInput(f"{path} has no features in the table: {batch['error'][row].as_py()}", "query")
                feature: FloatArray = _values(batch["feature"].slice(row, 1), self.recipe.length)[0]
                return feature
        raise InvalidInput(f"{path} is neither a file nor the path of an image in {self._path}", "query")

    def nearest(self, query: FloatArray, top: int) -> list[Neighbour]:
        """The `top` rows of highest cosine similarity, best first, equal ones by path.

        Computed in float64 with the same sums for every row, so that equal features are equally similar. Rows whose
        features are all zero or not finite, which point nowhere, are left out.

        Args:
            query: float32 [D].

        Raises:
            InvalidInput: the query points nowhere.
        """
        direction = query.astype(np.float64)
        if not 0 < (length := np.linalg.norm(direction)) < np.inf:
            raise InvalidInput("the query's features are all zero or not finite: nothing is similar to it", "query")
        direction /= length
        best: list[Neighbour] = []
        for batch in self._batches([*_SHOWN, "feature"]):
            batch = batch.filter(batch["feature"].is_valid())
            similarities = _cosines(_values(batch["feature"], self.recipe.length), direction)
            chosen = np.flatnonzero(similarities >= _nth_largest(similarities, top))
            best += [
                Neighbour(similarity=float(similarity), **row)
                for similarity, row in zip(
                    similarities[chosen], batch.select(_SHOWN).take(chosen).to_pylist(), strict=True
                )
            ]
            best = sorted(best, key=lambda found: (-found.similarity, found.path))[:top]
        return best

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _batches(self, columns: list[str]) -> Iterator[Any]:
        """Held one at a time; iter_batches would keep the bytes of all that it has read."""
        with reading(self._path):
            for group in range(self._file.num_row_groups):
                yield from self._file.read_row_group(group, columns).to_batches()


def _values(features: Any, length: int) -> FloatArray:
    """float32 [rows, length] of lists without nulls."""
    values: FloatArray = features.flatten().to_numpy(zero_copy_only=False).reshape(len(features), length)
    return values


def _nth_largest(values: NDArray[np.float64], n: int) -> float:
    """Of those that are not NaN; the smallest where there are fewer."""
    values = values[~np.isnan(values)]
    return float(np.partition(values, -n)[-n]) if len(values) > n else -np.inf


def _cosines(features: FloatArray, direction: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each row with a vector of unit length; a row's rounding does not depend on its neighbours."""
    with np.errstate(invalid="ignore", divide="ignore"):
        wide = features.astype(np.float64)
        lengths = np.sqrt((wide * wide).sum(axis=1))
        wide *= direction
        cosines: NDArray[np.float64] = np.clip(wide.sum(axis=1) / lengths, -1, 1)
    return cosines
