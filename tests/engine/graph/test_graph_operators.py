"""Every operator beside ONNX Runtime's: attributes, left-out inputs, padding of all kinds; and what is refused."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fullframe.engine import graph as package
from fullframe.engine.graph import TorchSession
from fullframe.engine.graph.operators import OPERATORS, QUANTIZING
from fullframe.errors import InvalidModel
from tests.engine.graph.parity import Array, in_onnx_runtime, largest_difference, serialized

_random = np.random.default_rng(0)


def noise(*shape: int, seed: int = 0, low: float = -2.0, high: float = 2.0) -> Array:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def number(value: Any, dtype: Any = np.float32) -> Array:
    return np.array(value, dtype)


@dataclass(frozen=True)
class Case:
    """A node; inputs that are `constant` are in the graph, the others are fed."""

    op: str
    inputs: tuple[Array | None, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    constant: tuple[int, ...] = ()
    outputs: int = 1
    opset: int = 18
    reference: bool = False

    def model(self) -> onnx.ModelProto:
        names = ["" if value is None else f"x{place}" for place, value in enumerate(self.inputs)]
        while not names[-1]:
            names.pop()
        made = [f"y{number}" for number in range(self.outputs)]
        given_, weights = [], []
        for place, (name, value) in enumerate(zip(names, self.inputs, strict=False)):
            if value is None:
                continue
            if place in self.constant:
                weights.append(numpy_helper.from_array(value, name))
            else:
                kind = helper.np_dtype_to_tensor_dtype(value.dtype)
                given_.append(helper.make_tensor_value_info(name, kind, [None] * value.ndim))
        node = helper.make_node(self.op, names, made, "node", **self.attributes)
        graph = helper.make_graph([node], "case", given_, [onnx.ValueInfoProto(name=name) for name in made], weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)

    def feeds(self) -> dict[str, Array]:
        return {
            f"x{place}": value
            for place, value in enumerate(self.inputs)
            if value is not None and place not in self.constant
        }

    def check(self, device: torch.device) -> None:
        model = onnx.shape_inference.infer_shapes(self.model())
        names = [each.name for each in model.graph.output]
        if self.reference:
            wanted = dict(zip(names, ReferenceEvaluator(model).run(None, self.feeds()), strict=True))
        else:
            wanted = in_onnx_runtime(serialized(model), self.feeds())
        found = TorchSession(serialized(model), device=device).run(names, self.feeds())
        for name, each in zip(names, found, strict=True):
            assert largest_difference(each, wanted[name]) <= 1e-5, (self, each, wanted[name])


X, MAP = noise(3, 5), noise(2, 4, 7, 6)
POSITIVE = noise(2, 4, 7, 6, low=0.1)
FLAGS = _random.integers(0, 2, (3, 5)).astype(bool)
WHOLE = _random.integers(-9, 10, (3, 5))
PLAIN = ("Abs", "Ceil", "Cos", "Elu", "Erf", "Exp", "Floor", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Neg")
MORE = ("Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Tanh", "ThresholdedRelu", "Celu")
REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2")
SUMS = ("ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp")
BROADCAST = ((3, 5), (5,)), ((2, 1, 4), (3, 1)), ((4,), ()), ((1,), (2, 3))
STEP = {"kernel_shape": [3, 2], "strides": [2, 3]}


def windows(op: str, **more: Any) -> list[Case]:
    """A pool with every kind of padding."""
    pads: list[dict[str, Any]] = [{}, {"pads": [1, 1, 1, 1]}, {"pads": [2, 1, 0, 1]}, {"pads": [0, 0, 1, 1]}]
    pads += [{"auto_pad": "VALID"}]
    # The runtime pads pools by less than nothing where windows leave gaps.
    pads += [{"auto_pad": mode, "strides": [2, 2]} for mode in ("SAME_UPPER", "SAME_LOWER")]
    found = [Case(op, (MAP,), STEP | each | more) for each in pads]
    if op != "LpPool":
        found += [Case(op, (MAP,), STEP | each | more | {"ceil_mode": 1}) for each in pads[:4]]
    return found


CASES: Final = [
    *(Case(op, (X,)) for op in (*PLAIN, *MORE)),
    *(Case(op, (noise(3, 5, low=0.1),)) for op in ("Log", "Reciprocal", "Sqrt")),
    *(Case("Round", (number([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]),)), Case("Not", (FLAGS,))),
    *(Case(op, (X,), {"alpha": 0.3}) for op in ("Elu", "LeakyRelu", "ThresholdedRelu", "HardSigmoid", "Celu")),
    *(Case("HardSigmoid", (X,), {"alpha": 1 / 6, "beta": 0.5}), Case("Selu", (X,), {"alpha": 1.1, "gamma": 2.0})),
    *(Case("Gelu", (X,), each, opset=20) for each in ({}, {"approximate": "tanh"})),
    *(Case("Swish", (X,), each, opset=24, reference=True) for each in ({}, {"alpha": 1.7})),
    *(
        Case(op, (noise(*a, seed=1), noise(*b, seed=2)), constant=constant)
        for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Sum", "Less", "LessOrEqual", "Greater")
        for a, b in BROADCAST
        for constant in ((), (1,))
    ),
    *(Case(op, (WHOLE, np.roll(WHOLE, 1))) for op in ("Add", "Mul", "Equal", "GreaterOrEqual", "Max", "Min")),
    *(Case("Div", (WHOLE, ints(3, -3, 2, -2, 7)), constant=each) for each in ((), (1,))),
    *(Case("Mod", (WHOLE, ints(3, -3, 2, -2, 7))), Case("Mod", (X, number(0.7)), {"fmod": 1})),
    *(Case(op, (FLAGS, FLAGS[::-1].copy())) for op in ("And", "Or", "Xor")),
    *(Case("Pow", (noise(3, 5, low=0.1), number(each)), constant=(1,)) for each in (0.5, 2.0, 3.0)),
    *(Case("Sum", (X, X[:1], X[:, :1])), Case("Max", (X, X[:1], X[:, :1])), Case("Mean", (X, X[:1], X[:, :1]))),
    Case("Pow", (WHOLE.astype(np.float32), ints(2)), constant=(1,)),
    *(Case("PRelu", (MAP, noise(*shape, low=0)), constant=(1,)) for shape in ((4, 1, 1), (1,))),
    *(
        Case("Where", (FLAGS, *values), constant=constant)
        for values in ((X, X * 2), (X, number(7.0)), (number(-np.inf), X), (number(1.0), number(2.0)))
        for constant in ((), (1,), (2,), (1, 2))
    ),
    *(Case("Where", (np.array(each), X, X[0])) for each in (True, [False])),
    *(Case("Where", (np.array(each), X, number(2.0)), constant=(0, 2)) for each in (True, [[False]])),
    *(Case("Clip", (X, low, high), constant=(1, 2)) for low in (None, number(-1.0)) for high in (None, number(0.5))),
    Case("Clip", (X, number(-1.0), number(0.5))),
    *(Case(op, (X,)) for op in ("Identity", "Dropout")),
    *(Case("Cast", (X,), {"to": to}) for to in (TensorProto.INT64, TensorProto.FLOAT16, TensorProto.DOUBLE)),
    *(Case("Cast", (WHOLE,), {"to": to}) for to in (TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT32)),
    Case("Cast", (FLAGS,), {"to": TensorProto.FLOAT}),
    # Reductions
    *(
        Case(op, (POSITIVE, axes), {"keepdims": keep}, constant=(1,))
        for op in (*REDUCTIONS, *SUMS)
        for axes in (ints(2, 3), ints(-1), ints(1), None)
        for keep in (0, 1)
    ),
    *(Case("ReduceSum", (MAP, each), {"noop_with_empty_axes": 1}) for each in (None, ints(1, -1))),
    Case("ReduceMean", (MAP,), {"axes": [1, 2]}, opset=17),
    *(Case(op, (WHOLE, ints(0)), constant=(1,)) for op in ("ReduceProd", "ReduceSum", "ReduceMax")),
    *(Case(op, (each,)) for op in ("GlobalAveragePool", "GlobalMaxPool") for each in (MAP, MAP[..., 0])),
    *(Case("GlobalLpPool", (MAP,), {"p": p}) for p in (1, 2, 3)),
    # Shapes
    *(Case("Shape", (MAP,), each) for each in ({}, {"start": 1}, {"start": -2}, {"start": 1, "end": -1})),
    Case("Size", (MAP,)),
    *(
        Case("Reshape", (MAP, ints(*shape)), constant=constant)
        for shape in ((2, 4, 42), (0, 2, 2, -1), (-1,), (0, 0, -1))
        for constant in ((), (1,))
    ),
    Case("Reshape", (MAP[:0], ints(0, 5)), {"allowzero": 1}, constant=(1,)),
    *(Case("Flatten", (MAP,), {"axis": axis}) for axis in (0, 1, 2, -1, 4)),
    *(Case("Squeeze", (MAP[:1, :, :, :1], axes), constant=(1,)) for axes in (ints(0), ints(-1, 0), None)),
    *(Case("Unsqueeze", (X, ints(*axes)), constant=(1,)) for axes in ((0,), (-1,), (1, 3), (-1, 0))),
    *(Case("Transpose", (MAP,), each) for each in ({}, {"perm": [0, 2, 3, 1]})),
    *(Case("Concat", (MAP, MAP * 2, MAP[:, :1]), {"axis": axis}) for axis in (1, -3)),
    *(Case("Split", (MAP,), {"axis": 2, "num_outputs": count}, outputs=count) for count in (2, 3)),
    Case("Split", (MAP, ints(1, 3)), {"axis": -3}, constant=(1,), outputs=2),
    *(
        Case("Slice", (MAP, *(ints(*each) for each in bounds)), constant=constant)
        for bounds in (
            ((1,), (3,), (2,)),
            ((0, 1), (2**62, -1), (2, 3)),
            ((-3,), (2**31 - 1,), (-1,)),
            ((5, -1), (-(2**62), -(2**63)), (2, 3), (-2, -1)),
            ((0, 0), (5, 6), (2, 3), (2, 4)),
            ((3,), (1,), (2,)),
        )
        for constant in ((), (1, 2, 3, 4))
    ),
    Case("Slice", (X, ints(1, 0), ints(3, 2)), constant=(1, 2)),
    *(
        Case("Gather", (MAP, index), {"axis": axis}, constant=constant)
        for index in (ints(0, -1, 1), np.array(-2), np.array([[1, 0]]))
        for axis in (1, -1)
        for constant in ((), (1,))
    ),
    *(Case("Expand", (X[:, :1], ints(*shape))) for shape in ((3, 4), (2, 3, 1), (1,), (5,))),
    Case("Tile", (X, ints(2, 3)), constant=(1,)),
    *(Case("Range", tuple(number(v, t) for v in (2, 11, 3))) for t in (np.int64, np.float32)),
    *(Case("ConstantOfShape", (ints(2, 3),), each) for each in ({}, {"value": numpy_helper.from_array(ints(7))})),
    *(Case("DepthToSpace", (MAP,), {"blocksize": 2, "mode": mode}) for mode in ("DCR", "CRD")),
    Case("SpaceToDepth", (MAP[:, :, :6].copy(),), {"blocksize": 2}),
    # Windows
    *windows("MaxPool"),
    *(case for case in windows("MaxPool", dilations=[2, 2]) if "auto_pad" not in case.attributes),
    *(case for count in (0, 1) for case in windows("AveragePool", count_include_pad=count)),
    *(
        Case("AveragePool", (MAP,), {"kernel_shape": [2, 2], "dilations": [2, 3], "pads": [1] * 4, **each}, opset=19)
        for each in ({}, {"count_include_pad": 1})
    ),
    *(case for p in (1, 2, 3) for case in windows("LpPool", p=p)),
    Case("AveragePool", (MAP,), {"kernel_shape": [5, 5], "strides": [3, 3], "pads": [4, 3, 4, 3], "ceil_mode": 1}),
    *(
        Case("Conv", (MAP, noise(6, 4 // group, 3, 2), bias), {"group": group, "dilations": steps, **pads}, constant)
        for group, steps in ((1, [1, 1]), (2, [2, 1]))
        for bias in (None, noise(6))
        for pads in ({"pads": [1, 0, 1, 0]}, {"pads": [0, 1, 2, 0]}, {"auto_pad": "VALID", "strides": [2, 1]})
        for constant in ((1, 2), ())
    ),
    *(
        Case("Conv", (MAP, noise(4, 4, 3, 2)), {"auto_pad": mode, "strides": [2, 3]}, (1,))
        for mode in ("SAME_UPPER", "SAME_LOWER")
    ),
    Case("Conv", (MAP[:, :, 0], noise(4, 4, 3)), {"pads": [1, 1]}, (1,)),
    Case("Conv", (MAP, noise(4, 1, 3, 3)), {"group": 4, "strides": [2, 2], "pads": [1] * 4}, (1,)),
    *(
        Case("Pad", (MAP, ints(*pads), None if value is None else number(value)), constant=(1, 2))
        for pads in ((0, 0, 1, 2, 0, 0, 3, 0), (0, 1, -1, 0, 0, 0, 0, -2))
        for value in (None, 3.5)
    ),
    Case("Pad", (MAP, ints(1, 2, 0, 1), None, ints(3, 2)), constant=(1, 3)),
    *(
        Case("Pad", (MAP, ints(0, 0, 1, 2, 0, 0, 3, 0)), {"mode": mode}, (1,), opset=19)
        for mode in ("reflect", "edge", "wrap")
    ),
    *(Case("LRN", (MAP,), {"size": size, "alpha": 0.5, "beta": 0.6, "bias": 1.5}) for size in (1, 3, 5)),
    # Layers
    *(
        Case("Gemm", (noise(3, 4), noise(4, 5), c), {"alpha": 0.5, "beta": 2.0}, (1, 2))
        for c in (None, noise(5), noise(3, 5), number(1.0))
    ),
    Case("Gemm", (noise(4, 3), noise(5, 4), noise(5)), {"transA": 1, "transB": 1}),
    *(Case("MatMul", (noise(2, 3, 4), noise(*shape))) for shape in ((4, 5), (2, 4, 5), (4,))),
    *(
        Case("BatchNormalization", (x, noise(4), noise(4), noise(4), noise(4, low=0.1)), {"epsilon": 1e-3}, constant)
        for x in (MAP, MAP[:, :, 0, 0], MAP[:, :, 0])
        for constant in ((1, 2, 3, 4), ())
    ),
    Case("InstanceNormalization", (MAP, noise(4), noise(4)), {"epsilon": 1e-2}),
    Case("GroupNormalization", (MAP, noise(4), noise(4)), {"num_groups": 2}, opset=21),
    *(
        Case("LayerNormalization", (MAP, noise(*shape), *bias), {"axis": axis, "epsilon": 1e-3})
        for axis, shape in ((-1, (6,)), (2, (7, 6)), (1, (4, 7, 6)))
        for bias in ((), (noise(*shape),))
    ),
    Case("LayerNormalization", (MAP, noise(1)), {"axis": 1}, reference=True),  # of which the runtime dies
    Case("MeanVarianceNormalization", (MAP,)),
    *(Case("LpNormalization", (X,), {"p": p, "axis": axis}) for p in (1, 2) for axis in (0, -1)),
    *(Case(op, (MAP,), each) for op in ("Softmax", "LogSoftmax") for each in ({}, {"axis": 1})),
    # Resize
    *(
        Case(
            "Resize",
            (MAP, None, number([1, 1, 2.0, 1.6])),
            {"mode": mode, "coordinate_transformation_mode": place, **nearest},
            (2,),
        )
        for mode, nearests in (
            ("linear", [{}]),
            ("nearest", [{"nearest_mode": m} for m in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")]),
        )
        for nearest in nearests
        for place in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    ),
    *(Case("Resize", (MAP, None, None, ints(2, 4, *size)), {"mode": "linear"}, (3,)) for size in ((3, 9), (1, 1))),
]  # fmt: skip


@pytest.mark.parametrize("op", sorted(OPERATORS))
def test_every_operator_does_what_onnx_runtime_does(device: torch.device, op: str) -> None:
    cases = [case for case in CASES if case.op == op]
    assert cases, "an operator without a case"
    for case in cases:
        case.check(device)


@pytest.mark.parametrize("op", sorted(OPERATORS))
def test_no_operator_asks_the_device_for_values(op: str) -> None:
    """On tensors without values, constants on the CPU beside them; but for numbers that are fed, which it must ask."""
    for case in (case for case in CASES if case.op == op):
        asked = [place for place in range(len(case.inputs)) if OPERATORS[op].on_host(place)]
        if not set(asked) <= set(case.constant) | {p for p, each in enumerate(case.inputs) if each is None}:
            continue
        names, feeds = [f"y{number}" for number in range(case.outputs)], case.feeds()
        wanted = TorchSession(serialized(case.model())).run(names, feeds)
        given_ = {name: torch.from_numpy(np.array(each)).to("meta") for name, each in feeds.items()}
        found = TorchSession(serialized(case.model()), device="meta", fused=False).run_tensors(names, given_)
        assert [tuple(each.shape) for each in found] == [each.shape for each in wanted], case


@pytest.mark.parametrize(("op", "attribute", "value"), [("LRN", "size", 7), ("Conv", "pads", [0, 1, 2, 1])])
def test_another_attribute_would_not_pass(op: str, attribute: str, value: Any) -> None:
    """The control."""
    case = next(case for case in CASES if case.op == op and attribute in case.attributes)
    wanted = in_onnx_runtime(serialized(case.model()), case.feeds())
    other = replace(case, attributes=case.attributes | {attribute: value})
    (found,) = TorchSession(serialized(other.model())).run(["y0"], case.feeds())
    assert found.shape != wanted["y0"].shape or largest_difference(found, wanted["y0"]) > 1e-3


def test_the_readme_lists_what_there_is() -> None:
    page = (Path(package.__file__).parent / "README.md").read_text()
    (listed,) = re.findall(r"## Operators\n\n.*?\n\n((?:`\w+`[,.\s]+)+)", page, re.DOTALL)
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(OPERATORS)


def refusal(op: str, inputs: tuple[Array | None, ...], opset: int = 18, outputs: int = 1, **attributes: Any) -> str:
    model = Case(op, inputs, attributes, opset=opset, outputs=outputs).model()
    with pytest.raises(InvalidModel) as refused:
        TorchSession(serialized(model))
    return str(refused.value)


def test_what_cannot_be_run_is_named(tmp_path: Path) -> None:
    assert refusal("NonZero", (X,)) == "NonZero 'node' is an operator that the PyTorch engine does not have"
    assert "Resize 'node' resizes by mode cubic" in refusal("Resize", (MAP, None, ints(1)), mode="cubic")
    assert "gives the places of its maxima" in refusal("MaxPool", (MAP,), outputs=2, kernel_shape=[2, 2])
    assert "along other than two sides" in refusal("MaxPool", (MAP[0],), kernel_shape=[2])
    assert "training_mode" in refusal("BatchNormalization", (MAP, *[noise(4)] * 4), training_mode=1)
    assert "casts to type 17" in refusal("Cast", (X,), to=TensorProto.FLOAT8E4M3FN)
    assert "opset 12" in refusal("Relu", (X,), opset=12)
    branch = helper.make_graph([], "none", [], [])
    assert "If 'node' is an operator" in refusal("If", (FLAGS,), then_branch=branch, else_branch=branch)
    for op in QUANTIZING:
        assert "serve the float model" in refusal(op, (X, number(0.1)))
    with pytest.raises(InvalidModel, match="it is no ONNX file"):
        TorchSession(b"no model")
    (tmp_path / "none.onnx").write_bytes(b"no model")
    with pytest.raises(InvalidModel, match=r"none\.onnx can't be loaded: it is no ONNX file"):
        TorchSession(tmp_path / "none.onnx")


def test_names_that_are_not_there_are_an_error() -> None:
    session = TorchSession(serialized(Case("Relu", (X,)).model()))
    with pytest.raises(ValueError, match="no output 'z'; it has y0"):
        session.run(["z"], {"x0": X})
    with pytest.raises(ValueError, match="takes x0; it was given y0"):
        session.run(["y0"], {"y0": X})


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_slices_of_any_bounds_are_numpys(data: st.DataObject) -> None:
    bound = st.integers(-9, 9) | st.sampled_from((2**31 - 1, 2**62, -(2**62)))
    first, last = data.draw(bound), data.draw(bound)
    step = data.draw(st.sampled_from((1, 2, 3, -1, -2)))
    case = Case("Slice", (MAP, ints(first), ints(last), ints(2), ints(step)), constant=(1, 2, 3, 4))
    (found,) = TorchSession(serialized(case.model())).run(["y0"], case.feeds())
    np.testing.assert_array_equal(found, MAP[:, :, first:last:step])
