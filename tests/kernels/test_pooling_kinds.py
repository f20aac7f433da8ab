"""The kinds as monoids: the same result however values are cut and combined, in Triton's interpreter."""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusedpool._triton import tl, triton
from fusedpool.kinds import KINDS, combine, finish, identity, lift, reduce
from tests.kernels import formulas

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

MEANINGFUL = tuple(kind for kind in KINDS if kind != "stochastic")
_FEW = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


@triton.jit  # type: ignore[untyped-decorator]
def _pool(  # type: ignore[no-untyped-def]
    v, valid, e, y, winner, p,
    T: tl.constexpr, CUT: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """v [4, T] -> y, winner [4]: the first CUT values one after another, the others in one reduction."""
    row = tl.arange(0, 4)[:, None]
    p = tl.cast(p, ACC)
    a, b, c, i = identity(tl.zeros((4, 1), ACC), KIND)
    for t in tl.static_range(CUT):
        value, draw = tl.load(v + row * T + t).to(ACC), tl.load(e + row * T + t).to(ACC)
        there = tl.load(valid + row * T + t) != 0
        a2, b2, c2 = lift(value, there, p, draw, KIND)
        a, b, c, i = combine(a, b, c, i, a2, b2, c2, tl.where(there, t, -1), KIND, True)
    a1, b1, c1, i1 = tl.reshape(a, (4,)), tl.reshape(b, (4,)), tl.reshape(c, (4,)), tl.reshape(i, (4,))
    column = tl.arange(0, T)[None, :]
    value, draw = tl.load(v + row * T + column).to(ACC), tl.load(e + row * T + column).to(ACC)
    there = (tl.load(valid + row * T + column) != 0) & (column >= CUT)
    a, b, c = lift(value, there, p, draw, KIND)
    a, b, c, i = reduce(a, b, c, tl.where(there, column, -1), KIND, 1)
    a, b, c, i = combine(a1, b1, c1, i1, a, b, c, i, KIND, False)
    n = tl.sum(tl.load(valid + row * T + column), 1).to(ACC)
    place = tl.arange(0, 4)
    tl.store(y + place, finish(a, b, c, n, p, KIND))
    tl.store(winner + place, i)


def pooled(v: Tensor, valid: Tensor, kind: str, cut: int, e: Tensor | None = None) -> tuple[Tensor, Tensor]:
    y, winner = v.new_empty(4), torch.empty(4, dtype=torch.int32)
    acc = tl.float64 if v.dtype is torch.float64 else tl.float32
    draws = torch.ones_like(v) if e is None else e
    p = formulas.PARAMETERS.get(kind, 0.0)
    _pool[(1,)](v, valid.to(torch.int32), draws, y, winner, p, T=v.shape[1], CUT=cut, KIND=kind, ACC=acc)
    return y, winner


@pytest.mark.parametrize("kind", MEANINGFUL)
@_FEW
@given(seed=st.integers(0, 10**6), cut=st.integers(0, 8), share=st.sampled_from([0.4, 1.0]))
def test_every_way_to_cut_gives_the_formula(kind: str, seed: int, cut: int, share: float) -> None:
    check(kind, seed, cut, share)


def check(kind: str, seed: int, cut: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(4, 8, dtype=torch.float64, generator=generator)
    valid = torch.rand(4, 8, generator=generator) < share
    valid[:, seed % 8] = True
    y, winner = pooled(v, valid, kind, cut)
    p = formulas.PARAMETERS.get(kind, 0.0)
    for row in range(4):
        values = v[row][valid[row]]
        expected = formulas.FORMULAS[kind](values[None], p, len(values))
        torch.testing.assert_close(y[row : row + 1], expected, rtol=1e-9, atol=1e-9)
        if KINDS[kind].winner:
            best = values.min() if kind == "min" else values.max()
            assert v[row, winner[row]] == best and valid[row, winner[row]]


@pytest.mark.parametrize("cut", [0, 3, 8])
def test_nan_wins_the_first_of_ties_and_infinities_count(cut: int) -> None:
    inf, nan = math.inf, math.nan
    v = torch.tensor(
        [[1, 5, 5, 2, 5, 0, 1, 2], [1, nan, 9, nan, 3, 2, 1, 0], [-inf] * 8, [inf, 1, 2, inf, 3, -inf, 0, 0]]
    )
    valid = torch.ones(4, 8, dtype=torch.bool)
    valid[2, :2] = False
    expected: dict[str, tuple[list[float], list[int]]] = {
        "max": ([5, nan, -inf, inf], [1, 3, 2, 0]),
        "min": ([0, nan, -inf, -inf], [5, 3, 2, 5]),
    }
    for kind, (values, winners) in expected.items():
        y, winner = pooled(v, valid, kind, cut)
        assert y.tolist() == pytest.approx(values, nan_ok=True) and winner.tolist() == winners, kind
    assert pooled(v, valid, "softpool", cut)[0][2] == -inf
    assert pooled(v, valid, "lse", cut)[0].tolist()[2:] == [-inf, inf]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_the_identity(kind: str) -> None:
    v, nothing = torch.ones(4, 8), torch.zeros(4, 8, dtype=torch.bool)
    y, winner = pooled(v, nothing, kind, 4)
    expected = {"max": -math.inf, "min": math.inf, "sum": 0.0, "lp": 0.0, "stochastic": 0.0, "stochastic_mean": 0.0}
    assert y[0].item() == pytest.approx(expected.get(kind, math.nan), nan_ok=True)
    assert winner.tolist() == [-1] * 4


@pytest.mark.parametrize("cut", [0, 3, 8])
def test_stochastic_takes_the_largest_of_activation_over_draw(cut: int) -> None:
    v = torch.tensor([[1.0, 2, 3, 4, -5, 0, 1, 2]] * 2 + [[0.0, -1] * 4, [0.0] * 7 + [1e-30]])
    e = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) + 0.1
    y, winner = pooled(v, torch.ones(4, 8, dtype=torch.bool), "stochastic", cut, e)
    best = (v.clamp(min=0) / e).argmax(1)
    assert winner.tolist() == [int(best[0]), int(best[1]), -1, 7]  # zeros have no winner
    assert y.tolist() == pytest.approx([v[0, best[0]].item(), v[1, best[1]].item(), 0, 1e-30])


def test_std_of_large_values_is_stable() -> None:
    v = torch.tensor([[1e4, 1e4 + 1] * 4, [3e19] * 8, [1e-3, 2e-3] * 4, [0.0] * 8])
    y, _ = pooled(v, torch.ones(4, 8, dtype=torch.bool), "std", 5)
    assert y.tolist() == pytest.approx([0.5, 0, 5e-4, 0], rel=1e-4)


def test_the_control_finds_a_kind_that_forgets_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    formula: Any = lambda v, p, n: v.sum(-1) / (n + 1)  # noqa: E731
    monkeypatch.setitem(formulas.FORMULAS, "avg", formula)
    with pytest.raises(AssertionError):
        check("avg", 0, 3, 0.4)
