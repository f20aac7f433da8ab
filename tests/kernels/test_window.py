"""Sliding windows: values, indices and gradients of the kernels and of the CPU path, against PyTorch and formulas."""

import math
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fusedpool import cells, operators, pool2d, runtime
from fusedpool.kinds import KINDS
from tests.kernels import formulas

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

MEANINGFUL = tuple(kind for kind in KINDS if kind != "stochastic")  # the same result whatever the seed
_FEW = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
_MANY = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))

LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "cropped", "expanded")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers [N, C, H, W], lying in memory in that way."""
    n, c, h, w = x.shape
    match layout:
        case "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        case "sliced":  # every other channel of a channels_last map, every other row
            wide = x.new_full((n, 2 * c, 2 * h, w), math.nan).contiguous(memory_format=torch.channels_last)
            wide[:, ::2, ::2] = x
            return wide[:, ::2, ::2]
        case "transposed":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        case "cropped":
            wide = x.new_full((n, c, h + 3, w + 5), math.nan).contiguous(memory_format=torch.channels_last)
            wide[:, :, 1 : h + 1, 2 : w + 2] = x
            return wide[:, :, 1 : h + 1, 2 : w + 2]
        case "expanded":  # the caller's x has equal images
            return x[:1].expand(x.shape) if n else x
    return x.contiguous()


def random_map(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def geometries(draw: st.DrawFn, dilated: bool = True) -> dict[str, Any]:
    """Legal arguments of a window, whether or not it fits."""
    kernel = draw(st.tuples(*[st.integers(1, 4)] * 2))
    dilation = draw(st.tuples(*[st.integers(1, 3)] * 2)) if dilated else (1, 1)
    padding = tuple(draw(st.integers(0, ((k - 1) * d + 1) // 2)) for k, d in zip(kernel, dilation, strict=True))
    stride = draw(st.none() | st.tuples(*[st.integers(1, 4)] * 2))
    return {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "ceil_mode": draw(st.booleans()),
    }


sizes = st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
layouts = st.sampled_from(LAYOUTS[:-1])
halves = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


def fits(x: Tensor, **geometry: Any) -> bool:
    """PyTorch's opinion."""
    try:
        F.max_pool2d(x, **geometry)
    except RuntimeError:
        return False
    return True


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


CASES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": (2, 3), "stride": (2, 3)},
    "overlapping": {"kernel_size": (3, 3), "stride": (2, 1), "padding": (1, 1)},
    "dilated": {"kernel_size": (2, 3), "stride": (3, 2), "padding": (1, 2), "dilation": (2, 2), "ceil_mode": True},
    "overhanging": {"kernel_size": (3, 2), "stride": (3, 2), "padding": (1, 0), "ceil_mode": True},
    "uncounted": {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1), "count_include_pad": False},
    "overridden": {"kernel_size": (3, 2), "stride": (1, 2), "divisor_override": 7},
    "larger": {"kernel_size": (9, 3), "stride": (2, 2), "padding": (4, 1), "ceil_mode": True},
}


def expected_of(x: Tensor, kind: str, geometry: dict[str, Any], activation: str, tensors: dict[str, Tensor]) -> Tensor:
    """The formula's outputs; tensors: scale, shift and p, or none."""
    channels = (1, -1, 1, 1)
    u = x * tensors["scale"].view(channels) + tensors["shift"].view(channels) if "scale" in tensors else x
    names = {"kernel_size": "kernel"}
    arguments = {names.get(name, name): value for name, value in geometry.items()}
    return formulas.windows(formulas.ACTIVATIONS[activation](u), kind, p=tensors.get("p"), **arguments)


def tensors_for(kind: str, channels: int, affine: bool) -> dict[str, Tensor]:
    tensors = {}
    if affine:
        tensors = {"scale": random_map(channels, seed=1) + 0.2, "shift": random_map(channels, seed=2)}
    if KINDS[kind].learnable:
        tensors["p"] = torch.tensor([2.5 if kind == "gem" else 0.3], dtype=torch.float64)
    return tensors


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


