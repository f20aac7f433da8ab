import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fullframe.errors import InvalidInput
from fullframe.learn import settings as learning
from fullframe.learn.nets import (
    ACTIVATIONS,
    BLOCK_POOLINGS,
    BLOCKS,
    GLOBAL_POOLINGS,
    Net,
    fully_connected_to_conv,
)
from fullframe.learn.settings import NetConfig

SMALL = NetConfig(classes=3, width=16, depth=(1, 1, 1), stem=4)


RESIDUAL = NetConfig(classes=3, width=8, depth=(1, 2, 1), stem=4, block="residual")
FINE = NetConfig(classes=3, width=4, depth=(1, 1, 1), stem=4, block="residual", first_stride=1)
LEVELS = NetConfig(classes=3, width=16, depth=(1, 1), stem=4, block="residual", levels=3)


def reduced(side: int, stride: int) -> int:
    return -(-side // stride)


@pytest.mark.parametrize(
    ("config", "channels", "stride"),
    [(SMALL, 64, 8), (RESIDUAL, 32, 8), (FINE, 16, 4), (LEVELS, 32, 16)],
    ids=lambda value: str(value)[:40],
)
@given(height=st.integers(1, 40), width=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_every_size_works(config: NetConfig, channels: int, stride: int, height: int, width: int) -> None:
    out = Net(config).eval().outputs(torch.randn(2, 3, height, width))
    cells = reduced(height, stride), reduced(width, stride)
    assert out.feature_map.shape == (2, channels, *cells)
    assert out.features.shape == (2, channels)
    assert out.logits.shape == (2, 3)
    assert out.class_map is not None
    assert out.class_map.shape == (2, 3, *cells)


@pytest.mark.parametrize("config", [SMALL, LEVELS], ids=["plain", "levels"])
@pytest.mark.parametrize("size", [(1, 500), (500, 1), (257, 3), (31, 129)])
def test_long_sizes_work(config: NetConfig, size: tuple[int, int]) -> None:
    out = Net(config).eval()(torch.randn(1, 3, *size))
    assert out.shape == (1, 3)
    assert out.isfinite().all()


def test_each_named_part_exists() -> None:
    assert (tuple(ACTIVATIONS), tuple(BLOCKS), tuple(BLOCK_POOLINGS), tuple(GLOBAL_POOLINGS)) == (
        (learning.ACTIVATIONS, learning.BLOCKS, learning.BLOCK_POOLINGS, learning.GLOBAL_POOLINGS)
    )


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("block_pooling", BLOCK_POOLINGS)
@pytest.mark.parametrize("global_pooling", GLOBAL_POOLINGS)
def test_options_train_and_agree_with_outputs(
    block: str, levels: int, activation: str, block_pooling: str, global_pooling: str
) -> None:
    config = NetConfig(4, 16, (1,), 4, activation, block_pooling, global_pooling, block=block, levels=levels)
    net = Net(config)
    x = torch.randn(2, 3, 9, 11)
    net(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    net.eval()
    out = net.outputs(x)
    assert torch.equal(net(x), out.logits)
    assert out.features.shape == (2, 32 if global_pooling == "avg+max" else 16)
    assert (out.class_map is not None) == (global_pooling == "avg")


def test_the_class_map_s_mean_is_the_logits() -> None:
    net = Net(SMALL).eval()
    nn.init.normal_(net.classifier.weight)
    out = net.outputs(torch.randn(2, 3, 33, 50))
    assert out.class_map is not None
    torch.testing.assert_close(out.class_map.mean((2, 3)), out.logits)


def gated(net: Net) -> Net:
    """The net with gates that differ from cell to cell."""
    nn.init.normal_(net.gate.weight)
    return net.eval()


def test_levels_are_weighted_means_over_sizes_and_cells() -> None:
    net = gated(Net(replace(LEVELS, levels=2)))
    x = torch.randn(1, 3, 64, 64)
    halved = nn.functional.conv2d(x, net.shrink.weight, stride=2, padding=1)
    fine, coarse = net.body(x), net.body(halved)
    fine_weights, coarse_weights = (1e-3 + net.gate(level).sigmoid() for level in (fine, coarse))
    rows, columns = slice(3, 6), slice(5, 8)  # the finer map's cells around (4, 6) of it, (2, 3) of the coarser
    seen = fine_weights[..., rows, columns]
    total = (seen * fine[..., rows, columns]).mean((2, 3)) + (coarse_weights * coarse)[..., 2, 3]
    expected = total / (seen.mean((2, 3)) + coarse_weights[..., 2, 3])
    torch.testing.assert_close(net.feature_map(x)[..., 2, 3], expected)
    other = fine[..., rows, columns].mean((2, 3))
    assert not torch.allclose(net.feature_map(x)[..., 2, 3], other), "the coarser level has a say"


def test_a_level_begins_as_an_unweighted_half_size_image() -> None:
    net = Net(LEVELS).eval()
    x = torch.randn(2, 3, 1, 1).expand(2, 3, 12, 10)
    torch.testing.assert_close(net.shrink(x)[..., 1:, 1:], x[..., :5, :4])
    assert (net.gate(torch.randn(1, 32, 3, 3)) == 0).all()


def test_a_lone_image_is_answered_as_in_a_batch() -> None:
    net = Net(SMALL).eval()
    x = torch.randn(3, 3, 21, 30)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]))


