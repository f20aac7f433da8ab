"""What the tests of pooling over regions share: inputs, formulas of a prologue and of cells, gradients, small tiles."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedpool import region_launch
from fusedpool.kinds import KINDS
from tests.kernels import formulas

MEANINGFUL = tuple(kind for kind in KINDS if kind not in ("stochastic", "stochastic_mean"))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, last: bool = False) -> Tensor:
    """Normal numbers; the same for every dtype and layout."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def activated(x: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str) -> Tensor:
    """The prologue of maps [N, C, H, W] in float64."""
    u = x.double()
    u = u if scale is None else u * scale.double()[:, None, None]
    u = u if shift is None else u + shift.double()[:, None, None]
    return formulas.ACTIVATIONS[activation](u)


def pooled(v: Tensor, kind: str, p: float | Tensor | None = None) -> Tensor:
    """A kind's formula over the last dimension."""
    return formulas.FORMULAS[kind](v, formulas.PARAMETERS.get(kind, 0.0) if p is None else p, v.shape[-1])


def cells(v: Tensor, kind: str, rows: int, columns: int, p: float | Tensor | None = None) -> Tensor:
    """A kind's formula over adaptive cells of maps [N, C, H, W], one after another -> [N, C, rows, columns]."""
    height, width = v.shape[2:]
    lines = []
    for i in range(rows):
        top, bottom = math.floor(i * height / rows), math.ceil((i + 1) * height / rows)
        line = []
        for j in range(columns):
            left, right = math.floor(j * width / columns), math.ceil((j + 1) * width / columns)
            line.append(pooled(v[:, :, top:bottom, left:right].flatten(2), kind, p))
        lines.append(torch.stack(line, -1))
    return torch.stack(lines, -2)


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], seed: int = 7) -> tuple[Tensor, ...]:
    """Those of the outputs' sum, weighted by numbers that depend on their shapes alone."""
    weights = [random(*y.shape, seed=seed + k).to(y) for k, y in enumerate(outputs)]
    return torch.autograd.grad(outputs, inputs, weights)


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Each within a share of its largest number (at least 1)."""
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == b.shape
        limit = tolerance * max(1.0, b.abs().max().item() if b.numel() else 0.0)
        try:
            torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=limit)
        except AssertionError as error:
            raise AssertionError(f"number {number}: {error}") from None


def leaf(x: Tensor) -> Tensor:
    """A copy, laid out alike, that wants a gradient."""
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that suit the interpreter, which walks over what it reduces one number after another."""
    for name, value in {"_ELEMENTS": 64, "_PIXELS": (16, 64), "_MERGED": (2, 8)}.items():
        monkeypatch.setattr(region_launch, name, value)


def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps take many parts, many tiles of each, and many steps to merge them."""
    for name, value in {"_ELEMENTS": 32, "_STEPS": 2, "_PIXELS": (4, 8), "_MERGED": (2, 4)}.items():
        monkeypatch.setattr(region_launch, name, value)


def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched from here on."""
    names: list[str] = []
    launch = region_launch._launch

    def record(kernel: Any, *args: Any, **constants: Any) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, *args, **constants)

    monkeypatch.setattr(region_launch, "_launch", record)
    return names
