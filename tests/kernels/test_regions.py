"""The mechanism behind whole maps, grids and packed images: every kind, how work is cut, what PyTorch sees of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedpool import adaptive_pool2d, global_pool2d, pyramid_pool2d, ragged_pool, region_launch, regions, runtime
from fusedpool.regions import _regions
from tests.kernels import region_cases as cases

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

# What the interpreter is too slow for but a few times.
_TILES = {name: getattr(region_launch, name) for name in ("_ELEMENTS", "_PIXELS", "_MERGED")}


@pytest.fixture(autouse=True)
def _tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    cases.small_tiles(monkeypatch)


OFFSETS = (0, 5, 5, 17, 20)


@pytest.mark.parametrize(("last", "activation"), [(False, "none"), (True, "relu"), (False, "gelu")])
def test_every_kind_at_once_equals_its_formula(device: torch.device, last: bool, activation: str) -> None:
    x = cases.random(2, 3, 5, 4, last=last).to(device).requires_grad_()
    scale, shift = ((cases.random(3, seed=n) + 1).to(device).requires_grad_() for n in (1, 2))
    p = {kind: torch.tensor(value, device=device, dtype=torch.float64, requires_grad=True)
         for kind, value in (("gem", 2.5), ("mixed", 0.3))}  # fmt: skip
    inputs = [x, scale, shift, *p.values()]
    found = global_pool2d(x, cases.MEANINGFUL, p=p, activation=activation, scale=scale, shift=shift)
    v = cases.activated(x, scale, shift, activation).flatten(2)
    expected = [cases.pooled(v, kind, p.get(kind)) for kind in cases.MEANINGFUL]
    cases.assert_close(found, expected, 1e-10)
    cases.assert_close(cases.gradients(found, inputs), cases.gradients(expected, inputs), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_accumulates_in_float32(device: torch.device, dtype: torch.dtype) -> None:
    x = (cases.random(2, 3, 9, 11, dtype=dtype) + 2).to(device).requires_grad_()
    found = global_pool2d(x, ("avg", "max", "gem", "std"))
    exact = x.detach().double().requires_grad_()
    expected = [cases.pooled(exact.flatten(2), kind) for kind in ("avg", "max", "gem", "std")]
    assert all(y.dtype is dtype for y in found)
    unit = torch.finfo(dtype).eps
    cases.assert_close(found, expected, 4 * unit if dtype is torch.float32 else unit)
    # One rounding of y, which backward reads, and one of each gradient.
    cases.assert_close(cases.gradients(found, [x]), cases.gradients(expected, [exact]), 6 * unit)
    # A running sum of ones in float16 stops at 2048, in bfloat16 at 256.
    ones = torch.ones(1, 1, 48, 64, dtype=dtype, device=device)
    assert global_pool2d(ones, ("sum",))[0].item() == 3072


def test_scale_and_shift_may_be_views(device: torch.device) -> None:
    x, kinds = cases.random(2, 3, 4, 3).to(device), ("avg", "max")
    views = cases.random(6, seed=1).to(device)[::2], cases.random(1, seed=2).to(device).expand(3)
    results = []
    for scale, shift in (views, [t.contiguous() for t in views]):
        inputs = [scale.requires_grad_(), shift.requires_grad_()]
        found = global_pool2d(x, kinds, scale=scale, shift=shift, activation="silu")
        results.append([*found, *cases.gradients(found, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
def test_many_parts_many_steps(kernel_device: torch.device, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cases.tiny_tiles(monkeypatch)
    names = cases.launches(monkeypatch)
    kinds = ("std", "softpool", "mixed", "gem")
    x = cases.random(1, 5, 9, 8, last=last).to(kernel_device).requires_grad_()
    scale = (cases.random(5, seed=3) + 1).to(kernel_device).requires_grad_()
    found = global_pool2d(x, kinds, scale=scale)
    v = cases.activated(x, scale, None, "none")
    expected = [cases.pooled(v.flatten(2), kind) for kind in kinds]
    cases.assert_close(found, expected, 1e-10)
    cases.assert_close(cases.gradients(found, [x, scale]), cases.gradients(expected, [x, scale]), 1e-9)
    assert names == ["partials", "merge", "backward"]
    grid, level = pyramid_pool2d(x, (2, 3), "max"), cases.cells(x, "max", 3, 3)
    cases.assert_close([grid[..., 4:]], [level.flatten(2)], 0)
    cases.assert_close(cases.gradients([grid[..., 4:]], [x]), cases.gradients([level.flatten(2)], [x]), 1e-12)


def test_small_maps_take_one_launch(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _TILES.items():
        monkeypatch.setattr(region_launch, name, value)
    names = cases.launches(monkeypatch)
    x = cases.random(1, 16, 7, 7, last=True).to(kernel_device)
    found = [*global_pool2d(x, ("avg", "lp")), adaptive_pool2d(x, (1, 7))]
    cases.assert_close(found, [*(cases.pooled(x.flatten(2), kind) for kind in ("avg", "lp")), x.mean(2, True)], 1e-12)
    assert names == ["partials", "partials"]


def test_work_is_cut_alike_in_every_batch() -> None:
    for channels, pixels, last in ((3, 400_000_000, False), (64, 12544, True), (2048, 49, False), (1, 10**10, True)):
        tiles = region_launch.Tiles.over(channels, pixels, last, True)
        assert tiles.pixels * tiles.steps * tiles.chunks >= pixels
        assert tiles.chunks <= 4096
    assert region_launch.Tiles.over(3, 400_000_000, False, True).chunks > 1000


def test_the_same_bits_twice_and_in_any_batch(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    cases.tiny_tiles(monkeypatch)
    x = cases.random(3, 3, 9, 8, dtype=torch.float32).to(kernel_device)

    def run(x: Tensor) -> list[Tensor]:
        x = cases.leaf(x)
        y = global_pool2d(x, ("avg", "softpool"))
        return [*y, *torch.autograd.grad([v.sum() for v in y], x)]

    first, again, alone = run(x), run(x), run(x[1:2])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a[1:2], b) for a, b in zip(first, alone, strict=True))


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
def test_places_and_offsets_of_64_bits(
    kernel_device: torch.device, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = cases.random(1, 3, 4, 5, last=last).to(kernel_device).requires_grad_()
    offsets = torch.tensor([0, 7, 20], device=kernel_device)

    def run() -> list[Tensor]:
        packed = x.permute(0, 2, 3, 1).reshape(-1, 3)
        y = [*global_pool2d(x, ("max", "avg")), pyramid_pool2d(x, (1, 3)), *ragged_pool(packed, offsets, ("min",))]
        return [*y, *cases.gradients(y, [x])]

    narrow = run()
    monkeypatch.setattr(region_launch, "_wide", lambda *tensors, **sizes: True)
    monkeypatch.setattr(regions, "statically_known_true", lambda known: False)
    assert all(torch.equal(a, b) for a, b in zip(run(), narrow, strict=True))


@pytest.mark.parametrize("layout", ["cropped", "transposed", "expanded", "strided"])
def test_strided_inputs_are_read_in_place(device: torch.device, layout: str) -> None:
    wide = cases.random(2, 6, 8, 9).to(device)
    x = {
        "cropped": wide.contiguous(memory_format=torch.channels_last)[:, :3, 1:6, 2:6],
        "transposed": wide[:, :3, :5, :4].transpose(2, 3),
        "expanded": wide[:1, :1, :5, :4].expand(2, 3, 5, 4),
        "strided": wide[:, ::2, ::2, ::3],
    }[layout].detach()
    a, b = x.requires_grad_(), x.detach().contiguous().requires_grad_()
    for pool in (lambda t: global_pool2d(t, ("max", "lse")), lambda t: (adaptive_pool2d(t, (2, 1), "lp"),)):
        cases.assert_close(pool(a), pool(b), 1e-12)
        cases.assert_close(cases.gradients(pool(a), [a]), cases.gradients(pool(b), [b]), 1e-12)


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
def test_gradients_of_any_strides(device: torch.device, last: bool) -> None:
    x = cases.random(2, 3, 4, 6, last=last).to(device).requires_grad_()
    for y in (global_pool2d(x, ("avg",))[0], adaptive_pool2d(x, (2, 3), "max"), adaptive_pool2d(x, 3, "avg")):
        ones = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]  # a stride of 0
        dense = torch.autograd.grad(y, x, torch.ones_like(y).contiguous(), retain_graph=True)[0]
        turned = torch.ones(y.shape[::-1], device=device, dtype=y.dtype).permute(*range(y.dim())[::-1])
        other = torch.autograd.grad(y, x, turned)[0]
        assert torch.equal(ones, dense) and torch.equal(ones, other)
        assert ones.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_nan_wins_and_ties_go_to_the_first(device: torch.device) -> None:
    x = torch.zeros(1, 2, 4, 4, device=device)
    x[0, 0, 1, 2] = x[0, 0, 3, 0] = float("nan")
    x.requires_grad_()
    y, low, mean = global_pool2d(x, ("max", "min", "avg"))
    assert y[0, 0].isnan() and low[0, 0].isnan() and mean[0, 0].isnan()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx[0, 0].flatten().nonzero().flatten().tolist() == [12]  # the last NaN, as torch's pools have it
    assert dx[0, 1].flatten().nonzero().flatten().tolist() == [0]


def test_all_infinite_maps(device: torch.device) -> None:
    x = torch.full((1, 1, 3, 3), float("-inf"), device=device, requires_grad=True)
    y, low = global_pool2d(x, ("max", "min"))
    assert y.item() == low.item() == float("-inf")
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.flatten().tolist() == [1.0, *[0.0] * 8]
    assert adaptive_pool2d(x, 1, "max", return_indices=True)[1].item() == 0


def draw(x: Tensor, seed: int, **arguments: Any) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(seed)
    return global_pool2d(x, ("stochastic",), generator=generator, **arguments)[0]


def test_stochastic_draws_in_proportion() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0, -5.0, 4.0, 0.0])
    x = weights.view(1, 1, 2, 3).repeat(1, 3000, 1, 1).requires_grad_()
    y = draw(x, 3)
    shares = [(y == w).double().mean().item() for w in (1, 2, 3, 4)]
    assert sum(shares) == pytest.approx(1)
    for share, expected in zip(shares, (0.1, 0.2, 0.3, 0.4), strict=True):
        assert abs(share - expected) < 4 * (expected * (1 - expected) / 3000) ** 0.5
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal((dx * x).sum((2, 3)), y) and torch.equal(dx.sum((2, 3)), torch.ones_like(y))
    assert torch.equal(y, draw(x, 3)) and not torch.equal(y, draw(x, 4))
    assert not draw(-x.abs(), 3).any()
    expectation = draw(x[:, :1], 3, training=False)
    cases.assert_close([expectation], [torch.tensor([[3.0]])], 1e-6)


def test_stochastic_is_the_same_everywhere(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = cases.random(2, 2, 6, 5, dtype=torch.float32).to(kernel_device)
    images = x.flatten(2).transpose(1, 2)  # pixels packed, channels last
    offsets = torch.tensor([0, 30, 60], device=kernel_device)

    def results() -> list[Tensor]:
        generator = torch.Generator(kernel_device).manual_seed(5)
        packed = ragged_pool(images.reshape(-1, 2), offsets, ("stochastic",), generator=generator)[0]
        generator = torch.Generator(kernel_device).manual_seed(5)
        level = adaptive_pool2d(x, 1, "stochastic", generator=generator)[..., 0, 0]
        padded = torch.nn.functional.pad(x, (0, 2, 0, 1), value=float("nan"))
        sizes = torch.tensor([[6, 5], [6, 5]], device=kernel_device)
        last = x.contiguous(memory_format=torch.channels_last)
        return [draw(x, 5), packed, level, draw(last, 5), draw(padded, 5, sizes=sizes)]

    found = results()
    cases.tiny_tiles(monkeypatch)
    found += results()
    if kernel_device.type == "cpu":
        with runtime.force("reference"):
            found += results()
    assert all(torch.equal(y, found[0]) for y in found)
    assert not torch.equal(draw(x, 6), found[0])


POOLS: dict[str, Callable[[Tensor], Any]] = {
    "whole": lambda x: global_pool2d(x, ("avg", "gem", "lp", "softpool"), p={"lp": 3.0}),
    "sized": lambda x: global_pool2d(x, ("avg", "std"), sizes=torch.tensor([[3, 2], [4, 3]])),
    "winners": lambda x: global_pool2d(x, ("max", "min", "mixed", "avg")),
    "grid": lambda x: adaptive_pool2d(x, (3, 2), "lse"),
    "pyramid": lambda x: pyramid_pool2d(x, (1, 2), "avg"),
    "ragged": lambda x: ragged_pool(x.permute(0, 2, 3, 1).reshape(-1, 2), torch.tensor([0, 5, 5, 24]), ("avg", "gem")),
}


@pytest.mark.parametrize("name", POOLS)
def test_first_and_second_derivatives(name: str) -> None:
    x = (cases.random(2, 2, 4, 3) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(POOLS[name], (x,))
    assert torch.autograd.gradgradcheck(POOLS[name], (x,))


def test_second_derivatives_by_the_prologue_and_the_parameter() -> None:
    x, scale, shift = cases.random(1, 2, 3, 2) + 2, cases.random(2, seed=1), cases.random(2, seed=2)
    p = torch.tensor(2.5, dtype=torch.float64)

    def pool(x: Tensor, scale: Tensor, shift: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        return global_pool2d(x, ("gem", "max", "avg"), scale=scale, shift=shift, activation="silu", p=p)

    inputs = [t.requires_grad_() for t in (x, scale, shift, p)]
    assert torch.autograd.gradcheck(pool, inputs)
    assert torch.autograd.gradgradcheck(pool, inputs)


@pytest.mark.parametrize("mode", ["whole", "sized", "grid", "packed"])
def test_the_operator_is_registered_as_pytorch_wants_it(mode: str) -> None:
    x = cases.random(2, 3, 4, 4, dtype=torch.float32, last=mode == "grid").requires_grad_()
    bounds, levels = None, [2, 3, 1, 1] if mode == "grid" else []
    if mode == "sized":
        bounds = torch.tensor([[2, 3], [4, 4]])
    if mode == "packed":
        x, bounds = cases.random(20, 3, dtype=torch.float32).t()[None, :, None].requires_grad_(), torch.tensor(OFFSETS)
    scale = torch.ones(3, requires_grad=True)
    param = torch.tensor([0.0, 2.0], requires_grad=True)
    torch.library.opcheck(
        _regions, (x, bounds, scale, None, param, None, mode, levels, "max,gem", [0.0, 0.0], "relu", True, False, False)
    )  # fmt: skip


class Head(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        average, best = global_pool2d(x, ("avg", "max"), activation="relu")
        return average, best, adaptive_pool2d(x, (2, 3), "max"), pyramid_pool2d(x, (1, 2), "avg")


def test_compiles_into_one_graph_for_all_sizes() -> None:
    compiled = torch.compile(Head(), fullgraph=True, dynamic=True, backend="aot_eager")
    for height, width in ((5, 4), (7, 9)):
        x = cases.random(2, 3, height, width).requires_grad_()
        cases.assert_close(compiled(x), Head()(x), 0)
        cases.assert_close(cases.gradients(compiled(x), [x]), cases.gradients(Head()(x), [x]), 0)


def test_exports_with_dynamic_sizes() -> None:
    sizes = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(Head(), (cases.random(2, 3, 6, 5),), dynamic_shapes=(sizes,))
    x = cases.random(4, 3, 8, 11)
    cases.assert_close(program.module()(x), Head()(x), 0)


def test_empty_batches(device: torch.device) -> None:
    x = torch.zeros(0, 3, 4, 5, device=device, requires_grad=True)
    scale = torch.ones(3, device=device, requires_grad=True)
    y = global_pool2d(x, ("avg", "max"), scale=scale)
    assert [tuple(v.shape) for v in y] == [(0, 3)] * 2
    dx, dscale = torch.autograd.grad([v.sum() for v in y], [x, scale])
    assert dx.shape == x.shape and not dscale.any()
    assert pyramid_pool2d(x).shape == (0, 3, 21)


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(2, 3, 4, 4)
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: global_pool2d(x, "avg"), "kinds is 'avg'"),
        (lambda: global_pool2d(x, (kind for kind in ("avg",))), "kinds is <generator"),  # type: ignore[arg-type]
        (lambda: global_pool2d(x, sizes=[(1, 1)]), "sizes is of type list"),  # type: ignore[arg-type]
        (lambda: global_pool2d(x, ()), "kinds"),
        (lambda: global_pool2d(x, ("avg", "avg")), "twice"),
        (lambda: global_pool2d(x, ("average",)), "kind is 'average'"),
        (lambda: global_pool2d(x[0]), r"\[N, C, H, W\]"),
        (lambda: global_pool2d(x, ("avg",), p=2.0), "p is 2.0"),
        (lambda: global_pool2d(x, ("lp", "gem"), p=2.0), "mapping"),
        (lambda: global_pool2d(x, ("lp",), p={"gem": 2.0}), "gem"),
        (lambda: global_pool2d(x, ("lp",), p=-1.0), "positive"),
        (lambda: global_pool2d(x, scale=torch.ones(2)), "scale"),
        (lambda: global_pool2d(x, activation="tanh"), "activation"),
    ]
    for call, words in wrong:
        with pytest.raises(ValueError, match=words):
            call()
