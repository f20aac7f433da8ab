"""Batch normalisation in one operator with pooling: the statistics of each channel, and those that run along."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fusedpool import batch_norm_act_pool2d, runtime
from tests.kernels.batchnorm_cases import affine, compare, fused, one_by_one, placed, step
from tests.kernels.window_cases import laid_out, random_map

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


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


def test_a_channel_without_variance_is_scaled_by_eps(device: torch.device) -> None:
    x, g, parameters = torch.full((2, 2, 4, 4), 3.0), random_map(2, 2, 2, 2, dtype=torch.float32), affine(2)
    expected = step(one_by_one(lambda v, _: F.max_pool2d(v, 2)), x.double(), g.double(), parameters)
    assert expected["x"].abs().max() > 100
    found = step(fused(kernel_size=2), x.to(device), g.to(device), placed(parameters, device, torch.float32))
    compare(found, expected, atol=1e-4)


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
