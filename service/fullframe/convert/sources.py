"""What the user names -> an ONNX classifier and what its source says of it; torch is loaded for what needs it."""

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import onnx

from fullframe.convert.options import Options
from fullframe.convert.reading import read_onnx
from fullframe.errors import InvalidInput, first_line, quoted

if TYPE_CHECKING:
    from torch import nn

SIZE: Final = (224, 224)
"""Height and width that a network is exported at when neither the user nor its source says."""
_WEIGHTS_ONLY: Final = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@dataclass(frozen=True)
class Source:
    """A classifier to convert.

    Attributes:
        model: float32 [1, 3, H, W] in, scores [1, K] out; a file's as it is.
        options: what the source says of itself.
    """

    model: onnx.ModelProto
    options: Options


@dataclass(frozen=True)
class _Network:
    """A module and what its source says of it, as fields of Options."""

    module: "nn.Module"
    name: str
    says: Mapping[str, Any] = field(default_factory=dict)


def open_source(spec: str, *, weights: Path | None = None, size: tuple[int, int] | None = None) -> Source:
    """Open what the user names.

    Args:
        spec: `torchvision:NAME`, `timm:NAME`, `python:package.module:factory` (a module will do too), or an ONNX file.
        weights: a safetensors file for a network in PyTorch. Without it a zoo downloads its own, and what a factory
            makes stays as it is.
        size: height and width to export a network in PyTorch at; without it what its source says, or SIZE.

    Raises:
        InvalidInput: the source or its package is not there or fails, or its weights can't be had or are another
            network's.
        InvalidModel: it is no classifier of images, can't be read or exported, or its graph has other scores.
    """
    kind, _, name = spec.partition(":")
    if kind in _KINDS:
        return _exported(spec, _KINDS[kind](name, weights), weights, size)
    if weights is not None:
        raise InvalidInput(f"{quoted(spec)} holds its weights; --weights is for {', '.join(_KINDS)}", "weights")
    path = Path(spec)
    if not path.is_file():
        raise InvalidInput(
            f"there is no file {quoted(spec)}; a source is an ONNX file, torchvision:NAME, timm:NAME "
            "or python:package.module:factory",
            "source",
        )
    return Source(read_onnx(path), Options(path.stem, source=path.name))


def _exported(spec: str, network: _Network, weights: Path | None, size: tuple[int, int] | None) -> Source:
    from fullframe.convert.modules import export_module

    says = {"source": f"{spec}, weights {weights.name}" if weights else spec, "size": SIZE, **network.says}
    if size is not None:
        says["size"] = size
    options = Options(network.name, **says)
    return Source(export_module(network.module, says["size"]), options)


def _torchvision(name: str, weights: Path | None) -> _Network:
    zoo = _package("torchvision").models
    _check_name("torchvision", name, zoo.list_models(module=zoo))
    published = zoo.get_model_weights(name).DEFAULT

    def build(pretrained: bool, **classes: int) -> "nn.Module":
        made: nn.Module = zoo.get_model(name, weights=published if pretrained else None, **classes)
        return made

    module, own_classes = _filled(f"torchvision:{name}", build, weights)
    if hasattr(module, "transform_input"):
        module.transform_input = True  # type: ignore[assignment]  # from the normalisation below to the one that it was trained with
    preset = published.transforms()
    says: dict[str, Any] = {"mean": tuple(preset.mean), "std": tuple(preset.std), "size": (preset.crop_size[0],) * 2}
    if own_classes:
        says["labels"] = tuple(published.meta["categories"])
    if weights is None:
        says |= {"source": f"torchvision:{name}, weights {published}", "license": published.meta.get("license", "")}
    return _Network(module, name, says)


