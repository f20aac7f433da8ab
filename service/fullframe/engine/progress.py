"""How far the work on an image is, told while it goes on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

OnShare: TypeAlias = Callable[[float], object]
"""Told, on a worker's thread and often, what share of an image is computed, 0 to 1; a device may still be at work on
the last two pieces of it."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What has become of one image so far.

    Attributes:
        received: bytes that the server has; 0 in this process.
        total: bytes of the file; 0 in this process.
        computed: share of the image, 0 to 1.
    """

    received: int
    total: int
    computed: float


OnProgress: TypeAlias = Callable[[Progress], object]
OnStreamProgress: TypeAlias = Callable[[int, Progress], object]
"""With the image's number before it."""


def unheard(share: float) -> None:
    """For those who do not ask."""
