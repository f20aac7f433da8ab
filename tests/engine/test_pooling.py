import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fullframe.engine.arrays import Array
from fullframe.engine.kinds import GEM_FLOOR
from fullframe.engine.pooling import (
    KINDS,
    FloatArray,
    Pooling,
    State,
    Term,
    pool,
)
from fullframe.errors import InvalidInput

Tile = tuple[int, int, int, int]  # top, bottom, left, right
Draw = Callable[[st.SearchStrategy[Any]], Any]


def naive(block: FloatArray, term: Term) -> np.ndarray:
    """The formulas as vision.proto writes them, in float64, over [C, h, w]."""
    x, p = block.astype(np.float64), term.p or 0.0
    axes = (1, 2)
    formulas: dict[str, Callable[[], np.ndarray]] = {
        "avg": lambda: x.mean(axes),
        "max": lambda: x.max(axes),
        "min": lambda: x.min(axes),
        "sum": lambda: x.sum(axes),
        "lp": lambda: (np.abs(x) ** p).sum(axes) ** (1 / p),
        "gem": lambda: (np.maximum(x, GEM_FLOOR) ** p).mean(axes) ** (1 / p),
        "lse": lambda: np.log(np.exp(p * x).mean(axes)) / p,
        "std": lambda: x.std(axes),
    }
    return formulas[term.kind]()


def naive_pool(x: FloatArray, pooling: Pooling) -> np.ndarray:
    height, width = x.shape[1:]
    parts = []
    for n in pooling.levels:
        for term in pooling.terms:
            for i in range(n):
                rows = slice(math.floor(i * height / n), math.ceil((i + 1) * height / n))
                for j in range(n):
                    columns = slice(math.floor(j * width / n), math.ceil((j + 1) * width / n))
                    parts.append(naive(x[:, rows, columns], term))
    vector = np.concatenate(parts)
    return vector / np.linalg.norm(vector) if pooling.l2_normalize else vector


def scale_of(x: FloatArray, term: Term) -> float:
    """What an error of this kind is relative to: sums and differences cancel, so their inputs' size."""
    size = float(np.abs(x).max())
    return max(size * (x.shape[1] * x.shape[2] if term.kind == "sum" else 1), 1e-6)


@st.composite
def terms(draw: st.DrawFn) -> Term:
    kind = draw(st.sampled_from(KINDS))
    if kind not in ("lp", "gem", "lse"):
        return Term(kind)
    p = st.floats(1 if kind == "lp" else 0.1, 8) | st.sampled_from((1.0, 2.0, 3.0, 4.0))
    return Term(kind, draw(st.none() | p))


poolings = st.builds(
    Pooling,
    st.lists(terms(), min_size=1, max_size=3).map(tuple),
    st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple),
)


@st.composite
def maps(draw: st.DrawFn, largest: int = 24) -> FloatArray:
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, largest)), draw(st.integers(1, largest)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from((1e-3, 1.0, 10.0)))  # the naive exponential overflows beyond
    return (rng.normal(size=shape) * spread + draw(st.sampled_from((0.0, -1.0, 5.0)))).astype(np.float32)


def cut(draw: Draw, tile: Tile, depth: int) -> list[Tile]:
    """A random partition of the tile."""
    top, bottom, left, right = tile
    ways = [w for w, size in (("rows", bottom - top), ("columns", right - left)) if size > 1]
    if depth == 0 or not ways or draw(st.integers(0, 4)) == 0:
        return [tile]
    if draw(st.sampled_from(ways)) == "rows":
        at = draw(st.integers(top + 1, bottom - 1))
        halves = [(top, at, left, right), (at, bottom, left, right)]
    else:
        at = draw(st.integers(left + 1, right - 1))
        halves = [(top, bottom, left, at), (top, bottom, at, right)]
    return [piece for half in halves for piece in cut(draw, half, depth - 1)]


def pooled_in_pieces(draw: Draw, x: Array, pooling: Pooling) -> FloatArray:
    """Random tiles, in random order, over several states merged as a random tree."""
    tiles = draw(st.permutations(cut(draw, (0, x.shape[1], 0, x.shape[2]), 4)))
    states = [pooling.begin(*x.shape) for _ in range(draw(st.integers(1, 4)))]
    for top, bottom, left, right in tiles:
        states[draw(st.integers(0, len(states) - 1))].add(x[:, top:bottom, left:right], top, left)
    while len(states) > 1:
        other = states.pop(draw(st.integers(0, len(states) - 1)))
        states[draw(st.integers(0, len(states) - 1))].merge(other)
    return states[0].finish()


