"""What every operator and module promises alike: its place in PyTorch, its memory, its determinism."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fusedpool
from fusedpool import channel_launch, runtime
from fusedpool import nn as pools
from fusedpool.nn import (
    AdaptivePool2d,
    BatchNormActPool2d,
    ChannelPool,
    Conv1x1GlobalPool2d,
    FractionalPool2d,
    GlobalPool2d,
    Pool2d,
    PyramidPool2d,
    RaggedPool,
)
from tests.kernels import region_cases as cases

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

CHANNELS: Final = 4


def _sizes(x: Tensor) -> Tensor:
    """Of padded images, each its map but for a column."""
    return torch.tensor([[x.shape[2], x.shape[3] - 1]], device=x.device).expand(x.shape[0], 2)


def _offsets(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0] + 1, device=x.device) * (x.shape[2] * x.shape[3])


def _pixels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, CHANNELS)


def _convolution(x: Tensor, scale: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, CHANNELS**2, device=x.device).view(CHANNELS, CHANNELS)
    return fusedpool.conv1x1_global_pool2d(x, weight.to(x.dtype), scale.to(x.dtype), "silu")


Operator = Callable[[Tensor, Tensor], Any]

OPERATORS: Final[dict[str, Operator]] = {
    "pool2d": lambda x, scale: fusedpool.pool2d(x, 3, 2, 1, scale=scale, activation="relu"),
    "global_pool2d": lambda x, scale: fusedpool.global_pool2d(x, ("avg", "max"), scale=scale, activation="silu"),
    "global_pool2d, sized": lambda x, scale: fusedpool.global_pool2d(x, ("lp",), sizes=_sizes(x), scale=scale)[0],
    "adaptive_pool2d": lambda x, scale: fusedpool.adaptive_pool2d(x, (1, 2), "lse", scale=scale),
    "pyramid_pool2d": lambda x, scale: fusedpool.pyramid_pool2d(x, (1, 2), scale=scale, activation="gelu"),
    "ragged_pool": lambda x, scale: fusedpool.ragged_pool(_pixels(x), _offsets(x), ("softpool",), scale=scale)[0],
    "channel_pool": lambda x, scale: fusedpool.channel_pool(x, 2, scale=scale, activation="silu"),
    "fractional_pool2d": lambda x, scale: fusedpool.fractional_pool2d(
        x, 2, 3, None, "std", scale=scale, training=False
    ),
    "batch_norm_act_pool2d": lambda x, scale: fusedpool.batch_norm_act_pool2d(x, scale, None, None, None, 3, 2, 1),
    "conv1x1_global_pool2d": _convolution,
}
"""Maps [N, CHANNELS, H, W] and a vector [CHANNELS], both of which get gradients -> a tensor, or several."""

MODULES: Final[dict[str, Callable[[], nn.Module]]] = {
    "Pool2d": lambda: Pool2d(3, 2, 1, kind="stochastic", activation="relu"),
    "GlobalPool2d": lambda: GlobalPool2d(("avg", "gem", "mixed"), learn_p=True),
    "AdaptivePool2d": lambda: AdaptivePool2d((2, None), "max", return_indices=True),
    "PyramidPool2d": lambda: PyramidPool2d((1, 2), "mixed", learn_p=True),
    "RaggedPool": lambda: RaggedPool(("max", "gem"), learn_p=True),
    "ChannelPool": lambda: ChannelPool(2, "lp", p=3.0),
    "FractionalPool2d": lambda: FractionalPool2d(2, (3, 2)),
    "BatchNormActPool2d": lambda: BatchNormActPool2d(CHANNELS, 3, 2, 1, momentum=None),
    "Conv1x1GlobalPool2d": lambda: Conv1x1GlobalPool2d(CHANNELS, 5, activation="gelu"),
}

without_interpreter = pytest.mark.parametrize(
    "device", ["reference", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
every_operator = pytest.mark.parametrize("name", OPERATORS)
every_module = pytest.mark.parametrize("name", MODULES)
both_formats = pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])


@pytest.fixture(autouse=True)
def _tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    if runtime.INTERPRETED:
        cases.small_tiles(monkeypatch)
        monkeypatch.setattr(channel_launch, "_ELEMENTS", 64)


def inputs(device: Any, *shape: int, last: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Maps, and a vector of float32 or wider."""
    x = cases.random(*(shape or (2, CHANNELS, 4, 4)), last=last).to(device, dtype)
    scale = torch.linspace(0.5, 2, CHANNELS, device=device, dtype=runtime.accumulator(x))
    return x.requires_grad_(), scale.requires_grad_()


