"""A graph's nodes -> steps on a device: which values are on the CPU, and how long each one lives."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fullframe.engine.graph.ir import Node, Readers
from fullframe.engine.graph.operators import OPERATORS, Operator
from fullframe.engine.graph.operators.elementwise import MAP_TYPE
from fullframe.engine.graph.operators.own import OWN
from fullframe.engine.graph.operators.table import Numbers, Outputs

_CPU: Final = torch.device("cpu")
_HOST: Final = "@host"
_EXACT: Final = "@exact"
_NUMBERS: Final = "@numbers"
_PLAIN: Final = (torch.int64, torch.float32)
"""Types that Python's numbers stand for."""
_MEASURES: Final = frozenset({"Shape", "Size"})
"""Operators that read of a tensor nothing but its shape."""


class _Step(NamedTuple):
    """One call: `inputs` are keys of values ("": left out), `outputs` where they go, `dead` those not read again."""

    title: str
    run: Callable[..., Outputs]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dead: tuple[str, ...] = ()


class Weights:
    """A graph's constants as steps take them, each made once and kept."""

    def __init__(self, constants: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        """dtype: of the maps."""
        self.device, self.dtype = device, dtype
        self._constants = constants
        self._made: dict[str, Tensor | Numbers] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._constants

    def key(self, name: str, operator: Operator, position: int, host: bool) -> str:
        """Which form of a constant an operator takes, on the CPU or the device."""
        value = self._constants[name]
        if operator.on_host(position) and value.dtype in _PLAIN:
            return name + _NUMBERS
        if host or operator.on_host(position) or (operator.broadcasts and value.numel() == 1):
            return name + _HOST
        return name + _EXACT if operator.exact else name

    def value(self, key: str) -> Tensor | Numbers:
        """A constant in that form."""
        if key not in self._made:
            self._made[key] = self._make(key)
        return self._made[key]

    def _make(self, key: str) -> Tensor | Numbers:
        if key.endswith(_NUMBERS):
            return tuple(self._constants[key.removesuffix(_NUMBERS)].reshape(-1).tolist())
        if key.endswith(_HOST):
            return self._constants[key.removesuffix(_HOST)]
        value = self._constants[key.removesuffix(_EXACT)]
        if value.dtype is torch.float32 and not key.endswith(_EXACT):
            value = value.to(self.dtype)
        value = value.to(self.device)
        return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


class Program:
    """What computes some of a graph's outputs; from any thread.

    Attributes:
        weights: the constants, as steps take them.
        asks: titles of the steps that wait for a value from the device, to go on by it. Without any, what is launched
            depends on the feeds' shapes alone, and so does what is uploaded on the way.
    """

    def __init__(self, nodes: Sequence[Node], feeds: Iterable[str], outputs: Sequence[str], weights: Weights) -> None:
        """`nodes` are just those that the outputs need, in topological order."""
        self._weights = weights
        self._host = _on_host(nodes)
        self._readers = Readers(nodes, outputs)
        self._places: dict[str, bool] = dict.fromkeys(feeds, False)
        self._steps: list[_Step] = []
        self._constants: set[str] = set()
        self._copies: set[str] = set()
        for node in nodes:
            self._add(node)
        self._results = tuple(self._output(name) for name in outputs)
        self._steps = _with_deaths(self._steps, {*self._results, *self._constants})
        self._fixed = {key: weights.value(key) for key in self._constants}
        self.weights = tuple(each for each in self._fixed.values() if isinstance(each, Tensor))
        self.asks = tuple(step.title for step in self._steps if step.run is _to_cpu)

    def run(self, feeds: Mapping[str, Tensor], uploaded: dict[str, Tensor] | None = None) -> list[Tensor]:
        """The outputs of feeds on the device; raises what a step raises, with the node's name.

        Args:
            uploaded: what runs on feeds of the same shapes upload on their way, each value once: filled by the first.
        """
        values: dict[str, Any] = {**self._fixed, **feeds}
        for step in self._steps:
            inputs = [values[key] if key else None for key in step.inputs]
            try:
                found = step.run(*inputs) if uploaded is None else _with_uploads(step, inputs, uploaded)
            except Exception as error:
                error.add_note(f"at {step.title}")
                raise
            if isinstance(found, tuple):
                values.update(zip(step.outputs, found, strict=False))
            else:
                values[step.outputs[0]] = found
            del found, inputs
            for key in step.dead:
                del values[key]
        return [values[key] for key in self._results]

    def _add(self, node: Node) -> None:
        operator = _operator(node)
        host = node.op in _MEASURES or not self._host.isdisjoint(node.outputs)
        if node.op == "Cast" or node.op in OWN:
            node = node.having(attributes={**node.attributes, MAP_TYPE: self._weights.dtype})
        if node.op in _MEASURES:  # which take their tensor wherever it is
            inputs: tuple[str, ...] = (_at(node.inputs[0], self._places[node.inputs[0]]),)
        else:
            named = enumerate(node.inputs)
            inputs = tuple(self._key(name, operator, position, host) if name else "" for position, name in named)
        outputs = tuple(self._make(name, host) for name in node.outputs)
        device = _CPU if host else self._weights.device
        run = operator.bound(node, device, into=not host and self._is_lost(node))
        self._steps.append(_Step(node.title, run, inputs, outputs))

    def _is_lost(self, node: Node) -> bool:
        """Whether nobody needs the memory of a node's first input any more."""
        made = self._readers.made_by.get(node.inputs[0]) if node.inputs else None
        fresh = made is not None and _operator(made).fresh and node.inputs.count(node.inputs[0]) == 1
        return fresh and self._readers.only(node.inputs[0]) is not None

    def _make(self, name: str, host: bool) -> str:
        self._places[name] = host
        return _at(name, host)

    def _key(self, name: str, operator: Operator, position: int, host: bool) -> str:
        if name in self._weights:
            key = self._weights.key(name, operator, position, host)
            self._constants.add(key)
            return key
        return self._moved(name, host or operator.on_host(position))

    def _moved(self, name: str, host: bool) -> str:
        """A value's key on the CPU or the device; a step that copies it there, once, where it is made elsewhere."""
        key, made = _at(name, host), _at(name, self._places[name])
        if key != made and key not in self._copies:
            self._copies.add(key)
            run = _to_cpu if host else _Upload(self._weights.device)
            self._steps.append(_Step(f"copy of {name!r}", run, (made,), (key,)))
        return key

    def _output(self, name: str) -> str:
        if name in self._weights:
            self._constants.add(name)
            return name
        return _at(name, self._places[name])


def _operator(node: Node) -> Operator:
    return OPERATORS.get(node.op) or OWN[node.op]


def _at(name: str, host: bool) -> str:
    return name + _HOST if host else name


def _on_host(nodes: Sequence[Node]) -> set[str]:
    """Tensors whose values are needed as numbers, and those that they are computed from."""
    found: set[str] = set()
    for node in reversed(nodes):
        operator = _operator(node)
        whole = not found.isdisjoint(node.outputs) and node.op not in _MEASURES
        found |= {name for position, name in enumerate(node.inputs) if name and (whole or operator.on_host(position))}
    return found


def _with_deaths(steps: Sequence[_Step], kept: set[str]) -> list[_Step]:
    """Steps that let each value go when it has been read for the last time."""
    alive, found = set(kept), []
    for step in reversed(steps):
        read = {key for key in step.inputs if key}
        dead = {key for key in (*read, *filter(None, step.outputs)) if key not in alive}
        alive |= read
        found.append(step._replace(dead=tuple(dead)))
    return found[::-1]


def _with_uploads(step: _Step, inputs: Sequence[Any], uploaded: dict[str, Tensor]) -> Outputs:
    """What a step makes, which for an upload may be there already."""
    if not isinstance(step.run, _Upload):
        return step.run(*inputs)
    (key,) = step.outputs
    if key not in uploaded:
        uploaded[key] = step.run(*inputs)
    return uploaded[key]


def _to_cpu(value: Tensor) -> Tensor:
    return value.cpu()


@dataclass(frozen=True)
class _Upload:
    """To the device, without waiting for it."""

    device: torch.device

    def __call__(self, value: Tensor) -> Tensor:
        if value.numel() == 1:  # a kernel's argument
            return torch.full(value.shape, value.item(), dtype=value.dtype, device=self.device)
        pinned = value.pin_memory() if self._pins() else value
        return pinned.to(self.device, non_blocking=True)

    def _pins(self) -> bool:
        return self.device.type == "cuda" and not torch.compiler.is_compiling()  # which can't trace it
