"""What runs a contract model: the seam between images and a runtime, ONNX Runtime or PyTorch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

import numpy as np

from fullframe.engine.arrays import Array
from fullframe.engine.machine import available_memory
from fullframe.errors import InvalidInput
from fullframe.image import Pixels
from fullframe.model.contract import INPUT, SIZES, Contract

if TYPE_CHECKING:
    from fullframe.model.memory import MapMemory

# Where a side is below the stride, maps from all depths are of about one size, and more memory stays around them:
# measured 1.1 to 1.5 times what it is for other images.
_AROUND_FLAT: Final = 1.75


class Session(Protocol):
    """One graph, runnable from many threads at once."""

    def run(
        self, outputs: Sequence[str], feeds: Mapping[str, Any], *, held: Collection[str] = (), alone: bool = False
    ) -> list[Any]:
        """Compute outputs, as numpy arrays.

        Args:
            feeds: an array for each input, or what came back for a held output of a session of the same engine.
            held: outputs that stay where they are computed: arrays that are not waited for.
            alone: no other image is being worked on.
        """


class Engine(ABC):
    """A contract model on one runtime, runnable from many threads at once.

    Attributes:
        path: the file.
        contract: its metadata, checked against its graph.
        title: the runtime and what it computes on, for people.
        large_pixels: an image of so many is computed by itself, with all that the machine has.
        piece_pixels: of the pieces that a huge image is computed in.
    """

    path: Path
    contract: Contract
    title: str
    large_pixels: ClassVar[int]
    piece_pixels: int
    _around_maps: ClassVar[float]
    """The runtime takes so many times the memory of the maps alone, on a CPU."""

    @property
    def accelerated(self) -> bool:
        """Whether another device than the CPU computes."""
        return False

    @property
    def lost(self) -> str:
        """Why nothing can be computed any more, until the process is started anew; empty while it can."""
        return ""

    @abstractmethod
    def open_session(self, model: Path | bytes) -> Session:
        """A session on a file or a serialized graph with this engine's settings; raises InvalidModel."""

    @abstractmethod
    def run_batch(
        self, images: Pixels, outputs: Sequence[str], *, held: Collection[str] = (), alone: bool = False
    ) -> list[Array]:
        """Run the graph on images of one size, uint8 [N, H, W, 3], not below the smallest; outputs with their batch
        axis, held ones as a session's."""

    def fence(self) -> Callable[[], object]:
        """What waits, when called, for the end of all that this thread has launched so far."""
        return lambda: None  # on a CPU nothing is left to do when a call has returned

    @cached_property
    def _maps(self) -> "MapMemory":
        from fullframe.model.memory import map_memory  # the onnx package takes a while

        return map_memory(self.path)

    @cached_property
    def bytes_per_pixel(self) -> float:
        """Of memory, while a large image is run whole, estimated from the graph; 0 where that can't be followed."""
        return self._around_maps * self._maps.bytes_per_pixel

    def bytes_for(self, height: int, width: int) -> float:
        """Of memory, while an image of that size is run whole: for each of its pixels more where a side is short."""
        down, across = self.contract.stride
        around = _AROUND_FLAT if height < down or width < across else 1.0
        return around * self.bytes_per_pixel * self._maps.pixels_for(height, width)

    @cached_property
    def carried_bytes(self) -> float:
        """Of memory, for each pixel of a huge image's width: what its strips carry; 0 where it can't be cut."""
        from fullframe.model.strips import carried_bytes

        return carried_bytes(self.path)

    def run(
        self, pixels: Pixels, outputs: Sequence[str], *, held: Collection[str] = (), alone: bool = False
    ) -> dict[str, Array]:
        """Run the graph on one image.

        Args:
            pixels: uint8 [H, W, 3].
            outputs: names from the contract; only what they need is returned.
            held, alone: as a session's.

        Returns:
            Each output without its batch axis, float32.

        Raises:
            InvalidInput: the image is smaller than the graph can take.
        """
        self.check_size(*pixels.shape[:2])
        results = self.run_batch(pixels[np.newaxis], outputs, held=held, alone=alone)
        return {name: result[0] for name, result in zip(outputs, results, strict=True)}

    def check_size(self, height: int, width: int) -> None:
        """Raise InvalidInput, naming the smallest size that works, if the graph can't take height x width."""
        least_height, least_width = self.contract.smallest_size
        if height < least_height or width < least_width:
            raise InvalidInput(
                f"the image is {width}x{height} pixels; this model needs at least {least_width}x{least_height}",
                "images",
            )

    def batch_size(self, height: int, width: int, alike: bool) -> tuple[int, int]:
        """What images in a batch are padded to, whose largest height and width are given.

        Args:
            alike: they are several, of one size; such a size is likely to come again.
        """
        return height, width

    def batch_count(self, count: int) -> int:
        """Of how many images a batch of so many had better be: as many, or more, to be padded with others."""
        return count

    def available_memory(self) -> int:
        """Bytes of the memory that images are computed in."""
        return available_memory()

    def zeros(self, shape: tuple[int, ...]) -> Pixels:
        """uint8, in memory that the runtime reads soonest."""
        return np.zeros(shape, np.uint8)

    def _feeds(self, images: Pixels) -> dict[str, Any]:
        """What the model's own graph takes for images of one size."""
        if not self.contract.ragged:
            return {INPUT: images}
        return {INPUT: images, SIZES: np.tile(np.array(images.shape[1:3], np.int64), (len(images), 1))}
