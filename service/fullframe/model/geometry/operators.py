"""The rule for each operator: what it makes of what is known of its inputs."""

from collections.abc import Sequence
from typing import Final

from fullframe.model.geometry.context import Context, joined
from fullframe.model.geometry.nodes import Node
from fullframe.model.geometry.shapes import SHAPE_RULES, arithmetic
from fullframe.model.geometry.tensors import Kind, Obstacle, Tensor, Unfollowed, made, varies
from fullframe.model.geometry.windows import Inputs, Rule, crop, first_of, ints_of, padding, resize, window
from fullframe.model.graphs import WINDOWS

_BROADCASTING: Final = (
    frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Mod", "Max", "Min", "Sum", "Mean", "PRelu", "Where"})
    | {"And", "Or", "Xor", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"}
    | {"Clip"}
)
_POINTWISE: Final = (
    frozenset({"Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "Log", "Neg", "Not", "Reciprocal", "Round", "Sign", "Sin"})
    | {"Celu", "Dropout", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Relu", "Selu", "Sqrt"}
    | {"Sigmoid", "Shrink", "Softplus", "Softsign", "Swish", "Tanh", "ThresholdedRelu"}
)
_CHANNELWISE: Final = frozenset({"BatchNormalization", "LRN"})
_GLOBAL: Final = frozenset({"GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"})
_REDUCING: Final = frozenset(
    "Reduce" + what for what in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
)
_SOFTMAX: Final = frozenset({"Softmax", "LogSoftmax", "Hardmax"})
_ALL_OVER: Final = frozenset({"InstanceNormalization", "GroupNormalization", "MeanVarianceNormalization"})


def apply(context: Context, node: Node, inputs: Inputs) -> list[Tensor]:
    """What is known of a node's outputs, in their order; those left out are not known."""
    try:
        rule = _RULES.get(node.op)
        if node.has_graph or rule is None:
            raise Unfollowed("is not known to keep what a cell sees bounded and the same everywhere")
        found = rule(context, node, inputs)
        return [found] if isinstance(found, Tensor) else list(found)
    except Unfollowed as unknown:
        return [_unfollowed(context, node, inputs, str(unknown))]


def _unfollowed(context: Context, node: Node, inputs: Inputs, reason: str) -> Tensor:
    tensors = [tensor for tensor in inputs if tensor is not None]
    if not node.has_graph and not any(tensor.varies for tensor in tensors):
        return made(node.title, tensors, None)
    obstacle = context.doubt(node, reason)
    return made(node.title, [*tensors, Tensor(None, fed=True)], None, unsized=True, obstacles=[obstacle])


def _pointwise(context: Context, node: Node, inputs: Inputs) -> Tensor:
    source = first_of(inputs)
    return made(node.title, [source], source.dims)


def _channelwise(context: Context, node: Node, inputs: Inputs) -> Tensor:
    source = first_of(inputs)
    assert source.dims is not None
    if len(source.dims) > 1 and varies(source.dims[1]):
        raise Unfollowed("works along a side of the map")
    return made(node.title, [source], source.dims)


def _broadcasting(context: Context, node: Node, inputs: Inputs) -> Tensor:
    if node.number("broadcast", 0):
        raise Unfollowed("broadcasts as operators did before opset 7; onnx.version_converter mends that")
    return arithmetic(context, node, inputs) or joined(
        context, node, [tensor for tensor in inputs if tensor is not None]
    )


def _quantization(context: Context, node: Node, inputs: Inputs) -> Tensor:
    """A scale and zero point lie along one axis; they are no map's unless they are computed from it."""
    if any(tensor is not None and tensor.fed for tensor in inputs[1:]):
        raise Unfollowed("takes its range from the image")
    return _pointwise(context, node, inputs)


def _reduction(context: Context, node: Node, inputs: Inputs) -> Tensor:
    source = first_of(inputs)
    assert source.dims is not None
    rank = len(source.dims)
    axes = list(range(2, rank)) if node.op in _GLOBAL else node.numbers("axes") or ints_of(inputs, 1, "axes")
    if not axes:
        axes = [] if node.number("noop_with_empty_axes", 0) else list(range(rank))
    gone = {axis % rank for axis in axes}
    keep = node.op in _GLOBAL or node.number("keepdims", 1)
    dims = tuple(1 if i in gone else dim for i, dim in enumerate(source.dims) if keep or i not in gone)
    sides = sum(varies(source.dims[axis]) for axis in gone)
    what = "takes one value from the whole image" if sides > 1 else "takes one value from whole rows or columns"
    latent = Obstacle(node.title, "whole image", what) if sides else None
    return made(node.title, [source], dims, latent=latent)


def _normalization(context: Context, node: Node, inputs: Inputs) -> Tensor:
    """Keeps the shape; every cell depends on all along some axes."""
    source = first_of(inputs)
    assert source.dims is not None
    rank = len(source.dims)
    old_softmax = node.op in _SOFTMAX and context.opset < 13  # it flattened what lies behind its axis
    if node.op in _ALL_OVER:
        along = range(2, rank)
    elif node.op == "LayerNormalization" or old_softmax:
        along = range(node.number("axis", 1 if old_softmax else -1) % rank, rank)
    else:
        axis = node.number("axis", -1) % rank
        along = range(axis, axis + 1)
    kind: Kind = "whole image"
    reason = "computes every cell from all of the image's" if node.op in _ALL_OVER else "works along a side of the map"
    against = [Obstacle(node.title, kind, reason)] if any(varies(source.dims[axis]) for axis in along) else []
    return made(node.title, [source], source.dims, obstacles=against)


def _matrix(context: Context, node: Node, inputs: Inputs) -> Tensor:
    """MatMul and Gemm of a value [..., C] and a constant matrix [C, D]."""
    source, matrix = first_of(inputs), inputs[1]
    assert source.dims is not None
    if matrix is None or matrix.fed or matrix.dims is None or len(matrix.dims) != 2 or node.number("transA", 0):
        raise Unfollowed("multiplies by what is no constant matrix")
    if not source.dims or varies(source.dims[-1]):
        raise Unfollowed("multiplies a flattened map by a matrix, which fits one image size alone")
    return made(node.title, [source], (*source.dims[:-1], matrix.dims[0 if node.number("transB", 0) else 1]))


def _rules() -> dict[str, Rule]:
    groups: Sequence[tuple[frozenset[str], Rule]] = (
        (_POINTWISE, _pointwise),
        (_BROADCASTING, _broadcasting),
        (_CHANNELWISE, _channelwise),
        (WINDOWS, window),
        (_GLOBAL | _REDUCING, _reduction),
        (_ALL_OVER | _SOFTMAX | {"LayerNormalization", "LpNormalization"}, _normalization),
        (frozenset({"QuantizeLinear", "DequantizeLinear"}), _quantization),
        (frozenset({"MatMul", "Gemm"}), _matrix),
        (frozenset({"Resize", "Upsample"}), resize),
    )
    rules = {op: rule for ops, rule in groups for op in ops}
    return rules | SHAPE_RULES | {"Constant": lambda _, node, __: node.constant(), "Pad": padding, "Slice": crop}


_RULES: Final = _rules()
