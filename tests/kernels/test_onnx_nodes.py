"""The ONNX standard's own examples of pooling, run on the operators."""

import importlib
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from onnx.helper import get_attribute_value
from torch import Tensor
from torch.nn import functional as F

from fusedpool import global_pool2d, pool2d

node = pytest.importorskip("onnx.backend.test.case.node")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

KINDS: Final = {"MaxPool": "max", "AveragePool": "avg", "LpPool": "lp"}
GLOBAL: Final = {"GlobalMaxPool": "max", "GlobalAveragePool": "avg", "GlobalLpPool": "lp"}  # the last has no example

_PADDING = "padding 2 is over half of the kernel, 3 // 2: refused by PyTorch's rule, and padded first here"
REFUSED: Final = {
    "test_maxpool_2d_pads": _PADDING,
    "test_averagepool_2d_pads": _PADDING,
    "test_averagepool_2d_pads_count_include_pad": _PADDING,
    "test_lppool_2d_pads": _PADDING,
    "test_maxpool_2d_uint8": "integers are not pooled; the same numbers in float32 are",
}
"""What arguments' rules forbid, and why; what is asked for comes out by another way."""


FOUR_DECIMALS: Final = ("test_averagepool_2d_ceil_last_window_starts_on_pad",)
"""Whose outputs the standard has written down rounded."""


def examples() -> dict[str, Any]:
    """Name -> the standard's case, of those in two dimensions."""
    for module in Path(node.__file__).parent.glob("*pool*.py"):
        importlib.import_module(f"{node.__name__}.{module.stem}")
    cases = [case for case in node._NodeTestCases if case.model.graph.node[0].op_type in {*KINDS, *GLOBAL}]
    return {case.name: case for case in cases if case.data_sets[0][0][0].ndim == 4}


EXAMPLES: Final = examples()


def test_no_example_is_left_out() -> None:
    assert {case.model.graph.node[0].op_type for case in EXAMPLES.values()} == {*KINDS, *GLOBAL} - {"GlobalLpPool"}
    everything = [case.name for case in node._NodeTestCases if "pool" in case.name and "unpool" not in case.name]
    others = [name for name in everything if "_1d_" in name or "_3d_" in name]
    assert sorted({*EXAMPLES, *others}) == sorted(set(everything))
    assert len(EXAMPLES) >= 36 and set(REFUSED) <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_standards_example(device: torch.device, name: str) -> None:
    case = EXAMPLES[name]
    (operator,) = case.model.graph.node
    attributes = {attribute.name: get_attribute_value(attribute) for attribute in operator.attribute}
    inputs, outputs = case.data_sets[0]
    x = torch.from_numpy(np.array(inputs[0])).to(device)
    if name in REFUSED:
        with pytest.raises(ValueError, match=r"padding is 2|x is torch\.uint8"):
            run(x, operator.op_type, attributes, pad_first=False)
        x = x.float()
    y, index = run(x, operator.op_type, attributes, pad_first=name in REFUSED)
    np.testing.assert_allclose(y.cpu().numpy(), outputs[0], rtol=1e-5, atol=1e-4 if name in FOUR_DECIMALS else 1e-6)
    if len(outputs) > 1:
        assert index is not None
        np.testing.assert_array_equal(index.cpu().numpy(), outputs[1])


def run(x: Tensor, operator: str, attributes: dict[str, Any], pad_first: bool) -> tuple[Tensor, Tensor | None]:
    """(y, index or None), as the operator's attributes say."""
    if operator in GLOBAL:
        return global_pool2d(x, (GLOBAL[operator],))[0][..., None, None], None
    kernel = attributes["kernel_shape"]
    stride, dilation = attributes.get("strides", [1, 1]), attributes.get("dilations", [1, 1])
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    if (auto := attributes.get("auto_pad", b"NOTSET")) != b"NOTSET":
        lower = auto == b"SAME_LOWER"
        (top, bottom), (left, right) = (
            same(*each, lower) for each in zip(x.shape[2:], kernel, stride, dilation, strict=True)
        )
    options: dict[str, Any] = {"kind": KINDS[operator], "ceil_mode": bool(attributes.get("ceil_mode", 0))}
    if operator == "LpPool":
        options["p"] = float(attributes.get("p", 2))
    places = (kernel, stride, [top, left], dilation)
    include = bool(attributes.get("count_include_pad", 0))
    if pad_first or (top, left) != (bottom, right):
        return padded(x, (left, right, top, bottom), (kernel, stride, 0, dilation), options, include), None
    if operator == "AveragePool":
        options["count_include_pad"] = include
    if operator != "MaxPool":
        return pool2d(x, *places, **options), None
    y, index = pool2d(x, *places, **options, return_indices=True)
    if attributes.get("storage_order", 0):  # columns first
        index = index % x.shape[3] * x.shape[2] + index // x.shape[3]
    return y, index


def same(size: int, kernel: int, stride: int, dilation: int, lower: bool) -> tuple[int, int]:
    """(before, after): as much as makes ceil(size / stride) windows, the odd one after, or before if `lower`."""
    missing = max(0, (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size)
    halves = missing // 2, missing - missing // 2
    return (halves[1], halves[0]) if lower else halves


def padded(x: Tensor, pads: tuple[int, ...], places: Any, options: dict[str, Any], include: bool) -> Tensor:
    """Pool what F.pad makes of x; where padding does not count, an average divides by what does."""
    low = float("-inf") if options["kind"] == "max" else 0.0
    y: Tensor = pool2d(F.pad(x, pads, value=low), *places, **options)
    if options["kind"] != "avg" or include:
        return y
    share: Tensor = pool2d(F.pad(torch.ones_like(x), pads), *places, **options)
    return y / share
