"""Batch normalisation, activation and pooling in one: against PyTorch's operators one after another, in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fusedpool import batch_norm_act_pool2d, batchnorm_launch, cells, runtime
from fusedpool.batchnorm_launch import Statistics
from tests.kernels import formulas
from tests.kernels.test_window import fits, geometries
from tests.kernels.window_cases import LAYOUTS, MEANINGFUL, laid_out, random_map

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

_SOME = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))

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


@_SOME
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    geometry=geometries(),
    layout=st.sampled_from(LAYOUTS[:-1]),
    kind=st.sampled_from(["max", "max", "min", "avg", "sum"]),
    activation=st.sampled_from(["relu", "relu", "none", "leaky_relu", "gelu", "silu"]),
    momentum=st.sampled_from([0.0, 0.1, 1.0]),
    eps=st.sampled_from([1e-5, 0.1]),
    seed=st.integers(0, 10**6),
)
def test_a_training_step_is_pytorchs(
    device: torch.device,
    shape: Any,
    geometry: Any,
    layout: str,
    kind: str,
    activation: str,
    momentum: float,
    eps: float,
    seed: int,
) -> None:
    x = random_map(*shape, seed=seed) * 3 + 1
    assume(x.numel() > shape[1] and fits(x, **geometry))
    if kind in ("avg", "sum"):
        geometry = {**geometry, "dilation": (1, 1)}
        assume(fits(x, **geometry))
    plain = {name: value for name, value in geometry.items() if name != "dilation"}

    def pool(v: Tensor, _: Any) -> Tensor:
        if kind in ("avg", "sum"):
            return F.avg_pool2d(v, **plain, divisor_override=1 if kind == "sum" else None)
        sign = 1 if kind == "max" else -1
        y: Tensor = sign * F.max_pool2d(sign * v, **geometry)
        return y

    assume(pool(x, None).isfinite().all())  # a window of nothing but padding: PyTorch's gradient goes astray
    assume(float(x.var((0, 2, 3)).min()) > 1e-3)
    g, parameters, options = random_map(*pool(x, None).shape, seed=seed + 1), affine(shape[1]), {"eps": eps}
    expected = step(one_by_one(pool, activation, momentum=momentum, **options), x, g, parameters)
    found = step(
        fused(kind=kind, activation=activation, momentum=momentum, **options, **geometry),
        *(laid_out(x.to(device), layout), g.to(device)),
        placed(parameters, device, torch.float64),
    )
    compare(found, expected, atol=1e-9)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", MEANINGFUL)
def test_every_kind_is_its_formula(device: torch.device, kind: str, layout: str) -> None:
    x, g, parameters = random_map(2, 3, 5, 6), random_map(2, 3, 3, 3, seed=1), affine(3)
    if kind in ("gem", "mixed"):
        parameters["p"] = torch.tensor([2.5 if kind == "gem" else 0.3], dtype=torch.float64, requires_grad=True)

    def pool(v: Tensor, p: Any) -> Tensor:
        return formulas.windows(v, kind, (3, 2), (2, 2), (1, 0), p=p)

    expected = step(one_by_one(pool, "silu"), x, g, parameters)
    found = step(
        fused(kernel_size=(3, 2), stride=2, padding=(1, 0), kind=kind, activation="silu"),
        *(laid_out(x.to(device), layout), g.to(device)),
        placed(parameters, device, torch.float64),
    )
    compare(found, expected, atol=1e-8)


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_each_precision_rounds_only_what_is_of_its_type(
    device: torch.device, kind: str, dtype: torch.dtype, layout: str
) -> None:
    x, g = random_map(3, 4, 9, 8, dtype=dtype), random_map(3, 4, 5, 4, seed=1, dtype=dtype)
    parameters = affine(4, torch.float32)
    exact = placed(parameters, torch.device("cpu"), torch.float64)
    pools = {"max": lambda v, _: F.max_pool2d(v, 3, 2, 1), "avg": lambda v, _: F.avg_pool2d(v, 3, 2, 1)}
    expected = step(one_by_one(pools[kind]), x.double(), g.double(), exact)
    found = step(
        fused(kernel_size=3, stride=2, padding=1, kind=kind),
        *(laid_out(x.to(device), layout), g.to(device)),
        placed(parameters, device, torch.float32),
    )
    assert (found["y"].dtype, found["x"].dtype, found["weight"].dtype) == (dtype, dtype, torch.float32)
    rounded = {name: found.pop(name) for name in ("y", "x")}
    # Triton's interpreter rounds to bfloat16 towards zero.
    steps = 1.01 if runtime.INTERPRETED and dtype is torch.bfloat16 else 0.51
    compare(rounded, {name: expected.pop(name) for name in rounded}, atol=max(2e-6, steps * torch.finfo(dtype).eps))
    compare(found, expected, atol=2e-6)


class TestLargeMeans:
    """Values that are all about 1e4 with a deviation of 1: a sum of squares in float32 has no digit of the variance."""

    x = (random_map(4, 2, 12, 11) + torch.tensor([1e4, -1e4]).view(1, 2, 1, 1)).float()
    naive = (x**2).mean((0, 2, 3)) - x.mean((0, 2, 3)) ** 2

    def test_the_control_loses_the_variance(self) -> None:
        assert ((self.naive - self.x.double().var((0, 2, 3), correction=0)).abs() > 0.1).all()

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
    def test_statistics_and_gradients_keep_theirs(
        self, device: torch.device, layout: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(runtime, "_ELEMENTS", 128)  # several blocks
        g, parameters = random_map(4, 2, 6, 5, seed=1, dtype=torch.float32), affine(2, torch.float32)
        exact = placed(parameters, torch.device("cpu"), torch.float64)
        pool = one_by_one(lambda v, _: F.max_pool2d(v, 2), "none", momentum=1)
        expected = step(pool, self.x.double(), g.double(), exact)
        x, on_device = laid_out(self.x.to(device), layout), placed(parameters, device, torch.float32)
        found = step(fused(kernel_size=2, activation="none", momentum=1), x, g.to(device), on_device)
        # The mean itself is rounded, by up to 5e-4 deviations.
        for name, tolerance in {"mean": 6e-8, "var": 1e-6, "weight": 1e-3, "bias": 1e-6, "x": 1e-3, "y": 2e-3}.items():
            compare({name: found[name]}, {name: expected[name]}, atol=tolerance)


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


def test_offsets_beyond_two_to_the_31(kernel_device: torch.device) -> None:
    far = 2**31 + 2**20
    try:
        storage = torch.empty(far + 64, dtype=torch.float16, device=kernel_device)  # pages appear when they are touched
    except RuntimeError:
        pytest.skip("no address space for 4 GiB")
    dense = random_map(2, 4, 2, 2, dtype=torch.float16).to(kernel_device)
    g = random_map(2, 4, 1, 1, seed=1, dtype=torch.float16).to(kernel_device)
    for strides in ((far, 4, 2, 1), (far, 1, 8, 4)):
        x = storage.as_strided(dense.shape, strides)
        x.copy_(dense)
        parameters, pool = placed(affine(4), kernel_device, torch.float32), fused(kernel_size=2)
        compare(
            step(pool, x, g, parameters),
            {k: t.double() for k, t in step(pool, dense, g, parameters).items()},
            atol=1e-3,
        )


@pytest.mark.parametrize(("affine_weight", "affine_bias"), [(True, False), (False, True), (False, False)])
def test_weight_bias_and_statistics_may_be_missing(
    device: torch.device, affine_weight: bool, affine_bias: bool
) -> None:
    x = random_map(2, 3, 6, 6).requires_grad_()
    weight, bias = affine(3)["weight"] if affine_weight else None, affine(3)["bias"] if affine_bias else None
    expected = F.max_pool2d(F.batch_norm(x, None, None, weight, bias, True).relu(), 2)
    exact = torch.autograd.grad((expected**2).sum(), [t for t in (x, weight, bias) if t is not None])
    x = x.detach().to(device).requires_grad_()
    weight, bias = (None if t is None else t.detach().to(device).requires_grad_() for t in (weight, bias))
    y = batch_norm_act_pool2d(x, weight, bias, None, None, 2)
    found = torch.autograd.grad((y**2).sum(), [t for t in (x, weight, bias) if t is not None])
    torch.testing.assert_close([t.cpu() for t in (y, *found)], [expected, *exact])


def test_statistics_keep_their_type_and_parameters_theirs(device: torch.device) -> None:
    mean, var = torch.zeros(3, dtype=torch.bfloat16, device=device), torch.ones(6, device=device)[::2]
    weight = torch.ones(3, dtype=torch.bfloat16, device=device, requires_grad=True)
    x = (random_map(2, 3, 6, 6, dtype=torch.float32) * 2 + 4).to(device)
    y = batch_norm_act_pool2d(x, weight, None, mean, var, 2, momentum=1)
    assert torch.equal(mean, x.mean((0, 2, 3)).bfloat16())
    torch.testing.assert_close(var, x.var((0, 2, 3)))
    assert torch.autograd.grad(y.sum(), weight)[0].dtype is torch.bfloat16


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_an_empty_batch_leaves_the_statistics_alone(device: torch.device, format: torch.memory_format) -> None:
    x = torch.ones(0, 3, 6, 6, device=device).contiguous(memory_format=format).requires_grad_()
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    weight, bias = (torch.ones(3, device=device, requires_grad=True) for _ in range(2))
    y = batch_norm_act_pool2d(x, weight, bias, mean, var, 3, 2, 1)
    assert y.shape == (0, 3, 3, 3)
    dx, *others = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert dx.shape == x.shape
    assert [t.tolist() for t in (*others, mean, var)] == [[0] * 3, [0] * 3, [0] * 3, [1] * 3]


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_special_values_spread_through_their_channel_alone(device: torch.device, activation: str) -> None:
    x, parameters = random_map(2, 3, 4, 4), affine(3)
    x[0, 0, 1, 1], x[0, 1, 2, 2] = math.nan, math.inf
    g = random_map(2, 3, 2, 2, seed=1)
    expected = step(one_by_one(lambda v, _: F.max_pool2d(v, 2), activation), x, g, parameters)
    on_device = placed(parameters, device, torch.float64)
    found = step(fused(kernel_size=2, activation=activation), x.to(device), g.to(device), on_device)
    for name in expected:
        one, other = (t[name][2] if t[name].dim() == 1 else t[name][:, 2] for t in (found, expected))
        torch.testing.assert_close(one, other)
    assert all(found[name][:, :2].isnan().all() for name in ("y", "x")) and found["var"][:2].isnan().all()


def test_a_channel_without_variance_is_scaled_by_eps(device: torch.device) -> None:
    x, g, parameters = torch.full((2, 2, 4, 4), 3.0), random_map(2, 2, 2, 2, dtype=torch.float32), affine(2)
    expected = step(one_by_one(lambda v, _: F.max_pool2d(v, 2)), x.double(), g.double(), parameters)
    assert expected["x"].abs().max() > 100
    found = step(fused(kernel_size=2), x.to(device), g.to(device), placed(parameters, device, torch.float32))
    compare(found, expected, atol=1e-4)


def test_indices_and_draws_are_those_of_windows(device: torch.device) -> None:
    x = random_map(2, 3, 6, 5).to(device)
    found = batch_norm_act_pool2d(x, None, None, None, None, 2, return_indices=True, activation="none")
    expected = F.max_pool2d(F.batch_norm(x, None, None, training=True), 2, return_indices=True)
    torch.testing.assert_close(found, expected)
    draws = [
        batch_norm_act_pool2d(
            x, None, None, None, None, 2, kind="stochastic", generator=torch.Generator(device).manual_seed(seed)
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    windows: Tensor = F.unfold(F.batch_norm(x, None, None, training=True).relu().flatten(0, 1)[:, None], 2, stride=2)
    drawn = draws[0].flatten(0, 1).flatten(1)[:, None]
    torch.testing.assert_close((windows - drawn).abs().amin(1), torch.zeros_like(windows[:, 0]))


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


class TestEvaluation:
    """With the running statistics it is pool2d alone."""

    @pytest.mark.parametrize("kind", ["max", "avg"])
    def test_it_is_pytorchs(self, device: torch.device, kind: str) -> None:
        x, g, parameters = random_map(2, 3, 6, 5), random_map(2, 3, 3, 2, seed=1), affine(3)
        pools = {"max": lambda v, _: F.max_pool2d(v, 2), "avg": lambda v, _: F.avg_pool2d(v, 2)}
        expected = step(one_by_one(pools[kind], training=False), x, g, parameters)
        on_device = placed(parameters, device, torch.float64)
        found = step(fused(kernel_size=2, kind=kind, training=False), x.to(device), g.to(device), on_device)
        compare(found, expected, atol=1e-10)
        assert found["mean"].tolist() == [0.5] * 3

    def test_it_is_exported_as_a_window(self) -> None:
        class Stem(torch.nn.BatchNorm2d):
            def forward(self, x: Tensor) -> Tensor:
                tensors = (self.weight, self.bias, self.running_mean, self.running_var)
                y: Tensor = batch_norm_act_pool2d(x, *tensors, 3, 2, 1, training=self.training)
                return y

        stem, x = Stem(3), random_map(2, 3, 8, 8, dtype=torch.float32)
        stem(x)
        exported = torch.export.export(stem.eval(), (x,))
        ours = [str(node.target) for node in exported.graph.nodes if "fusedpool" in str(node.target)]
        assert ours == ["fusedpool.window.default"]
        torch.testing.assert_close(
            exported.module()(x), F.max_pool2d(torch.nn.BatchNorm2d.forward(stem, x).relu(), 3, 2, 1)
        )


class TestDerivatives:
    """First and second derivatives."""

    @pytest.mark.parametrize("kind", [*MEANINGFUL, "stochastic"])
    def test_gradcheck_and_gradgradcheck(self, kind: str) -> None:
        x, parameters = random_map(2, 2, 4, 3).requires_grad_(), affine(2)
        if kind in ("gem", "mixed"):
            parameters["p"] = torch.tensor([2.5 if kind == "gem" else 0.3], dtype=torch.float64, requires_grad=True)

        def pooled(x: Tensor, weight: Tensor, bias: Tensor, *p: Tensor) -> Any:
            options: Any = {"kind": kind, "activation": "gelu", "generator": torch.Generator().manual_seed(3)}
            return batch_norm_act_pool2d(
                x, weight, bias, None, None, (3, 2), 2, (1, 0), **options, p=p[0] if p else None
            )

        with runtime.force("reference"):
            assert torch.autograd.gradcheck(pooled, (x, *parameters.values()))
            assert torch.autograd.gradgradcheck(pooled, (x, *parameters.values()), atol=1e-4)

    @pytest.mark.parametrize("kind", ["max", "avg", "softpool"])
    def test_second_derivatives_on_the_kernels_are_those_of_the_formula(
        self, kernel_device: torch.device, kind: str
    ) -> None:
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
        self, kernel_device: torch.device, lost: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x, g, parameters = random_map(2, 3, 6, 6), random_map(2, 3, 3, 3, seed=1), affine(3)
        expected = step(one_by_one(lambda v, _: F.max_pool2d(v, 2)), x, g, parameters)
        right = cells.Norm

        def wrong(*tensors: Tensor) -> Any:
            norm = right(*tensors)
            return norm if norm.slope is None else norm._replace(**{lost: torch.zeros_like(norm.slope)})

        monkeypatch.setattr(cells, "Norm", wrong)
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


def test_one_graph_for_every_size_updates_the_statistics() -> None:
    class Stem(torch.nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = batch_norm_act_pool2d(
                x, self.weight, self.bias, self.running_mean, self.running_var, 3, 2, 1, training=self.training
            )
            return y

    stems = Stem(2), Stem(2)
    compiled = torch.compile(stems[0], fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((4, 2, 9, 8), (3, 2, 12, 17)):
            x = random_map(*shape, dtype=torch.float32).requires_grad_()
            found, expected = ((y := stem(x), *torch.autograd.grad(y.sum(), x)) for stem in (compiled, stems[1]))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for a, b in zip(stems[0].buffers(), stems[1].buffers(), strict=True):
        assert torch.equal(a, b) and (b.dim() == 0 or b[0] != b[1])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"x": torch.ones(1, 2, 1, 1), "kernel_size": 1}, "more than 1 value per channel"),
        ({"weight": torch.ones(3)}, "weight has shape"),
        ({"bias": torch.ones(2, 1)}, "bias has shape"),
        ({"running_mean": torch.ones(1)}, "running_mean has shape"),
        ({"running_var": torch.ones(2, dtype=torch.int64)}, "running_var is torch.int64"),
        ({"running_var": None, "training": False}, "running_var is None"),
        ({"eps": 0.0}, "eps is 0"),
        ({"eps": -1.0, "training": False}, "eps is -1"),
        ({"momentum": None}, "momentum is None"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"kind": "median"}, "kind is 'median'"),
        ({"padding": 2}, "padding is 2"),
        ({"kernel_size": 9}, "kernel_size is"),
        ({"p": 2.0}, "p is 2"),
        ({"kind": "avg", "return_indices": True}, "return_indices"),
        ({"x": torch.ones(2, 4, 4)}, "x has shape"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], named: str) -> None:
    given: dict[str, Any] = {"x": torch.ones(2, 2, 4, 4), "weight": None, "bias": None, "kernel_size": 2}
    given |= {"running_mean": torch.zeros(2), "running_var": torch.ones(2)}
    with pytest.raises(ValueError, match=named):
        batch_norm_act_pool2d(**{**given, **arguments})
    assert given["running_mean"].tolist() == [0, 0]
