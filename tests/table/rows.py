"""Rows with features out of the air, for tests that need no model."""

from collections.abc import Iterable

import numpy as np

from fullframe.engine.query import Answer, ClassScore, FloatArray
from fullframe.table.recipe import Recipe
from fullframe.table.rows import Row

RECIPE = Recipe(
    root="/photos",
    model="tiny",
    version="1",
    digest="d" * 64,
    pooling="avg",
    normalize=False,
    length=5,
    compute="float32",
)


def feature(path: str, seed: int = 0) -> FloatArray:
    """float32 [5], different for every path and seed."""
    return np.random.default_rng([seed, *path.encode()]).normal(size=5).astype(np.float32)


def row(path: str, seed: int = 0, error: str = "", values: Iterable[float] | None = None) -> Row:
    """An image of 30 x `seed` pixels, whose file has the stamp (seed, 7)."""
    if error:
        return Row(path, (seed, 7), error)
    vector = feature(path, seed) if values is None else np.array(list(values), np.float32)
    return Row(path, (seed, 7), Answer(30, seed, [ClassScore(0, f"class {seed}", 0.25, 1.0)], [vector]))
