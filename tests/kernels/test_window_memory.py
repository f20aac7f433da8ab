"""Sliding windows in memory: layouts, offsets, grids, and what is kept for backward."""

from unittest.mock import Mock

import pytest
import torch
from torch.nn import functional as F

from fusedpool import operators, pool2d, runtime
from fusedpool.kinds import KINDS
from tests.kernels.window_cases import LAYOUTS, MEANINGFUL, Keep, laid_out, random_map

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


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
        _, winner, _, _ = operators.empty_outputs(torch.empty(1, 1, 1, 1), (1, 1, 1), taps, "max", True, False)
        assert winner.dtype is dtype


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
