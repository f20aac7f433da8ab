"""Packed images of different sizes: each as if it were alone."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusedpool import global_pool2d, ragged_pool
from tests.kernels import region_cases as cases

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    cases.small_tiles(monkeypatch)


_FEW = settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))

LENGTHS = (5, 0, 12, 1, 0)
SMOOTH = tuple(kind for kind in cases.MEANINGFUL if kind != "std")  # no derivative for one pixel


def offsets_of(lengths: tuple[int, ...] | list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def one_by_one(x: Tensor, lengths: tuple[int, ...] | list[int], kind: str) -> Tensor:
    """The formula of each segment; 0 for an empty one."""
    segments = torch.split(x, list(lengths))
    return torch.stack([cases.pooled(s.t(), kind) if len(s) else s.sum(0) for s in segments])


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("tiny", [False, True], ids=["whole tiles", "tiny tiles"])
def test_segments_equal_their_formulas(
    device: torch.device, last: bool, tiny: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tiny:
        cases.tiny_tiles(monkeypatch)
    x = cases.random(18, 5) if last else cases.random(5, 18).t()
    x = x.to(device).requires_grad_()
    found = ragged_pool(x, offsets_of(LENGTHS, device), SMOOTH)
    expected = [one_by_one(x, LENGTHS, kind) for kind in SMOOTH]
    cases.assert_close(found, expected, 1e-10)
    (dx,), (wanted,) = cases.gradients(found, [x]), cases.gradients(expected, [x])
    cases.assert_close([dx], [wanted], 1e-9)
    assert dx.stride() == x.stride()


@_FEW
@given(
    lengths=st.lists(st.integers(0, 24), min_size=1, max_size=4), channels=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_any_lengths(device: torch.device, lengths: list[int], channels: int, seed: int) -> None:
    kinds = ("max", "avg", "lse")
    x = cases.random(sum(lengths), channels, seed=seed).to(device).requires_grad_()
    found = ragged_pool(x, offsets_of(lengths, device), kinds)
    expected = [one_by_one(x, lengths, kind) for kind in kinds]
    cases.assert_close(found, expected, 1e-10)
    cases.assert_close(cases.gradients(found, [x]), cases.gradients(expected, [x]), 1e-10)


def test_packed_images_equal_each_alone(device: torch.device) -> None:
    kinds = ("avg", "gem", "max")
    images = [cases.random(1, 3, *size, seed=n).to(device) for n, size in enumerate(((4, 5), (1, 7), (6, 2)))]
    packed = torch.cat([image[0].flatten(1).t() for image in images]).requires_grad_()
    arguments: dict[str, Any] = {"activation": "gelu", "p": 2.0, "scale": (cases.random(3, seed=8) + 1).to(device)}
    offsets = offsets_of([20, 7, 12], device)
    found = ragged_pool(packed, offsets, kinds, **arguments)
    alone = [global_pool2d(image, kinds, **arguments) for image in images]
    cases.assert_close(found, [torch.cat(results) for results in zip(*alone, strict=True)], 1e-12)
    # The control: one pixel more or less in a segment is another result.
    shifted = ragged_pool(packed, offsets + torch.tensor([0, 1, 0, 0], device=device), ("avg",))[0]
    with pytest.raises(AssertionError):
        cases.assert_close([shifted], [ragged_pool(packed, offsets)[0]], 1e-6)


def test_bits_do_not_depend_on_neighbours(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    cases.tiny_tiles(monkeypatch)
    x = cases.random(60, 3, dtype=torch.float32).to(kernel_device)
    kinds = ("avg", "softpool", "std")
    together = ragged_pool(x, offsets_of([13, 40, 7], kernel_device), kinds)
    alone = ragged_pool(x[13:53], offsets_of([40], kernel_device), kinds)
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone, strict=True))


def test_nothing_to_pool(device: torch.device) -> None:
    x = torch.zeros(0, 3, device=device, requires_grad=True)
    for count in (0, 2):
        (y,) = ragged_pool(x, torch.zeros(count + 1, dtype=torch.int64, device=device), ("max",))
        assert y.shape == (count, 3) and not y.any()
        assert torch.autograd.grad(y.sum(), x)[0].shape == (0, 3)


def test_prologue_gradients(device: torch.device) -> None:
    x = cases.random(18, 3).to(device).requires_grad_()
    scale, shift = ((cases.random(3, seed=n) + 1).to(device).requires_grad_() for n in (1, 2))
    found = ragged_pool(x, offsets_of([6, 12], device), ("lp", "max"), scale=scale, shift=shift, activation="silu")
    v = cases.activated(x.t()[None, :, None], scale, shift, "silu")[0, :, 0].t()
    expected = [one_by_one(v, [6, 12], kind) for kind in ("lp", "max")]
    inputs = [x, scale, shift]
    cases.assert_close(cases.gradients(found, inputs), cases.gradients(expected, inputs), 1e-10)


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(6, 3)
    for offsets, words in (
        (torch.tensor([0, 3, 5]), "offsets must begin at 0, end at 6"),
        (torch.tensor([1, 6]), "offsets must begin at 0"),
        (torch.tensor([0, 5, 3, 6]), "never fall"),
        (torch.tensor([0.0, 6.0]), r"offsets is torch.float32 \[2\]"),
        (torch.tensor([[0, 6]]), "offsets is torch.int64"),
        (torch.zeros(0, dtype=torch.int64), "offsets is torch.int64"),
    ):
        with pytest.raises(ValueError, match=words):
            ragged_pool(x, offsets)
    with pytest.raises(ValueError, match=r"x has shape \[6\]"):
        ragged_pool(x[:, 0], torch.tensor([0, 6]))
