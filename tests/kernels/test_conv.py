"""1x1 convolution, activation and global pooling in one: the kernels and the CPU path against float64 formulas."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fusedpool import conv, runtime
from fusedpool.conv import CONV_KINDS, conv1x1_global_pool2d
from tests.kernels import formulas

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
_SMOOTH = ("avg", "sum", "lp", "gem", "lse", "softpool", "std", "mixed")


def inputs(
    device: Any,
    x: tuple[int, int, int, int] = (2, 5, 3, 5),
    outputs: int = 7,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    """x, weight and bias, rounded to dtype, that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (x, (outputs, x[1]), (outputs,))
    scales = (1, x[1] ** -0.5, 1)
    tensors = (torch.randn(s, generator=generator) * scale for s, scale in zip(shapes, scales, strict=True))
    return [t.to(device, dtype).requires_grad_() for t in tensors]


def pooled(tensors: list[Tensor], activation: str = "relu", kind: str = "avg", p: Any = None) -> Tensor:
    """The operator on x, weight and bias."""
    return conv1x1_global_pool2d(tensors[0], tensors[1], tensors[2], activation, kind, p=p)


def expected(tensors: list[Tensor], activation: str = "relu", kind: str = "avg", p: Any = None) -> Tensor:
    """The same, as formulas."""
    x, weight, bias = tensors
    u = torch.einsum("nchw,oc->nohw", x, weight)
    v = formulas.ACTIVATIONS[activation](u + bias[:, None, None]).flatten(2)
    return formulas.FORMULAS[kind](v, formulas.PARAMETERS.get(kind, 0.0) if p is None else p, v.shape[-1])


def compare(tensors: list[Tensor], activation: str, kind: str, tolerance: float | None = None) -> None:
    """Value and gradients against the formula in float64; errors by the largest number."""
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted = expected(exact, activation, kind)
    g = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(tensors[0])
    y = pooled(tensors, activation, kind)
    got = (y, *torch.autograd.grad(y, tensors, g))
    assert y.dtype is tensors[0].dtype
    for name, a, b in zip(
        ("y", "dx", "dweight", "dbias"), got, (wanted, *torch.autograd.grad(wanted, exact, g.double())), strict=True
    ):
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1e-2)
        assert error <= (tolerance or _TOLERANCES[y.dtype]), f"{name} is off by {error:.1e}"


@pytest.mark.parametrize(
    ("kind", "activation"),
    [(kind, activation) for kind in CONV_KINDS for activation in ("relu", "silu")]
    + [("avg", activation) for activation in ("none", "leaky_relu", "gelu")],
)
def test_values_and_gradients(device: torch.device, kind: str, activation: str) -> None:
    compare(inputs(device), activation, kind)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["avg", "max", "softpool"])
def test_dtypes(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    compare(inputs(device, dtype=dtype), "silu", kind)


def test_a_bias_may_be_a_view(device: torch.device) -> None:
    x, weight, bias = inputs(device)
    results = []
    for view in (bias.detach()[::2], bias.detach()[::2].contiguous()):
        found = pooled([x, weight[: len(view)], view.requires_grad_()], "silu")
        results.append([found, *torch.autograd.grad(found.sum(), (x, view))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("kind", "p"), [("gem", 2.7), ("lp", 1.3), ("lse", 0.1), ("mixed", 0.3)])
def test_a_number_p_is_not_rounded_to_float32(device: torch.device, kind: str, p: float) -> None:
    tensors = inputs(device, dtype=torch.float64)
    found, wanted = pooled(tensors, "silu", kind, p), expected(tensors, "silu", kind, p)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(y.sum(), tensors) for y in (found, wanted))
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("last", [False, True])
def test_blocks_of_channels_pixels_and_splits(device: torch.device, last: bool) -> None:
    x, weight, bias = inputs(device, (1, 70, 31, 17), 66)
    format = torch.channels_last if last else torch.contiguous_format
    compare([x.detach().contiguous(memory_format=format).requires_grad_(), weight, bias], "relu", "avg")


def test_a_winner_in_a_later_split(device: torch.device) -> None:
    x, weight, bias = inputs(device, (1, 3, 13, 20), 2, torch.float64)
    with torch.no_grad():
        weight.copy_(torch.eye(3)[[0, 0]] * torch.tensor([[1.0], [-1.0]]))
        x[0, 0].clamp_(-1, 1)
        x[0, 0, 12, 19], x[0, 0, 12, 18] = 5, -5
    compare([x, weight, bias], "none", "max")
    compare([x, weight, bias], "leaky_relu", "min")


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 35), st.integers(1, 6), st.integers(1, 12)),
    outputs=st.integers(1, 40),
    activation=st.sampled_from(list(formulas.ACTIVATIONS)),
    kind=st.sampled_from(["avg", "sum", "gem"]),
    seed=st.integers(0, 99),
)
def test_shapes(
    device: torch.device, shape: tuple[int, int, int, int], outputs: int, activation: str, kind: str, seed: int
) -> None:
    compare(inputs(device, shape, outputs, torch.float64, seed), activation, kind, 1e-8)


