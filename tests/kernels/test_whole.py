"""Whole maps: several kinds from one read, and images of different sizes in a padded batch."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusedpool import global_pool2d
from tests.kernels import region_cases as cases

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    cases.small_tiles(monkeypatch)


_FEW = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


@_FEW
@given(
    shape=st.tuples(st.integers(0, 2), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    last=st.booleans(),
    kinds=st.lists(st.sampled_from(cases.MEANINGFUL), min_size=1, max_size=3, unique=True),
    seed=st.integers(0, 99),
)
def test_any_size(device: torch.device, shape: tuple[int, ...], last: bool, kinds: list[str], seed: int) -> None:
    x = cases.random(*shape, seed=seed, last=last).to(device).requires_grad_()
    if not shape[0]:
        assert [y.shape for y in global_pool2d(x, kinds)] == [shape[:2]] * len(kinds)
        return
    found = global_pool2d(x, kinds)
    kept = found if shape[2] * shape[3] > 1 else [y for y, kind in zip(found, kinds, strict=True) if kind != "std"]
    names = [kind for kind in kinds if shape[2] * shape[3] > 1 or kind != "std"]  # no derivative where all is equal
    expected = [cases.pooled(x.flatten(2), kind) for kind in names]
    cases.assert_close(kept, expected, 1e-9)
    if names:
        cases.assert_close(cases.gradients(kept, [x]), cases.gradients(expected, [x]), 1e-8)


def test_equals_pytorch(device: torch.device) -> None:
    x = cases.random(2, 4, 6, 5, dtype=torch.float32).to(device)
    mean, best, worst, total = global_pool2d(x, ("avg", "max", "min", "sum"))
    assert torch.equal(best, x.amax((2, 3))) and torch.equal(worst, x.amin((2, 3)))
    cases.assert_close([mean, total], [x.mean((2, 3)), x.sum((2, 3))], 1e-6)


def test_kinds_together_equal_kinds_alone(device: torch.device) -> None:
    kinds = ("avg", "max", "gem")
    x = cases.random(2, 3, 6, 7, dtype=torch.float32).to(device).requires_grad_()
    together = global_pool2d(x, kinds, activation="relu")
    alone = [global_pool2d(x, (kind,), activation="relu")[0] for kind in kinds]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    parts = [torch.autograd.grad(y.sum(), x)[0] for y in alone]
    (whole,) = torch.autograd.grad([y.sum() for y in together], x)
    cases.assert_close([whole], [sum(parts[1:], parts[0])], 1e-6)


def test_all_kinds_take_one_read_and_one_backward(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    names = cases.launches(monkeypatch)
    x = cases.random(1, 8, 7, 7, dtype=torch.float32).to(kernel_device).requires_grad_()
    cases.gradients(global_pool2d(x, ("avg", "max", "gem")), [x])
    assert names == ["partials", "backward"]


SIZES = ((5, 4), (2, 6), (1, 1))
SIZED = tuple(kind for kind in cases.MEANINGFUL if kind != "std")  # no derivative for one pixel


def cropped(x: Tensor, kinds: tuple[str, ...], scale: Tensor | None = None) -> list[Tensor]:
    """Each image cut out and pooled by itself."""
    alone = [
        global_pool2d(x[n : n + 1, :, :height, :width], kinds, activation="relu", scale=scale)
        for n, (height, width) in enumerate(SIZES)
    ]
    return [torch.cat(results) for results in zip(*alone, strict=True)]


@pytest.mark.parametrize(("padding", "last"), [(float("nan"), False), (float("inf"), True)])
def test_sizes_equal_cropping(device: torch.device, padding: float, last: bool) -> None:
    x = cases.random(3, 3, 6, 7, last=last).to(device) + 1
    outside = torch.ones_like(x, dtype=torch.bool)
    for n, (height, width) in enumerate(SIZES):
        outside[n, :, :height, :width] = False
    x[outside] = padding
    x.requires_grad_()
    scale = torch.full((3,), 1.5, device=device, dtype=torch.float64, requires_grad=True)
    found = global_pool2d(x, SIZED, sizes=torch.tensor(SIZES, device=device), activation="relu", scale=scale)
    expected = cropped(x, SIZED, scale=scale)
    cases.assert_close(found, expected, 1e-12)
    (dx, dscale), (whole, by_scale) = (cases.gradients(y, [x, scale]) for y in (found, expected))
    assert not dx[outside].any()
    cases.assert_close([dx, dscale], [whole, by_scale], 1e-12)


def test_ignoring_sizes_would_show() -> None:
    x = cases.random(3, 3, 6, 7)
    whole, expected = global_pool2d(x, SIZED, activation="relu"), cropped(x, SIZED)
    for ignored, kept in zip(whole, expected, strict=True):
        with pytest.raises(AssertionError):
            cases.assert_close([ignored], [kept], 1e-3)


def test_an_image_of_no_pixels_pools_to_zero(device: torch.device) -> None:
    x = cases.random(2, 2, 3, 3).to(device).requires_grad_()
    p = torch.tensor(2.0, device=device, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([[0, 3], [3, 3]], device=device)
    found = global_pool2d(x, cases.MEANINGFUL, sizes=sizes, p={"gem": p})
    assert not any(y[0].any() for y in found)
    dx, dp = cases.gradients(found, [x, p])
    assert not dx[0].any() and dx[1].any() and dp.isfinite()


def test_wrong_sizes_are_named() -> None:
    x = torch.zeros(2, 3, 4, 5)
    for sizes, words in (
        (torch.tensor([[4, 5]]), r"sizes is torch.int64 \[1, 2\]"),
        (torch.ones(2, 2), "sizes is torch.float32"),
        (torch.tensor([[4, 5], [5, 5]]), "sizes has rows outside of 0 to 4 x 0 to 5"),
        (torch.tensor([[4, 5], [-1, 5]]), "sizes has rows outside"),
    ):
        with pytest.raises(ValueError, match=words):
            global_pool2d(x, sizes=sizes)