def _timm(name: str, weights: Path | None) -> _Network:
    zoo = _package("timm")
    _check_name("timm", name, zoo.list_models() + ([name] if zoo.is_model(name) else []))

    def build(pretrained: bool, **classes: int) -> "nn.Module":
        made: nn.Module = zoo.create_model(name, pretrained=pretrained, exportable=True, **classes)
        return made

    module, own_classes = _filled(f"timm:{name}", build, weights)
    config: Mapping[str, Any] = module.pretrained_cfg  # type: ignore[assignment]
    says: dict[str, Any] = {key: tuple(config[key]) for key in ("mean", "std")}
    says["size"] = tuple(config["input_size"][1:])
    if own_classes:
        subset = zoo.data.infer_imagenet_subset(config)
        labels = config.get("label_names") or (zoo.data.ImageNetInfo(subset).label_descriptions() if subset else ())
        says["labels"] = tuple(labels)
    if weights is None:
        tag = f".{config['tag']}" if config.get("tag") else ""
        says |= {"source": f"timm:{config['architecture']}{tag}", "license": config.get("license") or ""}
    return _Network(module, name, says)


def _factory(name: str, weights: Path | None) -> _Network:
    from torch import nn

    from fullframe.convert.modules import load_weights, read_weights, reason

    place, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*place.split("."), attribute)):
        raise InvalidInput(f"{quoted(f'python:{name}')} must be python:package.module:factory", "source")
    made: Any = getattr(_module(place), attribute, None)
    if not isinstance(made, nn.Module) and not _takes_nothing(made):
        raise InvalidInput(f"{place} has no {attribute!r} that can be called without arguments", "source")
    try:
        module = made if isinstance(made, nn.Module) else made()
    except Exception as error:
        raise InvalidInput(f"{name} fails: {reason(error)}", "source") from error
    if not isinstance(module, nn.Module):
        raise InvalidInput(f"{name} makes a {type(module).__name__}; it must make a torch.nn.Module", "source")
    if weights is not None:
        load_weights(module, read_weights(weights))
    return _Network(module, attribute)


_KINDS: Final = {"torchvision": _torchvision, "timm": _timm, "python": _factory}


def _filled(spec: str, build: Callable[..., "nn.Module"], weights: Path | None) -> tuple["nn.Module", bool]:
    """A zoo's network with published weights, or a file's and as many classes; whether the classes are the zoo's."""
    from fullframe.convert.modules import class_count, load_weights, read_weights

    if weights is None:
        try:
            with _nothing_but_tensors():
                return build(True), True
        except Exception as error:
            unsafe = "their file holds more than tensors, and that is not unpickled"
            reason = unsafe if isinstance(error, UnpicklingError) else first_line(error)
            raise InvalidInput(
                f"the published weights of {spec} can't be had ({reason}); give a file with --weights FILE.safetensors",
                "weights",
            ) from error
    tensors = read_weights(weights)
    module = build(False)
    count = class_count(module, tensors)
    if count is not None:
        module = build(False, num_classes=count)
    load_weights(module, tensors)
    return module, count is None


def _package(name: str) -> Any:
    import_module("torch")  # that it is missing is another message
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise InvalidInput(f"{name} is not installed: pip install {name}", "source") from error
    except (ImportError, RuntimeError, OSError) as error:
        raise InvalidInput(
            f"the installed {name} can't be imported ({error}); it must be the release made for the installed torch",
            "source",
        ) from error


def _check_name(kind: str, name: str, names: Collection[str]) -> None:
    if name not in names:
        close = ", ".join(get_close_matches(name, names)) or f"one of its {len(names)}"
        raise InvalidInput(f"{kind} has no classifier {quoted(name)}; is it {close}?", "source")


def _module(place: str) -> ModuleType:
    """A module by its dotted name, from the working folder too."""
    from fullframe.convert.modules import reason

    sys.path.insert(0, str(Path.cwd()))
    try:
        return import_module(place)
    except ModuleNotFoundError as error:
        if not f"{place}.".startswith(f"{error.name}."):  # one that the user's module needs
            raise InvalidInput(f"{place} can't be imported: {reason(error)}", "source") from error
        raise InvalidInput(f"there is no Python module {place!r} here or among those installed", "source") from error
    except Exception as error:
        raise InvalidInput(f"{place} can't be imported: {reason(error)}", "source") from error
    finally:
        sys.path.remove(str(Path.cwd()))


def _takes_nothing(function: Any) -> bool:
    """Whether it can be called without arguments."""
    try:
        signature(function).bind()
    except (TypeError, ValueError):
        return False
    return True


@contextmanager
def _nothing_but_tensors() -> Iterator[None]:
    """Files of weights are read without running what is pickled in them, whatever a zoo asks torch.load for."""
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before
