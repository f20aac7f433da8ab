"""A contract in an ONNX file's metadata: written, read, added to."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from fullframe.errors import InvalidModel
from fullframe.files import write_atomically
from fullframe.model.contract import Contract


def load_model(path: Path, *, weights: bool = True) -> onnx.ModelProto:
    """The file's graph; raises InvalidModel where it is no ONNX file.

    Without weights, those in files beside it are not read.
    """
    try:
        return onnx.load(path, load_external_data=weights)
    except DecodeError as error:
        raise InvalidModel(f"{path.name} is no ONNX file") from error


def get_contract(model: onnx.ModelProto) -> Contract:
    """The contract in the file's metadata; raises InvalidModel where there is none."""
    return Contract.from_metadata({entry.key: entry.value for entry in model.metadata_props})


def set_contract(model: onnx.ModelProto, contract: Contract) -> None:
    """Make the contract the file's metadata."""
    onnx.helper.set_model_props(model, contract.to_metadata())


def add_training_facts(path: Path, facts: Mapping[str, Any]) -> None:
    """Record more in a file's metadata, replacing the file atomically."""
    model = load_model(path)
    contract = get_contract(model)
    set_contract(model, replace(contract, training={**contract.training, **facts}))
    write_atomically(path, model.SerializeToString())