@pytest.mark.parametrize(("kind", "layout"), [*zip(("max", "softpool") * 3, LAYOUTS, strict=True)])
def test_memory_formats_are_kept_whatever_the_gradient_is(device: torch.device, kind: str, layout: str) -> None:
    images = random_map(1, 4, 5, 4).expand(2, 4, 5, 4)
    plain = images.clone().to(device).requires_grad_()
    y = pool2d(plain, 3, 2, 1, kind=kind)
    g = random_map(*y.shape, seed=1).to(device)
    gradients = [torch.autograd.grad(y, plain, g, retain_graph=True)[0], torch.autograd.grad(y.sum(), plain)[0]]
    x = laid_out(images.clone().to(device), layout).requires_grad_()
    z = pool2d(x, 3, 2, 1, kind=kind)
    last = layout in ("channels_last", "cropped")
    format = torch.channels_last if last else torch.contiguous_format
    assert torch.equal(z, y) and z.is_contiguous(memory_format=format)
    for given_layout in ("contiguous", "channels_last", "transposed"):
        found = torch.autograd.grad(z, x, laid_out(g, given_layout), retain_graph=True)[0]
        torch.testing.assert_close(found, gradients[0], rtol=1e-12, atol=1e-14)
        assert found.is_contiguous(memory_format=format)
    found = torch.autograd.grad(z.sum(), x)[0]  # a gradient of stride 0
    torch.testing.assert_close(found, gradients[1], rtol=1e-12, atol=1e-14)


def test_a_cropped_map_of_one_pixel_has_windows_around_it(device: torch.device) -> None:
    # Strides alone say channels_last here, and a dense map of one pixel is both.
    x = random_map(2, 4, 3, 3).to(device).contiguous(memory_format=torch.channels_last)[:, :, :1, :1].requires_grad_()
    y = pool2d(x, 2, 1, 1, kind="max")
    g = random_map(*y.shape, seed=1).to(device)
    assert torch.equal(y, x.expand(y.shape))
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], g.sum((2, 3), keepdim=True))


def test_scale_and_shift_may_be_views(device: torch.device) -> None:
    x = random_map(2, 4, 4, 4).to(device)
    scale, shift = random_map(8, seed=1).to(device), random_map(1, seed=2).to(device)
    views = [scale[::2].requires_grad_(), shift.expand(4).requires_grad_()]
    copies = [view.detach().clone().requires_grad_() for view in views]
    results = []
    for tensors in (views, copies):
        y = pool2d(x, 2, kind="avg", scale=tensors[0], shift=tensors[1], activation="gelu")
        results.append((y, *torch.autograd.grad(y.sum(), tensors)))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", MEANINGFUL)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_empty_batches(device: torch.device, kind: str, format: torch.memory_format) -> None:
    x = torch.empty(0, 3, 5, 5, device=device).to(memory_format=format).requires_grad_()
    scale = torch.ones(3, device=device, requires_grad=True)
    y = pool2d(x, 2, kind=kind, scale=scale, activation="relu")
    dx, dscale = torch.autograd.grad(y.sum(), (x, scale))
    assert y.shape == (0, 3, 2, 2) and dx.shape == x.shape and torch.equal(dscale, torch.zeros_like(dscale))


@pytest.mark.parametrize(("kernel", "saved"), [((10, 13), torch.uint8), ((16, 16), torch.int32)])
def test_winners_of_small_and_large_windows(device: torch.device, kernel: tuple[int, int], saved: torch.dtype) -> None:
    x = random_map(1, 2, 26, 18)
    x[0, 0, kernel[0] - 1, kernel[1] - 1] = 9  # the last tap of the first window: over int8's 127
    exact = x.clone().requires_grad_()
    expected, places = F.max_pool2d(exact, kernel, 9, return_indices=True)
    wanted = torch.autograd.grad(expected.sum(), exact)[0]
    inputs = x.to(device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep := Keep(), lambda t: t):
        y, index = pool2d(inputs, kernel, 9, return_indices=True)
    assert torch.equal(y.cpu(), expected) and torch.equal(index.cpu(), places)
    assert [t.dtype for t in keep.tensors if t.dim() == 4] == [saved]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), inputs)[0].cpu(), wanted)


