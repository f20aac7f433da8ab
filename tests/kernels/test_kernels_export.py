"""Exported graphs in ONNX Runtime, at sizes that they were not traced at, against the operators."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from fusedpool import (
    adaptive_pool2d,
    batch_norm_act_pool2d,
    channel_pool,
    fractional_pool2d,
    global_pool2d,
    pool2d,
    pyramid_pool2d,
    ragged_pool,
)
from fusedpool.conv import CONV_KINDS, conv1x1_global_pool2d
from fusedpool.export import export_onnx, onnx_translations
from fusedpool.kinds import KINDS

pytest.importorskip("onnxscript")

USER_KINDS = tuple(kind for kind in KINDS if kind != "stochastic_mean")
TOLERANCE = 1e-4
ANY_MAPS = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}


class Function(nn.Module):
    """A function of tensors, and parameters for it, as a module."""

    def __init__(self, function: Callable[..., Any], **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        self.named = nn.ParameterDict(parameters)
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, **self.named)


def exported(module: nn.Module, examples: Sequence[Tensor], shapes: Sequence[Any], path: Path) -> ort.InferenceSession:
    """The module as a session, its graph checked: nothing but standard operators at opset 18."""
    export_onnx(module, tuple(examples), path / "model.onnx", dynamic_shapes=(tuple(shapes),))
    model = onnx.load(path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)] and not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    return ort.InferenceSession(path / "model.onnx")


def compare(session: ort.InferenceSession, module: nn.Module, inputs: Sequence[Tensor]) -> None:
    names = [given.name for given in session.get_inputs()]
    with torch.no_grad():
        expected = module(*inputs)
    found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    assert len(found) == len(expected)
    for k, (y, exact) in enumerate(zip(found, expected, strict=True)):
        assert y.shape == tuple(exact.shape), k
        if exact.is_floating_point():
            wide = exact.double().numpy()
            error = np.abs(y - wide).max(initial=0) / max(1, np.abs(wide).max(initial=0))
            assert error <= TOLERANCE, (k, error)
        else:
            np.testing.assert_array_equal(y, exact.numpy())


def maps(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


SIZES = ((1, 4, 5, 7), (3, 4, 16, 3), (2, 4, 4, 11))

WINDOWS: tuple[dict[str, Any], ...] = (
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0), "ceil_mode": True},
    {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 1), "dilation": (2, 1), "count_include_pad": False},
    {"kernel_size": (3, 3), "stride": 3, "padding": 1, "count_include_pad": False, "divisor_override": 5},
)


@pytest.mark.parametrize(
    ("window", "kinds"),
    [
        (WINDOWS[0], USER_KINDS),
        (WINDOWS[1], USER_KINDS),
        (WINDOWS[2], ("max", "avg", "lp", "gem", "softpool")),
        (WINDOWS[3], ("avg", "mixed")),
    ],
    ids=["plain", "ceil", "dilated", "overridden"],
)
def test_windows_of_every_kind(window: dict[str, Any], kinds: Sequence[str], tmp_path: Path) -> None:
    activations = ("relu", "leaky_relu", "gelu", "silu", "none")

    def pooled(x: Tensor, scale: Tensor, shift: Tensor) -> list[Tensor]:
        return [
            pool2d(x, kind=kind, scale=scale, shift=shift, activation=activations[k % 5], training=False, **window)
            for k, kind in enumerate(kinds)
        ]

    module = Function(pooled, scale=maps(4, seed=1), shift=maps(4, seed=2))
    session = exported(module, (maps(2, 4, 9, 8),), (ANY_MAPS,), tmp_path)
    for size in SIZES:
        compare(session, module, (maps(*size),))
    compare(session, module, (maps(1, 4, 6, 6, scale=3000.0),))  # no overflow in exponentials


def test_indices(tmp_path: Path) -> None:
    def places(x: Tensor) -> list[Tensor]:
        results = []
        for kind in ("max", "min"):
            results += pool2d(x, 3, 2, 1, kind=kind, return_indices=True)
            results += pool2d(x, (2, 3), 2, (1, 1), (2, 1), kind=kind, ceil_mode=True, return_indices=True)
            results += adaptive_pool2d(x, (3, 4), kind, return_indices=True)
            results += channel_pool(x, 2, kind, return_indices=True)
        return results

    module = Function(places)
    session = exported(module, (maps(2, 4, 9, 8),), (ANY_MAPS,), tmp_path)
    for size in SIZES:
        compare(session, module, (maps(*size).round(),))  # with ties


DOMAINS: dict[str, Callable[..., Tensor]] = {
    "whole": lambda x, scale, weight, kind: global_pool2d(x, (kind,), scale=scale, activation="relu", training=False)[
        0
    ],
    "grid": lambda x, scale, weight, kind: adaptive_pool2d(x, (3, 5), kind, scale=scale, training=False),
    "pyramid": lambda x, scale, weight, kind: pyramid_pool2d(x, (1, 2), kind, scale=scale, training=False),
    "channels": lambda x, scale, weight, kind: channel_pool(x, 2, kind, scale=scale, activation="gelu", training=False),
    "fractional": lambda x, scale, weight, kind: fractional_pool2d(x, 2, (3, 2), None, kind, training=False),
    "batch norm": lambda x, scale, weight, kind: batch_norm_act_pool2d(
        x, None, scale, scale, scale * scale, 3, 2, 1, kind=kind, training=False
    ),
    "convolution": lambda x, scale, weight, kind: conv1x1_global_pool2d(x, weight, scale, "silu", kind),
}
"""Besides windows and images of different sizes: maps, a vector of their channels and a matrix -> one tensor."""


def check(domain: str, kinds: Sequence[str], tmp_path: Path) -> None:
    """The kinds at sizes of which none is a multiple of a grid's."""

    def pooled(x: Tensor, scale: Tensor, weight: Tensor) -> list[Tensor]:
        return [DOMAINS[domain](x, scale, weight, kind) for kind in kinds]

    module = Function(pooled, scale=maps(4, seed=1) + 0.2, weight=maps(4, 4, seed=2))
    session = exported(module, (maps(2, 4, 9, 8),), (ANY_MAPS,), tmp_path)
    for size in SIZES:
        compare(session, module, (maps(*size),))
    if domain in ("whole", "grid"):
        compare(session, module, (maps(1, 4, 1, 2),))
        compare(session, module, (maps(1, 4, 6, 6, scale=1000.0),))


