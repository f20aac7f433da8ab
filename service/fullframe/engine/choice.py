"""Which engine runs the models: ONNX Runtime, or PyTorch where there is a device for it."""

import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final, Literal, get_args

from fullframe.errors import InvalidInput, InvalidModel
from fullframe.model.repository import ModelFile

if TYPE_CHECKING:  # the choice is a setting, which a command line reads before it knows that it needs an engine
    from fullframe.engine.base import Engine

EngineName = Literal["auto", "onnx", "torch"]
"""torch: PyTorch with fused kernels, on a CUDA or ROCm device or, without one, the CPU; auto: on such a device."""
Compute = Literal["float32", "bfloat16", "float16"]
"""What the torch engine computes maps in, whatever the file's weights are; the promise is about float32."""

DRIVERS: Final = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))
"""One of these is there where a device is: on other machines nobody waits for PyTorch's import."""

_PYTORCH: Final = {
    # OpenMP's threads would spin between two operators, which takes the cores from those that decode, and from other
    # processes, and an image may take several times as long.
    "OMP_WAIT_POLICY": "PASSIVE",
    # oneDNN and what calls it would keep what was compiled for 1024 shapes each: of no use where all sizes differ.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
}
"""The environment that PyTorch's libraries read when they are loaded, or first used; the user's own comes first."""


def opener(engine: EngineName = "auto", compute: Compute = "float32") -> "Callable[[Path], Engine]":
    """What opens a model's file; its calls raise InvalidModel.

    With "auto" a model that the torch engine can't run goes to ONNX Runtime, unless `compute` asks for other maps.

    Raises:
        InvalidInput: an unknown engine or type, one that needs what is not installed, or a device without a compiler.
    """
    for name, given, kind in (("engine", engine, EngineName), ("compute", compute, Compute)):
        if given not in get_args(kind):
            raise InvalidInput(f"{name} is {given!r}; it must be one of {', '.join(get_args(kind))}", name)
    there = engine != "onnx" and _has_device()
    if there or engine == "torch":
        if there:
            _check_compiler()
        on_torch = partial(_torch_engine(), compute=compute)
        may_fall_back = engine == "auto" and compute == "float32"
        return partial(_either, on_torch) if may_fall_back else on_torch
    if compute != "float32":
        why = "the onnx engine" if engine == "onnx" else "without an accelerator and PyTorch the engine is onnx, which"
        raise InvalidInput(f"{why} computes in float32 alone; {compute} needs the torch engine", "compute")
    return _onnx_engine


def open_model(file: ModelFile, open_engine: "Callable[[Path], Engine]") -> "Engine":
    """The engine of a model's file; raises InvalidModel, which names the model where its file has another name."""
    try:
        return open_engine(file.path)
    except InvalidModel as error:
        if file.name == file.path.stem:
            raise
        raise InvalidModel(f"model {file.name!r}, version {file.version}: {error}") from error


def _onnx_engine(path: Path) -> "Engine":
    from fullframe.engine.ort import OrtEngine

    return OrtEngine(path)


def _has_device() -> bool:
    """Whether PyTorch is installed and sees a CUDA or ROCm device."""
    if find_spec("torch") is None or not any(path.exists() for path in DRIVERS):
        return False
    return bool(_fused().default_device() != "cpu")


def _check_compiler() -> None:
    """Raises InvalidInput where Triton would not find what it builds its kernels' launchers with: see its _build."""
    own = os.environ.get("CC")
    names = ["gcc", "clang"] if own is None else [own]
    if not any(shutil.which(name) for name in names):
        missing = "neither gcc nor clang is in PATH" if own is None else f"CC is {own!r}, which is no program here"
        raise InvalidInput(f"on a GPU Triton needs a C compiler: {missing}; the onnx engine needs none", "engine")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's own has no headers
    folders = [sysconfig.get_paths(scheme)["include"], *os.environ.get("CPATH", "").split(os.pathsep)]
    if not any(Path(folder, "Python.h").exists() for folder in folders):
        missing = f"there is no Python.h in {folders[0]} (Debian's python3-dev has it)"
        raise InvalidInput(f"on a GPU Triton needs Python's headers: {missing}; the onnx engine needs none", "engine")


def _torch_engine() -> "Callable[..., Engine]":
    try:
        engine: Callable[..., Engine] = _fused().TorchEngine
    except ModuleNotFoundError as error:
        raise InvalidInput(
            f"the torch engine needs {error.name}, of the gpu extra: pip install 'fullframe[gpu]'", "engine"
        ) from error
    return engine


def _fused() -> ModuleType:
    """The torch engine's module, which imports PyTorch; raises ModuleNotFoundError."""
    for name, value in _PYTORCH.items():
        os.environ.setdefault(name, value)
    from fullframe.engine import fused

    return fused


def _either(on_torch: "Callable[[Path], Engine]", path: Path) -> "Engine":
    try:
        return on_torch(path)
    except InvalidModel:  # an operator that only ONNX Runtime has, or a file that it will call wrong in its own words
        return _onnx_engine(path)
