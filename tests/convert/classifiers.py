"""Small ONNX classifiers, written as ONNX text."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, parser

from fullframe.convert.options import Options

Weights = Mapping[str, tuple[int, ...] | NDArray[Any]]

OPTIONS = Options("net", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
SIDE = 32
CLASSES = 5
# Two strided convolutions: a map `m` of 8 channels, a quarter as high and wide.
STEM = """
    a = Conv <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x, w1)
    b = Relu (a)
    c = Conv <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (b, w2)
    m = Relu (c)
"""
STEM_WEIGHTS: Weights = {"w1": (8, 3, 3, 3), "w2": (8, 8, 3, 3)}
POOLED = "p = GlobalAveragePool (m) \n f = Flatten <axis = 1> (p)"
HEAD = f"{POOLED} \n y = Gemm <transB = 1> (f, w, v)"
HEAD_WEIGHTS: Weights = {"w": (CLASSES, 8), "v": (CLASSES,)}


def classifier(
    text: str,
    weights: Weights | None = None,
    *,
    opset: int = 13,
    image: str = f"float[1, 3, {SIDE}, {SIDE}] x",
    scores: str = f"float[1, {CLASSES}] y",
    seed: int = 0,
) -> onnx.ModelProto:
    """A graph from x to y; a weight given by its shape is random, of a scale that keeps activations where they are."""
    rng = np.random.default_rng(seed)
    values = {}
    for name, given in (weights or {}).items():
        if isinstance(given, tuple):
            fan = np.prod(given[1:], dtype=int) or 1
            given = (rng.standard_normal(given) * np.sqrt(2 / fan)).astype(np.float32)
        values[name] = given
    taken = "".join(f", {_type(value)} {name}" for name, value in values.items())
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> net ({image}{taken}) => ({scores}) {{{text}}}'
    )
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    return model


def plain(text: str = STEM + HEAD, **changes: Any) -> onnx.ModelProto:
    """Stem and linear head."""
    return classifier(text, {**STEM_WEIGHTS, **HEAD_WEIGHTS}, **changes)


def _type(value: NDArray[Any]) -> str:
    kind = helper.tensor_dtype_to_string(helper.np_dtype_to_tensor_dtype(value.dtype)).removeprefix("TensorProto.")
    return f"{kind.lower()}[{', '.join(map(str, value.shape))}]"