LARGE = ("pyramid", "fractional")
"""Domains whose graphs are large: all kinds of them take long."""


@pytest.mark.parametrize("domain", [pytest.param(d, marks=[pytest.mark.slow] if d in LARGE else []) for d in DOMAINS])
def test_every_domain_of_every_kind(domain: str, tmp_path: Path) -> None:
    check(domain, CONV_KINDS if domain == "convolution" else USER_KINDS, tmp_path)


@pytest.mark.parametrize("domain", LARGE)
def test_large_graphs_of_some_kinds(domain: str, tmp_path: Path) -> None:
    check(domain, ("max", "stochastic", "std"), tmp_path)


def test_a_ratio_exports_for_its_own_size_alone(tmp_path: Path) -> None:
    module = Function(lambda x: [fractional_pool2d(x, 2, None, 0.6, training=False)])
    x = maps(2, 4, 9, 8)
    compare(exported(module, (x,), (None,), tmp_path), module, (x,))
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="use output_size"):
        exported(module, (x,), (ANY_MAPS,), tmp_path)


def test_images_of_different_sizes(tmp_path: Path) -> None:
    n, pixels, ends = torch.export.Dim("n"), torch.export.Dim("pixels"), torch.export.Dim("ends")

    def pooled(x: Tensor, sizes: Tensor, packed: Tensor, offsets: Tensor) -> list[Tensor]:
        padded = global_pool2d(x, USER_KINDS, sizes=sizes, training=False)
        return [*padded, *ragged_pool(packed, offsets, USER_KINDS, training=False)]

    module = Function(pooled)
    shapes = ({0: n, 2: ANY_MAPS[2], 3: ANY_MAPS[3]}, {0: n}, {0: pixels}, {0: ends})
    examples = maps(2, 3, 6, 5), torch.tensor([[6, 2], [3, 5]]), maps(9, 3), torch.tensor([0, 4, 9])
    session = exported(module, examples, shapes, tmp_path)
    compare(session, module, examples)
    sizes, offsets = torch.tensor([[1, 7], [4, 1], [0, 3]]), torch.tensor([0, 1, 1, 12, 20])  # and empty ones
    compare(session, module, (maps(3, 3, 4, 7), sizes, maps(20, 3), offsets))


