"""Graphs under torch.compile: followed from end to end, once for all sizes, with the answers that they give without."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fullframe.convert.options import Options
from fullframe.convert.pipeline import convert
from fullframe.engine.graph import TorchSession
from fullframe.engine.graph.module import GraphModule
from fullframe.model.geometry import graph_geometry
from fullframe.model.repository import BUNDLED
from tests.convert.families import FAMILIES
from tests.convert.test_families import MEAN, SOME, STD, exported
from tests.engine.graph.parity import PROMISE, largest_difference, serialized
from tests.pictures import pixels

SHAPES = ((96, 90), (103, 112))
QUICK = ("mobilenet-v1", "resnet-squeeze-excite", "inception")


def agrees(
    model: Path | bytes,
    device: torch.device,
    sizes: Sequence[tuple[int, int]] = SHAPES,
    *,
    backend: str = "eager",
    dynamic: bool = True,
    around: Callable[[GraphModule], torch.nn.Module] = lambda module: module,
) -> None:
    """Compiled once, without a break, it computes images of these sizes as it does by steps.

    Without mkldnn, which PyTorch takes for maps above some size, so that on a CPU each side of it is a case by itself.
    """
    session = TorchSession(model, device=device, fused=False)
    torch.compiler.reset()
    compiled = torch.compile(around(session.module(["logits"])), fullgraph=True, dynamic=dynamic, backend=backend)
    plainly = torch.backends.mkldnn.flags(enabled=False)
    with plainly, torch._dynamo.config.patch(error_on_recompile=True), torch.inference_mode():
        for size in sizes:
            images = torch.from_numpy(pixels(*size)[np.newaxis]).to(device)
            (found,) = compiled({"images": images})
            (wanted,) = session.run_tensors(["logits"], {"images": images})
            gap = largest_difference(found.cpu().numpy(), wanted.cpu().numpy())
            assert gap <= (0 if backend == "eager" else PROMISE), size


def check_family(name: str, exporter: str, device: torch.device, **how: Any) -> None:
    model = convert(exported(FAMILIES[name], exporter), Options(name, mean=MEAN, std=STD)).model
    height, width = graph_geometry(model).smallest_size
    agrees(serialized(model), device, [(height + 70, width + 64), (height + 81, width + 110)], **how)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, False])
def test_the_bundled_model(device: torch.device, dynamic: bool) -> None:
    agrees(BUNDLED, device, SHAPES[: 1 + dynamic], dynamic=dynamic)


@pytest.mark.parametrize(
    ("name", "exporter"), [pytest.param(*each, marks=[] if each[0] == QUICK[0] else pytest.mark.slow) for each in SOME]
)
def test_families(device: torch.device, name: str, exporter: str) -> None:
    check_family(name, exporter, device)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_by_inductor(device: torch.device) -> None:
    agrees(BUNDLED, device, SHAPES[:1], backend="inductor", dynamic=False)
    agrees(BUNDLED, device, backend="inductor")
    for each in SOME:
        if each[0] in QUICK:
            check_family(*each, device, backend="inductor")


class Asking(torch.nn.Module):
    """A module that goes on by what is in its images."""

    def __init__(self, inner: GraphModule) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, feeds: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        return self.inner(feeds) if feeds["images"].max() > 0 else []


def test_what_asks_for_a_value_is_told(tiny_model: Path) -> None:
    """The control."""
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Data-dependent"):
        agrees(tiny_model, torch.device("cpu"), around=Asking)


def test_another_shape_that_is_a_case_by_itself_is_told(tiny_model: Path) -> None:
    """The control: of a fixed shape each other one is compiled again."""
    with pytest.raises(torch._dynamo.exc.RecompileError):
        agrees(tiny_model, torch.device("cpu"), dynamic=False)
