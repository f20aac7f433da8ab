"""Batch normalisation in one operator with pooling: layouts, offsets, blocks, and what is kept for backward."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedpool import batch_norm_act_pool2d, batchnorm_launch, runtime
from fusedpool.batchnorm_launch import Statistics
from tests.kernels.batchnorm_cases import affine, compare, fused, placed, step
from tests.kernels.window_cases import LAYOUTS, laid_out, random_map

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.mark.parametrize("kind", ["max", "avg", "mixed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_formats_are_kept_whatever_the_gradient_is(device: torch.device, kind: str, layout: str) -> None:
    x = laid_out(random_map(2, 4, 6, 5).to(device)[:1].expand(2, -1, -1, -1), layout)
    dense = random_map(2, 4, 3, 2, seed=1).to(device)
    for g in (
        dense,
        laid_out(dense, "channels_last"),
        laid_out(dense, "sliced"),
        dense[:1, :1, :1, :1].expand(2, 4, 3, 2),
    ):
        parameters = placed(affine(4), device, torch.float64)
        pool = fused(kernel_size=2, kind=kind)
        with runtime.force("reference"):
            expected = step(pool, x.contiguous(), g.contiguous(), parameters)
        found = step(pool, x, g, parameters)
        compare(found, expected, atol=1e-12)
        assert all(runtime.channels_last(found[name]) == runtime.channels_last(x) for name in ("x", "y"))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped", "transposed"])
@pytest.mark.parametrize("kind", ["max", "avg"])
def test_many_small_blocks_give_the_same(
    kernel_device: torch.device, kind: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = laid_out(random_map(3, 2, 9, 40).to(kernel_device), layout)
    g, parameters = random_map(3, 2, 7, 19, seed=1).to(kernel_device), placed(affine(2), kernel_device, torch.float64)
    pool = fused(kernel_size=3, stride=(1, 2), kind=kind)
    expected = step(pool, x, g, parameters)
    monkeypatch.setattr(runtime, "_ELEMENTS", 512)
    monkeypatch.setattr(batchnorm_launch, "_PROGRAMS", 8)
    monkeypatch.setattr(batchnorm_launch, "_LINES", 1)
    monkeypatch.setattr(batchnorm_launch, "_UNROLL", 1)
    lines: list[int] = []
    launch = batchnorm_launch._Sweep.launch

    def noting(sweep: Any, *args: Any, **constants: Any) -> None:
        lines.append(sweep.lines)
        launch(sweep, *args, **constants)

    monkeypatch.setattr(batchnorm_launch._Sweep, "launch", noting)
    compare(step(pool, x, g, parameters), expected, atol=1e-12)
    assert min(lines) > 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("kind", ["max", "softpool"])
def test_wide_offsets_and_repetition_give_the_same_bits(
    device: torch.device, kind: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = laid_out(random_map(2, 3, 7, 6, dtype=torch.float32).to(device), layout)
    g, parameters = random_map(2, 3, 4, 3, seed=1, dtype=torch.float32).to(device), affine(3, torch.float32)
    results = []
    for wide in (False, False, True):
        monkeypatch.setattr(runtime, "wide", lambda *tensors, wide=wide: wide)
        pool = fused(kernel_size=3, stride=2, padding=1, kind=kind, activation="gelu")
        results.append(step(pool, x, g, placed(parameters, device, torch.float32)))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], t) for name, t in other.items())


def test_backward_keeps_only_what_it_needs(device: torch.device) -> None:
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    x, weight = random_map(2, 3, 8, 8, dtype=torch.float16).to(device).requires_grad_(), torch.ones(3, device=device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        batch_norm_act_pool2d(x, weight, None, None, None, 2)
    held = {(t.dtype, tuple(t.shape)) for t in kept if t.numel()}
    sums = (torch.float32, (len(Statistics._fields), 3))
    assert held == {(torch.float16, (2, 3, 8, 8)), (torch.float32, (3,)), (torch.uint8, (2, 3, 4, 4)), sums}


def test_sums_for_weight_and_bias_read_winners_alone(kernel_device: torch.device) -> None:
    """What has not won is NaN by the time of backward; the gradient by x, which needs all, shows that it would tell."""
    x = random_map(2, 3, 6, 6, dtype=torch.float32).to(kernel_device)
    window, constants = [2, 2, 2, 2, 0, 0, 1, 1, 0, 1, 0], (0.0, "silu", 1e-5)
    weight, bias = (torch.linspace(a, 2, 3, device=kernel_device) for a in (-1.5, 0.5))
    operators = torch.ops.fusedpool
    y, winner, aux, index, statistics = operators.norm_window(
        x, weight, bias, None, None, window, "max", *constants, True, True
    )
    won = torch.zeros_like(x, dtype=torch.bool).flatten(2).scatter(2, index.flatten(2), True).view(x.shape)
    results = [
        operators.norm_window_backward(
            torch.ones_like(y), given, weight, bias, None, winner, None, aux, statistics, window, "max", *constants
        )
        for given in (x, x.masked_fill(~won, float("nan")))
    ]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:3], results[1][1:3], strict=True))
    assert results[1][0][~won].isnan().all()
