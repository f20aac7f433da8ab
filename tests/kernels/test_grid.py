"""Adaptive grids and pyramids against PyTorch's own and against formulas, cell by cell."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fusedpool import adaptive_pool2d, pyramid_pool2d
from tests.kernels import region_cases as cases

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    cases.small_tiles(monkeypatch)


_FEW = settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))

_sides = st.tuples(st.integers(1, 6), st.integers(1, 6))


@_FEW
@given(size=_sides, output=_sides, last=st.booleans(), seed=st.integers(0, 99))
def test_equals_pytorch(
    device: torch.device, size: tuple[int, int], output: tuple[int, int], last: bool, seed: int
) -> None:
    x = cases.random(1, 3, *size, seed=seed, last=last).to(device).requires_grad_()
    y, indices = adaptive_pool2d(x, output, "max", return_indices=True)
    expected, places = F.adaptive_max_pool2d(x, output, return_indices=True)
    assert torch.equal(y, expected) and torch.equal(indices, places)
    mean, average = adaptive_pool2d(x, output), F.adaptive_avg_pool2d(x, output)
    cases.assert_close([mean], [average], 1e-12)
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    for found, wanted in ((y, expected), (mean, average)):
        cases.assert_close(cases.gradients([found], [x]), cases.gradients([wanted], [x]), 1e-11)


@pytest.mark.parametrize(
    ("kind", "size"),
    [*((kind, (7, 5)) for kind in cases.MEANINGFUL if kind != "std"), ("mixed", (6, 4)), ("lse", (2, 3))],
)
def test_every_kind_equals_its_formula(device: torch.device, kind: str, size: tuple[int, int]) -> None:
    x = cases.random(1, 3, *size, last=size == (7, 5)).to(device).requires_grad_()
    scale = (cases.random(3, seed=4) + 1).to(device).requires_grad_()
    found = adaptive_pool2d(x, (3, 2), kind, scale=scale, activation="leaky_relu")
    expected = cases.cells(cases.activated(x, scale, None, "leaky_relu"), kind, 3, 2)
    cases.assert_close([found], [expected], 1e-11)
    cases.assert_close(cases.gradients([found], [x, scale]), cases.gradients([expected], [x, scale]), 1e-9)


def test_std_equals_its_formula(device: torch.device) -> None:
    x = cases.random(1, 3, 7, 5).to(device).requires_grad_()
    found, expected = adaptive_pool2d(x, (3, 2), "std"), cases.cells(x, "std", 3, 2)
    cases.assert_close([found], [expected], 1e-11)
    cases.assert_close(cases.gradients([found], [x]), cases.gradients([expected], [x]), 1e-9)


def test_nan_and_ties_as_in_pytorch(device: torch.device) -> None:
    x = torch.randint(0, 3, (2, 2, 7, 8), generator=torch.Generator().manual_seed(1)).float().to(device)
    x[0, 0, 2, 3] = x[0, 0, 2, 4] = x[1, 1, 0, 0] = float("nan")
    x[1, 0] = float("-inf")
    y, indices = adaptive_pool2d(x, (3, 4), "max", return_indices=True)
    expected, places = F.adaptive_max_pool2d(x, (3, 4), return_indices=True)
    assert torch.equal(y.nan_to_num(99), expected.nan_to_num(99)) and torch.equal(indices, places)
    low, indices = adaptive_pool2d(x, (3, 4), "min", return_indices=True)
    expected, places = F.adaptive_max_pool2d(-x, (3, 4), return_indices=True)
    assert torch.equal(low.nan_to_num(99), -expected.nan_to_num(-99)) and torch.equal(indices, places)


def test_indices_are_of_the_winner_where_relu_hides_it(device: torch.device) -> None:
    x = -torch.ones(1, 1, 2, 2, device=device, requires_grad=True)
    y, indices = adaptive_pool2d(x, 1, "max", activation="relu", return_indices=True)
    assert y.item() == 0 and indices.item() == 0
    assert not torch.autograd.grad(y.sum(), x)[0].any()


@pytest.mark.parametrize(("kind", "last"), [("max", False), ("avg", True), ("gem", False)])
def test_a_pyramid_is_a_stack_of_grids(device: torch.device, kind: str, last: bool) -> None:
    levels = (1, 2, 3)
    x = cases.random(1, 3, 5, 6, last=last).to(device).requires_grad_()
    shift = torch.ones(3, device=device, dtype=torch.float64, requires_grad=True)
    found = pyramid_pool2d(x, levels, kind, shift=shift, activation="relu")
    grids = [adaptive_pool2d(x, level, kind, shift=shift, activation="relu") for level in levels]
    expected = torch.cat([grid.flatten(2) for grid in grids], 2)
    assert found.shape == (1, 3, 14) and found.is_contiguous()
    cases.assert_close([found], [expected], 1e-12)
    inputs = [x, shift]
    cases.assert_close(cases.gradients([found], inputs), cases.gradients([expected], inputs), 1e-11)


def test_a_pyramid_takes_one_read(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    names = cases.launches(monkeypatch)
    x = torch.ones(1, 2, 6, 7, device=kernel_device, requires_grad=True)
    cases.gradients([pyramid_pool2d(x, (1, 2, 3))], [x])
    assert names == ["partials", "merge", "backward"]


def test_cells_of_a_13_by_13_map_are_the_papers_windows() -> None:
    x = cases.random(1, 2, 13, 13)
    for level in (1, 2, 3, 6):
        windows = F.max_pool2d(x, -(-13 // level), 13 // level)
        assert torch.equal(pyramid_pool2d(x, (level,)), windows.flatten(2))


def test_levels_share_the_draws_of_a_pixel(device: torch.device) -> None:
    x = cases.random(2, 3, 4, 4).abs().to(device)
    y = pyramid_pool2d(x, (1, 4), "stochastic", generator=torch.Generator(device).manual_seed(2))
    assert torch.equal(y[..., 1:], x.flatten(2))
    assert (y[..., :1] == x.flatten(2)).any(-1).all()


def test_output_size_none_keeps_a_side() -> None:
    assert adaptive_pool2d(torch.zeros(1, 2, 5, 7), (None, 3)).shape == (1, 2, 5, 3)


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(1, 2, 5, 7)
    for call, words in (
        (lambda: adaptive_pool2d(x, 0), "output_size"),
        (lambda: adaptive_pool2d(x, (1, 2, 3)), "output_size"),
        (lambda: adaptive_pool2d(x, (2.5, None)), r"output_size is \(2.5, None\)"),  # type: ignore[arg-type]
        (lambda: adaptive_pool2d(x, 2, "avg", return_indices=True), "return_indices"),
        (lambda: adaptive_pool2d(x, 2, "median"), "kind is 'median'"),
        (lambda: pyramid_pool2d(x, ()), "levels"),
        (lambda: pyramid_pool2d(x, (1, 0)), "levels"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
