"""One ONNX graph on PyTorch: arrays or tensors in, the outputs asked for out."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fullframe.engine.graph.fusions import fuse
from fullframe.engine.graph.ir import needed
from fullframe.engine.graph.module import GraphModule
from fullframe.engine.graph.program import Program, Weights
from fullframe.engine.graph.reader import read_graph
from fullframe.engine.graph.replay import Replays
from fullframe.engine.graph.simplify import simplify
from fullframe.errors import InvalidModel

_NARROW: Final = (torch.bfloat16, torch.float16)


class TorchSession:
    """One graph, runnable from many threads at once.

    Args:
        model: a file, or a serialized graph.
        device: where it runs.
        dtype: of the maps: float32, bfloat16 or float16. What is reduced to a few numbers is float32.
        fused: combine operators into fusedpool's and our own kernels; None: on an accelerator.
        replays: the device's, to replay runs with shapes that come again. The session then is its one thread's and
            stream's too.

    Attributes:
        inputs, outputs: the graph's.
        metadata: its `metadata_props`.

    Raises:
        InvalidModel: it can't be read, or a node can't be run; the message names it.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        fused: bool | None = None,
        replays: Replays | None = None,
    ) -> None:
        if dtype not in (torch.float32, *_NARROW):
            raise ValueError(f"dtype is {dtype}; it must be float32, bfloat16 or float16")
        self.device, self.dtype = torch.device(device), dtype
        self._replays = replays
        self._fused = self.device.type != "cpu" if fused is None else fused
        try:
            self._graph = simplify(read_graph(model))
        except InvalidModel as error:
            named = f"{model.name} can't be loaded: " if isinstance(model, Path) else ""
            raise InvalidModel(f"{named}{error}") from error
        self._weights = Weights(self._graph.constants, self.device, dtype)
        self.inputs, self.outputs = self._graph.inputs, self._graph.outputs
        self.metadata = self._graph.metadata
        self._floats = {each.name for each in self.outputs if each.dtype == "tensor(float)"}
        self._programs: dict[tuple[str, ...], Program] = {}
        self._compiling = threading.Lock()

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The outputs, with the names, dtypes and shapes that ONNX Runtime gives; raises ValueError for names that the
        graph has not."""
        tensors = {name: torch.from_numpy(np.require(value, requirements="W")) for name, value in feeds.items()}
        found = self.run_tensors(outputs, {name: value.to(self.device) for name, value in tensors.items()})
        return [each.cpu().numpy() for each in found]

    @torch.inference_mode()
    def run_tensors(self, outputs: Sequence[str], feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """The same from tensors to tensors on the device, on its current stream, without waiting for it.

        What the graph gives as float32 is so, whatever the session's dtype; how maps lie in memory is not promised.
        Raises ValueError as `run`.
        """
        if set(feeds) != (names := {each.name for each in self.inputs}):
            raise ValueError(f"the graph takes {', '.join(sorted(names))}; it was given {', '.join(sorted(feeds))}")
        if self.dtype is not torch.float32:
            feeds = {name: self._as_map(each) for name, each in feeds.items()}
        program = self._program(outputs)
        found = program.run(feeds) if self._replays is None else self._replays.run(program, feeds)
        return [
            _compact(each.to(torch.float32) if name in self._floats else each)
            for name, each in zip(outputs, found, strict=True)
        ]

    def module(self, outputs: Sequence[str]) -> GraphModule:
        """The same for torch.compile, from feeds with maps of the session's dtype; raises ValueError as `run`."""
        return GraphModule(self._program(outputs), [name in self._floats for name in outputs])

    def _as_map(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.dim() == 4 and value.dtype is torch.float32 else value

    def _program(self, outputs: Sequence[str]) -> Program:
        key = tuple(outputs)
        with self._compiling:
            if key not in self._programs:
                self._programs[key] = self._compiled(key)
            return self._programs[key]

    def _compiled(self, outputs: tuple[str, ...]) -> Program:
        known = [each.name for each in self.outputs]
        if unknown := [name for name in outputs if name not in known]:
            raise ValueError(f"the graph has no output {unknown[0]!r}; it has {', '.join(known)}")
        nodes = fuse(self._graph, outputs) if self._fused else needed(self._graph.nodes, outputs)
        return Program(nodes, [each.name for each in self.inputs], outputs, self._weights)


def _compact(value: Tensor) -> Tensor:
    """What keeps no larger tensor alive: a few rows of a map, say, that are carried to the next strip."""
    is_part = value.device.type != "meta" and value.untyped_storage().nbytes() > value.nbytes
    return value.clone(memory_format=torch.preserve_format) if is_part else value