def test_products_of_float32_are_not_rounded(device: torch.device) -> None:
    """To the precision of tensor cores, say; the control shows that this would be noticed."""
    tensors = inputs(device, (1, 30, 4, 4), 16)
    compare(tensors, "none", "avg")
    exact = [t.detach().double() for t in tensors]
    rounded = [t.detach().bfloat16().double() for t in tensors[:2]]
    error = (expected(exact, "none", "avg") - expected([*rounded, exact[2]], "none", "avg")).abs().max()
    assert error > 10 * _TOLERANCES[torch.float32]


@pytest.mark.parametrize("layout", ["channels_last", "cropped", "sliced", "expanded", "transposed"])
@pytest.mark.parametrize("kind", ["avg", "max"])
def test_layouts(device: torch.device, layout: str, kind: str) -> None:
    x, weight, bias = (t.detach() for t in inputs(device, (2, 6, 5, 4)))
    match layout:
        case "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        case "cropped":
            x = F.pad(x, (1, 2, 3, 4), value=torch.nan)[:, :, 3:-4, 1:-2]
        case "sliced":
            wide = torch.full((2, 12, 10, 4), torch.nan, device=device).contiguous(memory_format=torch.channels_last)
            wide[:, ::2, ::2] = x
            x = wide[:, ::2, ::2]
        case "expanded":
            x = x[:1].expand(x.shape)
        case "transposed":
            x, weight = x.transpose(2, 3).contiguous().transpose(2, 3), weight.t().contiguous().t()
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    compare([x, weight, bias], "gelu", kind)
    y = conv1x1_global_pool2d(x, weight[:, :, None, None], bias, kind=kind)
    torch.autograd.backward(y.sum())  # a gradient of strides 0
    assert x.grad is not None
    if layout == "channels_last":
        assert x.grad.is_contiguous(memory_format=torch.channels_last)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    wanted = torch.autograd.grad(expected(exact, "relu", kind).sum(), exact)
    for t, want in zip((x, weight, bias), wanted, strict=True):
        torch.testing.assert_close(t.grad, want.float(), atol=1e-5, rtol=1e-5)


def test_matches_conv2d(device: torch.device) -> None:
    x, weight, bias = inputs(device)
    wanted = F.relu(F.conv2d(x, weight[:, :, None, None], bias)).mean((2, 3))
    torch.testing.assert_close(conv1x1_global_pool2d(x, weight, bias), wanted)
    torch.testing.assert_close(
        conv1x1_global_pool2d(x, weight, activation=None), F.conv2d(x, weight[:, :, None, None]).mean((2, 3))
    )


def test_only_wanted_gradients(device: torch.device) -> None:
    for frozen in range(3):
        tensors = inputs(device)
        tensors[frozen].requires_grad_(False)
        torch.autograd.backward(pooled(tensors).sum())
        assert [t.grad is not None for t in tensors] == [i != frozen for i in range(3)]


@pytest.mark.parametrize("kind", ["gem", "mixed"])
def test_a_learnt_parameter(device: torch.device, kind: str) -> None:
    tensors = [
        *inputs(device, dtype=torch.float64),
        torch.tensor(0.7, device=device, dtype=torch.float64, requires_grad=True),
    ]
    y = pooled(tensors[:3], "relu", kind, tensors[3])
    wanted = expected(tensors[:3], "relu", kind, tensors[3])
    torch.testing.assert_close(y, wanted)
    g = torch.rand_like(y)
    for got, want in zip(torch.autograd.grad(y, tensors, g), torch.autograd.grad(wanted, tensors, g), strict=True):
        torch.testing.assert_close(got, want)


