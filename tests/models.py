"""Small models that follow the contract, with random weights and a known architecture."""

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fullframe.model.contract import LOGITS_FROM_FEATURES, LOGITS_FROM_MAP, Contract

LABELS = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")

Head = Literal["linear", "layers", "windows", "peeks"]
"""Of a model: the mean of a class map; two layers behind the features; the same as 1x1 windows over the features
before they are flattened; or one that sees the largest cells of the feature map too."""


def write_model(
    path: Path,
    *,
    name: str = "tiny",
    channels: int = 16,
    depth: int = 1,
    least: int = 1,
    breaks_above: int | None = None,
    seed: int = 0,
    head: Head = "linear",
) -> Path:
    """Write a contract model: 3x3 convolution of stride 2, 3x3 max pool of stride 2, `depth` more 3x3 convolutions.

    Args:
        channels: width of every layer; the work for a pixel grows with channels^2 * depth.
        least: the smallest height and width that its metadata allows.
        breaks_above: a height above which running the graph is an error that the metadata says nothing of.
        head: what makes the logits; only a linear one has a class map, and can break.
    """
    random = np.random.default_rng(seed)
    weights: dict[str, NDArray[np.float32]] = {
        "mean": np.full(1, 127.5, np.float32),
        "scale": np.full(1, 1 / 64, np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["planes", "mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "scale"], ["normal"]),
    ]

    def conv(source: str, target: str, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        fan_in = inputs * kernel * kernel
        weights[f"{target}.w"] = random.normal(0, (2 / fan_in) ** 0.5, (outputs, inputs, kernel, kernel)).astype("f4")
        weights[f"{target}.b"] = random.normal(0, 0.1, outputs).astype("f4")
        nodes.append(
            helper.make_node(
                "Conv",
                [source, f"{target}.w", f"{target}.b"],
                [target],
                kernel_shape=[kernel, kernel],
                strides=[stride, stride],
                pads=[kernel // 2] * 4,
            )
        )

    conv("normal", "conv0", 3, channels, 3, stride=2)
    nodes += [
        helper.make_node("Relu", ["conv0"], ["relu0"]),
        helper.make_node("MaxPool", ["relu0"], ["pooled"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    ]
    source = "pooled"
    for layer in range(1, depth + 1):
        conv(source, f"conv{layer}", channels, channels, 3)
        source = "feature_map" if layer == depth else f"relu{layer}"
        nodes.append(helper.make_node("Relu", [f"conv{layer}"], [source]))
    if head != "linear":
        nodes.append(helper.make_node("GlobalAveragePool", ["feature_map"], ["pooled4"]))
        nodes.append(helper.make_node("Flatten", ["pooled4"], ["features"]))
        if head == "windows":
            start = "pooled4"
        elif head == "layers":
            nodes.append(helper.make_node("Unsqueeze", ["features", "space"], ["cell"]))
            start = "cell"
        else:
            nodes.append(helper.make_node("GlobalMaxPool", ["feature_map"], ["largest"]))
            nodes.append(helper.make_node("Add", ["pooled4", "largest"], ["both"]))
            start = "both"
        conv(start, "hidden", channels, 12, 1)
        nodes.append(helper.make_node("HardSwish", ["hidden"], ["bent"]))
        conv("bent", "scores", 12, len(LABELS), 1)
        nodes.append(helper.make_node("Flatten", ["scores"], ["logits"]))
    else:
        conv("feature_map", "scores" if breaks_above else "class_map", channels, len(LABELS), 1)
        nodes.append(helper.make_node("ReduceMean", ["feature_map", "space"], ["features"], keepdims=0))
    if breaks_above:
        weights["zeros"] = np.zeros(breaks_above + 1, np.float32)
        nodes += [
            helper.make_node("Shape", ["images"], ["height"], start=1, end=2),
            helper.make_node("Gather", ["zeros", "height"], ["zero"]),
            helper.make_node("Add", ["scores", "zero"], ["class_map"]),
        ]
    if head == "linear":
        nodes.append(helper.make_node("ReduceMean", ["class_map", "space"], ["logits"], keepdims=0))
    initializers = [numpy_helper.from_array(value, key) for key, value in weights.items()]
    initializers.append(numpy_helper.from_array(np.array([2, 3], np.int64), "space"))
    outputs: dict[str, list[str | int | None]] = {
        "features": ["N", channels],
        "logits": ["N", len(LABELS)],
        "feature_map": ["N", channels, "h", "w"],
        "class_map": ["N", len(LABELS), "h", "w"],
    }
    if head != "linear":
        del outputs["class_map"]
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", "H", "W", 3])],
        [helper.make_tensor_value_info(key, TensorProto.FLOAT, shape) for key, shape in outputs.items()],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    field = 7 + 8 * depth
    contract = Contract(
        name=name,
        labels=LABELS,
        stride=(4, 4),
        receptive_field=(field, field),
        start=(-3 - 4 * depth, -3 - 4 * depth),
        smallest_size=(least, least),
        feature_channels=channels,
        normalisation={"mean": [127.5] * 3, "std": [64.0] * 3},
        logits=LOGITS_FROM_MAP if head == "linear" else LOGITS_FROM_FEATURES,
        training={"data": "none: random weights"},
    )
    helper.set_model_props(model, contract.to_metadata())
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