def by_term(vector: np.ndarray, pooling: Pooling, channels: int) -> list[np.ndarray]:
    """One vector per term, all levels."""
    parts: list[list[np.ndarray]] = [[] for _ in pooling.terms]
    start = 0
    for level in pooling.levels:
        for part in parts:
            part.append(vector[start : (start := start + level * level * channels)])
    return [np.concatenate(part) for part in parts]


def assert_same(a: FloatArray, b: FloatArray, x: FloatArray, pooling: Pooling) -> None:
    """max and min bit for bit, the others to rounding."""
    terms_a, terms_b = by_term(a, pooling, len(x)), by_term(b, pooling, len(x))
    for term, part_a, part_b in zip(pooling.terms, terms_a, terms_b, strict=True):
        if term.kind in ("max", "min"):
            np.testing.assert_array_equal(part_a, part_b)
        else:
            atol = 1e-9 * scale_of(x, term)
            np.testing.assert_allclose(part_a, part_b, rtol=1e-6, atol=atol, err_msg=str(term))


@given(maps(), poolings)
def test_whole_map_matches_the_formulas(x: FloatArray, pooling: Pooling) -> None:
    vector = pool(x, pooling)
    assert vector.dtype == np.float32
    assert vector.shape == (pooling.dimension(len(x)),)
    got, want = (by_term(v, pooling, len(x)) for v in (vector, naive_pool(x, pooling)))
    for term, a, b in zip(pooling.terms, got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * scale_of(x, term), err_msg=str(term))


@settings(max_examples=200)
@given(st.data(), maps(), poolings)
def test_any_cut_in_any_order_gives_the_whole_answer(data: st.DataObject, x: FloatArray, pooling: Pooling) -> None:
    assert_same(pooled_in_pieces(data.draw, x, pooling), pool(x, pooling), x, pooling)


@settings(max_examples=60)
@given(st.data(), maps(), poolings)
def test_pieces_that_are_tensors_give_it_too(data: st.DataObject, x: FloatArray, pooling: Pooling) -> None:
    assert_same(pooled_in_pieces(data.draw, torch.from_numpy(x), pooling), pool(x, pooling), x, pooling)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_pieces_change_nothing(kind: str) -> None:
    x = np.random.default_rng(6).normal(size=(3, 5, 7)).astype(np.float32)
    pooling = Pooling((Term(kind),), (1, 2))
    for each in (x, torch.from_numpy(x)):
        state, empty = (pooling.begin(*x.shape) for _ in range(2))
        state.merge(empty)
        for top, bottom in ((0, 0), (0, 5), (5, 5)):
            state.add(each[:, top:bottom], top, 0)
        state.add(each[:, :, 3:3], 0, 3)
        empty.merge(state)
        for found in (state, empty):
            assert_same(found.finish(), pool(x, pooling), x, pooling)


@pytest.mark.parametrize("kind", KINDS)
def test_control_a_cut_that_is_a_row_off_differs(kind: str) -> None:
    x = np.random.default_rng(7).normal(size=(3, 12, 9)).astype(np.float32)
    x[:, 11] *= 2
    pooling = Pooling((Term(kind),))
    state = pooling.begin(*x.shape)
    state.add(x[:, :6], 0, 0)
    state.add(x[:, 5:11], 6, 0)
    with pytest.raises(AssertionError):
        assert_same(state.finish(), pool(x, pooling), x, pooling)


@given(maps(), st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), st.booleans())
def test_grids_are_those_of_torch(x: FloatArray, levels: tuple[int, ...], l2_normalize: bool) -> None:
    batch = torch.from_numpy(x)[None]
    expected = [
        f(batch, n)[0].flatten(1).T.flatten()  # cell by cell, channels innermost
        for n in levels
        for f in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)
    ]
    vector = torch.cat(expected)
    if l2_normalize:
        vector = F.normalize(vector, dim=0)
    got = pool(x, Pooling((Term("avg"), Term("max")), levels, l2_normalize))
    np.testing.assert_allclose(got, vector.numpy(), rtol=1e-5, atol=1e-5 * scale_of(x, Term("avg")))


@pytest.mark.parametrize("p", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4, 1e30])
def test_log_mean_exp_does_not_overflow(p: float, scale: float) -> None:
    x = (np.random.default_rng(1).normal(size=(3, 20, 30)) * scale).astype(np.float32)
    exact = torch.logsumexp(torch.from_numpy(x).double().flatten(1) * p, 1) - math.log(600)
    state = Pooling((Term("lse", p),)).begin(3, 20, 30)
    state.add(x[:, 13:], 13, 0)
    state.add(x[:, :13], 0, 0)
    for vector in (pool(x, Pooling((Term("lse", p),))), state.finish()):
        np.testing.assert_allclose(vector, exact.numpy() / p, rtol=2e-7, atol=1e-6 * scale)


