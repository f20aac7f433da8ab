"""Graphs in plain ONNX Runtime, as any other program would run them."""

from typing import Any

import onnxruntime as ort

from fullframe.errors import InvalidModel, first_line
from fullframe.model.contract import TensorInfo


def open_session(model: str | bytes, what: str) -> Any:
    """A session on a file or a serialized graph; raises InvalidModel, which calls it `what`."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_pattern = False
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no narrower base
        raise InvalidModel(f"{what} can't be loaded: {first_line(error)}") from error


def tensors(session: Any) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """A session's inputs and outputs."""
    inputs, outputs = (
        [TensorInfo(each.name, each.type, each.shape) for each in values]
        for values in (session.get_inputs(), session.get_outputs())
    )
    return inputs, outputs
