"""Few shapes of batches for images of all sizes: what their sides and numbers are padded to."""

from typing import Final

_SIDES: Final = 8
_COUNTS: Final = 4
"""Classes between a power of two and the next."""


def side_class(side: int) -> int:
    """The least class of sides, in pixels, that is not below: at most an eighth more."""
    return _class(side, _SIDES)


def count_class(count: int) -> int:
    """The least class of numbers of images that is not below: less than a quarter more."""
    return _class(count, _COUNTS)


def _class(number: int, classes: int) -> int:
    step = max(1, (1 << (number - 1).bit_length()) // (2 * classes))
    return -(-number // step) * step
