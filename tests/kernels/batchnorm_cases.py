"""What the tests of batch normalisation share: a training step of the operator, and of PyTorch's one after another."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedpool import batch_norm_act_pool2d
from tests.kernels import formulas
from tests.kernels.window_cases import random_map

Values = dict[str, Tensor]
"""What a training step gives: y, the running statistics, and the gradients by x, weight, bias and p."""


def step(pool: Callable[..., Tensor], x: Tensor, g: Tensor, parameters: Values) -> Values:
    """Pool x, with running statistics that begin at 0.5 and 2, and go back from g."""
    names = [name for name, t in parameters.items() if t.requires_grad]
    running = [
        torch.full((x.shape[1],), value, dtype=parameters["weight"].dtype, device=x.device) for value in (0.5, 2)
    ]
    x = x.detach().requires_grad_()
    y = pool(x, *running, **parameters)
    gradients = torch.autograd.grad(y, (x, *(parameters[name] for name in names)), g)
    results = {"y": y, "mean": running[0], "var": running[1]} | dict(zip(("x", *names), gradients, strict=True))
    return {name: t.detach().cpu() for name, t in results.items()}


def fused(**arguments: Any) -> Callable[..., Tensor]:
    """batch_norm_act_pool2d with these arguments, for `step`."""

    def pool(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, p: Tensor | None = None) -> Tensor:
        y: Tensor = batch_norm_act_pool2d(x, weight, bias, mean, var, p=p, **arguments)
        return y

    return pool


def one_by_one(
    pool: Callable[[Tensor, Any], Tensor], activation: str = "relu", **options: Any
) -> Callable[..., Tensor]:
    """PyTorch's batch norm, the activation's formula and `pool`, for `step`."""

    def run(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, p: Any = None) -> Tensor:
        normal = F.batch_norm(x, mean, var, weight, bias, **{"training": True, **options})
        return pool(formulas.ACTIVATIONS[activation](normal), p)

    return run


def affine(channels: int, dtype: torch.dtype = torch.float64) -> Values:
    """A weight, one of its numbers negative, and a bias."""
    weight = torch.linspace(-0.5, 2, channels, dtype=dtype) if channels > 1 else torch.tensor([1.5], dtype=dtype)
    return {"weight": weight.requires_grad_(), "bias": random_map(channels, seed=9, dtype=dtype).requires_grad_()}


def placed(parameters: Values, device: torch.device, dtype: torch.dtype) -> Values:
    return {name: t.detach().to(device, dtype).requires_grad_() for name, t in parameters.items()}


def compare(found: Values, expected: Values, **tolerance: Any) -> None:
    """Each to its own largest number."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        options = {"rtol": 0.0, **{key: value * scale for key, value in tolerance.items()}}
        try:
            torch.testing.assert_close(found[name].double(), wanted, **options)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
