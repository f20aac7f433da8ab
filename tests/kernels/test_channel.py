"""Pooling across channels: the formulas' values and gradients, in each layout and for each kind."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusedpool import channel_launch, channel_pool, runtime
from tests.kernels import formulas
from tests.kernels.window_cases import LAYOUTS, MEANINGFUL, Keep, laid_out, random_map, tensors_for

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

_FEW = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", autouse=True)
def _small_tiles() -> Iterator[None]:
    """The interpreter reduces along an axis element by element."""
    with pytest.MonkeyPatch.context() as patch:
        if runtime.INTERPRETED:
            patch.setattr(channel_launch, "_ELEMENTS", 64)
        yield


def grouped(x: Tensor, number: int) -> Tensor:
    """[N, C, ...] -> [N, groups, ..., members]."""
    members: Tensor = x.unflatten(1, (number, -1)).movedim(2, -1)  # type: ignore[no-untyped-call]
    return members


def expected_of(x: Tensor, number: int, kind: str, activation: str, tensors: dict[str, Tensor]) -> Tensor:
    if "scale" in tensors:
        shape = (1, -1, *[1] * (x.dim() - 2))
        x = x * tensors["scale"].view(shape) + tensors["shift"].view(shape)
    p = tensors.get("p", torch.tensor(formulas.PARAMETERS.get(kind, 0.0), dtype=x.dtype))
    v = grouped(formulas.ACTIVATIONS[activation](x), number)
    return formulas.FORMULAS[kind](v, p, v.shape[-1])


@_FEW
@given(
    shape=st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(1, 6), st.integers(1, 7)),
    members=st.integers(1, 9),
    layout=st.sampled_from(LAYOUTS[:-1]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 10**6),
)
def test_max_and_min_are_exact(
    device: torch.device, shape: Any, members: int, layout: str, dtype: torch.dtype, seed: int
) -> None:
    n, number, height, width = shape
    values = torch.tensor([-math.inf, -1, 0, 1, 1, 2, math.inf])
    choice = torch.randint(7, (n, number * members, height, width), generator=torch.Generator().manual_seed(seed))
    x = values[choice].to(dtype)
    for kind, sign in (("max", 1), ("min", -1)):
        y, index = channel_pool(laid_out(x.to(device), layout), number, kind, return_indices=True)
        expected, first = (grouped(sign * x, number).double().numpy() for _ in range(2))
        assert torch.equal(y.cpu(), sign * torch.from_numpy(expected.max(-1)).to(dtype))
        places = torch.from_numpy(first.argmax(-1)) + torch.arange(number).view(-1, 1, 1) * members
        assert torch.equal(index.cpu(), places)


SHAPES = [
    ((2, 6, 3, 5), 3, "contiguous", None),
    ((2, 6, 3, 5), 2, "channels_last", "relu"),
    ((1, 8, 2, 9), 2, "channels_last", "silu"),
    ((2, 10, 2, 3), 2, "cropped", "gelu"),
    ((2, 6, 4, 2), 1, "transposed", "leaky_relu"),
    ((1, 140, 1, 2), 1, "channels_last", "relu"),
]


@pytest.mark.parametrize("kind", MEANINGFUL)
@pytest.mark.parametrize(("shape", "number", "layout", "activation"), SHAPES)
def test_values_and_gradients_are_those_of_the_formula(
    device: torch.device, kind: str, shape: tuple[int, ...], number: int, layout: str, activation: str | None
) -> None:
    x, tensors = random_map(*shape), tensors_for(kind, shape[1], affine=activation is not None)
    exact = [t.clone().requires_grad_() for t in (x, *tensors.values())]
    named = dict(zip(tensors, exact[1:], strict=True))
    expected = expected_of(exact[0], number, kind, activation or "none", named)
    g = random_map(*expected.shape, seed=3)
    wanted = torch.autograd.grad(expected, exact, g)
    inputs = [
        laid_out(x.to(device), layout).requires_grad_(),
        *(t.to(device).requires_grad_() for t in tensors.values()),
    ]
    named = dict(zip(tensors, inputs[1:], strict=True))
    y = channel_pool(inputs[0], number, kind, activation=activation, **named)  # type: ignore[arg-type]
    found = torch.autograd.grad(y, inputs, laid_out(g.to(device), layout))
    for one, other in zip((y, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["max", "softpool", "mixed"])
@pytest.mark.parametrize("shape", [(5, 12), (2, 12, 7)])
@pytest.mark.parametrize("last", [False, True])
def test_features_and_sequences(device: torch.device, kind: str, shape: tuple[int, ...], last: bool) -> None:
    x = random_map(*shape)
    exact = x.clone().requires_grad_()
    expected = expected_of(exact, 4, kind, "none", {})
    wanted = torch.autograd.grad(expected.square().sum(), exact)[0]
    inputs = (x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x).to(device).requires_grad_()
    y = channel_pool(inputs, 4, kind)
    assert y.shape == (shape[0], 4, *shape[2:])
    torch.testing.assert_close(y.cpu(), expected)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), inputs)[0].cpu(), wanted)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_memory_formats_are_kept_whatever_the_gradient_is(device: torch.device, layout: str) -> None:
    x = laid_out(random_map(2, 6, 3, 4).to(device), layout).requires_grad_()
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    y = channel_pool(x, 3, "avg")
    assert y.is_contiguous(memory_format=format)
    for given_layout in LAYOUTS:
        g = laid_out(random_map(1, 3, 3, 4, seed=1).expand(2, 3, 3, 4).to(device), given_layout)
        dx = torch.autograd.grad(y, x, g, retain_graph=True)[0]
        assert dx.is_contiguous(memory_format=format)
        torch.testing.assert_close(dx, g.repeat_interleave(2, 1) / 2)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 0.5))


def test_nan_wins_and_equal_values_leave_it_to_the_first(device: torch.device) -> None:
    x = torch.tensor([[1.0, 1.0, 0.0], [math.nan, 2.0, 3.0], [-math.inf] * 3], device=device).view(1, 9, 1, 1)
    for layout in ("contiguous", "channels_last"):
        y, index = channel_pool(laid_out(x.expand(1, 9, 2, 2), layout), 3, return_indices=True)
        assert y[0, :, 0, 0].tolist()[::2] == [1, -math.inf] and y[0, 1].isnan().all()
        assert index[0, :, 1, 1].tolist() == [0, 3, 6]


@pytest.mark.parametrize(("members", "saved"), [(255, torch.uint8), (256, torch.int32)])
def test_winners_of_small_and_large_groups(device: torch.device, members: int, saved: torch.dtype) -> None:
    x = random_map(1, members, 1, 2)
    x[0, -1] = 9
    keep = Keep()
    inputs = x.to(device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = channel_pool(inputs, 1)
    assert [t.dtype for t in keep.tensors if t.numel()] == [saved]
    dx = torch.autograd.grad(y.sum(), inputs)[0]
    assert dx[0, -1].tolist() == [[1, 1]] and dx.sum() == 2


def test_relus_mask_is_in_the_winner_alone(device: torch.device) -> None:
    x = torch.tensor([-1.0, -2.0, 3.0, -1.0], device=device).view(1, 4, 1, 1).requires_grad_()
    keep = Keep()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = channel_pool(x, 2, activation="relu")
    assert [t.dtype for t in keep.tensors if t.numel()] == [torch.uint8]
    assert y.flatten().tolist() == [0, 3]
    assert torch.autograd.grad(y.sum(), x)[0].flatten().tolist() == [0, 0, 1, 0]


def test_stochastic_draws_the_same_in_each_layout_and_on_each_path(kernel_device: torch.device) -> None:
    drawn = []
    for place, path in ((torch.device("cpu"), "reference"), (kernel_device, "triton")):
        for layout in ("contiguous", "channels_last", "transposed"):
            x = laid_out(random_map(2, 12, 3, 3, dtype=torch.float32).to(place), layout).requires_grad_()
            seed = torch.tensor([2**40 + 5], device=place)
            with runtime.force(path):  # type: ignore[arg-type]
                y = torch.ops.fusedpool.channel(x, None, None, None, seed, 4, "stochastic", 0.0, "none", True, False)[0]
                drawn.append((y.cpu(), torch.autograd.grad(y.sum(), x)[0].cpu()))
    assert all(torch.equal(a, b) for each in drawn[1:] for a, b in zip(each, drawn[0], strict=True))
    x = random_map(2, 12, 3, 3)
    torch.testing.assert_close(
        channel_pool(x, 4, "stochastic", training=False), expected_of(x, 4, "stochastic_mean", "none", {})
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_wide_offsets_and_larger_tiles_give_the_same(
    kernel_device: torch.device, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = laid_out(random_map(2, 12, 5, 7, dtype=torch.float32).to(kernel_device), layout).requires_grad_()
    scale = torch.full((12,), 1.5, device=kernel_device, requires_grad=True)

    def results() -> tuple[Tensor, ...]:
        y = channel_pool(x, 4, scale=scale, activation="relu")
        return y, *torch.autograd.grad(y.sum(), (x, scale))

    first = results()
    monkeypatch.setattr(runtime, "wide", lambda *tensors: True)
    assert all(torch.equal(a, b) for a, b in zip(results(), first, strict=True))
    monkeypatch.setattr(channel_launch, "_ELEMENTS", 1024)
    for found, wanted in zip(results(), first, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", [*MEANINGFUL, "stochastic"])
def test_derivatives(kind: str) -> None:
    tensors = {name: t.requires_grad_() for name, t in tensors_for(kind, 6, affine=True).items()}

    def pooled(x: Tensor, *values: Tensor) -> Any:
        named: Any = dict(zip(tensors, values, strict=True))
        return channel_pool(x, 2, kind, activation="silu", generator=torch.Generator().manual_seed(3), **named)

    inputs = (random_map(2, 6, 1, 2).requires_grad_(), *tensors.values())
    assert torch.autograd.gradcheck(pooled, inputs)
    assert torch.autograd.gradgradcheck(pooled, inputs)


@pytest.mark.parametrize(("kind", "layout"), [("max", "channels_last"), ("mixed", "contiguous")])
def test_the_operators_are_registered_well(device: torch.device, kind: str, layout: str) -> None:
    for number in (1, 3):
        x = laid_out(random_map(2, 6, 3, 2, dtype=torch.float32).to(device), layout).requires_grad_()
        scale = torch.ones(6, device=device, requires_grad=True)
        arguments = (x, scale, None, None, None, number, kind, 0.5, "relu", True, kind == "max")
        torch.library.opcheck(torch.ops.fusedpool.channel.default, arguments)
        y, winner, aux, _ = (t.detach() for t in torch.ops.fusedpool.channel(*arguments))
        last = layout == "channels_last"
        torch.library.opcheck(
            torch.ops.fusedpool.channel_backward.default,
            (torch.ones_like(y), x, y, winner, aux, scale, None, None, x.shape, last, number, kind, 0.5, "relu"),
        )


def test_one_graph_for_every_size() -> None:
    compiled = torch.compile(lambda x: channel_pool(x, 2, "lse"), fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((3, 4), (5, 2)):
        x = random_map(2, 4, *size).requires_grad_()
        y, expected = compiled(x), channel_pool(x, 2, "lse")
        assert torch.equal(y, expected)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"groups": 4}, "groups is 4; it must be a divisor of x's 6"),
        ({"groups": 0}, "groups"),
        ({"groups": 2.0}, "groups"),
        ({"kind": "median"}, "kind"),
        ({"kind": "avg", "return_indices": True}, "return_indices"),
        ({"p": 2.0}, "p is"),
        ({"activation": "tanh"}, "activation"),
        ({"shift": torch.ones(2)}, "shift"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        channel_pool(torch.zeros(1, 6, 2, 2), **{"groups": 2, **arguments})
    for shape in ((6,), (1, 6, 2, 2, 2)):
        with pytest.raises(ValueError, match="x has shape"):
            channel_pool(torch.zeros(shape), 2)
