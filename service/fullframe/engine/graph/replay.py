"""Programs' runs recorded where shapes come again, and replayed: one launch in place of hundreds.

A small batch is computed sooner than its kernels are launched, one by one, from Python.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol
from weakref import WeakSet, ref

import torch
from torch import Tensor

from fullframe.engine.graph.failures import is_out_of_memory
from fullframe.engine.graph.program import Program
from fullframe.errors import first_line

_MOST_ELEMENTS: Final = 3_000_000
"""Of feeds together, about a megapixel: the launches of a larger run are done before it has been computed."""
_RECORDINGS: Final = 256
"""Kept. Each has its own inputs; their maps share memory, which is that of the largest run."""
_SIGHTS: Final = 3
"""Of a shape, until it is recorded, which costs as much as some launches."""
_WARMER: Final = 2
"""A shape takes another's place once it is seen so many times as often: of shapes seen alike, those recorded stay."""
_AGEING: Final = 4096
"""Runs after which all counts are halved, so that what came often once does not stay for ever."""
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


@dataclass
class _Kept:
    """A recording with what it reads: its own inputs, and what was uploaded of shapes alone.

    Attributes:
        sights: of its shapes, aged.
    """

    recording: Recording
    inputs: Mapping[str, Tensor]
    uploaded: Mapping[str, Tensor]
    sights: int

    def replay(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        for name, each in feeds.items():
            self.inputs[name].copy_(each, non_blocking=True)
        return [each.clone() for each in self.recording.replay()]


class _Due(NamedTuple):
    """A run that is to be recorded."""

    program: Program
    feeds: Mapping[str, Tensor]
    uploaded: dict[str, Tensor]


class Replays:
    """Runs programs on one stream of a device, from one thread at a time; those with shapes that come often are
    recorded, and replayed from then on.

    Args:
        record: how.
        most: recordings that are kept; for a shape that is seen more often, the one seen least goes.
    """

    def __init__(self, record: Record, most: int = _RECORDINGS) -> None:
        self._record, self._most = record, most
        self._kept: dict[Key, _Kept] = {}
        self._sights = Counter[Key]()
        """Of what is launched, aged."""
        self._due: dict[Key, _Due] = {}
        self._refused: set[Key] = set()
        """What can't be recorded."""
        self._runs = 0

    @property
    def due(self) -> bool:
        """Whether there is something for record_next."""
        return bool(self._due)

    def run(self, program: Program, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """As the program's."""
        if program.asks or sum(each.numel() for each in feeds.values()) > _MOST_ELEMENTS:
            return program.run(feeds)
        self._age()
        key = (ref(program), tuple((name, feeds[name].shape, feeds[name].dtype) for name in sorted(feeds)))
        if kept := self._kept.get(key):
            kept.sights += 1
            return kept.replay(feeds)
        self._sights[key] += 1
        if key in self._due or not self._deserves(key):
            return program.run(feeds)
        due = _Due(program, feeds, {})
        found = program.run(feeds, due.uploaded)
        self._due[key] = due
        return found

    @torch.inference_mode()
    def record_next(self) -> None:
        """Record one of the runs that are due, if any: after its answer, which is not to wait for it.

        One that fails is logged, and is launched each time.
        """
        if not self._due:
            return
        key = next(iter(self._due))
        program, feeds, uploaded = self._due.pop(key)
        if not self._deserves(key):
            return
        try:
            inputs = {name: torch.empty_like(each) for name, each in feeds.items()}
            recording = self._record(lambda: program.run(inputs, uploaded))
        except Exception as error:
            self._refused.add(key)
            shapes = ", ".join(f"{name} {list(each.shape)}" for name, each in feeds.items())
            _LOG.warning("a run on %s can't be recorded and is launched each time: %s", shapes, first_line(error))
            if is_out_of_memory(error):
                self.clear()
            return
        if len(self._kept) >= self._most:
            coldest = self._coldest()
            self._sights[coldest] = self._kept.pop(coldest).sights
        self._kept[key] = _Kept(recording, inputs, uploaded, self._sights.pop(key))

    def clear(self) -> bool:
        """Let go of all recordings and their memory; whether there were any."""
        had = bool(self._kept)
        self._kept.clear()
        self._due.clear()
        return had

    def _deserves(self, key: Key) -> bool:
        """Whether what is launched had better be recorded."""
        sights = self._sights[key]
        if sights < _SIGHTS or key in self._refused or len(self._refused) >= _MOST_FAILURES:
            return False
        for gone in [each for each in self._kept if each[0]() is None]:
            del self._kept[gone]
        return len(self._kept) < self._most or sights >= _WARMER * self._kept[self._coldest()].sights

    def _coldest(self) -> Key:
        return min(self._kept, key=lambda key: self._kept[key].sights)

    def _age(self) -> None:
        self._runs += 1
        if self._runs % _AGEING == 0:
            self._sights = Counter({key: sights // 2 for key, sights in self._sights.items() if sights > 1})
            for kept in self._kept.values():
                kept.sights //= 2


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

    Recordings share one pool of memory, which is safe since they are replayed one after another on one stream, and
    what they return is copied there before the next replay.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._alive: WeakSet[_CudaRecording] = WeakSet()
        self._begin_anew()

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
        """Bring the allocator out of a capture that has failed, and let the next have nothing of it: PyTorch below 2.12
        leaves the pool's part for the host's memory in that capture."""
        with suppress(Exception):
            graph.capture_end()
        with suppress(Exception):  # PyTorch below 2.12 leaves the allocator in it, where it never takes memory back
            torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
