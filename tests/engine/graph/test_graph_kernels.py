"""Fused graphs through the Triton kernels themselves: in the interpreter on small images, or on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullframe.engine.graph import TorchSession
from fullframe.engine.graph.fusions.epilogues import EPILOGUE, FUNCTIONS
from fullframe.engine.graph.ir import Node
from fullframe.engine.graph.operators.own import OWN
from fullframe.model.ragged import ragged_model
from fullframe.model.repository import BUNDLED
from fusedpool import pool2d, runtime
from tests.engine.graph.parity import PROMISE, Array, differences, in_onnx_runtime, largest_difference, serialized
from tests.engine.graph.test_graph_fusions import GELU, GEM, HEAD, JOINED, NORM, POOL, model
from tests.model.test_ragged_graphs import AVERAGE3, CONV3, build
from tests.models import write_model
from tests.pictures import pixels
from tests.ragged import images_of, padded

HALVES = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""What half precision may differ by, relative to the largest value: some 5 roundings of 2^-8 and 2^-11 each."""


def in_kernels(graph: onnx.ModelProto, feeds: dict[str, Array], device: torch.device, *outputs: str) -> float:
    with runtime.force("triton"):
        found = differences(graph, feeds, [outputs] if outputs else [], device=device, fused=True)
    return max(found.values())


@pytest.mark.parametrize(
    "text",
    [
        f"r = Relu (a) \n y = MaxPool <{POOL}> (r)",
        f"{NORM} \n s = Sigmoid (n) \n r = Mul (n, s) \n y = AveragePool <{POOL}> (r)",
        f"{GELU} \n y = AveragePool <{POOL}, count_include_pad = 1> (r)",
        "y = MaxPool <kernel_shape = [3, 2], strides = [2, 2], ceil_mode = 1> (a)",
        f"{JOINED} \n r = Relu (n) \n y = MaxPool <{POOL}> (r)",
        f"t = GlobalAveragePool (a) \n u = GlobalMaxPool (a) \n {GEM} \n y = Sum (t, u, z)",
        HEAD.format("r = Relu (s)", 0, "r"),
        HEAD.format("m = Neg (s)", 1, "s"),
    ],
)
def test_every_fusion(device: torch.device, text: str) -> None:
    x = np.random.default_rng(1).normal(0, 1, (2, 3, 7, 9)).astype(np.float32)
    assert in_kernels(model(text, "y"), {"x": x}, device) <= PROMISE


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_epilogues_are_what_plain_pytorch_makes(device: torch.device, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, most)) for most in (3, 9, 7, 11))
    dtype = data.draw(st.sampled_from((torch.float32, torch.float16)))
    format = data.draw(st.sampled_from((torch.contiguous_format, torch.channels_last)))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def values(*size: int) -> torch.Tensor | None:
        return torch.randn(size, generator=random).to(device) if data.draw(st.booleans()) else None

    x, addend = (torch.randn(shape, generator=random).to(device, dtype, memory_format=format) for _ in range(2))
    scale, shift = values(shape[1]), values(shape[1])
    sizes = [torch.randint(0, side + 1, (shape[0],), generator=random) for side in shape[2:]]
    own = torch.stack(sizes, 1).to(device).unbind(1) if data.draw(st.booleans()) else [None, None]
    attributes = {
        "activation": data.draw(st.sampled_from(sorted(FUNCTIONS))),
        "fill": data.draw(st.sampled_from((0.0, -torch.inf))),
    }
    node = Node(EPILOGUE, (), ("y",), "epilogue", attributes)
    inputs = (scale, shift, addend if data.draw(st.booleans()) else None, *own)
    with runtime.force("reference"):
        wanted = OWN[EPILOGUE].run(node, x, *inputs)
    into = OWN[EPILOGUE].into
    assert into is not None and isinstance(wanted, torch.Tensor)
    with runtime.force("triton"):
        found, taken = OWN[EPILOGUE].run(node, x, *inputs), x.clone(memory_format=torch.preserve_format)
        assert into(node, taken, *inputs) is taken, "in its own memory"
    for each in (found, taken):
        assert isinstance(each, torch.Tensor) and each.stride() == x.stride()
        torch.testing.assert_close(
            each, wanted, rtol=1e-5 if dtype is torch.float32 else 4e-3, atol=4e-3 * (dtype is torch.float16) + 1e-6
        )


COMPILED = """
import json, sys, torch
from fullframe.engine.graph.fusions.epilogue_kernel import launch
from tests.kernels.compiling import captured, counts

found = []
for target in ("sm_90", "gfx942"):
    for format in (torch.channels_last, torch.contiguous_format):
        x = torch.zeros((2, 64, 28, 80), dtype=torch.float16).to(memory_format=format)
        bias, own = torch.zeros(64), torch.zeros(2, dtype=torch.int64)
        with captured(target) as launches:
            launch(x, x, None, bias, x.clone(memory_format=torch.preserve_format), own, own, "relu", 0.0)
        found += [counts(each, target) for each in launches]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_kernel_compiles_into_wide_loads(tmp_path: Path) -> None:
    """For GPUs that need not be there; no atomics, nothing spilled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 4
    for each in found:
        assert each["wide"] >= 3 and not each["atomic"] and not each["spilled"], each


def test_whole_models(device: torch.device, tmp_path: Path) -> None:
    """Alone, and in a batch of different sizes."""
    graph = onnx.load(write_model(tmp_path / "m.onnx"))
    feeds = {"images": pixels(13, 10)[np.newaxis]}
    assert in_kernels(graph, feeds, device, "features", "logits") <= PROMISE
    for each in (graph, build(CONV3, AVERAGE3)):
        assert in_kernels(ragged_model(each), padded(images_of([(9, 12), (12, 5)])), device, "logits") <= PROMISE


def test_a_kernel_that_reads_a_pixel_too_far_would_not_pass(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""

    def unpadded(x: torch.Tensor, kernel: Any, stride: Any, padding: Any, *rest: Any, **options: Any) -> Any:
        return pool2d(x, kernel, stride, 0, *rest, **options)

    monkeypatch.setattr("fullframe.engine.graph.fusions.windows.pool2d", unpadded)
    text = "y = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (a)"
    with pytest.raises(AssertionError):
        in_kernels(model(text, "y"), {"x": np.ones((1, 3, 5, 5), np.float32)}, device)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_is_near(device: torch.device, dtype: torch.dtype, fused: bool) -> None:
    graph = onnx.load(BUNDLED)
    images = images_of([(24, 31), (33, 18)], seed=3)
    for each, feeds in ((graph, {"images": images[0][np.newaxis]}), (ragged_model(graph), padded(images))):
        wanted = in_onnx_runtime(serialized(each), feeds)
        names = list(wanted)
        found = TorchSession(serialized(each), device=device, dtype=dtype, fused=fused).run(names, feeds)
        for name, mine in zip(names, found, strict=True):
            gap = np.abs(mine - wanted[name]).max() / np.abs(wanted[name]).max()
            assert mine.dtype == wanted[name].dtype and gap <= HALVES[dtype], (name, gap)
        if largest_difference(found[0], wanted[names[0]]) <= 1e-5:
            raise AssertionError("computed in float32")