def test_global_poolings_follow_their_formulas() -> None:
    x = torch.rand(2, 5, 4, 3) - 0.2
    gem = ((x.clamp(min=1e-6) ** 3).sum((2, 3)) / 12) ** (1 / 3)
    torch.testing.assert_close(GLOBAL_POOLINGS["gem"](x).flatten(1), gem)
    both = torch.cat((x.sum((2, 3)) / 12, x.flatten(2).max(2).values), 1)
    torch.testing.assert_close(GLOBAL_POOLINGS["avg+max"](x).flatten(1), both)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 3), (6, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fully_connected_head_is_a_convolution(height: int, width: int, bias: bool) -> None:
    head = nn.Sequential(nn.Flatten(), nn.Linear(7 * height * width, 11, bias=bias)).double()
    linear = head[1]
    assert isinstance(linear, nn.Linear)
    conv = fully_connected_to_conv(linear, 7, height, width)
    x = torch.randn(4, 7, height, width, dtype=torch.float64)
    torch.testing.assert_close(conv(x).flatten(1), head(x), rtol=1e-13, atol=1e-13)

    larger = torch.randn(1, 7, height + 2, width + 4, dtype=torch.float64)
    place = larger[:, :, 1 : 1 + height, 3 : 3 + width]
    torch.testing.assert_close(conv(larger)[:, :, 1, 3], head(place), rtol=1e-13, atol=1e-13)
    flipped = head(x.flip(1))
    assert not torch.allclose(conv(x).flatten(1), flipped), "the order of the inputs matters"


def test_a_head_of_another_shape_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"takes 12 inputs.*has 28"):
        fully_connected_to_conv(nn.Linear(12, 3), 7, 2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": "dense"}, "one of inception, residual, bottleneck"),
        ({"levels": 5}, "levels is 5; it must be 1 to 4"),
        ({"classes": 0}, "classes is 0"),
        ({"width": 40}, "multiple of 16"),
        ({"depth": ()}, "depth"),
        ({"depth": (1, 0)}, "depth"),
        ({"stem": 0}, "stem"),
        ({"activation": "tanh"}, "'tanh'; it must be one of relu"),
        ({"block_pooling": "min"}, "one of max, avg"),
        ({"global_pooling": "sum"}, r"one of avg, max, gem, avg\+max"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_a_bad_setting_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        NetConfig.from_json({"classes": 3} | change)
    assert caught.value.field == next(iter(change))


def test_settings_survive_json() -> None:
    config = NetConfig(5, 24, (2, 1), 8, "silu", "avg", "gem", 0.1, "residual", 2)
    assert NetConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(InvalidInput, match="unknown settings: colour"):
        NetConfig.from_json({"classes": 3, "colour": 1})
