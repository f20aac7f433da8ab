"""Sizes in one step, as ONNX Runtime computes them one by one; a batch of many sizes in few steps more than of one."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser

from fullframe.engine.graph import TorchSession, fusions
from fullframe.engine.graph.fusions.masks import find_masks
from fullframe.engine.graph.fusions.pattern import Pattern
from fullframe.engine.graph.ir import Node
from fullframe.engine.graph.reader import read_graph
from fullframe.engine.graph.simplify import simplify
from fullframe.engine.graph.sizes import SIZES
from fullframe.model.ragged import ragged_model
from fullframe.model.repository import BUNDLED
from tests.engine.graph.parity import in_onnx_runtime, serialized

MOST = 1.5
"""Times the steps of a batch of one size."""


def graph(text: str, *outputs: str, kind: str = "int64") -> bytes:
    """From sizes [N, 2]."""
    constants = ", ".join(f"int64 {name} = {{{value}}}" for name, value in (("zero", 0), ("one", 1)))
    numbers = ", ".join(f"{kind}[1] n{value} = {{{value}}}" for value in range(-1, 6)).replace("n-1", "minus")
    made = f"{', '.join(f'{kind}[N] {name}' for name in outputs)}"
    return serialized(
        parser.parse_model(
            f'<ir_version: 10, opset_import: ["": 18]> net ({kind}[N, 2] sizes) => ({made}) '
            f"<{constants}, {numbers}> {{ {text} }}"
        )
    )


def ops(model: bytes) -> Counter[str]:
    return Counter(node.op for node in simplify(read_graph(model)).nodes)


def agrees(model: bytes, sizes: Sequence[Sequence[int]], dtype: str = "int64") -> None:
    feeds = {"sizes": np.array(sizes, dtype)}
    wanted = in_onnx_runtime(model, feeds)
    for name, found in zip(wanted, TorchSession(model).run(list(wanted), feeds), strict=True):
        np.testing.assert_array_equal(found, wanted[name])


steps = st.lists(st.tuples(st.sampled_from(["Add", "Div"]), st.integers(1, 5)), min_size=1, max_size=7)


@settings(max_examples=30, deadline=None)
@given(steps, steps, st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=4))
def test_chains_of_additions_and_divisions_are_one_step(
    rows: list[tuple[str, int]], columns: list[tuple[str, int]], sizes: list[tuple[int, int]]
) -> None:
    lines = []
    for axis, (name, chain) in enumerate((("r", rows), ("c", columns))):
        lines.append(f"{name}0 = Gather <axis = 1> (sizes, {('zero', 'one')[axis]})")
        lines += [f"{name}{at + 1} = {op} ({name}{at}, n{number})" for at, (op, number) in enumerate(chain)]
    outputs = [f"r{at}" for at in range(1, len(rows) + 1)] + [f"c{len(columns)}", "c0"]
    model = graph(" \n ".join(lines), *outputs)
    assert ops(model) == {SIZES: 1}
    agrees(model, sizes)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("a = Gather <axis = 1> (sizes, zero) \n y = Div (a, minus)", "int64"),
        ("a = Gather <axis = 1> (sizes, one) \n y = Div (n5, a)", "int64"),
        ("a = Gather <axis = 1> (sizes, one) \n y = Div (a, n2)", "float"),
    ],
    ids=["of a number below 0", "by a size", "of other than integers"],
)
def test_other_divisions_stay(text: str, kind: str) -> None:
    model = graph(text, "y", kind=kind)
    assert ops(model) == {"Gather": 1, "Div": 1}
    agrees(model, [(7, 3), (1, 12)], "int64" if kind == "int64" else "float32")


def in_steps(model: onnx.ModelProto, *outputs: str) -> int:
    return len(TorchSession(serialized(model), fused=True).module(outputs)._program._steps)


def test_a_batch_of_many_sizes_takes_few_steps_more(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = onnx.load(BUNDLED)
    masked, names = ragged_model(plain), ("features", "logits")
    alone = in_steps(plain, *names)
    assert in_steps(masked, *names, "map_sizes") <= MOST * alone

    def as_they_are(pattern: Pattern) -> list[Node]:
        return pattern.nodes

    passes = [as_they_are if each is find_masks else each for each in fusions._PASSES]
    monkeypatch.setattr(fusions, "_PASSES", passes)
    assert in_steps(masked, *names, "map_sizes") > MOST * alone, "the control: each mask and share by ONNX's operators"
