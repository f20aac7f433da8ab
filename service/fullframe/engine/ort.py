"""A contract model on ONNX Runtime: pixels in, the graph's outputs out, on one core or on all."""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Final

import onnxruntime as ort

from fullframe.engine.arrays import Array
from fullframe.engine.base import Engine
from fullframe.engine.machine import available_cores
from fullframe.errors import InvalidModel
from fullframe.image import Pixels
from fullframe.model.contract import Contract, TensorInfo

ort.set_default_logger_severity(3)

# A lone image of fewer pixels is done before a second core could help.
_SHARED_PIXELS: Final = 50_000
_CPU: Final = "CPUExecutionProvider"


@cache
def _share_arena() -> None:
    """One arena under all sessions of this process: it holds what runs at once, not what each model once ran."""
    cpu = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(cpu, ort.OrtArenaCfg({}))


class OrtSession:
    """One graph, opened when it is first run: for one core, for all, or for either.

    Args:
        open_: opens it for so many threads.
    """

    def __init__(self, open_: Callable[[int], ort.InferenceSession]) -> None:
        self._open, self._opening = open_, threading.Lock()
        self._opened: dict[int, ort.InferenceSession] = {}

    def run(
        self,
        outputs: Sequence[str],
        feeds: Mapping[str, Any],
        *,
        held: Collection[str] = (),
        alone: bool = False,
        options: ort.RunOptions | None = None,
    ) -> list[Any]:
        """As Session.run; the arrays have the same bits on one core and on all."""
        session = self.on(available_cores() if alone else 1)
        return list(session.run(list(outputs), dict(feeds), options))

    def on(self, threads: int) -> ort.InferenceSession:
        """The session of so many threads: not every process meets a lone or large image."""
        with self._opening:
            if threads not in self._opened:
                self._opened[threads] = self._open(threads)
            return self._opened[threads]


class OrtEngine(Engine):
    """A model file on ONNX Runtime.

    Ordinary images run on one core each, side by side; large ones, and one that has the machine to itself, on all
    cores. The answer has the same bits either way.

    Args:
        arena: keep memory for the next image, except a large one's; without, memory is fragmented and runs are slower.
        pattern: ONNX Runtime's memory patterns: one more plan in memory for every image size that comes by.

    Raises:
        InvalidModel: the file is no ONNX model or breaks the contract.
    """

    title = "onnx"
    # From here on an image is computed on all cores, and its memory is given back, which costs time: the arena would
    # keep it for good.
    large_pixels = 2_000_000
    # A few hundred bytes of memory each; pieces that fit in the caches are the fastest.
    piece_pixels = 2**18
    _around_maps = 1.5  # measured 1.25 to 1.45

    def __init__(self, path: Path, *, arena: bool = True, pattern: bool = False) -> None:
        self.path, self._arena, self._pattern = path, arena, pattern
        self._session = self.open_session(path)
        opened = self._session.on(1)
        self.contract = Contract.from_metadata(opened.get_modelmeta().custom_metadata_map)
        self.contract.check_graph(_tensors(opened.get_inputs()), _tensors(opened.get_outputs()))

    @cached_property
    def _shrinking(self) -> ort.RunOptions | None:
        """Gives the arena's memory back after a run."""
        options = ort.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return options if self._arena else None

    def run_batch(
        self, images: Pixels, outputs: Sequence[str], *, held: Collection[str] = (), alone: bool = False
    ) -> list[Array]:
        """As Engine's. It counts on the smallest size: a pool with an empty output would end the process."""
        pixels = images.shape[1] * images.shape[2]
        large = pixels >= self.large_pixels
        all_cores = large or (alone and pixels >= _SHARED_PIXELS)
        options = self._shrinking if large else None
        return self._session.run(outputs, self._feeds(images), alone=all_cores, options=options)

    def open_session(self, model: Path | bytes) -> OrtSession:
        """As Engine's."""
        return OrtSession(partial(self._open, model))

    def _open(self, model: Path | bytes, threads: int) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = self._arena
        if self._arena:
            _share_arena()
            options.add_session_config_entry("session.use_env_allocators", "1")
        options.enable_mem_pattern = self._pattern
        # Threads that went on spinning between runs would take cores from the other workers.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if isinstance(model, bytes):
            # Graphs made of a model's, strips above all, have many short operators: threads that spin between them
            # take half as much again, for nothing.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            # As the nodes are listed: by default what a strip carries is cut off last, and all its maps live till then.
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        try:
            return ort.InferenceSession(model, options, providers=[_CPU])
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            reason = str(error).splitlines()[0].replace(str(self.path), self.path.name)
            raise InvalidModel(f"{self.path.name} can't be loaded: {reason}") from error


def _tensors(nodes: Sequence[Any]) -> list[TensorInfo]:
    return [TensorInfo(node.name, node.type, node.shape) for node in nodes]
