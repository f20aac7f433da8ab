"""numpy arrays and PyTorch tensors by one interface, the Python array API standard; PyTorch is never imported."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = Any
"""A numpy array, or a tensor on whatever device. What is computed of it stays there."""


def namespace(array: Array) -> Any:
    """The standard's functions for arrays of this kind.

    A Python number among tensors is copied to their device, for which the host waits, where a function takes arrays
    alone (maximum, where): give it an array made there (full, ones_like).
    """
    if isinstance(array, np.ndarray):
        return np  # which follows the standard itself from 2.1 on
    from array_api_compat import array_namespace

    return array_namespace(array)


def on_host(array: Array) -> NDArray[Any]:
    """Its values, once they are computed."""
    if isinstance(array, np.ndarray):
        return array
    from array_api_compat import to_device

    return np.asarray(to_device(array, "cpu"))
