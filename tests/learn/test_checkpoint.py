from pathlib import Path

import pytest
import torch
from torch import nn

from fullframe.errors import InvalidInput
from fullframe.learn.checkpoint import (
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)


def test_tensors_and_state_come_back(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "b": torch.tensor(7),
        "c": torch.get_rng_state(),
    }
    state = {"epoch": 3, "history": [{"loss": 0.1 + 0.2}]}
    save_checkpoint(tmp_path / "c", tensors, state)
    loaded, read = load_checkpoint(tmp_path / "c")
    assert read == state
    assert loaded.keys() == tensors.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", {"a": torch.zeros(100)}, {})
    whole = (tmp_path / "c").read_bytes()
    for content in (b"", whole[:50], whole[:-1], b"text"):
        (tmp_path / "c").write_bytes(content)
        with pytest.raises(InvalidInput, match="not a readable checkpoint"):
            load_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)])
def test_an_optimizer_goes_on_where_it_was(make: object, tmp_path: Path) -> None:
    assert callable(make)
    x = torch.randn(8, 3, 6, 6)

    def network() -> nn.Conv2d:
        torch.manual_seed(0)
        return nn.Conv2d(3, 4, 3)

    def steps(net: nn.Conv2d, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()

    straight = network()
    steps(straight, make(straight.parameters()), 5)
    first = network()
    optimizer = make(first.parameters())
    steps(first, optimizer, 3)
    save_checkpoint(tmp_path / "c", optimizer_tensors(optimizer), {})
    again = make(first.parameters())
    restore_optimizer(again, load_checkpoint(tmp_path / "c")[0])
    steps(first, again, 2)
    assert torch.equal(first.weight, straight.weight)
