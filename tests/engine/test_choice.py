"""Which engine is chosen, and what is said where one can't be had."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fullframe
from fullframe.engine import choice
from fullframe.engine.choice import opener
from fullframe.engine.fused import TorchEngine
from fullframe.engine.ort import OrtEngine
from fullframe.errors import InvalidInput
from fullframe.model.repository import BUNDLED, int8_copy

HERE = "\n".join(
    (
        "import sys",
        "sys.modules['torch'] = None  # as where it is not installed",
        "import fullframe",
        "from fullframe.errors import InvalidInput",
        "assert fullframe.load().classify(sys.argv[1], top_k=1)",
        "try: fullframe.load(engine='torch')",
        "except InvalidInput as error: print(error)",
    )
)


def test_each_by_its_name(tiny_model: Path) -> None:
    assert isinstance(opener("onnx")(tiny_model), OrtEngine)
    torch_engine = opener("torch")(tiny_model)
    assert isinstance(torch_engine, TorchEngine)
    assert "torch" in torch_engine.title and "float32" in torch_engine.title


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"engine": "magic"}, "engine is 'magic'; it must be one of auto, onnx, torch"),
        ({"compute": "float8"}, "compute is 'float8'; it must be one of float32, bfloat16, float16"),
        (
            {"engine": "onnx", "compute": "float16"},
            "the onnx engine computes in float32 alone; float16 needs the torch",
        ),
    ],
)
def test_what_there_is_not(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        opener(**arguments)
    with pytest.raises(InvalidInput, match=complaint):
        fullframe.load(**arguments)


def test_auto_takes_torch_on_a_device_for_what_it_can_run(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice alone: whether there is a device is not what it depends on here."""
    monkeypatch.setattr(choice, "_has_device", lambda: False)
    assert isinstance(opener()(tiny_model), OrtEngine)
    with pytest.raises(InvalidInput, match="without an accelerator"):
        opener(compute="bfloat16")
    monkeypatch.setattr(choice, "_has_device", lambda: True)
    assert isinstance(opener()(tiny_model), TorchEngine)
    assert opener(compute="bfloat16")(tiny_model).title.endswith("bfloat16")
    assert isinstance(opener()(int8_copy(BUNDLED)), OrtEngine), "integers are a CPU's"


def test_without_pytorch_the_extra_is_named(tmp_path: Path) -> None:
    from tests.pictures import encode, pixels

    (tmp_path / "a.png").write_bytes(encode(pixels(20, 30)))
    done = subprocess.run(
        [sys.executable, "-c", HERE, str(tmp_path / "a.png")], check=True, capture_output=True, text=True
    )
    assert done.stdout == "the torch engine needs torch, of the gpu extra: pip install 'fullframe[gpu]'\n"
