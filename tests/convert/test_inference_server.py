"""A model repository of Triton Inference Server: its configuration is one, and says of the model what is so."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from fullframe.convert.inference_server import write_repository
from fullframe.convert.metadata import get_contract, load_model, set_contract
from fullframe.convert.ragged import make_ragged
from fullframe.errors import InvalidInput, InvalidModel
from fullframe.model.contract import Contract
from fullframe.model.repository import BUNDLED, find_models
from tests.models import LABELS

# Numbers, types and names of model_config.proto (github.com/triton-inference-server/common), as far as they are used.
FIELDS = {
    "ModelConfig": (
        *("name=1 string", "platform=2 string", "backend=17 string", "max_batch_size=4 int32"),
        *("input=5 repeated ModelInput", "output=6 repeated ModelOutput"),
    ),
    "ModelInput": ("name=1 string", "data_type=2 DataType", "format=3 Format", "dims=4 repeated int64"),
    "ModelOutput": ("name=1 string", "data_type=2 DataType", "dims=3 repeated int64", "label_filename=4 string"),
}
ENUMS = {
    "DataType": {"TYPE_INVALID": 0, "TYPE_UINT8": 2, "TYPE_INT64": 9, "TYPE_FP32": 11},
    "Format": {"FORMAT_NONE": 0, "FORMAT_NHWC": 1, "FORMAT_NCHW": 2},
}


def model_config() -> Any:
    """An empty ModelConfig."""
    file = FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for value, code in values.items():
            enum.value.add(name=value, number=code)
    for message, fields in FIELDS.items():
        described = file.message_type.add(name=message)
        for field in fields:
            place, *repeated, kind = field.split()
            name, number = place.split("=")
            entry = described.field.add(name=name, number=int(number))
            entry.label = FieldDescriptorProto.LABEL_REPEATED if repeated else FieldDescriptorProto.LABEL_OPTIONAL
            if kind in FIELDS or kind in ENUMS:
                entry.type_name = f".inference.{kind}"
                entry.type = FieldDescriptorProto.TYPE_ENUM if kind in ENUMS else FieldDescriptorProto.TYPE_MESSAGE
            else:
                entry.type = FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")
    pool = DescriptorPool()
    pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()


def read(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config())


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The last one takes images of different sizes together."""
    ragged = tmp_path_factory.mktemp("ragged") / "ragged.onnx"
    make_ragged(tiny_model, ragged)
    return {"tiny": tiny_model, "photos-32.v1": BUNDLED, "ragged": ragged}


@pytest.fixture(scope="module")
def repository(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository") / "models"
    for name, path in models.items():
        write_repository(path, folder, name)
    return folder


def test_our_own_server_reads_it_too(repository: Path, models: dict[str, Path]) -> None:
    found = {(file.name, file.version): file.path.read_bytes() for file in find_models([str(repository)])}
    assert found == {(name, "1"): path.read_bytes() for name, path in models.items()}


@pytest.mark.parametrize("name", ["tiny", "photos-32.v1", "ragged"])
def test_the_configuration_says_what_the_model_takes_and_gives(repository: Path, name: str) -> None:
    config = read(repository / name)
    assert (config.name, config.platform, config.backend) == (name, "onnxruntime_onnx", "onnxruntime")
    assert config.max_batch_size > 1
    image, *others = config.input
    assert (image.name, image.data_type, image.format, list(image.dims)) == ("images", 2, 1, [-1, -1, 3])
    feeds = {"images": np.zeros((2, 64, 96, 3), np.uint8)}
    for other in others:
        assert (other.name, other.data_type, other.format, list(other.dims)) == ("sizes", 9, 0, [2])
        feeds["sizes"] = np.array([[64, 96], [64, 40]])
    session = ort.InferenceSession(repository / name / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    arrays = dict(zip([each.name for each in session.get_outputs()], session.run(None, feeds), strict=True))
    assert {each.name for each in config.output} == arrays.keys()
    for output in config.output:
        array = arrays[output.name]
        assert (output.data_type, array.dtype) in ((11, np.float32), (9, np.int64))
        assert len(output.dims) == array.ndim - 1
        assert all(said in (-1, found) for said, found in zip(output.dims, array.shape[1:], strict=True))
        assert output.dims[0] == array.shape[1], "channels are known"
        assert (output.label_filename == "labels.txt") == (output.name == "logits")


def test_a_field_that_the_server_does_not_know_would_show(repository: Path) -> None:
    """The control."""
    text = (repository / "tiny" / "config.pbtxt").read_text()
    for wrong in (text.replace("dims:", "shape:"), text.replace("TYPE_UINT8", "UINT8"), text.replace("-1", '"-1"')):
        with pytest.raises(text_format.ParseError):
            text_format.Parse(wrong, model_config())


def test_each_class_has_its_line(repository: Path, tmp_path: Path) -> None:
    assert (repository / "tiny" / "labels.txt").read_text().splitlines() == list(LABELS)
    model = load_model(BUNDLED)
    facts = get_contract(model).to_metadata() | {
        "fullframe.labels": '["two\\nlines", "b", "c", "d", "e", "f", "g", "h", "i", "j"]'
    }
    set_contract(model, Contract.from_metadata(facts))
    (tmp_path / "odd.onnx").write_bytes(model.SerializeToString())
    folder = write_repository(tmp_path / "odd.onnx", tmp_path, "odd")
    assert (folder / "labels.txt").read_text().splitlines() == ["two lines", *"bcdefghij"]


def test_what_can_not_be_written_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="can't name a model"):
        write_repository(tiny_model, tmp_path / "models", "../elsewhere")
    model = load_model(tiny_model)
    del model.metadata_props[:]
    (tmp_path / "bare.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InvalidModel, match="contract"):
        write_repository(tmp_path / "bare.onnx", tmp_path / "models", "bare")
    assert not (tmp_path / "models").exists()
