"""A float32 model -> its int8 copy: convolutions in integers, scales from images, the same contract.

Static quantisation with a scale per output channel, as QuantizeLinear and DequantizeLinear around what is computed in
integers (Jacob et al. 2018, arXiv:1712.05877; Nagel et al. 2021, arXiv:2106.08295, section 3).
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from fullframe.convert.metadata import get_contract, load_model, set_contract
from fullframe.engine.ort import OrtEngine
from fullframe.errors import InvalidInput, InvalidModel
from fullframe.files import write_atomically
from fullframe.image import Pixels
from fullframe.model.contract import FLOAT32, INPUT, INT8, Contract
from fullframe.model.geometry import OUTPUT, graph_geometry
from fullframe.model.graphs import ancestors

# What ONNX Runtime computes on integers without a detour through floats.
_IN_INTEGERS: Final = ("Conv", "Add", "AveragePool", "Clip", "Concat", "MaxPool", "Relu")
_CHECKED_SIZES: Final = ((1, 1), (2, 3), (7, 5), (31, 33), (64, 64), (1, 200), (97, 41), (224, 224), (300, 451))
"""Height, width."""


def quantize(model: Path, output: Path, images: Iterable[Pixels]) -> Contract:
    """Write the int8 copy of a model.

    The convolutions before the feature map, and what lies between them, are computed on uint8 activations and int8
    weights; normalisation, whatever follows the last of those convolutions, and the outputs stay float32. Weights
    take 7 of the 8 bits, so that no processor's 16-bit sums overflow.

    Args:
        model: a float32 file of the contract.
        output: written only when the copy has run at many sizes beside the model.
        images: uint8 [H, W, 3] each, like those that the model will see; the range of each activation is taken from
            them. Those too small for the model are passed over.

    Returns:
        The copy's contract; its training record holds the model's under "float32".

    Raises:
        InvalidModel: the file is no model of the contract, is int8 already or has no convolution before its feature
            map; or its copy would not follow the contract.
        InvalidInput: there is no image.
    """
    source = load_model(model)
    contract = get_contract(source)
    if contract.precision != FLOAT32:
        raise InvalidModel(f"{model.name} is {contract.precision} already; give the float32 model that it was made of")
    if contract.ragged:
        raise InvalidModel(f"{model.name} is for batches of different sizes; give the model that it was made of")
    nodes = _between_convolutions(source.graph)
    reader = _Reader(images, contract)
    with TemporaryDirectory() as folder, _quiet():
        named, quantized = Path(folder) / "named.onnx", Path(folder) / "quantized.onnx"
        onnx.save(source, named)
        quantize_static(
            named,
            quantized,
            reader,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_IN_INTEGERS),
            nodes_to_quantize=nodes,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        copy = onnx.load(quantized)
        record = {FLOAT32: contract.training, "calibration_images": reader.read}
        contract = replace(contract, precision=INT8, training=record)
        set_contract(copy, contract)
        onnx.checker.check_model(copy, full_check=True)
        onnx.save(copy, quantized)
        _compare(named, quantized, contract)
    write_atomically(output, copy.SerializeToString())
    return contract


def _between_convolutions(graph: onnx.GraphProto) -> list[str]:
    """The convolutions before the feature map and whatever has one of them downstream; raises InvalidModel."""
    before = ancestors(graph, {OUTPUT})
    convolutions = {node.output[0] for node in graph.node if node.op_type == "Conv" and node.output[0] in before}
    if not convolutions:
        raise InvalidModel("the graph has no convolution before its feature map, so there is nothing to quantise")
    names: list[str] = []
    upstream = ancestors(graph, convolutions)
    for number, node in enumerate(graph.node):
        node.name = node.name or f"node_{number}"
        if not upstream.isdisjoint(node.output):
            names.append(node.name)
    return names


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped
    """The images as the calibration asks for them; `read` counts them."""

    def __init__(self, images: Iterable[Pixels], contract: Contract) -> None:
        least = contract.smallest_size
        self._images = (pixels for pixels in images if all(np.greater_equal(pixels.shape[:2], least)))
        self._first = next(self._images, None)
        self.read = 0
        if self._first is None:
            raise InvalidInput(
                "there is no image to calibrate with that the model can take "
                "(it needs {} x {} pixels, height x width)".format(*least),
                "calibrate",
            )

    def get_next(self) -> dict[str, Pixels] | None:
        """The next image as the graph's input, or None."""
        pixels, self._first = self._first if self._first is not None else next(self._images, None), None
        if pixels is None:
            return None
        self.read += 1
        return {INPUT: pixels[np.newaxis]}


def _compare(source: Path, copy: Path, contract: Contract) -> None:
    """Raise InvalidModel where the copy's cells see other pixels than the source's, or its outputs have other sizes."""
    if graph_geometry(onnx.load(copy)) != graph_geometry(onnx.load(source)):
        raise InvalidModel("the int8 graph's cells see other pixels than the model's; it can't be used")
    engines = OrtEngine(source), OrtEngine(copy)
    rng = np.random.default_rng(0)
    for height, width in _checked_sizes(contract.smallest_size):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        wanted, found = (engine.run(pixels, contract.outputs) for engine in engines)
        for name in contract.outputs:
            if found[name].shape != wanted[name].shape or not np.isfinite(found[name]).all():
                raise InvalidModel(
                    f"{name!r} of the int8 graph is {found[name].shape} at {height} x {width} pixels "
                    f"(height x width); it must be {wanted[name].shape} and finite"
                )


def _checked_sizes(least: Sequence[int]) -> list[tuple[int, int]]:
    return [(max(height, least[0]), max(width, least[1])) for height, width in _CHECKED_SIZES]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without ONNX Runtime's advice to preprocess the graph and its remark on each node that it leaves alone."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
