"""A contract file -> a model repository of Triton Inference Server: the file, its configuration, its labels."""

import json
from pathlib import Path
from typing import Final

import onnx

from fullframe.convert.metadata import get_contract, load_model
from fullframe.files import write_atomically
from fullframe.model.contract import INPUT
from fullframe.model.repository import FILE_NAME, checked_name

CONFIG: Final = "config.pbtxt"
LABELS: Final = "labels.txt"
VERSION: Final = "1"
MOST_IMAGES: Final = 64
"""Images of one size in one request."""
_TYPES: Final[dict[int, str]] = {
    onnx.TensorProto.UINT8: "TYPE_UINT8",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.FLOAT: "TYPE_FP32",
}
_MORE: Final = {INPUT: ["format: FORMAT_NHWC"], "logits": [f'label_filename: "{LABELS}"']}


def write_repository(model: Path, folder: Path, name: str) -> Path:
    """Write `folder`/`name` with config.pbtxt, labels.txt and 1/model.onnx, replacing what has these names.

    The server's classification extension names `logits` by the labels. Requests are not put together into batches: an
    answer is computed on its images alone.

    Returns the model's folder. Raises InvalidModel where the file is no model of the contract, InvalidInput where the
    name is none for a model.
    """
    graph = load_model(model)
    contract = get_contract(graph)
    file = model_file(folder, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, model.read_bytes())
    inside = file.parents[1]
    lines = (" ".join(label.split()) for label in contract.labels)
    write_atomically(inside / LABELS, "".join(f"{line}\n" for line in lines).encode())
    write_atomically(inside / CONFIG, configuration(graph.graph, name).encode())
    return inside


def model_file(folder: Path, name: str) -> Path:
    """Where a repository has a model's first version; raises InvalidInput where the name is none for a model."""
    return folder / checked_name(name) / VERSION / FILE_NAME


def configuration(graph: onnx.GraphProto, name: str) -> str:
    """The text of a ModelConfig (model_config.proto of github.com/triton-inference-server/common) for a contract graph.

    Its dims leave out the axis of images; -1 is a size that varies.
    """
    blocks = [
        f"name: {json.dumps(name)}",
        'platform: "onnxruntime_onnx"',
        'backend: "onnxruntime"',
        f"max_batch_size: {MOST_IMAGES}",
        *(_tensor("input", each) for each in graph.input),
        *(_tensor("output", each) for each in graph.output),
    ]
    return "\n".join(blocks) + "\n"


def _tensor(kind: str, value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    dims = [dim.dim_value or -1 for dim in tensor.shape.dim][1:]
    fields = [f"name: {json.dumps(value.name)}", f"data_type: {_TYPES[tensor.elem_type]}", f"dims: {dims}"]
    fields += _MORE.get(value.name, [])
    return "\n".join([f"{kind} {{", *(f"  {each}" for each in fields), "}"])
