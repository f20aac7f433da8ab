"""The kinds of pooling on PyTorch tensors: the states that numpy makes, wherever the tensors are, and no questions."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from fullframe.engine import kinds
from fullframe.engine.arrays import Array, on_host
from fullframe.engine.kinds import MAKERS, Kind
from fullframe.engine.query import FloatArray

CASES = [
    *((kind, float("nan")) for kind in ("avg", "max", "min", "sum", "std")),
    *(("lp", p) for p in (1.0, 2.0, 3.5, 100.0)),
    *(("gem", p) for p in (0.1, 1.0, 3.0, 2.5, 100.0)),
    *(("lse", p) for p in (0.05, 1.0, 20.0)),
]
CUTS = ([0, 13], [0, 4, 13], [0, 1, 2, 9, 13])
TOLERANCE = 1e-12
"""Of float64 states, relative to the largest: sums in another order, powers and exponentials by another library."""


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def values() -> FloatArray:
    """float32 [10, 13, 17]: noise of several sizes, all the same, zeros, not a number, infinities."""
    x = np.random.default_rng(0).normal(size=(10, 13, 17)).astype(np.float32)
    x[1] *= 1e-3
    x[2] *= 1e4
    x[3] += 100
    x[4] = 5
    x[5] = 0
    x[6, 7, 8] = np.nan
    x[7, 3, 2] = np.inf
    x[8, 12, 16] = -np.inf
    x[9, 0, 0], x[9, 10, 10] = np.inf, -np.inf
    return x


def pooled(kind: Kind, x: Array, cut: list[int]) -> Array:
    """The state of a map's rows, put together from pieces, the last one first."""
    state, seen = None, 0
    with np.errstate(all="ignore"):
        for top, bottom in reversed(list(pairwise(cut))):
            piece, count = kind.lift(x[:, top:bottom]), (bottom - top) * x.shape[2]
            state = piece if state is None else kind.combine(state, piece, seen, count)
            seen += count
    return state


def assert_same(found: Array, wanted: Array) -> None:
    """Each row's values to the tolerance, channel by channel; what is not finite, exactly."""
    ours, theirs = on_host(found), on_host(wanted)
    assert ours.dtype == theirs.dtype == np.float64
    assert ours.shape == theirs.shape
    for row in range(len(ours)):
        for channel in range(ours.shape[1]):
            np.testing.assert_allclose(ours[row, channel], theirs[row, channel], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "p"), CASES)
def test_tensors_have_the_states_of_arrays(device: str, name: str, p: float) -> None:
    kind, x = MAKERS[name](p), values()
    tensor = torch.from_numpy(x).to(device)
    channels_last = tensor[None].contiguous(memory_format=torch.channels_last)[0]
    for cut in CUTS:
        wanted = pooled(kind, x, cut)
        for each in (tensor, channels_last):
            found = pooled(kind, each, cut)
            assert isinstance(found, torch.Tensor) and found.device == tensor.device
            assert_same(found, wanted)


@pytest.mark.parametrize(("name", "p"), CASES)
def test_a_wrong_combine_would_not_pass(monkeypatch: pytest.MonkeyPatch, name: str, p: float) -> None:
    """The control: one that forgets the second piece."""
    kind, x = MAKERS[name](p), values()
    x[0, 0, 0], x[0, 1, 1] = 99, -99  # the extreme ones are in it
    wanted = pooled(kind, x, CUTS[1])
    monkeypatch.setattr(type(kind), "combine", lambda self, a, b, n_a, n_b: a)
    with pytest.raises(AssertionError):
        assert_same(pooled(kind, torch.from_numpy(x), CUTS[1]), wanted)


@pytest.mark.parametrize(("name", "p"), CASES)
def test_no_value_is_asked_for(name: str, p: float) -> None:
    """On tensors without values."""
    state = pooled(MAKERS[name](p), torch.empty(10, 13, 17, device="meta"), CUTS[2])
    assert state.device.type == "meta" and state.dtype is torch.float64
    with pytest.raises(NotImplementedError):
        on_host(state)  # the control


@pytest.mark.parametrize(("name", "p"), CASES)
@pytest.mark.parametrize("limit", [1, 100, 500])
def test_the_values_that_are_widened_at_once_do_not_matter(
    monkeypatch: pytest.MonkeyPatch, name: str, p: float, limit: int
) -> None:
    x: Any = values()
    wanted = pooled(MAKERS[name](p), x, CUTS[1])
    monkeypatch.setattr(kinds, "_CHUNK", limit)
    np.testing.assert_array_equal(pooled(MAKERS[name](p), x, CUTS[1]), wanted)
