"""The classifiers that ship inside the onnx package without weights, filled with random ones of a sensible scale."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

_FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
NAMES = tuple(sorted(path.stem.removeprefix("light_") for path in _FOLDER.glob("*.onnx")))


def light_model(name: str, seed: int = 0) -> onnx.ModelProto:
    """Opset 9 and IR 3, as it ships: float32 [1, 3, 224, 224] in; every weight an input too."""
    model = onnx.load(_FOLDER / f"light_{name}.onnx")
    graph = model.graph
    shapes = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    takers = {taken: (node, place) for node in graph.node for place, taken in enumerate(node.input)}
    rng = np.random.default_rng(seed)
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if node.op_type != "ConstantOfShape":
            graph.node.append(node)
            continue
        weight, shape = node.output[0], tuple(map(int, shapes[node.input[0]]))
        taker, place = takers[weight]
        while taker.op_type in ("Unsqueeze", "Reshape"):
            taker, place = takers[taker.output[0]]
        graph.initializer.append(numpy_helper.from_array(_weight(rng, taker.op_type, place, shape), weight))
        graph.input.append(helper.make_tensor_value_info(weight, TensorProto.FLOAT, shape))
    _settle_scores(model, rng)
    return model


def _settle_scores(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Scale the last layer, so that probabilities are neither all alike nor all 0 and 1."""
    last = next(node for node in reversed(model.graph.node) if node.op_type in ("Conv", "Gemm"))
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.append(helper.make_empty_tensor_value_info(last.output[0]))
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    image = rng.standard_normal((1, 3, 224, 224)).astype(np.float32)
    (scores,) = session.run(last.output, {session.get_inputs()[0].name: image})
    for weight in model.graph.initializer:
        if weight.name in last.input:
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * (2 / scores.std()), weight.name))


def of_any_size(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same, its image's height and width let go: for those whose layers can do without."""
    weights = {each.name for each in model.graph.initializer}
    (image,) = (each for each in model.graph.input if each.name not in weights)
    for dim in list(image.type.tensor_type.shape.dim)[2:]:
        dim.ClearField("dim_value")
    del model.graph.value_info[:]
    return model


def _weight(rng: np.random.Generator, op: str, place: int, shape: tuple[int, ...]) -> NDArray[Any]:
    """Activations neither vanish nor explode (He et al., arXiv:1502.01852), so that comparisons mean something."""
    if op in ("Conv", "Gemm") and place == 1:
        values = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    elif (op, place) in (("BatchNormalization", 1), ("BatchNormalization", 4), ("Mul", 1)):  # scale and variance
        values = rng.uniform(0.5, 1.5, shape)
    else:
        values = rng.standard_normal(shape) * 0.1
    return np.asarray(values, np.float32)
