"""Sliding windows: values, indices and gradients of the kernels and of the CPU path, against PyTorch and formulas."""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fusedpool import pool2d, runtime, window_launch
from tests.kernels import formulas
from tests.kernels.window_cases import (
    CASES,
    LAYOUTS,
    MEANINGFUL,
    expected_of,
    fits,
    geometries,
    laid_out,
    random_map,
    tensors_for,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

_FEW = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
_MANY = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))


# Rows of 16 and 8 are read and written in units, others one by one.
widths = st.integers(1, 9) | st.just(16)
sizes = st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(1, 9), widths)
layouts = st.sampled_from(LAYOUTS[:-1])
halves = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


@_MANY
@given(shape=sizes, geometry=geometries(), layout=layouts, dtype=halves, seed=st.integers(0, 10**6))
def test_max_values_and_indices_are_exactly_pytorchs(
    device: torch.device, shape: Any, geometry: Any, layout: str, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([-math.inf, -1, 0, 1, 1, 2, math.inf, math.nan])
    x = values[torch.randint(len(values), shape, generator=generator)].to(dtype)
    assume(fits(torch.ones(1, *shape[1:]), **geometry))
    y, index = pool2d(laid_out(x.to(device), layout), kind="max", return_indices=True, **geometry)
    expected, places = F.max_pool2d(x, return_indices=True, **geometry)
    empty = (
        F.max_pool2d(torch.ones(1, 1, *shape[2:]), **geometry) == -math.inf
    )  # there, PyTorch's index is out of the map
    places = torch.where(empty.expand(places.shape), -1, places)
    torch.testing.assert_close(y.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(index.cpu(), places)
    low, places = F.max_pool2d(-x, return_indices=True, **geometry)
    z, index = pool2d(laid_out(x.to(device), layout), kind="min", return_indices=True, **geometry)
    torch.testing.assert_close(z.cpu(), -low, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(index.cpu(), torch.where(empty.expand(places.shape), -1, places))


@_FEW
@given(
    shape=sizes,
    geometry=geometries(dilated=False),
    layout=layouts,
    include=st.booleans(),
    divisor=st.sampled_from([None, None, 1, 5, -3]),
)
def test_avg_is_pytorchs(
    device: torch.device, shape: Any, geometry: Any, layout: str, include: bool, divisor: int | None
) -> None:
    x = random_map(*shape)
    assume(fits(torch.ones(1, *shape[1:]), **geometry))
    g = dict(geometry)
    del g["dilation"]
    options: Any = {"count_include_pad": include, "divisor_override": divisor}
    expected = F.avg_pool2d(x, **g, **options)
    y = pool2d(laid_out(x.to(device), layout), kind="avg", **geometry, **options)
    torch.testing.assert_close(y.cpu(), expected)
    if divisor is None and not include:
        total = pool2d(x.to(device), kind="sum", **geometry).cpu()
        torch.testing.assert_close(total, F.avg_pool2d(x, **g, divisor_override=1))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_lp_of_positive_maps_is_pytorchs(device: torch.device, p: float, ceil_mode: bool) -> None:
    x = random_map(2, 3, 8, 7).abs()
    # With ceil_mode PyTorch scales an overhanging window's sum up to a whole one: compare those that do not overhang.
    expected = F.lp_pool2d(x, p, 3, 2, ceil_mode)[..., :3, :3]
    y = pool2d(x.to(device), 3, 2, kind="lp", p=p, ceil_mode=ceil_mode)[..., :3, :3]
    torch.testing.assert_close(y.cpu(), expected)


ARRANGED = (
    ("plain", "contiguous", None),
    ("overlapping", "channels_last", "relu"),
    ("dilated", "transposed", "gelu"),
    ("overhanging", "sliced", "none"),
    ("uncounted", "cropped", "silu"),
    ("overridden", "channels_last", "leaky_relu"),
    ("larger", "contiguous", "relu"),
)


@pytest.mark.parametrize(
    ("kind", "case", "layout", "activation"),
    [  # all of some kinds, every other case of the others
        (kind, *arranged)
        for k, kind in enumerate(MEANINGFUL)
        for a, arranged in enumerate(ARRANGED)
        if kind in ("max", "avg", "mixed") or (k + a) % 2 == 0
    ],
)
def test_values_and_gradients_are_those_of_the_formula(
    device: torch.device, kind: str, case: str, layout: str, activation: str | None
) -> None:
    x = random_map(2, 3, 7, 6)
    tensors = tensors_for(kind, 3, affine=activation is not None)
    reference = [t.clone().requires_grad_() for t in (x, *tensors.values())]
    named = dict(zip(tensors, reference[1:], strict=True))
    expected = expected_of(reference[0], kind, CASES[case], activation or "none", named)
    g = random_map(*expected.shape, seed=3)
    wanted = torch.autograd.grad(expected, reference, g)

    inputs = [
        laid_out(x.to(device), layout).requires_grad_(),
        *(t.to(device).requires_grad_() for t in tensors.values()),
    ]
    options: Any = {**dict(zip(tensors, inputs[1:], strict=True)), **CASES[case]}
    y = pool2d(inputs[0], kind=kind, activation=activation, **options)
    gradients = torch.autograd.grad(y, inputs, g.to(device))
    for found, exact in zip((y, *gradients), (expected, *wanted), strict=True):
        torch.testing.assert_close(found.cpu(), exact, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.float16) for kind in MEANINGFUL]
    + [(kind, dtype) for kind in ("max", "avg", "lse", "std") for dtype in (torch.float32, torch.bfloat16)],
)
def test_each_precision_sums_in_float32(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    # One rounding of the output, and what a rounded saved output does to the gradient: (1 + |y|) half-steps.
    step = 2 * torch.finfo(dtype).eps if dtype is not torch.float32 else 1e-5
    x, g = random_map(2, 4, 9, 8, dtype=dtype), random_map(2, 4, 4, 3, seed=1, dtype=dtype)
    scale, shift = random_map(4, seed=2, dtype=dtype), random_map(4, seed=3, dtype=torch.float32)
    exact = [t.double().requires_grad_() for t in (x, scale, shift)]
    geometry: Any = {"kernel_size": (3, 4), "stride": (2, 2)}
    expected = expected_of(exact[0], kind, geometry, "silu", {"scale": exact[1], "shift": exact[2]})
    wanted = torch.autograd.grad(expected, exact, g.double())
    inputs = [t.to(device).requires_grad_() for t in (x, scale, shift)]
    y = pool2d(inputs[0], kind=kind, scale=inputs[1], shift=inputs[2], activation="silu", **geometry)
    gradients = torch.autograd.grad(y, inputs, g.to(device))
    assert y.dtype is dtype and [t.dtype for t in gradients] == [t.dtype for t in inputs]
    for found, correct in zip((y, *gradients), (expected, *wanted), strict=True):
        error = (found.cpu().double() - correct).abs().max() / correct.abs().max().clamp(min=1)
        assert error <= step * 2, (kind, error)


def test_large_values_do_not_overflow_nor_lose_the_gradient(device: torch.device) -> None:
    x = (random_map(1, 2, 6, 6) * 0.5 + 100).to(torch.bfloat16)
    for kind, p in (("lse", 4.0), ("softpool", None), ("std", None)):
        exact = x.double().requires_grad_()
        expected = formulas.windows(exact, kind, (3, 3), (3, 3), p=p)
        wanted = torch.autograd.grad(expected.sum(), exact)[0]
        given_x = x.to(device).requires_grad_()
        y = pool2d(given_x, 3, kind=kind, p=p)
        found = torch.autograd.grad(y.sum(), given_x)[0]
        torch.testing.assert_close(y.cpu().double(), expected, rtol=2**-7, atol=1e-3)
        if kind != "softpool":  # whose gradient holds v - y, y rounded
            torch.testing.assert_close(found.cpu().double(), wanted, rtol=2**-7, atol=2**-8)


def test_special_values(device: torch.device) -> None:
    inf, nan = math.inf, math.nan
    windows = torch.tensor([[-inf, 1.0, 2.0, 0.5], [inf, 1.0, -2.0, 3.0], [nan, 1.0, 2.0, 3.0], [-inf] * 4])
    x = windows.view(4, 1, 2, 2).double().to(device)

    def pooled(kind: str) -> list[float]:
        result: list[float] = pool2d(x, 2, kind=kind).flatten().tolist()
        return result

    finite = windows[0, 1:].double()
    weighted = float((finite * torch.softmax(finite, 0)).sum())
    expected = {
        "max": [2.0, inf, nan, -inf],
        "min": [-inf, -2.0, nan, -inf],
        "avg": [-inf, inf, nan, -inf],
        "sum": [-inf, inf, nan, -inf],
        "lse": [math.log(float(finite.exp().sum()) / 4), inf, nan, -inf],
        "softpool": [weighted, inf, nan, -inf],
        "lp": [inf, inf, nan, inf],
        "mixed": [-inf, inf, nan, -inf],
        "stochastic_mean": [float((finite**2).sum() / finite.sum()), nan, nan, 0.0],
        "gem": [float(((finite**3).sum() + 1e-18) / 4) ** (1 / 3), inf, nan, 1e-6],
        "std": [nan, nan, nan, nan],
    }
    for kind, values in expected.items():
        assert pooled(kind) == pytest.approx(values, nan_ok=True), kind


def test_a_weight_of_nothing_has_no_gradient(device: torch.device) -> None:
    x = (
        torch.tensor([[-math.inf, 1.0], [2.0, 0.5]], dtype=torch.float64, device=device)
        .view(1, 1, 2, 2)
        .requires_grad_()
    )
    gradient = torch.autograd.grad(pool2d(x, 2, kind="softpool").sum(), x)[0]
    assert gradient[0, 0, 0, 0] == 0
    assert gradient.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", "silu"])
def test_activations_treat_nan_and_zero_as_pytorch(device: torch.device, activation: str) -> None:
    x = torch.tensor([math.nan, 0.0, -0.0, -1.0, 2.0, -40.0, 40.0], dtype=torch.float64).view(1, 1, 1, 7)
    exact = x.clone().requires_grad_()
    expected = getattr(F, activation)(exact)
    wanted = torch.autograd.grad(expected.sum(), exact)[0]
    for kind in ("max", "avg"):  # with the mask in the winner, and without
        inputs = x.to(device).requires_grad_()
        y = pool2d(inputs, 1, kind=kind, activation=activation)
        found = torch.autograd.grad(y.sum(), inputs)[0]
        torch.testing.assert_close(y.cpu(), expected, equal_nan=True)
        torch.testing.assert_close(found.cpu(), wanted, equal_nan=True)


def test_windows_of_nothing_but_padding(device: torch.device) -> None:
    # A dilated window may step over a map of one row.
    x = torch.full((1, 1, 1, 3), 2.0, dtype=torch.float64, device=device, requires_grad=True)
    geometry: Any = {"kernel_size": (2, 1), "stride": 1, "padding": (1, 0), "dilation": (2, 1)}
    y, index = pool2d(x, kind="max", return_indices=True, **geometry)
    assert (y == -math.inf).all() and (index == -1).all()
    assert (torch.autograd.grad(y.sum(), x)[0] == 0).all()
    assert (pool2d(x, kind="min", **geometry) == math.inf).all()
    for kind in ("sum", "lp"):
        assert (pool2d(x, kind=kind, **geometry) == 0).all()
    assert (pool2d(x, kind="avg", **geometry) == 0).all()  # the padding counts
    assert pool2d(x, kind="avg", count_include_pad=False, **geometry).isnan().all()  # the mean of nothing


class TestStochastic:
    """Samples in training, their expectation in evaluation."""

    def test_a_seed_draws_the_same_in_each_layout_and_on_each_path(self, kernel_device: torch.device) -> None:
        x = random_map(2, 3, 8, 7, dtype=torch.float32)
        draws = []
        for place, path in ((kernel_device, "triton"), (torch.device("cpu"), "reference")):
            for layout in ("contiguous", "channels_last", "transposed"):
                inputs = laid_out(x.to(place), layout).requires_grad_()
                seed = torch.tensor([2**40 + 5], device=place)  # its upper half counts
                with runtime.force(path):  # type: ignore[arg-type]
                    y = self._drawn(inputs, seed)
                    draws.append((y.cpu(), torch.autograd.grad(y.sum(), inputs)[0].cpu()))
        assert all(torch.equal(a, b) for draw in draws[1:] for a, b in zip(draw, draws[0], strict=True))
        with runtime.force("reference"):
            assert not torch.equal(self._drawn(x, torch.tensor([5])), draws[0][0])

    def _drawn(self, x: Tensor, seed: Tensor) -> Tensor:
        window = [3, 3, 2, 2, 1, 1, 1, 1, 0, 1, 0]
        y: Tensor = torch.ops.fusedpool.window(
            x, None, None, None, seed, window, "stochastic", 0.0, "none", True, False
        )[0]
        return y

    def test_values_are_drawn_in_proportion(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runtime, "_ELEMENTS", 2**15)  # few programs: the interpreter takes its time for each
        weights = torch.tensor([0.0, 1.0, 2.0, 3.0, -5.0, 4.0])
        draws = 4000
        x = weights.view(1, 1, 2, 3).repeat(1, draws, 1, 1).to(device)
        y = pool2d(x, (2, 3), kind="stochastic", generator=torch.Generator(device).manual_seed(0)).flatten().cpu()
        counts = torch.stack([(y == w).sum() for w in weights])
        expected = weights.clamp(min=0) / weights.clamp(min=0).sum() * draws
        assert counts.sum() == draws and (counts[expected == 0] == 0).all()
        drawn = expected > 0
        chi_squared = ((counts - expected)[drawn] ** 2 / expected[drawn]).sum()
        assert chi_squared < 16.3  # 3 degrees of freedom, p = 0.001

    def test_evaluation_is_the_expectation(self, device: torch.device) -> None:
        x = random_map(2, 3, 6, 6)
        y = pool2d(x.to(device), 3, kind="stochastic", training=False)
        torch.testing.assert_close(y.cpu(), formulas.windows(x, "stochastic_mean", (3, 3), (3, 3)))

    def test_nothing_to_draw_from(self, device: torch.device) -> None:
        x = torch.tensor([-1.0, 0.0, -2.0, 0.0], device=device).view(1, 1, 2, 2).requires_grad_()
        y = pool2d(x, 2, kind="stochastic")
        assert y.item() == 0 and (torch.autograd.grad(y, x)[0] == 0).all()

    def test_a_generator_moves_on(self, device: torch.device) -> None:
        x = random_map(1, 8, 6, 6).to(device)
        generator = torch.Generator(device).manual_seed(0)
        first, second = (pool2d(x, 3, kind="stochastic", generator=generator) for _ in range(2))
        assert not torch.equal(first, second)
        torch.manual_seed(7)
        third = pool2d(x, 3, kind="stochastic")
        torch.manual_seed(7)
        assert torch.equal(third, pool2d(x, 3, kind="stochastic"))


def test_the_control_finds_a_kernel_that_reads_a_row_too_far(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = random_map(1, 1, 5, 5).to(kernel_device)
    right = window_launch._constants
    monkeypatch.setattr(window_launch, "_constants", lambda window: {**right(window), "PH": 0})
    assert not torch.equal(pool2d(x, 3, 2, 1).cpu(), F.max_pool2d(x.cpu(), 3, 2, 1))
