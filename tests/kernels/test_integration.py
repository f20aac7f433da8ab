"""Sliding windows inside PyTorch's machinery: operator checks, compile, export, autocast, fake tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F

from fusedpool import pool2d
from fusedpool.geometry import Window

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

WINDOW = Window(3, 2, 2, 1, 1, 1, 1, 1, 1).to_ints()


def maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Stem(nn.Module):
    """A convolution and pools of several kinds, with learned parameters."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        for parameter in self.conv.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.scale, self.shift = nn.Parameter(torch.linspace(0.5, 2, 4)), nn.Parameter(torch.linspace(-1, 1, 4))
        self.p = nn.Parameter(torch.tensor(2.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        first = pool2d(x, 3, 2, 1, scale=self.scale, shift=self.shift, activation="relu")
        second = pool2d(x, 3, 2, 1, kind="gem", p=self.p)
        third = pool2d(x, 3, 2, 1, kind="softpool", activation="silu")
        result: Tensor = first * second + third
        return result


def outcome(module: nn.Module, run: Any, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of everything."""
    x = x.clone().requires_grad_()
    y = run(x)
    return [y, *torch.autograd.grad((y * torch.cos(y.detach())).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize(
    ("kind", "activation", "format"),
    [
        ("max", "relu", torch.channels_last),
        ("avg", "none", torch.contiguous_format),
        ("gem", "gelu", torch.channels_last),
        ("mixed", "none", torch.contiguous_format),
    ],
)
def test_both_operators_pass_pytorchs_checks(kind: str, activation: str, format: torch.memory_format) -> None:
    x = maps(2, 3, 5, 4).to(memory_format=format).requires_grad_()
    scale, shift = maps(3, seed=1).requires_grad_(), maps(3, seed=2).requires_grad_()
    param = torch.tensor([0.4], requires_grad=True) if kind in ("gem", "mixed") else None
    affine = (scale, shift) if activation != "none" else (None, None)
    common = (WINDOW, kind, 0.0, activation)
    operators = torch.ops.fusedpool
    forward = (x, *affine, param, None, *common, True, kind == "max")
    torch.library.opcheck(operators.window.default, forward)
    y, winner, aux, _ = (t.detach() for t in operators.window(*forward))
    g = maps(*y.shape, seed=3).requires_grad_()
    last = format is torch.channels_last
    torch.library.opcheck(
        operators.window_backward.default, (g, x, y, winner, aux, *affine, param, x.shape, last, *common)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    torch._dynamo.reset()
    stem = Stem()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stem, fullgraph=True, dynamic=dynamic, backend=counter)
    sizes = [(2, 3, 9, 8), (4, 3, 12, 7), (3, 3, 20, 33)] if dynamic else [(2, 3, 9, 8)]
    compilations = set()
    for size in sizes:
        for found, expected in zip(outcome(stem, compiled, maps(*size)), outcome(stem, stem, maps(*size)), strict=True):
            torch.testing.assert_close(found, expected)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1  # a new size brings no new one


def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()

    def pooled(x: Tensor) -> Tensor:
        y: Tensor = pool2d(x * 2, 3, 2, 1, activation="relu")
        return y + 1

    x = maps(2, 3, 9, 8).to(memory_format=torch.channels_last).requires_grad_()
    y = torch.compile(pooled, fullgraph=True)(x)
    assert torch.equal(y, pooled(x)) and y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(pooled(x).sum(), x)[0])


def test_a_window_as_large_as_the_map_may_be_symbolic() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: pool2d(x, x.shape[2:], kind="avg"), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for size in ((2, 3, 5, 4), (2, 3, 7, 6)):
        torch.testing.assert_close(compiled(maps(*size)), maps(*size).mean((2, 3), keepdim=True))


def test_exports_for_any_size() -> None:
    stem = Stem().eval()
    axes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=3), 3: torch.export.Dim("w", min=3)}
    program = torch.export.export(stem, (maps(2, 3, 9, 8),), dynamic_shapes=(axes,))
    for size in ((1, 3, 3, 17), (4, 3, 10, 4)):
        assert torch.equal(program.module()(maps(*size)), stem(maps(*size)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_pytorchs(device: torch.device, dtype: torch.dtype) -> None:
    stem, x = Stem().to(device), maps(2, 3, 7, 6).to(device).requires_grad_()
    results = []
    for pool in (pool2d, F.max_pool2d):
        with torch.autocast(device.type, dtype):
            y = pool(stem.conv(x), 3, 3)  # no overlap: gradients are not sums
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, stem.conv.weight))))
    assert [t.dtype for t in results[0]] == [dtype, torch.float32, torch.float32]
    assert all(torch.equal(found, expected) for found, expected in zip(*results, strict=True))
    with torch.autocast(device.type, dtype):  # float32 parameters beside a half map
        y = pool2d(stem.conv(x), 2, scale=stem.scale, shift=stem.shift, activation="relu")
        exact = F.max_pool2d((stem.conv(x).float() * stem.scale.view(4, 1, 1) + stem.shift.view(4, 1, 1)).relu(), 2)
    assert y.dtype is dtype
    torch.testing.assert_close(y, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.autograd.grad(y.float().sum(), stem.scale)[0].dtype is torch.float32


def test_nothing_waits_for_the_values_of_a_tensor() -> None:
    with FakeTensorMode():  # whose tensors have none: reading one, as a host would have to, raises
        x = torch.empty(2, 3, 8, 7, requires_grad=True)
        p = torch.empty(1, requires_grad=True)
        y = pool2d(x, 3, kind="stochastic") + pool2d(x, 3, kind="gem", p=p, scale=torch.empty(3))
        torch.autograd.grad(y.sum(), (x, p))
        with pytest.raises(Exception, match="local_scalar_dense"):
            x.sum().item()


def test_without_gradients_nothing_is_kept() -> None:
    x = maps(1, 2, 4, 4).requires_grad_()
    with torch.no_grad():
        assert not pool2d(x, 2).requires_grad
    with torch.inference_mode():
        assert torch.equal(pool2d(x, 2), F.max_pool2d(x, 2))


def test_forward_mode_is_refused() -> None:
    x = maps(1, 2, 4, 4)
    scale = torch.ones(2)
    with pytest.raises(NotImplementedError, match="an input has a tangent"):
        torch.func.jvp(lambda x: pool2d(x, 2), (x,), (x,))
    with forward_ad.dual_level():
        pool2d(x, 2, scale=scale)
        with pytest.raises(NotImplementedError, match="an input has a tangent"):
            pool2d(x, 2, scale=forward_ad.make_dual(scale, scale))  # type: ignore[no-untyped-call]


def test_activation_checkpointing_recomputes_the_same() -> None:
    stem, x = Stem(), maps(2, 3, 9, 8)
    recomputed = outcome(stem, lambda x: torch.utils.checkpoint.checkpoint(stem, x, use_reentrant=False), x)
    for found, expected in zip(recomputed, outcome(stem, stem, x), strict=True):
        assert torch.equal(found, expected)


def test_stochastic_pooling_is_drawn_anew_in_a_compiled_function() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: pool2d(x, 3, kind="stochastic"), fullgraph=True, backend="aot_eager")
    x = maps(1, 8, 9, 9).abs()
    assert not torch.equal(compiled(x), compiled(x))
    torch.manual_seed(3)
    first = compiled(x)
    torch.manual_seed(3)
    assert torch.equal(first, compiled(x))
