"""What an error says of the device that it comes from."""

import re
from typing import Final

import torch

from fullframe.errors import first_line

_NO_MEMORY: Final = re.compile(r"\bout of memory\b|STATUS_ALLOC_FAILED|ERROR_OUT_OF_MEMORY|hipErrorOutOfMemory")
"""Of the allocator, of what takes memory past it (cuBLAS, cuDNN, the driver), and of Triton."""
_OF_DEVICE: Final = re.compile(r"\b(CUDA|HIP) error\b|Triton Error \[|\b(CUBLAS|CUDNN|HIPBLAS)_STATUS_|miopenStatus")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory for a run, which may be tried again with less."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(first_line(error)) is not None


def is_device_error(error: BaseException) -> bool:
    """Whether the device or its driver failed otherwise. After some such errors nothing runs there any more."""
    of_device = isinstance(error, RuntimeError) and _OF_DEVICE.search(first_line(error)) is not None
    return of_device and not is_out_of_memory(error)
