"""A contract model on ONNX Runtime: pixels in, the graph's outputs out, on one core or on all."""

import threading
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from fullframe.engine.machine import available_cores
from fullframe.engine.query import FloatArray
from fullframe.errors import InvalidInput, InvalidModel
from fullframe.image import Pixels
from fullframe.model.contract import INPUT, SIZES, Contract, TensorInfo

ort.set_default_logger_severity(3)

# A lone image of fewer pixels is done before a second core could help.
_SHARED_PIXELS: Final = 50_000
_CPU: Final = "CPUExecutionProvider"
LARGE_PIXELS: Final = 2_000_000
"""From here on an image is computed on all cores, and its memory is given back, which costs time: the arena would keep
it for good."""
# ONNX Runtime takes so many times the memory of the maps alone: measured 1.25 to 1.45.
_AROUND_MAPS: Final = 1.5


@cache
def _share_arena() -> None:
    """One arena under all sessions of this process: it holds what runs at once, not what each model once ran."""
    cpu = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(cpu, ort.OrtArenaCfg({}))


class OrtEngine:
    """One model file, runnable from many threads at once.

    Ordinary images run on one core each, side by side; large ones, and one that has the machine to itself, on all
    cores. The answer has the same bits either way.

    Args:
        arena: keep memory for the next image, except a large one's; without, memory is fragmented and runs are slower.
        pattern: ONNX Runtime's memory patterns: one more plan in memory for every image size that comes by.

    Attributes:
        path: the file.
        contract: its metadata, checked against its graph.

    Raises:
        InvalidModel: the file is no ONNX model or breaks the contract.
    """

    def __init__(self, path: Path, *, arena: bool = True, pattern: bool = False) -> None:
        self.path, self._arena, self._pattern = path, arena, pattern
        self._one_core = self.open_session(path, 1)
        self._all_cores_session: ort.InferenceSession | None = None
        self._opening = threading.Lock()
        self.contract = Contract.from_metadata(self._one_core.get_modelmeta().custom_metadata_map)
        self.contract.check_graph(_tensors(self._one_core.get_inputs()), _tensors(self._one_core.get_outputs()))

    def _all_cores(self) -> ort.InferenceSession:
        """Opened when first needed: not every process meets a lone or large image."""
        with self._opening:
            if self._all_cores_session is None:
                self._all_cores_session = self.open_session(self.path, available_cores())
            return self._all_cores_session

    @cached_property
    def _shrinking(self) -> ort.RunOptions | None:
        """Gives the arena's memory back after a run."""
        options = ort.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return options if self._arena else None

    def run(self, pixels: Pixels, outputs: Sequence[str], *, alone: bool = False) -> dict[str, FloatArray]:
        """Run the graph on one image.

        Args:
            pixels: uint8 [H, W, 3].
            outputs: names from the contract; only what they need is returned.
            alone: no other image is being worked on.

        Returns:
            Each output without its batch axis.

        Raises:
            InvalidInput: the image is smaller than the graph can take. Asking ONNX Runtime would be unwise: a pool
                with an empty output ends the process.
        """
        height, width, _ = pixels.shape
        self.check_size(height, width)
        large = height * width >= LARGE_PIXELS
        all_cores = large or (alone and height * width >= _SHARED_PIXELS)
        session = self._all_cores() if all_cores else self._one_core
        feeds = {INPUT: pixels[np.newaxis]}
        if self.contract.ragged:
            feeds[SIZES] = np.array([[height, width]], np.int64)
        results = session.run(list(outputs), feeds, self._shrinking if large else None)
        return {name: result[0] for name, result in zip(outputs, results, strict=True)}

    @property
    def accelerated(self) -> bool:
        """Whether another device than the CPU runs the graph."""
        return bool(self._one_core.get_providers()[0] != _CPU)

    @cached_property
    def bytes_per_pixel(self) -> float:
        """Of memory, while an image of more than a few pixels is run whole; 0 where the graph can't be followed."""
        from fullframe.model.memory import bytes_per_pixel  # the onnx package takes a while

        return _AROUND_MAPS * bytes_per_pixel(self.path)

    def check_size(self, height: int, width: int) -> None:
        """Raise InvalidInput, naming the smallest size that works, if the graph can't take height x width."""
        least_height, least_width = self.contract.smallest_size
        if height < least_height or width < least_width:
            raise InvalidInput(
                f"the image is {width}x{height} pixels; this model needs at least {least_width}x{least_height}",
                "images",
            )

    def open_session(self, model: Path | bytes, threads: int, *, spinning: bool = True) -> ort.InferenceSession:
        """A session on a file or a serialized graph with this engine's settings; raises InvalidModel.

        Args:
            spinning: threads spin while they wait for the next operator's work: soonest done, at the cost of others.
        """
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
        if not spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            return ort.InferenceSession(model, options, providers=[_CPU])
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            reason = str(error).splitlines()[0].replace(str(self.path), self.path.name)
            raise InvalidModel(f"{self.path.name} can't be loaded: {reason}") from error


def _tensors(nodes: Sequence[Any]) -> list[TensorInfo]:
    return [TensorInfo(node.name, node.type, node.shape) for node in nodes]
