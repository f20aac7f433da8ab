"""Programs' runs recorded where shapes come again, and replayed: one launch in place of hundreds.

A small batch is computed sooner than its kernels are launched, one by one, from Python.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final, NamedTuple, Protocol
from weakref import WeakSet, ref

import torch
from torch import Tensor

from fullframe.engine.graph.program import Program
from fullframe.errors import first_line

_MOST_ELEMENTS: Final = 3_000_000
"""Of feeds together, about a megapixel: the launches of a larger run are done before it has been computed."""
_RECORDINGS: Final = 64
"""Kept. Each has its own inputs; their maps share memory, which is that of the largest run."""
_REMEMBERED: Final = 4096
"""Shapes known to have come."""
_MOST_FAILURES: Final = 3
"""After so many nothing is recorded any more: what failed may hold memory for good."""
_LOG: Final = logging.getLogger(__name__)

Key = tuple[ref[Program], tuple[tuple[str, torch.Size, torch.dtype], ...]]
"""A program and the names, shapes and types of its feeds."""


class Recording(Protocol):
    """A run of which the launches have been recorded."""

    def replay(self) -> list[Tensor]:
        """Launch them again, on what is in the same inputs now.

        Returns the outputs, in memory that the next replay of any recording may take.
        """


Record = Callable[[Callable[[], list[Tensor]]], Recording]
"""Records what a function launches; raises what it raises, or why that can't be recorded."""


class _Kept(NamedTuple):
    """A recording with what it reads: its own inputs, and what was uploaded of shapes alone."""

    recording: Recording
    inputs: Mapping[str, Tensor]
    uploaded: Mapping[str, Tensor]

    def replay(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        for name, each in feeds.items():
            self.inputs[name].copy_(each, non_blocking=True)
        return [each.clone() for each in self.recording.replay()]


class Replays:
    """Runs programs on one stream of a device, from one thread at a time; the second run with the same shapes is
    recorded, those that follow are replays.

    Args:
        record: how.
        most: recordings that are kept; the least recently used goes.
    """

    def __init__(self, record: Record, most: int = _RECORDINGS) -> None:
        self._record, self._most = record, most
        self._kept: OrderedDict[Key, _Kept] = OrderedDict()
        self._launched: OrderedDict[Key, bool] = OrderedDict()
        """Whether one that was launched may be recorded when it comes again."""
        self._failures = 0

    def run(self, program: Program, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """As the program's; a recording that fails costs no answer."""
        if program.asks or sum(each.numel() for each in feeds.values()) > _MOST_ELEMENTS:
            return program.run(feeds)
        key = (ref(program), tuple((name, feeds[name].shape, feeds[name].dtype) for name in sorted(feeds)))
        if kept := self._kept.get(key):
            self._kept.move_to_end(key)
            return kept.replay(feeds)
        again = self._launched.get(key, False) and self._failures < _MOST_FAILURES
        self._launched[key] = self._launched.get(key, True)
        self._launched.move_to_end(key)
        while len(self._launched) > _REMEMBERED:
            self._launched.popitem(last=False)
        return self._recorded(key, program, feeds) if again else program.run(feeds)

    def clear(self) -> bool:
        """Let go of all recordings and their memory; whether there were any."""
        had = bool(self._kept)
        self._kept.clear()
        return had

    def _recorded(self, key: Key, program: Program, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """The answer first, and then the recording."""
        uploaded: dict[str, Tensor] = {}
        found = program.run(feeds, uploaded)
        try:
            inputs = {name: torch.empty_like(each) for name, each in feeds.items()}
            recording = self._record(lambda: program.run(inputs, uploaded))
        except Exception as error:
            self._failures += 1
            self._launched[key] = False
            shapes = ", ".join(f"{name} {list(each.shape)}" for name, each in feeds.items())
            _LOG.warning("a run on %s can't be recorded and is launched each time: %s", shapes, first_line(error))
            if isinstance(error, torch.OutOfMemoryError):
                self.clear()
            return found
        del self._launched[key]
        self._kept[key] = _Kept(recording, inputs, uploaded)
        self._forget()
        return found

    def _forget(self) -> None:
        for key in [key for key in self._kept if key[0]() is None]:
            del self._kept[key]
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)


class _CudaRecording:
    """A CUDA graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: list[Tensor]) -> None:
        self._graph, self._outputs = graph, outputs

    def replay(self) -> list[Tensor]:
        """On the current stream."""
        self._graph.replay()
        return self._outputs


class CudaGraphs:
    """Records on a CUDA or ROCm device, without waiting for it, what has been launched there before from this thread:
    a kernel's first launch compiles or loads it, and a convolution's chooses its algorithm.

    All recordings share one pool of memory, which is safe since they are replayed one after another on one stream, and
    what they return is copied there before the next replay.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._alive: WeakSet[_CudaRecording] = WeakSet()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], list[Tensor]]) -> Recording:
        """As Record."""
        if not self._alive:  # PyTorch refuses a pool whose last graph is gone
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            # torch.cuda.graph would first wait for the device and empty the allocator's cache. Other threads copy
            # images meanwhile, which only a capture of this thread's allows.
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                outputs = run()
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
        recording = _CudaRecording(graph, outputs)
        self._alive.add(recording)
        return recording

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Bring stream and allocator out of a capture that has failed."""
        with suppress(Exception):
            graph.capture_end()
        with suppress(Exception):  # PyTorch below 2.12 leaves the allocator in it, where it never takes memory back
            torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
