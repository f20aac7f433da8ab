"""Batch normalisation, activation and pooling in one: against PyTorch's operators one after another, in float64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fusedpool import batch_norm_act_pool2d, runtime
from tests.kernels import formulas
from tests.kernels.batchnorm_cases import affine, compare, fused, one_by_one, placed, step
from tests.kernels.window_cases import LAYOUTS, MEANINGFUL, fits, geometries, laid_out, random_map

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

_SOME = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


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
