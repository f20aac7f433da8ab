"""Networks on fusedpool's pools learn as those on torch.nn's do."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fullframe.errors import InvalidInput
from fullframe.learn.data import load_images
from fullframe.learn.export import export_run
from fullframe.learn.nets import Net
from fullframe.learn.pools import fuse_pools
from fullframe.learn.runs import load_run
from fullframe.learn.settings import Augmentation, NetConfig, Recipe
from fullframe.learn.train import Trainer
from fusedpool import operators
from fusedpool.nn import Pool2d
from tests.learn.shapes import write_shapes

CONFIGS = [
    NetConfig(3, 16, (1, 1), 4, "relu", "max", "avg"),
    NetConfig(3, 16, (1,), 4, "silu", "avg", "avg+max"),
    NetConfig(3, 8, (1, 1), 4, "gelu", "max", "gem", block="residual"),
    NetConfig(3, 8, (1, 1), 4, "relu", "avg", "max", block="residual", levels=2),
]


def pair(config: NetConfig) -> tuple[Net, Net]:
    torch.manual_seed(0)
    plain = Net(config)
    fused = deepcopy(plain)
    fuse_pools(fused)
    return plain, fused


def losses(net: Net, steps: int) -> Tensor:
    """Of a training on noise whose mean gives the class away."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(net.parameters(), 0.03, momentum=0.9)
    found = []
    for step in range(steps):
        labels = torch.randint(3, (8,), generator=generator)
        images = torch.randn(8, 3, 12 + step % 3, 11, generator=generator) / 2 + labels.view(-1, 1, 1, 1) - 1
        loss = F.cross_entropy(net(images.contiguous(memory_format=torch.channels_last)), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.block} {config.global_pooling}")
def test_fifty_steps_have_the_same_losses(config: NetConfig) -> None:
    plain, fused = pair(config)
    assert [type(module) for module in plain.modules()].count(Pool2d) == 0
    pools = nn.MaxPool2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d
    assert not any(isinstance(module, pools) for module in fused.modules())
    assert list(fused.state_dict()) == list(plain.state_dict())
    expected, found = losses(plain, 50), losses(fused, 50)
    assert expected[-5:].mean() < expected[:5].mean() / 2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(fused.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-4)


def test_the_control_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = pair(CONFIGS[0])
    right = operators.reference_backward
    monkeypatch.setattr(operators, "reference_backward", lambda *args: [t * 1.001 for t in right(*args)])
    assert (losses(fused, 50) - losses(plain, 50)).abs().max() > 1e-5


def test_a_run_on_fused_pools_is_trained_and_exported(tmp_path: Path) -> None:
    images = load_images(write_shapes(tmp_path / "shapes", 20))
    recipe = Recipe(epochs=3, batch_size=16, ema=0.9, augmentation=Augmentation(sizes=(16,)))
    trainer = Trainer(tmp_path / "run", NetConfig(3, 16, (1, 1), 8), recipe, images, "cpu", pooling="fused")
    assert any(isinstance(module, Pool2d) for module in trainer.net.modules())
    trainer.open()
    trainer.fit()
    net, settings, progress = load_run(tmp_path / "run")
    assert settings["pooling"] == "fused"
    assert progress["history"][-1]["validation_accuracy"] > 0.8
    x = torch.randn(2, 3, 17, 14)
    torch.testing.assert_close(trainer.ema(x), net(x))
    _, worst = export_run(tmp_path / "run", tmp_path / "model.onnx", "shapes")
    assert worst <= 1e-4
    with pytest.raises(InvalidInput, match="pooling is 'cudnn'"):
        Trainer(tmp_path / "run", net.config, recipe, images, "cpu", pooling="cudnn")