def test_learned_parameters_are_parameters_of_the_graph(tmp_path: Path) -> None:
    def pooled(x: Tensor, gem: Tensor, mixed: Tensor) -> list[Tensor]:
        windows = pool2d(x, 3, 2, kind="gem", p=gem), pool2d(x, 3, 2, kind="mixed", p=mixed)
        return [*windows, *global_pool2d(x, ("gem", "avg", "mixed"), p={"gem": gem, "mixed": mixed})]

    module = Function(pooled, gem=torch.tensor([2.7]), mixed=torch.tensor(0.2))
    session = exported(module, (maps(2, 4, 9, 8),), (ANY_MAPS,), tmp_path)
    compare(session, module, (maps(*SIZES[0]),))


def test_halves_are_pooled_in_float32(tmp_path: Path) -> None:
    module = Function(lambda x: [*global_pool2d(x, ("sum", "avg")), pool2d(x, 3, kind="lp", p=3.5)])
    x = maps(1, 2, 90, 90).abs().half() + 1  # a sum that a float16 can't count to
    session = exported(module, (x,), (ANY_MAPS,), tmp_path)
    names = [given.name for given in session.get_inputs()]
    found = session.run(None, {names[0]: x.numpy()})
    for y, exact in zip(found, module(x.double()), strict=True):
        assert y.dtype == np.float16
        np.testing.assert_allclose(y, exact.numpy().astype(np.float16), rtol=2**-10)


def test_usual_windows_are_single_operators() -> None:
    module = Function(lambda x: [pool2d(x, 3, 2, 1, kind=kind) for kind in ("max", "avg", "lp", "min")])
    model = export_onnx(module, (maps(1, 2, 8, 8),), dynamic_shapes=((ANY_MAPS,),))
    assert [node.op_type for node in model.graph] == ["MaxPool", "AveragePool", "LpPool", "Neg", "MaxPool", "Neg"]


def test_every_operator_is_translated() -> None:
    registered = {name for name in dir(torch.ops.fusedpool) if hasattr(getattr(torch.ops.fusedpool, name), "default")}
    forward = {name for name in registered if not name.endswith("_backward")}
    translated: list[Any] = list(onnx_translations())
    assert {operator.name().split("::")[1] for operator in translated} == forward


@pytest.mark.parametrize("function", [
    lambda x: pool2d(x, 2, kind="stochastic"),
    lambda x: batch_norm_act_pool2d(x, None, None, None, None, 2),
])  # fmt: skip
def test_what_has_no_meaning_in_evaluation_says_so(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="training=False"):
        export_onnx(Function(function), (maps(1, 2, 8, 8),))


def test_the_control_finds_another_function(tmp_path: Path) -> None:
    module = Function(lambda x: [pool2d(x, 3, 2, kind="avg")])
    session = exported(module, (maps(1, 2, 8, 8),), (ANY_MAPS,), tmp_path)
    with pytest.raises(AssertionError):
        compare(session, Function(lambda x: [pool2d(x, 3, 2, kind="avg") * (1 + 1e-3)]), (maps(1, 2, 8, 8, scale=9.0),))
