"""What kernels/README.md says: its table is what the code does, its example runs."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

import fusedpool
from fusedpool.kinds import KINDS

README: Final = Path(__file__).parents[2] / "kernels" / "README.md"


def _norm(x: Tensor, kind: str) -> Tensor:
    one, zero = torch.ones(4, dtype=x.dtype), torch.zeros(4, dtype=x.dtype)
    y: Tensor = fusedpool.batch_norm_act_pool2d(x, one, zero, zero.clone(), one.clone(), 2, kind=kind)
    return y


def _packed(x: Tensor, kind: str) -> Tensor:
    return fusedpool.ragged_pool(x.permute(0, 2, 3, 1).reshape(-1, 4), torch.tensor([0, 5, 32]), (kind,))[0]


def _convolution(x: Tensor, kind: str) -> Tensor:
    weight = torch.linspace(-1, 2, 20, dtype=x.dtype).view(5, 4)
    return fusedpool.conv1x1_global_pool2d(x, weight, kind=kind)


DOMAINS: Final[dict[str, Callable[[Tensor, str], Tensor]]] = {
    "pool2d": lambda x, kind: fusedpool.pool2d(x, 2, kind=kind),
    "global_pool2d": lambda x, kind: fusedpool.global_pool2d(x, (kind,))[0],
    "adaptive_pool2d": lambda x, kind: fusedpool.adaptive_pool2d(x, 3, kind),
    "pyramid_pool2d": lambda x, kind: fusedpool.pyramid_pool2d(x, (1, 3), kind),
    "ragged_pool": _packed,
    "channel_pool": lambda x, kind: fusedpool.channel_pool(x, 2, kind),
    "fractional_pool2d": lambda x, kind: fusedpool.fractional_pool2d(x, 2, 3, kind=kind),
    "batch_norm_act_pool2d": _norm,
    "conv1x1_global_pool2d": _convolution,
}


def works(call: Callable[[Tensor, str], Tensor], kind: str) -> str:
    """Whether it pools and gives first and second derivatives, rather than raising NotImplementedError."""
    x = torch.linspace(0.1, 2, 128, dtype=torch.float64).sin().view(2, 4, 4, 4).requires_grad_()
    try:
        y = call(x, kind)
    except NotImplementedError:
        return "no"
    upstream = torch.ones_like(y).requires_grad_()
    (gradient,) = torch.autograd.grad(y, x, upstream, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), upstream)
    assert gradient.abs().sum() > 0
    assert second.abs().sum() > 0
    return "yes"


def test_the_table_is_what_the_code_does() -> None:
    lines = [line for line in README.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines if "---" not in line]
    said = {(row[0], domain): cell for row in rows[1:] for domain, cell in zip(rows[0][1:], row[1:], strict=True)}
    assert said == {(kind, name): works(call, kind) for kind in KINDS for name, call in DOMAINS.items()}


def test_every_public_operator_is_in_the_table() -> None:
    assert {name for name in fusedpool.__all__ if "pool" in name} == set(DOMAINS)


def test_the_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert isinstance(names["y"], Tensor)
    assert names["y"].shape == (2, 64, 56, 56)
