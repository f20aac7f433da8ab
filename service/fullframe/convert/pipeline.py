"""A classifier's ONNX graph -> the contract, step by step, and the proof that it is the same classifier."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import onnx
from onnx import TensorProto, helper

from fullframe.convert.branches import make_agree
from fullframe.convert.draft import Draft, counted, words
from fullframe.convert.head import check_scores, make_outputs
from fullframe.convert.metadata import set_contract
from fullframe.convert.options import Options
from fullframe.convert.pixels import source_images, take_pixels
from fullframe.convert.pools import make_global, pool_channels
from fullframe.convert.proof import Proof, Source
from fullframe.convert.reading import checked, in_one_line, source_size
from fullframe.convert.sizes import free_reshapes, gather_shuffles, refuse_fixed_constants, write_out_padding
from fullframe.convert.tidy import drop_softmax, drop_training, fold, upgrade
from fullframe.errors import InvalidInput, InvalidModel, first_line
from fullframe.model.contract import LOGITS_FROM_FEATURES, LOGITS_FROM_MAP, Contract, Tiles
from fullframe.model.geometry import Geometry, graph_geometry
from fullframe.model.strips import tiles_of

_STEPS: Final[tuple[Callable[[Draft], None], ...]] = (
    drop_training,
    upgrade,
    fold,
    drop_softmax,
    check_scores,
    write_out_padding,
    pool_channels,
    make_global,
    gather_shuffles,
    free_reshapes,
    refuse_fixed_constants,
)
"""From the source's graph to one for any size, but for its head; in this order."""

_MALFORMED: Final = (
    *(ArithmeticError, LookupError, RuntimeError, TypeError, ValueError),
    onnx.shape_inference.InferenceError,
)
"""What a graph that contradicts itself may raise in any step."""


@dataclass(frozen=True)
class Converted:
    """A model of the contract, proved equal to its source.

    Attributes:
        model: with its metadata; what a file of it holds.
        contract: that metadata.
        difference: the largest from the source at its own size, relative to the source's largest score.
        report: what was done to the graph and what was found, a line for each step.
    """

    model: onnx.ModelProto
    contract: Contract
    difference: float
    report: tuple[str, ...]


def convert(model: onnx.ModelProto, options: Options) -> Converted:
    """Make a model of the contract of a classifier.

    Args:
        model: float32 [N, 3, H, W] in, scores or probabilities [N, K] or [N, K, 1, 1] out; not changed.
        options: what the graph does not say.

    Raises:
        InvalidInput: an option does not fit the graph.
        InvalidModel: something stands in the way; the message names the node and says why.
    """
    source = checked(model)
    try:
        return _convert(source, options)
    except _MALFORMED as error:
        raise InvalidModel(
            f"the graph is malformed, or of a kind that is not known: {_fault(source, error)}"
        ) from error


def _fault(model: onnx.ModelProto, error: Exception) -> str:
    """What ONNX's shape inference, which names the node, finds wrong; the error itself where it finds nothing."""
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except _MALFORMED as found:
        return first_line(found)  # the others follow from it
    return f"{type(error).__name__}: {in_one_line(error)}"


def _convert(source: onnx.ModelProto, options: Options) -> Converted:
    draft = Draft(source, source_size(source, options.size))
    for step in _STEPS:
        step(draft)
    pooling = make_outputs(draft)
    make_agree(draft)
    take_pixels(draft, options)
    geometry = graph_geometry(draft.model(weights=False))
    geometry.graph.check_sizes()
    converted = draft.model()
    del converted.graph.output[:]
    converted.graph.output.extend(_outputs(draft))
    contract = _contract(draft, geometry, tiles_of(converted), pooling, options)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "converted.onnx"
        _write(converted, contract, path)
        proof = Proof(path, contract, geometry)
        worst = proof.difference(Source(source, partial(source_images, options)), draft.size)
        others = proof.run_elsewhere(draft.size)
    draft.note(f"proved: the source's scores at {words(draft.size)}, largest difference {worst:.1e}")
    draft.note(f"proved: runs at {counted(others, 'other size')}, its maps as large as its geometry says")
    return Converted(converted, contract, worst, tuple(draft.report))


def _contract(draft: Draft, geometry: Geometry, tiles: Tiles, pooling: str, options: Options) -> Contract:
    """Raises InvalidInput where there are not as many labels as classes."""
    classes = draft.shape("logits")[1]
    if options.labels and len(options.labels) != classes:
        raise InvalidInput(f"there are {len(options.labels)} labels for {classes} classes", "labels")
    preprocessing: dict[str, Any] = {"mean": options.mean, "std": options.std}
    if options.input_range != 1:
        preprocessing["input_range"] = options.input_range
    if options.bgr:
        preprocessing["order"] = "blue, green, red"
    facts = {"source": options.source, "license": options.license, "conversion": list(draft.report)}
    return Contract(
        name=options.name,
        labels=options.labels or tuple(map(str, range(classes))),
        stride=geometry.stride,
        receptive_field=geometry.receptive_field,
        start=geometry.start,
        smallest_size=geometry.smallest_size,
        feature_channels=draft.shape("feature_map")[1],
        pooling=pooling,
        logits=LOGITS_FROM_MAP if "class_map" in draft.outputs else LOGITS_FROM_FEATURES,
        normalisation=preprocessing,
        training={name: value for name, value in facts.items() if value},
        tiles=tiles,
    )


def _outputs(draft: Draft) -> list[onnx.ValueInfoProto]:
    """Their types: the maps' heights and widths are the same."""
    shapes: dict[str, list[str | int]] = {
        name: ["N", draft.shape(name)[1], *("h", "w")[: len(draft.shape(name)) - 2]] for name in draft.outputs
    }
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]


def _write(model: onnx.ModelProto, contract: Contract, path: Path) -> None:
    set_contract(model, contract)
    onnx.save(model, path)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InvalidModel(f"the converted graph is no valid ONNX: {error}") from error