def test_ties_and_nan(device: torch.device) -> None:
    x = torch.ones(1, 1, 2, 20, device=device, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(1, 1, device=device, dtype=torch.float64)
    torch.autograd.backward(conv1x1_global_pool2d(x, weight, kind="max").sum())
    assert x.grad is not None
    assert x.grad.flatten().nonzero().tolist() == [[0]]  # the first of equals
    torch.autograd.backward(conv1x1_global_pool2d(x, -weight, kind="max").sum())
    assert x.grad.sum() == 1  # nothing passes relu there
    with torch.no_grad():
        x[0, 0, 1, 3] = torch.nan
    for kind in ("max", "min", "avg", "lse"):
        assert conv1x1_global_pool2d(x, weight, kind=kind).isnan().all(), kind


def test_no_images(device: torch.device) -> None:
    x, weight, bias = inputs(device, (0, 5, 3, 5))
    y = conv1x1_global_pool2d(x, weight, bias, kind="max")
    assert y.shape == (0, 7)
    torch.autograd.backward(y.sum())
    assert x.grad is not None and weight.grad is not None and bias.grad is not None
    assert x.grad.shape == x.shape and not weight.grad.any() and not bias.grad.any()


def test_same_bits_every_time_and_in_every_batch(kernel_device: torch.device) -> None:
    x, weight, bias = inputs(kernel_device, (3, 5, 13, 20), dtype=torch.float64)
    runs = []
    for _ in range(2):
        y = conv1x1_global_pool2d(x, weight, bias)
        runs.append((y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    alone = x[1:2].detach().requires_grad_()
    y = conv1x1_global_pool2d(alone, weight, bias)
    assert torch.equal(y[0], runs[0][0][1])
    assert torch.equal(torch.autograd.grad(y.square().sum(), alone)[0][0], runs[0][1][1])


@pytest.mark.parametrize("kind", _SMOOTH)
def test_first_and_second_derivatives(kind: str) -> None:
    tensors = [t.detach().double().requires_grad_() for t in inputs("cpu", (2, 3, 2, 3), 2, torch.float64)]

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return conv1x1_global_pool2d(x, weight, bias, "silu", kind)

    with runtime.force("reference"):
        assert torch.autograd.gradcheck(call, tensors)
        assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("kind", ["avg", "max"])
def test_second_derivatives_of_kernels(kernel_device: torch.device, kind: str) -> None:
    tensors = inputs(kernel_device, (2, 3, 2, 3), 2, torch.float64)

    def penalty(y: Tensor) -> list[Tensor]:
        """Gradients of a gradient that itself came from y."""
        first = torch.autograd.grad(y.pow(3).sum(), tensors, create_graph=True)
        return list(torch.autograd.grad([g.square().sum() for g in first], tensors))

    got = penalty(pooled(tensors, "gelu", kind))
    wanted = penalty(expected(tensors, "gelu", kind))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["avg", "mixed"])
def test_operators_keep_their_contracts(device: torch.device, kind: str) -> None:
    x, weight, bias = inputs(device, (2, 3, 2, 3), 2)
    arguments = (x, weight, bias, None, kind, 0.3, "relu", True)
    torch.library.opcheck(conv._conv, arguments)
    y, winner, saved = (t.detach() for t in conv._conv(*arguments))
    tensors = [t.detach() for t in (y, x, weight, bias)]
    torch.library.opcheck(conv._conv_backward, (*tensors, None, winner, saved, kind, 0.3, "relu", [True, True]))
    torch.library.opcheck(conv._conv_backward, (*tensors, None, winner, saved, kind, 0.3, "relu", [True, False]))


def test_compiles_whole(device: torch.device) -> None:
    tensors = inputs(device)
    compiled = torch.compile(pooled, fullgraph=True, backend="aot_eager")
    results = []
    for call in (pooled, compiled):
        y = call(tensors, kind="gem")
        results.append((y, *torch.autograd.grad(y.square().sum(), tensors)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device: torch.device, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(device)
    with torch.autocast(device.type, dtype):
        y = conv1x1_global_pool2d(x, weight, bias)
        torch.autograd.backward(y.sum())
    assert y.dtype is dtype
    assert torch.equal(y, conv1x1_global_pool2d(x.to(dtype), weight.to(dtype), bias.to(dtype)))
    assert weight.grad is not None and weight.grad.dtype is torch.float32
    with torch.autocast(device.type, dtype):
        assert conv1x1_global_pool2d(x.double(), weight.double(), bias.double()).dtype is torch.float64


def test_shapes_alone_will_do() -> None:
    x, weight, bias = (t.detach().to("meta") for t in inputs("cpu"))
    y = conv1x1_global_pool2d(x, weight, bias)
    assert y.is_meta and y.shape == (len(x), len(weight))


def test_wrong_arguments() -> None:
    x, weight, bias = (t.detach() for t in inputs("cpu"))
    wrong: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("x has shape", (x[0], weight), {}),
        ("x has shape", (x[:, :, :0], weight), {}),
        ("x is torch.int64", (x.long(), weight), {}),
        ("weight is of type list", (x, [[1.0] * 5]), {}),
        ("bias is of type float", (x, weight, 1.0), {}),
        ("weight has shape", (x, weight[:, :4]), {}),
        ("weight has shape", (x, weight[:0]), {}),
        ("weight has shape", (x, weight[:, :, None]), {}),
        ("weight has shape", (x, weight[:, :, None, None].expand(-1, -1, 3, 3)), {}),
        ("weight is torch.float64", (x, weight.double()), {}),
        ("bias has shape", (x, weight, bias[:3]), {}),
        ("bias is torch.float16", (x, weight, bias.half()), {}),
        ("activation is 'swish'", (x, weight), {"activation": "swish"}),
        ("kind is 'median'", (x, weight), {"kind": "median"}),
        ("p is 2", (x, weight), {"p": 2.0}),
        ("p is -1", (x, weight), {"kind": "gem", "p": -1.0}),
    ]
    for message, arguments, options in wrong:
        with pytest.raises(ValueError, match=message):
            conv1x1_global_pool2d(*arguments, **options)
    with pytest.raises(NotImplementedError, match="conv1x1_global_pool2d has no kind 'stochastic'; it has max"):
        conv1x1_global_pool2d(x, weight, kind="stochastic")
    with pytest.raises(ValueError, match=r"H \* W must be at most"):
        conv1x1_global_pool2d(x[:, :, :1, :1].expand(-1, -1, 2**16, 2**15), weight)
