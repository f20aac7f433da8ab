"""Modules: the operators' numbers, torch.nn's states, parameters that learn."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedpool import nn as pools
from fusedpool.channel import channel_pool
from fusedpool.grid import adaptive_pool2d, pyramid_pool2d
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
from fusedpool.ragged import ragged_pool
from fusedpool.whole import global_pool2d
from fusedpool.window import pool2d
from tests.kernels.window_cases import random_map

X = random_map(2, 4, 7, 6, dtype=torch.float32)
OFFSETS = torch.tensor([0, 3, 14])


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_each_module_is_its_operator() -> None:
    same(Pool2d(3, 2, 1, kind="avg", count_include_pad=False)(X), nn.AvgPool2d(3, 2, 1, count_include_pad=False)(X))
    same(
        Pool2d((3, 2), 2, kind="lp", p=3.0, ceil_mode=True, activation="relu")(X),
        pool2d(X, (3, 2), 2, kind="lp", p=3.0, ceil_mode=True, activation="relu"),
    )
    y, index = Pool2d(2, return_indices=True)(X)
    expected, places = nn.MaxPool2d(2, return_indices=True)(X)
    same(y, expected)
    same(index, places)
    same(AdaptivePool2d((3, None), "max")(X), adaptive_pool2d(X, (3, None), "max"))
    same(PyramidPool2d((1, 3), "avg")(X), pyramid_pool2d(X, (1, 3), "avg"))
    same(ChannelPool(2, activation="silu")(X), channel_pool(X, 2, activation="silu"))
    sizes = torch.tensor([[7, 6], [2, 3]])
    pooled = global_pool2d(X, ("avg", "lp"), sizes=sizes, p=4.0)
    same(GlobalPool2d(("avg", "lp"), p=4.0)(X, sizes), torch.cat(pooled, 1))
    flat = X.flatten(2)[0].t()[:14]
    same(RaggedPool(("max", "std"))(flat, OFFSETS), torch.cat(ragged_pool(flat, OFFSETS, ("max", "std")), 1))


def test_training_and_evaluation_differ_where_chance_has_a_part() -> None:
    def drawn(pool: nn.Module) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        return pool(X), pool(X)

    for pool in (Pool2d(3, kind="stochastic"), FractionalPool2d(2, (4, 5)), ChannelPool(1, "stochastic")):
        assert not torch.equal(*drawn(pool.train()))
        same(*drawn(pool.eval()))
        torch.manual_seed(3)
        assert torch.equal(pool.train()(X), drawn(pool)[0])


LEARNING: list[tuple[Any, Any]] = [
    (lambda kind, **p: Pool2d(3, 2, kind=kind, **p), X),
    (lambda kind, **p: AdaptivePool2d(2, kind, **p), X),
    (lambda kind, **p: PyramidPool2d((2,), kind, **p), X),
    (lambda kind, **p: ChannelPool(2, kind, **p), X),
    (lambda kind, **p: FractionalPool2d(2, 3, kind=kind, **p).eval(), X),
    (lambda kind, **p: GlobalPool2d((kind, "max"), **p), X),
    (lambda kind, **p: BatchNormActPool2d(4, 2, kind=kind, **p), X),
    (lambda kind, **p: Conv1x1GlobalPool2d(4, 3, kind=kind, **p), X),
]


@pytest.mark.parametrize("kind", ["gem", "mixed"])
@pytest.mark.parametrize("number", range(len(LEARNING)))
def test_p_learns(kind: str, number: int) -> None:
    make, x = LEARNING[number]
    torch.manual_seed(0)
    pool = make(kind, learn_p=True)
    names = [name for name, _ in pool.named_parameters() if name.split(".")[0] == "p"]
    assert len(names) == 1
    p = pool.get_parameter(names[0])
    assert p.item() == {"gem": 3.0, "mixed": 0.5}[kind]
    before = pool(x).square().sum()
    before.backward()
    assert p.grad is not None and p.grad.abs().item() > 0
    with torch.no_grad():
        p -= 1e-3 * p.grad.sign()
    assert pool(x).square().sum() < before
    other = make(kind, learn_p=True)
    other.load_state_dict(pool.state_dict())
    same(other.eval()(x), pool.eval()(x))


def test_a_learnt_p_stays_in_range_and_can_return() -> None:
    for kind, far, near in (("mixed", 1.5, 1.0), ("mixed", -2.0, 0.0), ("gem", -1.0, 0.1)):
        pool = Pool2d(3, kind=kind, learn_p=True)
        with torch.no_grad():
            pool.get_parameter("p").fill_(far)
        torch.testing.assert_close(pool(X), pool2d(X, 3, kind=kind, p=near))
        pool(X).sum().backward()
        assert pool.get_parameter("p").grad != 0


def test_several_kinds_learn_several_p() -> None:
    fixed: Any = torch.tensor(2.0)
    same(Pool2d(3, kind="lse", p=fixed)(X), pool2d(X, 3, kind="lse", p=2.0))
    pool = GlobalPool2d(("gem", "lp", "mixed"), p={"lp": 4.0, "gem": 2.0}, learn_p=True)
    assert {name: value.item() for name, value in pool.named_parameters()} == {"p.gem": 2.0, "p.mixed": 0.5}
    expected = global_pool2d(X, ("gem", "lp", "mixed"), p={"lp": 4.0, "gem": 2.0, "mixed": 0.5})
    torch.testing.assert_close(pool(X), torch.cat(expected, 1))
    flat = X.flatten(2)[0].t()[:14]
    ragged = RaggedPool(("gem", "max"), p=2.0, learn_p=True)
    expected = ragged_pool(flat, OFFSETS, ("gem", "max"), p=2.0)
    torch.testing.assert_close(ragged(flat, OFFSETS), torch.cat(expected, 1))


@pytest.mark.parametrize("momentum", [0.2, None])
@pytest.mark.parametrize(("affine", "track"), [(True, True), (False, True), (True, False)])
def test_batch_norm_has_torchs_state_and_numbers(momentum: float | None, affine: bool, track: bool) -> None:
    norm = nn.BatchNorm2d(4, momentum=momentum, affine=affine, track_running_stats=track)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    twin = nn.Sequential(norm, nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    pool = BatchNormActPool2d(4, 3, 2, 1, momentum=momentum, affine=affine, track_running_stats=track)
    assert list(pool.state_dict()) == list(norm.state_dict())
    pool.load_state_dict(norm.state_dict())
    for x in (X, 2 * X + 1):
        torch.testing.assert_close(pool(x), twin(x))
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(pool.state_dict()[name], value)
    torch.testing.assert_close(pool.eval()(X), twin.eval()(X))
    pool.reset_parameters()
    if track:
        state = pool.state_dict()
        assert state["num_batches_tracked"] == 0 and torch.equal(state["running_var"], torch.ones(4))


@pytest.mark.parametrize("bias", [True, False])
def test_conv_has_torchs_state_and_numbers(bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 5, 1, bias=bias)
    torch.manual_seed(0)
    pool = Conv1x1GlobalPool2d(4, 5, bias=bias)
    assert list(pool.state_dict()) == list(conv.state_dict())
    assert all(torch.equal(value, conv.state_dict()[name]) for name, value in pool.state_dict().items())
    pool.load_state_dict(conv.state_dict())
    torch.testing.assert_close(pool(X), conv(X).relu().mean((2, 3)))


def test_modules_show_what_is_not_the_default() -> None:
    assert repr(Pool2d(3, padding=1)) == "Pool2d(kernel_size=3, padding=1)"
    assert repr(FractionalPool2d(2, output_ratio=0.7)) == "FractionalPool2d(kernel_size=2, output_ratio=0.7)"
    assert repr(BatchNormActPool2d(8, 3, kind="avg")) == "BatchNormActPool2d(num_features=8, kernel_size=3, kind='avg')"
    assert repr(ChannelPool(2, "gem", learn_p=True)) == "ChannelPool(groups=2, kind='gem', learn_p=True)"


def test_all_modules_are_tested() -> None:
    made = {type(make("gem")) for make, _ in LEARNING} | {RaggedPool}
    assert {module.__name__ for module in made} == set(pools.__all__)


def test_a_bad_argument_is_named() -> None:
    for kind in ("max", "lp"):
        with pytest.raises(ValueError, match="learn_p is True; only gem and mixed"):
            Pool2d(3, kind=kind, learn_p=True)
    with pytest.raises(ValueError, match="learn_p is True"):
        GlobalPool2d(("max", "lp"), learn_p=True)
    with pytest.raises(ValueError, match="kinds is 'avg'; it must be a sequence"):
        GlobalPool2d("avg")
    with pytest.raises(ValueError, match=r"p is 0.5; the kinds that take a parameter are \['mixed', 'gem'\]"):
        GlobalPool2d(("mixed", "gem"), p=0.5, learn_p=True)
    with pytest.raises(ValueError, match=r"p is 3.0; none of the kinds \['avg'\] has a parameter"):
        GlobalPool2d(("avg",), p=3.0)
    with pytest.raises(ValueError, match="levels is 3; it must be a sequence"):
        PyramidPool2d(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="p is 2"):
        AdaptivePool2d(2, "mixed", p=2.0)
    with pytest.raises(ValueError, match="kind is 'median'"):
        ChannelPool(2, "median")
