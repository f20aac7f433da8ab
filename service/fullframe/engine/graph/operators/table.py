"""The table that the operators' modules fill, and what they share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from fullframe.engine.graph.ir import Node

Outputs: TypeAlias = Tensor | tuple[Tensor, ...]
Run: TypeAlias = Callable[..., Outputs]
"""(node, *inputs) -> its output, or all of several; an input left out is None, and so are those behind the last."""
Check: TypeAlias = Callable[[Node], object]
"""Raises InvalidModel for attributes that can't be run."""
Numbers: TypeAlias = tuple[Any, ...]
"""A constant's elements, known when its node is bound, so that nothing asks for them while it runs."""
Given: TypeAlias = Tensor | Numbers | None
"""What comes in a position of Operator.host."""


@dataclass(frozen=True)
class Operator:
    """How the nodes of one operator are run.

    Attributes:
        run: what they do.
        host: positions of inputs whose values are needed as numbers, those from `host_from` on too: constants come as
            Numbers, what is computed as tensors on the CPU.
        check: what is refused.
        creates: `run` makes tensors of numbers alone, and takes the device that they go to.
        broadcasts: a constant of one element may stay on the CPU, from where kernels take it as an argument.
        exact: its constants stay float32 where maps are narrower.
        fresh: what it returns is new memory, which no other tensor shares.
        into: what `run` does, into the memory of the first input, which is lost.
    """

    run: Run
    host: tuple[int, ...] = ()
    host_from: int = 1 << 30
    check: Check = lambda node: None
    creates: bool = False
    broadcasts: bool = False
    exact: bool = False
    fresh: bool = False
    into: Run | None = None

    def bound(self, node: Node, device: torch.device, into: bool = False) -> Callable[..., Outputs]:
        """A function of a node's inputs alone; `into`: which may take the first one's memory, where there is a way."""
        run = self.into if into and self.into else self.run
        return partial(run, node, device=device) if self.creates else partial(run, node)

    def on_host(self, position: int) -> bool:
        """Whether an input's values are needed as numbers."""
        return position in self.host or position >= self.host_from


OPERATORS: Final[dict[str, Operator]] = {}
"""By ONNX's names."""

QUANTIZING: Final = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"}
    | {"ConvInteger", "MatMulInteger"}
)
"""Known, and refused."""


def operator(*names: str, table: dict[str, Operator] = OPERATORS, **facts: Any) -> Callable[[Run], Run]:
    """Enter a function into the table; `facts` are Operator's further attributes."""

    def enter(run: Run) -> Run:
        table.update((name, Operator(run, **facts)) for name in names)
        return run

    return enter


def aligned(*tensors: Tensor) -> list[Tensor]:
    """Floating-point tensors in one type, that of the largest; a lone number on the CPU becomes a scalar."""
    device = next((each.device for each in tensors if each.device.type != "cpu"), None)
    if device is not None:
        tensors = tuple(each.reshape(()) if each.numel() == 1 and each.device != device else each for each in tensors)
    floats = {each.dtype for each in tensors if each.is_floating_point() and each.dim()}
    if len(floats) < 2:
        return list(tensors)
    dtype = largest([each for each in tensors if each.is_floating_point()]).dtype
    return [each.to(dtype) if each.is_floating_point() else each for each in tensors]


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """The first of those with the most elements; as a loop, which torch.compile can follow."""
    found = tensors[0]
    for each in tensors[1:]:
        found = each if each.numel() > found.numel() else found
    return found


def accumulator(x: Tensor) -> torch.dtype | None:
    """What sums over x are kept in and returned as, for torch's `dtype` arguments; None: its own type."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None


def numbers(given: Given) -> list[Any] | None:
    """The elements of a constant, or of a tensor on the CPU; None where it is left out."""
    if given is None:
        return None
    return given.reshape(-1).tolist() if isinstance(given, Tensor) else list(given)


def ints(given: Given) -> list[int] | None:
    """The same as whole numbers."""
    found = numbers(given)
    return None if found is None else [int(each) for each in found]


def number(given: Given) -> Any:
    """The one element, or None."""
    found = numbers(given)
    return None if found is None else found[0]
