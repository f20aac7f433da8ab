"""Batch normalisation in one operator with pooling: first and second derivatives, and what PyTorch checks of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fusedpool import batch_norm_act_pool2d, runtime, window_launch
from tests.kernels import formulas
from tests.kernels.batchnorm_cases import affine, compare, fused, one_by_one, placed, step
from tests.kernels.window_cases import MEANINGFUL, random_map

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.mark.parametrize("kind", [*MEANINGFUL, "stochastic"])
def test_gradcheck_and_gradgradcheck(kind: str) -> None:
    x, parameters = random_map(2, 2, 4, 3).requires_grad_(), affine(2)
    if kind in ("gem", "mixed"):
        parameters["p"] = torch.tensor([2.5 if kind == "gem" else 0.3], dtype=torch.float64, requires_grad=True)

    def pooled(x: Tensor, weight: Tensor, bias: Tensor, *p: Tensor) -> Any:
        options: Any = {"kind": kind, "activation": "gelu", "generator": torch.Generator().manual_seed(3)}
        return batch_norm_act_pool2d(x, weight, bias, None, None, (3, 2), 2, (1, 0), **options, p=p[0] if p else None)

    with runtime.force("reference"):
        assert torch.autograd.gradcheck(pooled, (x, *parameters.values()))
        assert torch.autograd.gradgradcheck(pooled, (x, *parameters.values()), atol=1e-4)


@pytest.mark.parametrize("kind", ["max", "avg", "softpool"])
def test_second_derivatives_on_the_kernels_are_those_of_the_formula(kernel_device: torch.device, kind: str) -> None:
    def second(pool: Callable[..., Tensor], device: torch.device) -> list[Tensor]:
        x, tensors = random_map(1, 2, 5, 4).to(device).requires_grad_(), placed(affine(2), device, torch.float64)
        y = pool(x, None, None, **tensors)
        inputs = (x, *tensors.values())
        first = torch.autograd.grad(y, inputs, torch.cos(y.detach()), create_graph=True)
        return [t.cpu() for t in torch.autograd.grad(torch.stack([(t**2).sum() for t in first]).sum(), inputs)]

    plain = one_by_one(lambda v, _: formulas.windows(v, kind, (3, 3), (2, 1), (1, 1)), "silu")
    options: Any = {"kernel_size": 3, "stride": (2, 1), "padding": 1, "kind": kind, "activation": "silu"}
    expected = second(plain, torch.device("cpu"))
    torch.testing.assert_close(second(fused(**options), kernel_device), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("lost", ["offset", "slope"])
def test_the_control_finds_a_gradient_without_its_corrections(
    kernel_device: torch.device, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, g, parameters = random_map(2, 3, 6, 6), random_map(2, 3, 3, 3, seed=1), affine(3)
    expected = step(one_by_one(lambda v, _: F.max_pool2d(v, 2)), x, g, parameters)
    right = window_launch.Norm

    def wrong(*tensors: Tensor) -> Any:
        norm = right(*tensors)
        return norm if norm.slope is None else norm._replace(**{lost: torch.zeros_like(norm.slope)})

    monkeypatch.setattr(window_launch, "Norm", wrong)
    on_device = placed(parameters, kernel_device, torch.float64)
    found = step(fused(kernel_size=2), x.to(kernel_device), g.to(kernel_device), on_device)
    with pytest.raises(AssertionError, match="x: "):
        compare(found, expected, atol=1e-9)


@pytest.mark.parametrize(("kind", "indices"), [("max", True), ("gem", False)])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_the_operators_are_registered_well(
    device: torch.device, kind: str, indices: bool, format: torch.memory_format
) -> None:
    x = random_map(2, 2, 5, 5, dtype=torch.float32).to(device).contiguous(memory_format=format).requires_grad_()
    weight = torch.ones(2, device=device, requires_grad=True)
    window, constants = [3, 3, 2, 2, 1, 1, 1, 1, 0, 1, 0], (kind, 2.0, "relu", 1e-5)
    forward = (x, weight, None, None, None, window, *constants, True, indices)
    torch.library.opcheck(torch.ops.fusedpool.norm_window.default, forward)
    y, winner, aux, _, statistics = (t.detach() for t in torch.ops.fusedpool.norm_window(*forward))
    saved = (winner, y if kind == "gem" else None, aux, statistics)
    backward = (torch.ones_like(y), x, weight, None, None, *saved, window, *constants)
    torch.library.opcheck(torch.ops.fusedpool.norm_window_backward.default, backward)
