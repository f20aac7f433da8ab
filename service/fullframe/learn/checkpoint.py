"""Training state on disk: one safetensors file, whole or not there, without pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fullframe.errors import InvalidInput
from fullframe.files import write_atomically

FILE = "checkpoint.safetensors"
_STATE = "fullframe.state"


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and JSON state as one file, so that they can't disagree after a crash."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(contiguous, metadata={_STATE: json.dumps(state)}))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What save_checkpoint wrote; raises InvalidInput."""
    try:
        with safe_open(path, framework="pt") as file:
            state = (file.metadata() or {}).get(_STATE)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{path} is not a readable checkpoint: {error}", "run") from error
    if state is None:
        raise InvalidInput(f"{path} is a safetensors file, but not a training checkpoint", "run")
    return tensors, json.loads(state)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's per-parameter state, as "index.key"."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": value
        for index, values in state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors` for an optimizer made with the same settings."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        state.setdefault(int(index), {})[key] = tensor.contiguous(memory_format=layout)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