def outputs(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def with_gradients(found: Any, *wanted: Tensor) -> list[Tensor]:
    """The outputs, and gradients of those that have them."""
    given = outputs(found)
    floating = [y for y in given if y.requires_grad]
    return [*given, *torch.autograd.grad(floating, wanted, [torch.ones_like(y) for y in floating])]


def test_all_are_here() -> None:
    assert {name.partition(",")[0] for name in OPERATORS} == set(fusedpool.__all__)
    assert set(MODULES) == set(pools.__all__)


@every_operator
@both_formats
def test_a_batch_may_be_empty(device: torch.device, name: str, last: bool) -> None:
    x, scale = inputs(device, 0, CHANNELS, 4, 4, last=last)
    images, _ = inputs(device, 1, CHANNELS, 4, 4, last=last)
    *found, dx, dscale = with_gradients(OPERATORS[name](x, scale), x, scale)
    shapes = [y.shape for y in outputs(OPERATORS[name](images, scale))]
    assert [y.shape for y in found] == [(0, *shape[1:]) for shape in shapes]
    assert dx.shape == x.shape
    assert not dscale.any()


@every_operator
def test_a_gradient_may_lie_in_memory_in_any_way(kernel_device: torch.device, name: str) -> None:
    x, scale = inputs(kernel_device)
    y = outputs(OPERATORS[name](x, scale))[0]
    g = cases.random(*y.shape[1:], seed=3).to(kernel_device).expand(y.shape)  # a batch's stride of 0
    expected = torch.autograd.grad(y, (x, scale), g.contiguous(), retain_graph=True)
    backwards = tuple(range(y.dim()))[::-1]
    for other in (
        g,
        g.permute(backwards).contiguous().permute(backwards),
        g.movedim(1, -1).contiguous().movedim(-1, 1),
    ):
        found = torch.autograd.grad(y, (x, scale), other, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(AssertionError):  # the control: another gradient is another result
        torch.testing.assert_close(torch.autograd.grad(y, (x, scale), g.flip(1)), expected)


@every_operator
def test_the_same_bits_every_time(kernel_device: torch.device, name: str) -> None:
    x, scale = inputs(kernel_device, 1, CHANNELS, 4, 4, dtype=torch.float32)
    runs = [with_gradients(OPERATORS[name](x, scale), x, scale) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@every_operator
def test_no_map_is_written_but_the_gradient(
    kernel_device: torch.device, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the tensors that kernels get, none but x and its gradient has as many elements: no activation, no product."""
    large: set[int] = set()
    launch = runtime.launch

    def noting(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        tensors = [t for t in (*args, *constants.values()) if isinstance(t, Tensor) and t.numel() >= x.numel()]
        large.update(t.data_ptr() for t in tensors)
        launch(kernel, programs, *args, **constants)

    monkeypatch.setattr(runtime, "launch", noting)
    x, scale = inputs(kernel_device, 1, CHANNELS, 6, 6, last=True, dtype=torch.float32)
    found = OPERATORS[name](x, scale)
    assert large == {x.data_ptr()}
    dx = with_gradients(found, x)[-1]
    assert large <= {x.data_ptr(), dx.data_ptr()}


@every_operator
def test_second_derivatives_on_the_kernels_are_the_formulas(kernel_device: torch.device, name: str) -> None:
    def second(device: Any) -> list[Tensor]:
        x, scale = inputs(device, 1, CHANNELS, 4, 4)
        y = outputs(OPERATORS[name](x, scale))[0]
        first = torch.autograd.grad(y, (x, scale), torch.cos(y.detach()), create_graph=True)
        return [t.cpu() for t in torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), (x, scale))]

    found = second(kernel_device)
    with runtime.force("reference"):
        expected = second("cpu")
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    assert any(t.any() for t in found)


@without_interpreter
@every_operator
def test_autocast_leaves_maps_and_vectors_their_types(device: torch.device, name: str) -> None:
    x, scale = inputs(device, dtype=torch.bfloat16)
    expected = with_gradients(OPERATORS[name](x, scale), x, scale)
    with torch.autocast(device.type, torch.bfloat16):
        found = with_gradients(OPERATORS[name](x, scale), x, scale)
    assert [t.dtype for t in found[-2:]] == [torch.bfloat16, torch.float32]
    assert all(t.dtype is torch.bfloat16 for t in found[:-1])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_operator
@both_formats
def test_offsets_beyond_two_to_the_31(kernel_device: torch.device, name: str, last: bool) -> None:
    """Two images 4 GiB apart, between which memory is never touched."""
    far = 2**31 + 2**20
    try:
        storage = torch.empty(far + 256, dtype=torch.float16, device=kernel_device)
    except RuntimeError:
        pytest.skip("no address space for 4 GiB")
    x, scale = inputs(kernel_device, last=last, dtype=torch.float16)
    distant = storage.as_strided(x.shape, (far, *x.stride()[1:])).copy_(x.detach()).requires_grad_()
    assert runtime.wide(distant) and not runtime.wide(x)
    near = with_gradients(OPERATORS[name](x, scale), x, scale)
    for a, b in zip(with_gradients(OPERATORS[name](distant, scale), distant, scale), near, strict=True):
        torch.testing.assert_close(a, b)


@without_interpreter
@every_operator
def test_many_images_of_many_pixels(device: torch.device, name: str) -> None:
    """On a GPU more images than an axis of a grid holds, and more than 2^31 elements: each as if it were alone."""
    images, side = (70_000, 96) if device.type == "cuda" else (3, 5)
    one, scale = inputs(device, 1, CHANNELS, side, side, dtype=torch.float16)
    alone = with_gradients(OPERATORS[name](one, scale), one, scale)
    x = one.detach().repeat(images, 1, 1, 1).requires_grad_()
    assert device.type == "cpu" or x.numel() > 2**31
    found = with_gradients(OPERATORS[name](x, scale), x)
    for among, expected in zip(found, alone, strict=False):
        for image in (0, images // 2, images - 1):
            torch.testing.assert_close(among[image : image + 1], expected, rtol=4e-3, atol=4e-3)


def test_kernels_are_launched_along_one_axis_of_a_grid() -> None:
    """The first axis, which holds 2^31 - 1 programs; the others hold 65,535. No size picks a kernel's tuning."""
    launches, tuned = [], []
    for path in Path(fusedpool.__file__).parent.rglob("*.py"):
        tuned += re.findall(r"autotune|program_id\([12]", source := path.read_text())
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launches.append((path.name, ast.unparse(node.func)))
    assert [(name, call) for name, call in launches if "kernel" in call] == [("runtime.py", "kernel[programs,]")]
    assert not tuned


def compiled_for(function: Callable[..., Any]) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, dynamic=True, backend=counter), counter


SIZES: Final = ((2, CHANNELS, 9, 8), (4, CHANNELS, 12, 7), (3, CHANNELS, 20, 33))


@every_operator
def test_an_operator_compiles_as_one_graph_for_all_sizes(name: str) -> None:
    compiled, counter = compiled_for(OPERATORS[name])
    compilations = set()
    for size in SIZES:
        x, scale = inputs("cpu", *size)
        found, expected = (with_gradients(run(x, scale), x, scale) for run in (compiled, OPERATORS[name]))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1  # a new size brings no new one


def arguments_for(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return (_pixels(x), _offsets(x)) if isinstance(module, RaggedPool) else (x,)


@every_module
def test_a_module_compiles_as_one_graph_for_all_sizes(name: str) -> None:
    module = MODULES[name]()
    compiled, counter = compiled_for(module)
    compilations = set()
    for size in SIZES[:2]:
        x = cases.random(*size, dtype=torch.float32).requires_grad_()
        given = arguments_for(module, x)
        state = {key: value.clone() for key, value in module.state_dict().items()}
        results = []
        for run in (compiled, module):
            module.load_state_dict(state)
            torch.manual_seed(3)
            results.append(with_gradients(run(*given), x, *module.parameters()))
        torch.testing.assert_close(*results)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1  # a new size brings no new one


@every_module
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_module_exports_for_any_size(name: str, training: bool) -> None:
    module = MODULES[name]().train(training)
    given = arguments_for(module, cases.random(*SIZES[0], dtype=torch.float32))
    auto, axes = torch.export.Dim.AUTO, range(4)
    shapes = tuple({axis: auto for axis in axes[: t.dim()] if t.shape[axis] != CHANNELS or t.dim() == 1} for t in given)
    program = torch.export.export(module, given, dynamic_shapes=shapes)
    other = arguments_for(module, cases.random(*SIZES[1], dtype=torch.float32))
    results = []
    for run in (program.module(), module):
        torch.manual_seed(3)
        results.append(outputs(run(*other)))
    torch.testing.assert_close(*results)
