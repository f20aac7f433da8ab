"""Fractional windows: exactly PyTorch's values and indices in the same windows, and the formulas for all kinds."""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fusedpool import arguments, fractional_pool2d, runtime
from fusedpool.fractional import _covering, starts
from fusedpool.kinds import KINDS
from tests.kernels import formulas
from tests.kernels.window_cases import LAYOUTS, MEANINGFUL, laid_out, random_map, tensors_for

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

_FEW = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def axes(draw: st.DrawFn, most: int) -> tuple[int, int, int]:
    """(size, kernel, outputs) of an axis."""
    size = draw(st.integers(1, most))
    kernel = draw(st.integers(1, min(5, size)))
    return size, kernel, draw(st.integers(1, size - kernel + 1))


def seed_of(number: int, device: torch.device) -> tuple[torch.Generator, Tensor]:
    """A generator, and the seed that the next call draws from it."""
    generator = torch.Generator(device).manual_seed(number)
    seed = arguments.seed_for(torch.empty(0, device=device), generator)
    return generator.manual_seed(number), seed.cpu()


def samples(seed: Tensor, *planes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """PyTorch's _random_samples [N, C, 2] for those windows: horizontal first."""
    low = 2**20
    pair = torch.tensor([int(seed) // low % low / low, int(seed) % low / low], dtype=dtype)
    return pair.expand(*planes, 2)


@_FEW
@given(vertical=axes(9), horizontal=axes(9), layout=st.sampled_from(LAYOUTS[:-1]), number=st.integers(0, 10**9))
def test_max_is_exactly_pytorchs_in_the_same_windows(
    device: torch.device, vertical: Any, horizontal: Any, layout: str, number: int
) -> None:
    (height, *window_h), (width, *window_w) = vertical, horizontal
    kernel, outputs = zip(window_h, window_w, strict=True)
    values = torch.tensor([-math.inf, -1, 0, 1, 1, 2, math.inf, math.nan], dtype=torch.float64)
    choice = torch.randint(len(values), (2, 2, height, width), generator=torch.Generator().manual_seed(number))
    x = values[choice].requires_grad_()
    generator, seed = seed_of(number, device)
    expected, places = F.fractional_max_pool2d(
        x, kernel, outputs, return_indices=True, _random_samples=samples(seed, 2, 2)
    )
    g = random_map(*expected.shape)
    wanted = torch.autograd.grad(expected, x, g)[0]
    inputs = laid_out(x.detach().to(device), layout).requires_grad_()
    y, index = fractional_pool2d(inputs, kernel, outputs, generator=generator, return_indices=True)
    torch.testing.assert_close(y.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(index.cpu(), places)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, g.to(device))[0].cpu(), wanted)


def test_other_windows_give_other_values() -> None:
    x = torch.arange(400.0).view(1, 1, 20, 20)
    _, seed = seed_of(0, x.device)
    generator, _ = seed_of(1, x.device)
    expected = F.fractional_max_pool2d(x, 2, 13, _random_samples=samples(seed, 1, 1, dtype=x.dtype))
    assert not torch.equal(fractional_pool2d(x, 2, 13, generator=generator), expected)


@settings(max_examples=300, deadline=None)
@given(axis=axes(400), seed=st.integers(0, 2**62 - 1))
def test_windows_lie_in_the_map_and_backward_finds_all_of_them(axis: tuple[int, int, int], seed: int) -> None:
    size, kernel, outputs = axis
    begun, _ = starts(torch.tensor([seed]), (size, size), (kernel, kernel), (outputs, outputs))
    assert len(begun) == outputs and begun[0] >= 0 and begun[-1] == size - kernel
    steps = begun.diff()
    if outputs > 1:
        alpha = (size - kernel) / (outputs - 1)
        assert begun[0] == 0 and steps.min() >= math.floor(alpha) and steps.max() <= math.ceil(alpha)
    first, most = _covering(begun, size, kernel)
    for row in range(0, size, max(1, size // 20)):
        containing = [o for o, start in enumerate(begun.tolist()) if start <= row < start + kernel]
        assert len(containing) <= most
        assert not containing or containing[0] == first[row]


def test_starts_are_exact_on_the_largest_sides() -> None:
    size, seed = 2**21, 2**40 - 1
    begun, _ = starts(torch.tensor([seed]), (size, 2), (2, 1), (size - 2, 1))
    u = 2**20 - 1
    exact = [((i << 20) + u) * (size - 2) // ((size - 3) << 20) for i in (1, size // 2, size - 3)]
    assert begun[[1, size // 2, size - 3]].tolist() == exact


@pytest.mark.parametrize("kind", MEANINGFUL)
@pytest.mark.parametrize(
    ("layout", "activation"), [("contiguous", None), ("channels_last", "relu"), ("cropped", "silu")]
)
def test_values_and_gradients_are_those_of_the_formula(
    device: torch.device, kind: str, layout: str, activation: str | None
) -> None:
    x, tensors = random_map(2, 3, 8, 7), tensors_for(kind, 3, affine=activation is not None)
    generator, seed = seed_of(3, device)
    exact = [t.clone().requires_grad_() for t in (x, *tensors.values())]
    named = dict(zip(tensors, exact[1:], strict=True))
    expected = windowed(exact[0], kind, starts(seed, (8, 7), (3, 2), (5, 4)), (3, 2), activation or "none", named)
    g = random_map(*expected.shape, seed=3)
    wanted = torch.autograd.grad(expected, exact, g)
    inputs = [
        laid_out(x.to(device), layout).requires_grad_(),
        *(t.to(device).requires_grad_() for t in tensors.values()),
    ]
    named = dict(zip(tensors, inputs[1:], strict=True))
    y = fractional_pool2d(inputs[0], (3, 2), (5, 4), kind=kind, activation=activation, generator=generator, **named)  # type: ignore[arg-type]
    found = torch.autograd.grad(y, inputs, g.to(device))
    for one, other in zip((y, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-7, atol=1e-9)


def windowed(
    x: Tensor,
    kind: str,
    begun: tuple[Tensor, Tensor],
    kernel: tuple[int, int],
    activation: str,
    tensors: dict[str, Tensor],
) -> Tensor:
    """The formula in each window."""
    if "scale" in tensors:
        x = x * tensors["scale"].view(1, -1, 1, 1) + tensors["shift"].view(1, -1, 1, 1)
    v = formulas.ACTIVATIONS[activation](x)
    p = tensors.get("p", torch.tensor(formulas.PARAMETERS.get(kind, 0.0), dtype=x.dtype))
    lines = [
        torch.stack(
            [
                formulas.FORMULAS[kind](
                    v[:, :, top : top + kernel[0], left : left + kernel[1]].flatten(2), p, kernel[0] * kernel[1]
                )
                for left in begun[1].tolist()
            ],
            -1,
        )
        for top in begun[0].tolist()
    ]
    return torch.stack(lines, -2)


@pytest.mark.parametrize("kind", ["max", "avg", "stochastic"])
def test_a_generator_repeats_and_moves_on(device: torch.device, kind: str) -> None:
    x = random_map(1, 2, 15, 16, dtype=torch.float32).to(device)
    generator, _ = seed_of(5, device)
    first, second = (fractional_pool2d(x, 2, (10, 11), kind=kind, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(fractional_pool2d(x, 2, (10, 11), kind=kind, generator=generator.manual_seed(5)), first)
    same = [fractional_pool2d(x, 2, (10, 11), kind=kind, training=False) for _ in range(2)]
    assert torch.equal(*same)
    begun = starts(torch.tensor([2**39 + 2**19]), (15, 16), (2, 2), (10, 11))
    half = windowed(x.double().cpu(), kind + "_mean" * (kind == "stochastic"), begun, (2, 2), "none", {})
    torch.testing.assert_close(same[0].cpu().double(), half, rtol=1e-5, atol=1e-6)


def test_stochastic_draws_the_same_on_each_path(kernel_device: torch.device) -> None:
    drawn = []
    for place, path in ((torch.device("cpu"), "reference"), (kernel_device, "triton")):
        x = random_map(2, 3, 7, 7).to(place).requires_grad_()
        tables = [t.to(place) for t in starts(torch.tensor([2**40 + 9]), (7, 7), (3, 3), (4, 4))]
        seed = torch.tensor([2**40 + 9], device=place)
        with runtime.force(path):  # type: ignore[arg-type]
            y = torch.ops.fusedpool.fractional(
                x, None, None, None, seed, *tables, [3, 3], "stochastic", 0.0, "relu", True, False
            )[0]
            drawn.append((y.cpu(), torch.autograd.grad(y.sum(), x)[0].cpu()))
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precisions_layouts_and_empty_batches(device: torch.device, dtype: torch.dtype) -> None:
    x = random_map(2, 3, 9, 8, dtype=dtype).to(device).contiguous(memory_format=torch.channels_last)
    generator, _ = seed_of(1, device)
    results = []
    for cast in (dtype, torch.float64):
        inputs = x.to(cast).requires_grad_()
        y = fractional_pool2d(inputs, 3, output_ratio=(0.5, 0.4), kind="softpool", generator=generator.manual_seed(1))
        assert y.shape == (2, 3, 4, 3) and y.dtype is cast and y.is_contiguous(memory_format=torch.channels_last)
        results.append((y.double(), torch.autograd.grad(y.sum(), inputs)[0].double()))
    step = 4 * torch.finfo(dtype).eps
    for found, exact in zip(*results, strict=True):
        torch.testing.assert_close(found, exact, rtol=step, atol=4 * step)
    assert fractional_pool2d(x[:0].requires_grad_(), 2, 3).shape == (0, 3, 3, 3)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "stochastic"])
def test_derivatives(kind: str) -> None:
    tensors = {name: t.requires_grad_() for name, t in tensors_for(kind, 2, affine=True).items()}

    def pooled(x: Tensor, *values: Tensor) -> Any:
        named: Any = dict(zip(tensors, values, strict=True))
        return fractional_pool2d(x, 2, 3, kind=kind, activation="gelu", training=False, **named)

    inputs = (random_map(1, 2, 5, 4).requires_grad_(), *tensors.values())
    assert torch.autograd.gradcheck(pooled, inputs)
    assert torch.autograd.gradgradcheck(pooled, inputs)


@pytest.mark.parametrize(("kind", "indices"), [("max", True), ("mixed", False)])
def test_the_operators_are_registered_well(device: torch.device, kind: str, indices: bool) -> None:
    x = random_map(1, 2, 4, 4, dtype=torch.float32).to(device).requires_grad_()
    seed = torch.tensor([5**20], device=device)
    tables = starts(seed, (4, 4), (2, 2), (2, 2))
    scale = torch.ones(2, device=device, requires_grad=True)
    torch.library.opcheck(
        torch.ops.fusedpool.fractional.default,
        (x, scale, None, None, seed, *tables, [2, 2], kind, 0.5, "relu", True, indices),
    )
    y, winner, aux, _ = torch.ops.fusedpool.fractional(
        x, scale, None, None, seed, *tables, [2, 2], kind, 0.5, "relu", True, indices
    )
    saved = [t.detach() for t in (y, winner, aux)]
    torch.library.opcheck(
        torch.ops.fusedpool.fractional_backward.default,
        (torch.ones_like(y), x, *saved, scale, None, None, x.shape, False, *tables, [2, 2], kind, 0.5, "relu"),
    )


def test_one_graph_for_every_size() -> None:
    compiled = torch.compile(
        lambda x: fractional_pool2d(x, 2, output_ratio=0.6, training=False),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for size in ((9, 8), (12, 17)):
        x = random_map(2, 2, *size).requires_grad_()
        y, expected = compiled(x), fractional_pool2d(x, 2, output_ratio=0.6, training=False)
        assert torch.equal(y, expected)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"output_size": 6}, "output_size asks for 6 x 6"),
        ({"output_size": (2, 6)}, "output_size"),
        ({"output_size": 0}, "output_size"),
        ({"output_ratio": 1.0}, "output_ratio"),
        ({"output_ratio": (0.5, 0.5, 0.5)}, "output_ratio"),
        ({"output_ratio": 0.1}, "output_ratio asks for 0 x 0"),
        ({}, "output_size or output_ratio"),
        ({"output_size": 2, "output_ratio": 0.5}, "output_size or output_ratio"),
        ({"kernel_size": 7, "output_size": 1}, "output_size"),
        ({"kernel_size": 0, "output_size": 1}, "kernel_size"),
        ({"output_size": 2, "kind": "median"}, "kind"),
        ({"output_size": 2, "kind": "avg", "return_indices": True}, "return_indices"),
        ({"output_size": 2, "kind": "max", "p": 2.0}, "p is"),
        ({"output_size": 2, "activation": "tanh"}, "activation"),
        ({"output_size": 2, "scale": torch.ones(2)}, "scale"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        fractional_pool2d(torch.zeros(1, 3, 6, 6), **{"kernel_size": 2, **arguments})
    with pytest.raises(ValueError, match="x has shape"):
        fractional_pool2d(torch.zeros(3, 6, 6), 2, 2)
