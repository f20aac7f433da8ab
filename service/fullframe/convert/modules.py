"""PyTorch modules as a source: weights from safetensors, and the graph of a module at one image size. Needs torch."""

import io
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from itertools import chain
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fullframe.convert.proof import TOLERANCE, relative_difference
from fullframe.convert.runtime import open_session
from fullframe.errors import InvalidInput, InvalidModel
from fullframe.model.contract import OPSET

_NAMED: Final = 3
_IMAGES: Final = 2
_ESCAPE: Final = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def export_module(module: nn.Module, size: tuple[int, int]) -> onnx.ModelProto:
    """The graph of a classifier in evaluation mode: float32 [1, 3, height, width] in, scores [1, K] out.

    Raises InvalidModel where the module can't take that size, returns something else, can't be exported, or has other
    scores than its graph.
    """
    module = module.eval().to("cpu", torch.float32)
    images = torch.zeros(1, 3, *size)
    height, width = size
    try:
        with torch.no_grad():
            scores = module(images)
    except Exception as error:
        raise InvalidModel(
            f"the module fails on float32 [1, 3, {height}, {width}]: {reason(error)}; give it a size it can take"
        ) from error
    if not isinstance(scores, Tensor) or scores.ndim < 2 or scores.numel() != scores.shape[1]:
        found = list(scores.shape) if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise InvalidModel(f"the module returns {found} for one image; a classifier returns scores [1, K]")
    try:
        with quiet(), redirect_stderr(io.StringIO()):  # where it prints the graph that it failed on
            program = torch.onnx.export(
                module,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["scores"],
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        raise InvalidModel(f"torch can't export the module: {reason(error)}") from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    strip(model)
    _compare(model, module, size)
    return model


def reason(error: BaseException) -> str:
    """What a foreign exception says, in one line: the type and first line of what caused it in the first place."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = _ESCAPE.sub("", str(error)).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _compare(model: onnx.ModelProto, module: nn.Module, size: tuple[int, int]) -> None:
    """Raise InvalidModel where a graph's scores of random images are not those of the module it was exported from.

    A forward can ask whether it is being exported, draw random numbers, or use what the exporter took for a constant.
    """
    session = open_session(model.SerializeToString(), "the exported graph")
    random = torch.Generator().manual_seed(0)
    for _ in range(_IMAGES):
        image = torch.randn(1, 3, *size, generator=random)
        with torch.no_grad():
            wanted = module(image).numpy()
        (found,) = session.run(["scores"], {"images": image.numpy()})
        difference = relative_difference(found, wanted)
        if not difference <= TOLERANCE:
            raise InvalidModel(
                f"the graph that torch exported is not the module: its scores differ by {difference:.1e} of the "
                f"largest, and at most {TOLERANCE:.0e} is allowed; is the module the same when it is exported, and "
                "each time that it is called?"
            )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises InvalidInput where it is none."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InvalidInput(f"there is no file {path}", "weights") from error
    except (SafetensorError, OSError) as error:
        raise InvalidInput(
            f"{path.name} is no safetensors file ({error}); "
            "safetensors.torch.save_file(module.state_dict(), FILE) makes one",
            "weights",
        ) from error


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the module these weights, all of them and no others; raises InvalidInput naming those that don't fit."""
    own = module.state_dict()
    reshaped = [
        f"{name} is {list(weights[name].shape)}, not {list(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if not reshaped:
        missing, unknown = module.load_state_dict(weights, strict=False)
        faults = [
            f"{verb} {_listed(names)}" for verb, names in (("lack", missing), ("have an unknown", unknown)) if names
        ]
    else:
        faults = [f"differ in shape: {_listed(reshaped)}"]
    if faults:
        raise InvalidInput(f"the weights are not this network's: they {'; they '.join(faults)}", "weights")


def class_count(module: nn.Module, weights: Mapping[str, Tensor]) -> int | None:
    """The one number that the first axes of the weights have where the module's last layer has its own.

    None where the weights fit as they are, or differ from the module in more than the number of classes.
    """
    own = module.state_dict()
    pairs = {
        (own[name].shape, tensor.shape)
        for name, tensor in weights.items()
        if name in own and own[name].shape != tensor.shape
    }
    counts = {found[:1] for _, found in pairs}
    if len(counts) != 1 or any(len(there) != len(here) or there[1:] != here[1:] for there, here in pairs):
        return None
    (count,) = counts
    return int(count[0])


def strip(model: onnx.ModelProto) -> None:
    """Drop what the exporter says of itself: source lines, module names, shapes that can be inferred."""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    parts: Iterable[Any] = chain(model.graph.node, model.graph.initializer, model.graph.input, model.graph.output)
    for part in parts:
        del part.metadata_props[:]
        part.ClearField("doc_string")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that it does not need and on its own deprecations."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logging.disable(before)


def _listed(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