@pytest.mark.parametrize("kind", ["lp", "gem"])
@pytest.mark.parametrize("p", [2.0, 3.5, 100.0, 1e6])
def test_powers_do_not_overflow(kind: str, p: float) -> None:
    """The naive formula does, in float64 too, at p = 100 already."""
    x = np.full((2, 4, 5), 1e30, np.float32)
    x[1] = 1e-5
    expected = x[:, 0, 0] * (20 ** (1 / p) if kind == "lp" else 1)
    np.testing.assert_allclose(pool(x, Pooling((Term(kind, p),))), expected, rtol=1e-6)
    with np.errstate(all="ignore"):
        assert p < 100 or not np.isfinite(naive(x, Term(kind, p))[0])


def test_gem_lifts_what_is_below_its_floor() -> None:
    x = np.array([[[-5.0, -1.0], [0.0, 1e-9]]], np.float32)
    np.testing.assert_allclose(pool(x, Pooling((Term("gem"),))), [GEM_FLOOR], rtol=1e-6)
    x[0, 0, 0] = 2.0
    np.testing.assert_allclose(pool(x, Pooling((Term("gem"),))), [2 / 4 ** (1 / 3)], rtol=1e-6)


def test_std_keeps_its_digits_beside_a_large_offset() -> None:
    """Where the mean of squares less the square of the mean, in float32, has none left."""
    rng = np.random.default_rng(2)
    x = (rng.integers(0, 2, size=(3, 64, 64)) + 1e6).astype(np.float32)
    textbook = np.sqrt(np.maximum((x * x).mean((1, 2)) - x.mean((1, 2)) ** 2, 0))
    assert (np.abs(textbook - 0.5) > 0.1).any()
    pooling = Pooling((Term("std"),))
    state = pooling.begin(3, 64, 64)
    for row in range(64):
        state.add(x[:, row : row + 1], row, 0)
    exact = x.astype(np.float64).std((1, 2))
    np.testing.assert_allclose(pool(x, pooling), exact, rtol=1e-6)
    np.testing.assert_allclose(state.finish(), exact, rtol=1e-6)
    x[:] = 16777213.0
    np.testing.assert_array_equal(pool(x, pooling), 0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("of", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("kind", KINDS)
def test_special_values(kind: str, of: Callable[[FloatArray], Array]) -> None:
    pooling = Pooling((Term(kind),), (1, 2))
    x = np.ones((2, 4, 4), np.float32)
    x[0, 1, 1] = np.nan
    nan = np.isnan(pool(of(x), pooling)).reshape(5, 2)  # whole map, then four cells
    np.testing.assert_array_equal(nan[:, 0], [True, True, False, False, False])
    assert not nan[:, 1].any()

    x[0, 1, 1], x[1, 1, 1] = np.inf, -np.inf
    infinite: dict[str, tuple[float, float]] = {
        "min": (1, -np.inf),
        "max": (np.inf, 1),
        "lse": (np.inf, math.log(15 / 16 * math.e)),
        "gem": (np.inf, (15 / 16) ** (1 / 3)),
        "lp": (np.inf, np.inf),
        "std": (np.nan, np.nan),
    }
    state = pooling.begin(2, 4, 4)
    for row in range(4):
        state.add(of(x)[:, row : row + 1], row, 0)
    expected = infinite.get(kind, (np.inf, -np.inf))
    for vector in (pool(of(x), pooling), state.finish()):
        np.testing.assert_allclose(vector[:2], expected, rtol=1e-6)

    zeros = pool(of(np.zeros_like(x)), pooling)
    np.testing.assert_allclose(zeros, GEM_FLOOR if kind == "gem" else 0, rtol=1e-6)
    normalized = pool(np.zeros_like(x), Pooling((Term("avg"),), l2_normalize=True))
    np.testing.assert_array_equal(normalized, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_the_vector(kind: str) -> None:
    x = np.random.default_rng(3).normal(size=(3, 5, 7)).astype(np.float32)
    pooling = Pooling((Term(kind), Term("max")), (2, 1))
    vector = pool(x, pooling)
    lower_left = naive(x[:, 2:5, 0:4], Term(kind))
    np.testing.assert_allclose(vector[2 * 3 : 3 * 3], lower_left, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(vector[-3:], x.max((1, 2)))


@pytest.mark.parametrize("kind", KINDS)
def test_layout_in_memory_does_not_matter(kind: str) -> None:
    x = np.random.default_rng(4).normal(size=(5, 9, 11)).astype(np.float32)
    channels_last = np.ascontiguousarray(x.transpose(1, 2, 0)).transpose(2, 0, 1)
    pooling = Pooling((Term(kind),), (1, 3))
    np.testing.assert_allclose(pool(channels_last, pooling), pool(x, pooling), rtol=1e-6)


def test_pieces_must_make_up_the_map() -> None:
    x = np.random.default_rng(5).normal(size=(2, 6, 6)).astype(np.float32)

    def state_of(*rows: tuple[int, int]) -> State:
        state = Pooling(levels=(1, 2)).begin(*x.shape)
        for top, bottom in rows:
            state.add(x[:, top:bottom], top, 0)
        return state

    state_of((0, 3), (3, 6)).finish()
    for wrong in ([(0, 3)], [(0, 3), (4, 6)], [(0, 4), (3, 6)], [(0, 6), (0, 6)], []):
        with pytest.raises(ValueError, match="exactly once"):
            state_of(*wrong).finish()
    twice = state_of((0, 3))
    twice.merge(state_of((0, 6)))
    with pytest.raises(ValueError, match="exactly once"):
        twice.finish()


def test_misuse_is_refused() -> None:
    state = Pooling().begin(2, 6, 6)
    for shape, top, left in [((3, 2, 2), 0, 0), ((2, 2, 2), 5, 0), ((2, 2, 2), 0, 5), ((2, 2, 2), -1, 0)]:
        with pytest.raises(ValueError, match="not within"):
            state.add(np.zeros(shape, np.float32), top, left)
    for other in (Pooling((Term("max"),)).begin(2, 6, 6), Pooling().begin(2, 6, 7)):
        with pytest.raises(ValueError, match="do not merge"):
            state.merge(other)
    with pytest.raises(ValueError, match="nothing to pool"):
        Pooling().begin(2, 0, 6)


@given(poolings, st.booleans())
def test_text_round_trip(pooling: Pooling, l2_normalize: bool) -> None:
    assert Pooling.parse(str(pooling)) == pooling
    assert Pooling.parse(f" {str(pooling).upper()} ", l2_normalize).l2_normalize == l2_normalize


@given(st.floats(1, 1.7e308))
def test_text_keeps_every_digit_of_p(p: float) -> None:
    assert Pooling.parse(str(Pooling((Term("lp", p), Term("max"))))).terms[0].p == p


def test_text() -> None:
    assert Pooling.parse("avg") == Pooling()
    assert Pooling.parse("gem") == Pooling((Term("gem", 3),))
    assert Pooling.parse("lp").terms[0].p == 2
    assert Pooling.parse("lse").terms[0].p == 1
    assert Pooling.parse("Avg + gem( 4 ) @ 1, 2") == Pooling((Term("avg"), Term("gem", 4)), (1, 2))
    assert str(Pooling((Term("gem"), Term("max")), (1, 2, 4))) == "gem(3)+max@1,2,4"
    assert str(Pooling((Term("gem", 2.5),))) == "gem(2.5)"
    assert Pooling.parse("avg+gem(4)@1,2").dimension(10) == 10 * 2 * 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean", "the kinds are avg, max"),
        ("", "cannot read ''"),
        ("avg+", "cannot read"),
        ("avg@", "cannot read"),
        ("avg@1,,2", "cannot read"),
        ("avg@1.5", "cannot read"),
        ("gem()", "cannot read"),
        ("gem(x)", "cannot read"),
        ("gem(nan)", "cannot read"),
        ("gem(1,2)", "cannot read"),
        ("avg max", "cannot read"),
        ("x" * 10**6, "unknown kind 'xxx"),
        ("avg+" * 10**5, "cannot read"),
        ("max(2)", "max takes no p; only lp, gem, lse do"),
        ("gem(0)", "at least 0.001, not 0"),
        ("gem(-1)", "at least 0.001, not -1"),
        ("gem(1e999)", "finite"),
        ("lp(0.5)", "at least 1, not 0.5"),
        ("avg@0", "level 0 is out of range; levels are 1 to 64"),
        ("avg@65", "level 65"),
        ("avg@1,2,3,4,5,6,7,8,9", "9 levels given; 1 to 8"),
        ("+".join(["avg"] * 9), "9 terms given; 1 to 8"),
        ("avg+max@64", "8192 values per channel (terms times grid cells); at most 4096"),
    ],
)
def test_bad_text_is_refused_with_what_would_be_right(text: str, message: str) -> None:
    with pytest.raises(InvalidInput) as error:
        Pooling.parse(text)
    assert message in str(error.value)
    assert len(str(error.value)) < 300
    assert error.value.field == "pooling"


def test_values_are_checked_without_text_too() -> None:
    for p in (math.nan, math.inf, 0.0, -2.0):
        with pytest.raises(InvalidInput):
            Term("gem", p)
    with pytest.raises(InvalidInput):
        Pooling(())
    with pytest.raises(InvalidInput):
        Pooling(levels=())
