import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fullframe.errors import InvalidInput
from fullframe.learn.nets import (
    ACTIVATIONS,
    BLOCK_POOLINGS,
    GLOBAL_POOLINGS,
    Net,
    NetConfig,
    fully_connected_to_conv,
)

SMALL = NetConfig(classes=3, width=16, depth=(1, 1, 1), stem=4)


def eighth(side: int) -> int:
    return -(-side // 8)


@given(st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_every_size_works(height: int, width: int) -> None:
    out = Net(SMALL).eval().outputs(torch.randn(2, 3, height, width))
    assert out.feature_map.shape == (2, 64, eighth(height), eighth(width))
    assert out.features.shape == (2, 64)
    assert out.logits.shape == (2, 3)
    assert out.class_map is not None
    assert out.class_map.shape == (2, 3, eighth(height), eighth(width))


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (257, 3), (31, 129)])
def test_long_sizes_work(size: tuple[int, int]) -> None:
    out = Net(SMALL).eval()(torch.randn(1, 3, *size))
    assert out.shape == (1, 3)
    assert out.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("block_pooling", BLOCK_POOLINGS)
@pytest.mark.parametrize("global_pooling", GLOBAL_POOLINGS)
def test_options_train_and_agree_with_outputs(activation: str, block_pooling: str, global_pooling: str) -> None:
    config = NetConfig(4, 16, (1,), 4, activation, block_pooling, global_pooling)
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
    config = NetConfig(5, 32, (2, 1), 8, "silu", "avg", "gem", 0.1)
    assert NetConfig.from_json(config.to_json()) == config
    with pytest.raises(InvalidInput, match="unknown network settings: colour"):
        NetConfig.from_json({"classes": 3, "colour": 1})
