"""Which engine is chosen, and what is said where one can't be had."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fullframe
from fullframe.engine import choice
from fullframe.engine.choice import open_model, opener
from fullframe.engine.fused import TorchEngine
from fullframe.engine.ort import OrtEngine
from fullframe.errors import InvalidInput, InvalidModel
from fullframe.model.repository import BUNDLED, ModelFile, int8_copy

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
    monkeypatch.setattr(choice, "_check_compiler", lambda: None)
    assert isinstance(opener()(tiny_model), TorchEngine)
    assert opener(compute="bfloat16")(tiny_model).title.endswith("bfloat16")
    assert isinstance(opener()(int8_copy(BUNDLED)), OrtEngine), "integers are a CPU's"


def test_on_a_device_what_triton_compiles_with_has_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton looks for it: CC, else gcc or clang, and Python.h."""
    monkeypatch.setattr(choice, "_has_device", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("CPATH", str(tmp_path))
    for engine in ("auto", "torch"):
        with pytest.raises(InvalidInput, match="C compiler: neither gcc nor clang is in PATH"):
            opener(engine)
    opener("onnx")
    (tmp_path / "clang").touch(0o755)
    monkeypatch.setenv("CC", "icc")
    with pytest.raises(InvalidInput, match="CC is 'icc', which is no program"):
        opener("torch")
    monkeypatch.delenv("CC")
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme: {"include": "/nonexistent"})
    with pytest.raises(InvalidInput, match=r"there is no Python\.h in /nonexistent"):
        opener("torch")
    (tmp_path / "Python.h").touch()
    opener("torch")


@pytest.mark.parametrize(("own", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")])
def test_pytorch_s_threads_sleep_between_operators_unless_told(own: dict[str, str], policy: str) -> None:
    code = "from fullframe.engine.choice import opener; opener('torch')"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true", **own}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr


def test_without_pytorch_the_extra_is_named(tmp_path: Path) -> None:
    from tests.pictures import encode, pixels

    (tmp_path / "a.png").write_bytes(encode(pixels(20, 30)))
    done = subprocess.run(
        [sys.executable, "-c", HERE, str(tmp_path / "a.png")], check=True, capture_output=True, text=True
    )
    assert done.stdout == "the torch engine needs torch, of the gpu extra: pip install 'fullframe[gpu]'\n"


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_a_model_that_can_t_be_loaded_is_named_as_it_was_given(tmp_path: Path, engine: Any) -> None:
    (tmp_path / "zoo" / "2").mkdir(parents=True)
    (path := tmp_path / "zoo" / "2" / "model.onnx").write_text("not a model")
    for name, said in (
        ("zoo", r"^model 'zoo', version 2: model\.onnx can't be loaded: "),
        ("model", r"^model\.onnx can't be loaded: "),
    ):
        with pytest.raises(InvalidModel, match=said):
            open_model(ModelFile(name, "2", path), opener(engine))


MANY_SIZES = """
import ctypes, random, resource
import numpy as np
from pathlib import Path
from fullframe.engine.choice import opener
from fullframe.model.repository import BUNDLED

def resident():
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free is not held for anybody
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

engine = opener("torch")(BUNDLED)
engine.run(np.zeros((64, 64, 3), np.uint8), ["logits"])
before, random = resident(), random.Random(0)
for _ in range(400):
    engine.run(np.zeros((random.randint(16, 90), random.randint(16, 90), 3), np.uint8), ["logits"])
print(resident() - before)
"""


@pytest.mark.slow
def test_sizes_that_never_come_again_leave_little_in_memory() -> None:
    """The control: as PyTorch comes it keeps several times as much."""

    def grown(**more: str) -> int:
        command = [sys.executable, "-c", MANY_SIZES]
        return int(subprocess.run(command, check=True, capture_output=True, env={**os.environ, **more}).stdout)

    assert 2 * grown() < grown(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024", LRU_CACHE_CAPACITY="1024")
