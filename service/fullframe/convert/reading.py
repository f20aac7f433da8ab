"""An ONNX classifier, read and checked: nothing outside its file's folder is opened, and no custom operator loaded."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Final

import onnx
from onnx import TensorProto, helper, inliner, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_model, uses_external_data

from fullframe.convert.metadata import load_model
from fullframe.errors import InvalidInput, InvalidModel, first_line
from fullframe.model.graphs import OWN_DOMAINS, opset_of, title

_LEAST_OPSET: Final = 7
_MOST_BYTES: Final = 2**31 - 2**24
"""Protocol buffers end at 2 GiB; the rest is for the graph."""
_MOST_NODES: Final = 100_000
_USUAL_SIDE: Final = 224
_MOST_PIXELS: Final = 2**26
"""Of the source's image; the proof computes whole ones."""
_MOST_WORDS: Final = 300


def read_onnx(path: Path) -> onnx.ModelProto:
    """A file's graph with its weights, those in files beside it too.

    Raises InvalidModel where it is no ONNX file, is too large, or has weights outside its folder.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise InvalidModel(f"{path.name} is {path.stat().st_size:,} bytes; at most {_MOST_BYTES:,} can be converted")
    model = load_model(path, weights=False)
    folder = path.absolute().parent.resolve()
    total = 0
    for tensor in _tensors(model.graph):
        if uses_external_data(tensor):
            _check_type(tensor)
            try:
                place = ExternalDataInfo(tensor).location
            except ValueError as error:
                raise _unreadable(tensor, error) from error
            file = (folder / place).resolve()
            if not file.is_relative_to(folder):
                raise InvalidModel(f"the weights {tensor.name!r} are in {place!r}, outside the folder of {path.name}")
            if not file.is_file():
                raise InvalidModel(f"the weights {tensor.name!r} are in {place!r}, which is not beside {path.name}")
            total += _bytes(tensor)
    if total > _MOST_BYTES:
        raise InvalidModel(f"the weights of {path.name} are {total:,} bytes; at most {_MOST_BYTES:,} can be converted")
    try:
        load_external_data_for_model(model, str(folder))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise InvalidModel(f"the weights of {path.name} can't be read: {first_line(error)}") from error
    return model


def checked(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with its functions inlined and its weights no inputs, that has one image in and one tensor out.

    Raises InvalidModel naming what is otherwise.
    """
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise InvalidModel(f"the file is no valid ONNX: {in_one_line(error)}") from error
    model = inliner.inline_local_functions(model) if model.functions else deepcopy(model)
    graph = model.graph
    if len(graph.node) > _MOST_NODES:
        raise InvalidModel(f"the graph has {len(graph.node):,} nodes; at most {_MOST_NODES:,} can be converted")
    for node in _nodes(graph):
        if node.domain not in OWN_DOMAINS:
            raise InvalidModel(
                f"{title(node)} is an operator of {node.domain!r}; only ONNX's own can be converted, "
                "since no library of operators is loaded"
            )
    if (opset := opset_of(model)) < _LEAST_OPSET:
        raise InvalidModel(f"the graph is of opset {opset}; {_LEAST_OPSET} is the least that can be converted")
    if graph.sparse_initializer:
        raise InvalidModel(f"the weights {graph.sparse_initializer[0].values.name!r} are sparse; they must be dense")
    weights = {each.name for each in graph.initializer}
    inputs = [each for each in graph.input if each.name not in weights]
    del graph.input[:]
    graph.input.extend(inputs)
    _check_tensors(graph)
    for tensor in _tensors(graph):
        _check_type(tensor)
        try:
            numpy_helper.to_array(tensor)
        except ValueError as error:
            raise _unreadable(tensor, error) from error
    return model


def source_size(model: onnx.ModelProto, given: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width that a checked graph was made for: its input's where they are fixed, else as given, else 224.

    Raises InvalidInput or InvalidModel, by which of them says so, where that is more than can be proved.
    """
    dims = model.graph.input[0].type.tensor_type.shape.dim
    fixed = tuple(dim.dim_value for dim in dims[2:])
    if all(fixed) and given is not None and given != fixed:
        raise InvalidModel(
            f"the graph's input is fixed to {fixed[0]} x {fixed[1]} (height x width), not {given[0]} x {given[1]}"
        )
    if all(fixed) or given is None:
        height, width = fixed[0] or _USUAL_SIDE, fixed[1] or _USUAL_SIDE
        _check_pixels(InvalidModel, "the graph's input is fixed to", height, width)
    else:
        height, width = given
        _check_pixels(partial(InvalidInput, field="size"), "the source's size is", height, width)
    return height, width


def _check_pixels(error: Callable[[str], Exception], what: str, height: int, width: int) -> None:
    if height * width > _MOST_PIXELS:
        raise error(
            f"{what} {height} x {width} (height x width), {height * width:,} pixels; at most {_MOST_PIXELS:,} "
            "can be converted"
        )


def _check_tensors(graph: onnx.GraphProto) -> None:
    for what, values in (("input", graph.input), ("output", graph.output)):
        if len(values) != 1:
            names = ", ".join(repr(each.name) for each in values) or "none"
            raise InvalidModel(f"the graph has {len(values)} {what}s ({names}); a classifier has one")
        kind = values[0].type.tensor_type.elem_type
        if kind != TensorProto.FLOAT:
            found = helper.tensor_dtype_to_string(kind).removeprefix("TensorProto.").lower() if kind else "no tensor"
            raise InvalidModel(f"the {what} {values[0].name!r} is {found}; it must be float32")
    image = graph.input[0]
    dims = image.type.tensor_type.shape.dim
    if len(dims) != 4 or dims[1].dim_value not in (0, 3):
        shape = ", ".join(str(dim.dim_value or dim.dim_param or "?") for dim in dims)
        raise InvalidModel(f"the input {image.name!r} is [{shape}]; it must be [N, 3, height, width]")
    if dims[0].dim_value > 1:
        raise InvalidModel(f"the input {image.name!r} takes {dims[0].dim_value} images; export it for 1, or for any")


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Its own and those of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _check_type(tensor: TensorProto) -> None:
    if tensor.data_type not in helper.get_all_tensor_dtypes():
        raise InvalidModel(f"the weights {tensor.name!r} are of type {tensor.data_type}, which ONNX does not have")


def _unreadable(tensor: TensorProto, error: Exception) -> InvalidModel:
    dims = ", ".join(map(str, tensor.dims))
    return InvalidModel(f"the weights {tensor.name!r} [{dims}] can't be read: {first_line(error)}")


def in_one_line(error: Exception) -> str:
    """The checker names the node in its second line, or in what follows it."""
    said = " ".join(str(error).split())
    return said if len(said) <= _MOST_WORDS else said[:_MOST_WORDS] + "..."


def _bytes(tensor: TensorProto) -> int:
    size = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    for dim in tensor.dims:
        size *= dim
    return size
