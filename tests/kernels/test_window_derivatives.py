"""Sliding windows: first and second derivatives in float64, against finite differences and formulas."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fusedpool import operators, pool2d, runtime
from tests.kernels.window_cases import CASES, MEANINGFUL, expected_of, random_map, tensors_for

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.mark.parametrize("kind", [*MEANINGFUL, "stochastic"])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_gradcheck_and_gradgradcheck(kind: str, activation: str) -> None:
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
def test_second_derivatives_on_the_kernels_are_those_of_the_formula(kernel_device: torch.device, kind: str) -> None:
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


def test_one_tensor_may_be_the_input_and_the_gradient() -> None:
    def squared(x: Tensor, pool: Any) -> Tensor:
        first = torch.autograd.grad(pool(x), x, x, create_graph=True)[0]
        return torch.autograd.grad(first.sum(), x)[0]

    x = random_map(1, 1, 3, 3).requires_grad_()
    found = squared(x, lambda x: pool2d(x, 1, kind="avg", activation="silu"))
    torch.testing.assert_close(found, squared(x, F.silu))


def test_a_linear_gradient_has_no_second_derivative_by_the_shift() -> None:
    x, shift = random_map(1, 2, 4, 4).requires_grad_(), random_map(2).requires_grad_()
    y = pool2d(x, 2, shift=shift, activation="relu")
    first = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
    assert torch.autograd.grad(first.sum(), shift, allow_unused=True)[0] is None


def test_the_control_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random_map(1, 1, 4, 4).requires_grad_()
    right = operators.reference_backward
    monkeypatch.setattr(operators, "reference_backward", lambda *args: [t * 1.1 for t in right(*args)])
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda x: pool2d(x, 2, kind="softpool"), x)