def test_winners_are_bytes_up_to_255_cells() -> None:
    for taps, dtype in ((255, torch.uint8), (256, torch.int32)):
        _, winner, _, _ = operators.empty_outputs(torch.empty(1, 1, 1, 1), (1, 1), taps, "max", True, False)
        assert winner.dtype is dtype


class Keep:
    """A hook that remembers which tensors autograd saves."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor)
        return tensor


@pytest.mark.parametrize(
    ("kind", "activation", "kept"),
    [
        ("max", "none", {torch.uint8}),
        ("min", "relu", {torch.uint8}),
        ("stochastic", "relu", {torch.uint8}),
        ("max", "gelu", {torch.uint8, torch.float16}),
        ("avg", "none", set()),
        ("avg", "relu", {torch.float16}),
        ("mixed", "none", {torch.uint8, torch.float32}),
        ("softpool", "none", {torch.float16, torch.float32}),
    ],
)
def test_backward_keeps_only_what_it_needs(
    device: torch.device, kind: str, activation: str, kept: set[torch.dtype]
) -> None:
    x = random_map(1, 2, 4, 4, dtype=torch.float16).to(device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep := Keep(), lambda t: t):
        pool2d(x, 2, kind=kind, activation=activation)
    saved = [t for t in keep.tensors if t.numel()]
    assert {t.dtype for t in saved} == kept
    assert all(t.dtype is torch.float16 or t.shape == (1, 2, 2, 2) for t in saved)


def test_saved_tensors_may_come_back_laid_out_otherwise(device: torch.device) -> None:
    x = random_map(2, 3, 6, 5).to(device).contiguous(memory_format=torch.channels_last).requires_grad_()
    results = []
    for unpack in (lambda t: t, lambda t: t.contiguous()):  # as torch.autograd.graph.save_on_cpu does
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = pool2d(x, 3, 2, kind="softpool") + pool2d(x, 3, 2, kind="max")
        results.append(torch.autograd.grad(y.sum(), x)[0])
    assert torch.equal(*results)


def test_relus_mask_is_in_the_winner(device: torch.device) -> None:
    x = torch.tensor([[-1.0, -2.0, 3.0, -1.0], [-3.0, -1.0, 1.0, 2.0]], device=device).view(1, 1, 2, 4).requires_grad_()
    y = pool2d(x, 2, activation="relu")
    assert y.flatten().tolist() == [0, 3]
    assert torch.autograd.grad(y.sum(), x)[0].flatten().tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    outputs = torch.ops.fusedpool.window(
        x.detach(), None, None, None, None, [2, 2, 2, 2, 0, 0, 1, 1, 0, 1, 0], "max", 0.0, "relu", True, False
    )
    assert outputs[1].flatten().tolist() == [operators.NO_WINNER, 0]


def test_a_mixed_winner_counts_though_the_output_is_negative(device: torch.device) -> None:
    x = torch.tensor([1.0, -2.0, -1.0, 0.5], dtype=torch.float64).view(1, 1, 2, 2)
    tensors = [x.clone().requires_grad_(), torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)]
    v = tensors[0].clamp(min=0).flatten()
    expected = torch.autograd.grad(tensors[1] * v.max() + (1 - tensors[1]) * v.mean(), tensors)
    inputs = [t.detach().to(device).requires_grad_() for t in tensors]
    found = torch.autograd.grad(pool2d(inputs[0], 2, kind="mixed", p=inputs[1], activation="relu").sum(), inputs)
    torch.testing.assert_close([t.cpu() for t in found], list(expected))


@pytest.mark.parametrize("kind", ["max", "softpool"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_wide_offsets_give_the_same_bits(
    kernel_device: torch.device, kind: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = laid_out(random_map(2, 3, 7, 6, dtype=torch.float32).to(kernel_device), layout).requires_grad_()
    scale = torch.full((3,), 1.5, device=kernel_device, requires_grad=True)
    results = []
    for wide in (False, True):
        ask = Mock(return_value=wide)
        monkeypatch.setattr(runtime, "wide", ask)
        y = pool2d(x, 3, 2, 1, kind=kind, scale=scale, activation="relu", return_indices=kind == "max")
        y = y[0] if kind == "max" else y
        results.append((y, *torch.autograd.grad(y.sum(), (x, scale))))
        assert ask.call_count == 2
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_offsets_beyond_two_to_the_31(kernel_device: torch.device) -> None:
    # Real memory behind the few elements that are read: the rows of a sparse mapping, 4 GiB apart and never touched.
    storage = torch.empty(0, dtype=torch.float16)
    far = 2**31 + 2**20
    try:
        storage = torch.empty(far + 64, dtype=torch.float16, device=kernel_device)  # pages appear when they are touched
    except RuntimeError:
        pytest.skip("no address space for 4 GiB")
    x = storage.as_strided((1, 2, 2, 4), (0, far, 4, 1))
    x.copy_(torch.arange(16).view(1, 2, 2, 4))
    assert runtime.wide(x)
    assert pool2d(x, 2).flatten().tolist() == [5, 7, 13, 15]
    nhwc = storage.as_strided((1, 4, 2, 2), (0, 1, far, 4))
    nhwc.copy_(torch.arange(16).view(1, 4, 2, 2))
    assert pool2d(nhwc, 2).flatten().tolist() == [3, 7, 11, 15]


def test_which_tensors_need_wide_offsets() -> None:
    meta = torch.empty(2, 2**15, 2**8, 2**8, device="meta")  # 2^32 elements
    assert runtime.wide(meta) and not runtime.wide(meta[:1, : 2**14])
    assert runtime.wide(meta[:, :1]) and not runtime.wide(meta[:1, :, :, :-1][:, :-1])
    assert runtime.wide(None, meta) and not runtime.wide(None, meta.new_empty(0))


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_more_planes_than_a_grid_axis_holds(
    device: torch.device, format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(runtime, "_ELEMENTS", 2**17)  # few programs: the interpreter takes its time for each
    x = random_map(35000, 2, 2, 2, dtype=torch.float32).to(device).contiguous(memory_format=format).requires_grad_()
    y = pool2d(x, 2)
    assert torch.equal(y, x.amax((2, 3), keepdim=True))
    g = torch.autograd.grad(y.sum(), x)[0]
    assert torch.equal(g, (x == y).float())


def test_the_same_bits_every_time(device: torch.device) -> None:
    kinds, side = (("max", "softpool", "stochastic"), 5) if device.type == "cpu" else (tuple(KINDS), 200)
    x = random_map(3, 4, side, side, dtype=torch.float32).to(device).requires_grad_()
    scale = torch.linspace(0.5, 2, 4, device=device, requires_grad=True)
    for kind in kinds:
        runs = []
        for _ in range(2):
            generator = torch.Generator(device).manual_seed(4)
            y = pool2d(x, 3, 2, 1, kind=kind, scale=scale, activation="silu", generator=generator)
            runs.append((y, *torch.autograd.grad(y.sum(), (x, scale))))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), kind


def test_an_image_does_not_depend_on_its_batch(device: torch.device) -> None:
    x = random_map(3, 3, 5, 5, dtype=torch.float32).to(device)
    for kind in ("avg", "softpool", "std"):
        assert torch.equal(pool2d(x, 3, 2, kind=kind)[2:3], pool2d(x[2:3], 3, 2, kind=kind)), kind


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


class TestDerivatives:
    """First and second derivatives of the CPU path in float64, against finite differences."""

    @pytest.mark.parametrize("kind", [*MEANINGFUL, "stochastic"])
    @pytest.mark.parametrize("activation", ["none", "gelu"])
    def test_gradcheck_and_gradgradcheck(self, kind: str, activation: str) -> None:
        x = random_map(1, 2, 4, 3).requires_grad_()
        tensors = {name: t.requires_grad_() for name, t in tensors_for(kind, 2, activation != "none").items()}

        def pooled(x: Tensor, *values: Tensor) -> Any:
            named: Any = dict(zip(tensors, values, strict=True))
            generator = torch.Generator().manual_seed(3)
            return pool2d(x, (3, 2), 2, (1, 0), kind=kind, activation=activation, generator=generator, **named)

        with runtime.force("reference"):
            assert torch.autograd.gradcheck(pooled, (x, *tensors.values()))
            assert torch.autograd.gradgradcheck(pooled, (x, *tensors.values()))

    @pytest.mark.parametrize("kind", ["max", "avg", "lp", "softpool", "std"])
    def test_second_derivatives_on_the_kernels_are_those_of_the_formula(
        self, kernel_device: torch.device, kind: str
    ) -> None:
        x, scale, shift = random_map(1, 2, 5, 4), random_map(2, seed=1), random_map(2, seed=2)

        def second(inputs: list[Tensor], y: Tensor) -> tuple[Tensor, ...]:
            first = torch.autograd.grad(y, inputs[:2], torch.cos(y.detach()), create_graph=True)
            return torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), inputs)

        exact = [t.clone().requires_grad_() for t in (x, scale, shift)]
        named = {"scale": exact[1], "shift": exact[2]}
        expected = second(exact, expected_of(exact[0], kind, CASES["overlapping"], "silu", named))
        inputs = [t.to(kernel_device).requires_grad_() for t in (x, scale, shift)]
        y = pool2d(inputs[0], kind=kind, scale=inputs[1], shift=inputs[2], activation="silu", **CASES["overlapping"])
        for found, wanted in zip(second(inputs, y), expected, strict=True):
            torch.testing.assert_close(found.cpu(), wanted, rtol=1e-7, atol=1e-9)

    def test_one_tensor_may_be_the_input_and_the_gradient(self) -> None:
        def squared(x: Tensor, pool: Any) -> Tensor:
            first = torch.autograd.grad(pool(x), x, x, create_graph=True)[0]
            return torch.autograd.grad(first.sum(), x)[0]

        x = random_map(1, 1, 3, 3).requires_grad_()
        found = squared(x, lambda x: pool2d(x, 1, kind="avg", activation="silu"))
        torch.testing.assert_close(found, squared(x, F.silu))

    def test_a_linear_gradient_has_no_second_derivative_by_the_shift(self) -> None:
        x, shift = random_map(1, 2, 4, 4).requires_grad_(), random_map(2).requires_grad_()
        y = pool2d(x, 2, shift=shift, activation="relu")
        first = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
        assert torch.autograd.grad(first.sum(), shift, allow_unused=True)[0] is None

    def test_the_control_finds_a_wrong_gradient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = random_map(1, 1, 4, 4).requires_grad_()
        right = operators.reference_backward
        monkeypatch.setattr(operators, "reference_backward", lambda *args: [t * 1.1 for t in right(*args)])
        with pytest.raises(RuntimeError, match="Jacobian mismatch"):
            torch.autograd.gradcheck(lambda x: pool2d(x, 2, kind="softpool"), x)


def test_the_control_finds_a_kernel_that_reads_a_row_too_far(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = random_map(1, 1, 5, 5).to(kernel_device)
    right = cells._constants
    monkeypatch.setattr(cells, "_constants", lambda window: {**right(window), "PH": 0})
    assert not torch.equal(pool2d(x, 3, 2, 1).cpu(), F.max_pool2d(x.cpu(), 3, 2, 1))
