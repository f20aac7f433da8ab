"""What modules share: the kinds that they pool by, parameters that learn, and how they are shown."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from fusedpool import arguments
from fusedpool.kinds import KINDS

_RANGES: Final = {"gem": (0.1, math.inf), "mixed": (0.0, 1.0)}


class Module(nn.Module):
    """Shows the arguments that are not the defaults."""

    def extra_repr(self) -> str:
        """For print."""
        shown = []
        for name, argument in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name)
            if not isinstance(value, nn.Module | Tensor) and value != argument.default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)


class OneKind(Module):
    """Pools by one kind.

    With learn_p, for gem and mixed, p is a parameter of shape [1]. Forward takes its nearest value in range, p >= 0.1
    for gem and 0 <= p <= 1 for mixed, and hands the gradient through, so that a p that has left the range can return.
    """

    def _set_kind(self, kind: str, p: float | None, learn_p: bool, activation: str | None) -> None:
        arguments.check_kind(kind)
        arguments.parameter(kind, p, torch.empty(0))
        self.kind, self.learn_p, self.activation = kind, learn_p, activation
        self.p: float | nn.Parameter | None = _initial(kind, p) if learn_p else p

    def _number(self) -> Any:
        return _in_range(self.kind, self.p) if isinstance(self.p, nn.Parameter) else self.p

    def _options(self) -> dict[str, Any]:
        """Arguments that operators of one kind share."""
        return {"kind": self.kind, "p": self._number(), "activation": self.activation, "training": self.training}


class ManyKinds(Module):
    """Pools by several kinds from one read; p: of the kind that takes it, or a mapping from kinds to theirs.

    With learn_p, p holds a parameter for gem and for mixed, whichever there is, as in the modules of one kind.
    """

    def __init__(
        self,
        kinds: Sequence[str] = ("avg",),
        *,
        p: float | Mapping[str, float] | None = None,
        learn_p: bool = False,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self.kinds, self.learn_p, self.activation = tuple(arguments.check_kinds(kinds)), learn_p, activation
        self.p: Any = p
        numbers, _ = arguments.parameters(kinds, p, torch.empty(0))
        if learn_p:
            given = {kind: p for kind, p in zip(kinds, numbers, strict=True) if KINDS[kind].default is not None}
            learnt = [kind for kind in kinds if KINDS[kind].learnable] or kinds[:1]
            self.p = nn.ParameterDict({kind: _initial(kind, given.pop(kind, None)) for kind in learnt})
            self.fixed = given

    def _options(self) -> dict[str, Any]:
        """Arguments that operators of several kinds share."""
        return {"kinds": self.kinds, "p": self._numbers(), "activation": self.activation, "training": self.training}

    def _numbers(self) -> Any:
        if not self.learn_p:
            return self.p
        return {**self.fixed, **{kind: _in_range(kind, value) for kind, value in self.p.items()}}


def _initial(kind: str, p: float | None) -> nn.Parameter:
    """Raises ValueError for a kind whose p is not learnable, and for a p that is not in range."""
    if not KINDS[kind].learnable:
        raise ValueError(f"learn_p is True; only gem and mixed can learn p, not {kind}")
    number, _ = arguments.parameter(kind, p, torch.empty(0))
    return nn.Parameter(torch.tensor([number]))


def _in_range(kind: str, p: Tensor) -> Tensor:
    low, high = _RANGES[kind]
    return p + (p.clamp(low, high) - p).detach()
