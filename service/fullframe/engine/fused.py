"""A contract model on PyTorch with fused kernels: images up to a device, answers down, the next batch meanwhile."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fullframe.engine.arrays import Array
from fullframe.engine.base import Engine
from fullframe.engine.choice import Compute
from fullframe.engine.graph import CudaGraphs, Replays, TorchSession, is_device_error, is_out_of_memory
from fullframe.engine.size_classes import count_class, side_class
from fullframe.errors import Overloaded, first_line
from fullframe.image import Pixels
from fullframe.model.contract import Contract

_MEASURED_SIDE: Final = 512
"""Of the image whose memory is measured on a device, in pixels."""
_RETRY_AFTER: Final = 1.0
"""Seconds until an image for which there was no memory may be sent again."""
_LOG: Final = logging.getLogger(__name__)


class Lane:
    """The way to a device and back, for all sessions on it.

    Graphs are launched one at a time, by a thread of the lane's: what PyTorch keeps of a shape's convolutions, it keeps
    for each thread by itself, and a second launch would only wait for the first's kernels. On a CUDA or ROCm device a
    launch does not wait for its end: while the device computes, other threads copy their images up and answers down,
    on streams of their own, and the next graph is launched.

    Attributes:
        replays: of runs recorded there; none on the CPU.
        lost: why nothing runs on the device any more, which only a new process mends; empty while it does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._launcher = ThreadPoolExecutor(1, "fullframe-launch")
        on_gpu = device.type == "cuda"
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if on_gpu else []  # type: ignore[no-untyped-call]
        self.replays = Replays(CudaGraphs(device)) if on_gpu else None
        self.lost = ""

    def run(
        self, session: TorchSession, outputs: Sequence[str], feeds: Mapping[str, Any], held: Collection[str]
    ) -> list[Any]:
        """As Session.run."""
        tensors = {name: each if isinstance(each, Tensor) else self._upload(each) for name, each in feeds.items()}
        there = self._streams[0].record_event() if self._streams else None
        found, done = self._launcher.submit(self._launch, session, outputs, tensors, there).result()
        if done is None:
            return _on_host(outputs, found, held)
        down = self._streams[1]
        with torch.cuda.stream(down):
            down.wait_event(done)
            return _on_host(outputs, found, held)

    def give_back(self) -> bool:
        """Give the device memory that is kept for the next run; whether recorded runs were among it."""
        return self._launcher.submit(self._give_back).result()

    def _launch(
        self, session: TorchSession, outputs: Sequence[str], feeds: Mapping[str, Tensor], there: torch.Event | None
    ) -> tuple[list[Tensor], torch.Event | None]:
        """The outputs of feeds that are there after an event, and the event after which the outputs are."""
        with torch.inference_mode():
            if there is None:
                answer = session.run_tensors(outputs, feeds), None
            else:
                here = torch.cuda.current_stream(self._device)
                here.wait_event(there)
                answer = session.run_tensors(outputs, feeds), here.record_event()
        if self.replays is not None and self.replays.due:
            with suppress(RuntimeError):  # which says that the process ends
                self._launcher.submit(self.replays.record_next)
        return answer

    def note(self, error: RuntimeError) -> None:
        """Find out whether the device is lost by what a run has raised: then it fails at whatever comes next."""
        if is_device_error(error) and not self.lost and not self._computes():
            self.lost = first_line(error)
            _LOG.error("nothing runs on %s any more until this process is started anew: %s", self._device, self.lost)

    def _computes(self) -> bool:
        try:
            return torch.ones(1, device=self._device).add(1).item() == 2
        except RuntimeError as error:
            return is_out_of_memory(error)

    def _give_back(self) -> bool:
        had = self.replays is not None and self.replays.clear()
        torch.cuda.empty_cache()
        return had

    def _upload(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        if not self._streams:
            return tensor
        with torch.cuda.stream(self._streams[0]):
            pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
            there = pinned.to(self._device, non_blocking=True)
        there.record_stream(torch.cuda.current_stream(self._device))  # its memory is not the next copy's before the end
        return there


def _on_host(names: Sequence[str], found: Sequence[Tensor], held: Collection[str]) -> list[Any]:
    return [each if name in held else each.cpu().numpy() for name, each in zip(names, found, strict=True)]


_lane = cache(Lane)


def default_device() -> str:
    """Where models run unless told: on a CUDA or ROCm device, else on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class DeviceSession:
    """One graph on a device: arrays in and out, held values there."""

    def __init__(self, graph: TorchSession, lane: Lane) -> None:
        self.graph, self._lane = graph, lane

    def run(
        self, outputs: Sequence[str], feeds: Mapping[str, Any], *, held: Collection[str] = (), alone: bool = False
    ) -> list[Any]:
        """As Session.run; raises Overloaded where the device has not the memory."""
        names = sorted(outputs)  # in one order, since each is a program of its own
        again = True
        while again:
            try:
                found = dict(zip(names, self._lane.run(self.graph, names, feeds, held), strict=True))
                return [found[name] for name in outputs]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    self._lane.note(error)
                    raise
                # What follows is outside the handler: with the error, all that it holds of the run is gone
            again = self._lane.give_back()
        raise Overloaded("the device has no memory for this image now; send it again later", _RETRY_AFTER)


class TorchEngine(Engine):
    """A model file on PyTorch, on a CUDA or ROCm device or the CPU.

    In float32 it turns TF32 off, for the whole process: the promise is float32's. New shapes cost a device time, for
    the choice of convolution algorithms and room in the allocator, which is why batches have few.

    Args:
        device: as torch.device takes it; none: the first such device, else the CPU.
        compute: what maps are computed in; pooled values and outputs are float32.

    Raises:
        InvalidModel: the file is no ONNX model, breaks the contract or has an operator that is not known, named by the
            message.
    """

    large_pixels = 2_000_000
    _around_maps = 3.0  # measured 1.0 to 2.8

    def __init__(self, path: Path, *, device: str = "", compute: Compute = "float32") -> None:
        self.path = path
        self._device = torch.device(device or default_device())
        self._dtype: torch.dtype = getattr(torch, compute)
        self.title = f"torch on {self._device}, {compute}"
        # Larger on a device, which has more to launch than to compute for a small one.
        self.piece_pixels = 2**20 if self.accelerated else 2**18
        if compute == "float32":
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        self._session = self.open_session(path)
        graph = self._session.graph
        self.contract = Contract.from_metadata(graph.metadata)
        self.contract.check_graph(graph.inputs, graph.outputs)

    @property
    def accelerated(self) -> bool:
        """As Engine's."""
        return self._device.type == "cuda"

    @property
    def lost(self) -> str:
        """As Engine's."""
        return _lane(self._device).lost

    def open_session(self, model: Path | bytes) -> DeviceSession:
        """As Engine's."""
        lane = _lane(self._device)
        return DeviceSession(TorchSession(model, device=self._device, dtype=self._dtype, replays=lane.replays), lane)

    def run_batch(
        self, images: Pixels, outputs: Sequence[str], *, held: Collection[str] = (), alone: bool = False
    ) -> list[Array]:
        """As Engine's."""
        return self._session.run(outputs, self._feeds(images), held=held)

    def fence(self) -> Callable[[], object]:
        """As Engine's."""
        if not self.accelerated:
            return super().fence()
        wait: Callable[[], object] = torch.cuda.current_stream(self._device).record_event().synchronize
        return wait

    @cached_property
    def bytes_per_pixel(self) -> float:
        """On a device measured, with all outputs; on the CPU estimated from the graph."""
        if not self.accelerated:
            return super().bytes_per_pixel
        height, width = (max(_MEASURED_SIDE, least) for least in self.contract.smallest_size)
        image = self.zeros((1, height, width, 3))
        self.run_batch(image, self.contract.outputs)  # which takes once what stays: weights, kernels, workspaces
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        self.run_batch(image, self.contract.outputs)
        return (torch.cuda.max_memory_allocated(self._device) - before) / (height * width)

    def batch_size(self, height: int, width: int, alike: bool) -> tuple[int, int]:
        """As Engine's: on a device a class of sizes, unless alike."""
        exact = alike or not self.accelerated
        return (height, width) if exact else (side_class(height), side_class(width))

    def batch_count(self, count: int) -> int:
        """As Engine's: on a device a class of numbers."""
        return count_class(count) if self.accelerated else count

    def available_memory(self) -> int:
        """As Engine's: what is free on the device and in PyTorch's cache of it, or the host's if that is less."""
        host = super().available_memory()
        if not self.accelerated:
            return host
        free, _ = torch.cuda.mem_get_info(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return min(host, free + cached)

    def zeros(self, shape: tuple[int, ...]) -> Pixels:
        """As Engine's: in pinned memory, which goes up without a copy on the host."""
        return torch.zeros(shape, dtype=torch.uint8, pin_memory=self.accelerated).numpy()
