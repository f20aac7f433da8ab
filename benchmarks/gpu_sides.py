"""The ways to compute images' logits that benchmarks.gpu compares: our engine, PyTorch, ONNX Runtime."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import onnxruntime as ort
import torch

from benchmarks.workloads import Size
from fullframe.engine.choice import Compute
from fullframe.engine.fused import TorchEngine
from fullframe.engine.graph import TorchSession
from fullframe.engine.plane import Plane, Served
from fullframe.engine.query import FloatArray, Query
from fullframe.engine.ragged import padded
from fullframe.errors import first_line
from fullframe.image import Limits, Picture, Pixels, open_raw
from fullframe.model.contract import INPUT
from fullframe.model.repository import ModelFile

LOGITS: Final = "logits"
BATCH: Final = 32
"""Images padded to the largest of them."""


class Side:
    """One way to compute logits, of many images or of one."""

    name: str

    def __init__(self, file: ModelFile, device: str, compute: Compute) -> None:
        """Raises RuntimeError, or what a runtime raises, where it can't be had."""
        raise NotImplementedError

    def ready(self, images: Sequence[Pixels]) -> Sequence[Any]:
        """The images as this side takes them, which is not timed."""
        return images

    def run(self, images: Sequence[Any]) -> list[FloatArray]:
        """float32 [K] of each, in their order."""
        return [self.one(image) for image in images]

    def one(self, image: Any) -> FloatArray:
        """Of a lone image, once its logits are on the host."""
        return self.run([image])[0]

    def close(self) -> None:
        """End its threads."""


class Fullframe(Side):
    """The engine behind the server."""

    name = "fullframe"

    def __init__(self, file: ModelFile, device: str, compute: Compute) -> None:
        engine = TorchEngine(file.path, device=device, compute=compute)
        models = [Served(file.name, file.version, True, engine)]
        self._plane = Plane(models, limits=Limits(), max_pixels_in_flight=10**10, batching="ragged")
        self._plane.warm_up()

    def ready(self, images: Sequence[Pixels]) -> list[Picture]:
        """As a request brings them."""
        return [open_raw(image.tobytes(), image.shape[0], image.shape[1], self._plane.limits) for image in images]

    def run(self, images: Sequence[Picture]) -> list[FloatArray]:
        """All queued at once."""
        futures = self._plane.submit(self._plane.model(), images, Query(top_k=0, logits=True))
        found = [future.result().logits for future in futures]
        answered = [each for each in found if each is not None]
        if len(answered) < len(images):
            raise RuntimeError(f"{len(images) - len(answered)} of {len(images)} images came back without logits")
        return answered

    def close(self) -> None:
        """As Side's."""
        self._plane.close()


class OneByOne(Side):
    """The graph's own operators in PyTorch."""

    name = "pytorch one by one"

    def __init__(self, file: ModelFile, device: str, compute: Compute) -> None:
        self._device = device
        session = TorchSession(file.path, device=device, dtype=getattr(torch, compute), fused=False)
        self._graph: torch.nn.Module = session.module([LOGITS])

    def one(self, image: Pixels) -> FloatArray:
        """As Side's."""
        logits: FloatArray = self._logits(image[np.newaxis])[0]
        return logits

    @torch.inference_mode()
    def _logits(self, images: Pixels) -> FloatArray:
        """[N, K] of uint8 [N, H, W, 3]."""
        found: FloatArray = self._graph({INPUT: torch.from_numpy(images).to(self._device)})[0].cpu().numpy()
        return found


class Compiled(OneByOne):
    """The same, compiled."""

    name = "torch.compile one by one"

    def __init__(self, file: ModelFile, device: str, compute: Compute) -> None:
        super().__init__(file, device, compute)
        self._graph.compile(fullgraph=True, dynamic=True)


class PaddedToLargest(OneByOne):
    """What batching does without masks."""

    name = "pytorch padded to the largest"

    def run(self, images: Sequence[Pixels]) -> list[FloatArray]:
        """In the order that they come."""
        found: list[FloatArray] = []
        for first in range(0, len(images), BATCH):
            part = images[first : first + BATCH]
            size: Size = (max(image.shape[0] for image in part), max(image.shape[1] for image in part))
            found += list(self._logits(padded(part, np.zeros((len(part), *size, 3), np.uint8))))
        return found


class OnnxRuntime(Side):
    """On a GPU its CUDA provider, as its users are told to set it for changing sizes."""

    name = "onnxruntime one by one"

    def __init__(self, file: ModelFile, device: str, compute: Compute) -> None:
        provider = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[device]
        if compute != "float32":
            raise RuntimeError(f"it computes in the file's own float32, not in {compute}")
        if provider not in ort.get_available_providers():
            raise RuntimeError(f"the onnxruntime that is installed has no {provider}; onnxruntime-gpu has")
        options = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"} if device == "cuda" else {}
        self._session = ort.InferenceSession(file.path, providers=[(provider, options)])
        if self._session.get_providers()[0] != provider:
            raise RuntimeError(f"its {provider} is installed and does not load")

    def one(self, image: Pixels) -> FloatArray:
        """As Side's."""
        logits: FloatArray = self._session.run([LOGITS], {INPUT: image[np.newaxis]})[0][0]
        return logits


TURNS: Final[tuple[tuple[type[Side], ...], ...]] = (
    (Fullframe, OneByOne, PaddedToLargest),
    (OnnxRuntime,),
    (Compiled,),
)
"""Sides that take turns with each other: what matters most first, what may compile for minutes last."""
SIDES: Final = tuple(side for turn in TURNS for side in turn)


def usable(
    make: type[Side], file: ModelFile, device: str, compute: Compute, images: Sequence[Pixels]
) -> Iterator[Side]:
    """The side, where it computes these images; else a line on stderr."""
    side: Side | None = None
    try:
        side = make(file, device, compute)
        side.run(side.ready(images))
    except Exception as wrong:  # a baseline that can't do the work is no reason to lose the others' figures
        print(f"benchmarks.gpu: {make.name}, {compute}, is left out: {first_line(wrong)}", file=sys.stderr)
        if side is not None:
            side.close()
        return
    yield side
