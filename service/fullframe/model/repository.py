"""Which model files to serve under which names: single files, repository folders, or the bundled default."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, get_args

from fullframe.errors import InvalidInput, InvalidModel
from fullframe.model.contract import INT8

FILE_NAME: Final = "model.onnx"
BUNDLED_NAME: Final = "cifar10"
BUNDLED: Final = Path(__file__).parent / "bundled" / f"{BUNDLED_NAME}.onnx"

Precision = Literal["auto", "float32", "int8"]
"""Which of a model's files: its own, the int8 copy beside it, or that copy where there is one."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One version of one model on disk."""

    name: str
    version: str
    path: Path


def int8_copy(path: Path) -> Path:
    """Where the int8 copy of a model's file belongs: beside it, model.onnx -> model.int8.onnx."""
    return path.with_suffix(f".{INT8}.onnx")


def find_models(specs: Sequence[str], precision: Precision = "float32") -> list[ModelFile]:
    """The files behind `specs`, in order; the first is the server's default model.

    A spec is `NAME=PATH` or `PATH`, where PATH is an .onnx file (version "1"; NAME defaults to the file's stem), a
    model's folder holding VERSION/model.onnx, or a repository of such folders (no NAME then). No specs: the bundled
    model. A copy that is named itself is taken as it is.

    Raises InvalidInput for a spec that names nothing, for "int8" where there is no copy and for an unknown precision,
    InvalidModel for two models of one name and version.
    """
    if precision not in get_args(Precision):
        raise InvalidInput(
            f"precision is {precision!r}; it must be one of {', '.join(get_args(Precision))}", "precision"
        )
    files = [file for spec in specs for file in _expand(spec)] or [ModelFile(BUNDLED_NAME, "1", BUNDLED)]
    files = [replace(file, path=_in_precision(file.path, precision)) for file in files]
    seen = set()
    for file in files:
        if (file.name, file.version) in seen:
            raise InvalidModel(f"model {file.name!r} version {file.version!r} is given twice")
        seen.add((file.name, file.version))
    return files


def version_order(version: str) -> tuple[int, str]:
    """Sorts versions so that the newest comes last: numbers by value, then other texts."""
    return (int(version), "") if version.isdecimal() else (-1, version)


def _in_precision(path: Path, precision: Precision) -> Path:
    copy = int8_copy(path)
    if precision == "float32" or path.suffixes[-2:] == copy.suffixes[-2:]:
        return path
    if copy.exists():
        return copy
    if precision == "auto":
        return path
    raise InvalidInput(f"there is no {copy}; `fullframe quantize {path} --calibrate DIR` makes it", "precision")


def _expand(spec: str) -> list[ModelFile]:
    name, equals, rest = spec.partition("=")
    path = Path(rest if equals else spec)
    if not equals:
        name = path.stem if path.is_file() else path.name
    if path.is_file():
        return [ModelFile(checked_name(name), "1", path)]
    if not path.is_dir():
        raise InvalidInput(f"no model at {str(path)!r}: give NAME=FILE.onnx or a folder of models", "model")
    if versions := _versions(name, path):
        return versions
    if equals:
        raise InvalidInput(f"{str(path)!r} holds no VERSION/{FILE_NAME}", "model")
    models = [file for folder in sorted(path.iterdir()) if folder.is_dir() for file in _versions(folder.name, folder)]
    if not models:
        raise InvalidInput(f"{str(path)!r} holds no NAME/VERSION/{FILE_NAME}", "model")
    return models


def _versions(name: str, folder: Path) -> list[ModelFile]:
    found = sorted(folder.glob(f"*/{FILE_NAME}"), key=lambda file: version_order(file.parent.name))
    return [ModelFile(checked_name(name), checked_name(file.parent.name), file) for file in found]


def checked_name(name: str) -> str:
    """The name; raises InvalidInput where it is none for a model or a version."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"{name!r} can't name a model: use letters, digits, '.', '_' and '-'", "model")
    return name
