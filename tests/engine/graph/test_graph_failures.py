"""What is read in the messages of PyTorch, of NVIDIA's and AMD's libraries, and of Triton."""

import pytest
import torch

from fullframe.engine.graph import is_device_error, is_out_of_memory

TAIL = "\nCUDA kernel errors might be asynchronously reported at some other API call\nout of memory"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        torch.OutOfMemoryError("HIP out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: out of memory" + TAIL),
        torch.AcceleratorError("CUDA error: out of memory" + TAIL),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("HIP error: out of memory"),
    ],
)
def test_a_want_of_memory_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_device_error(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered" + TAIL),
        torch.AcceleratorError("CUDA error: device-side assert triggered" + TAIL),
        RuntimeError("HIP error: unspecified launch failure"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
)
def test_other_errors_of_a_device_are_no_want_of_memory(error: Exception) -> None:
    assert is_device_error(error)
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("out of memory"), RuntimeError("")])
def test_errors_of_a_program_say_nothing_of_the_device(error: Exception) -> None:
    assert not is_out_of_memory(error)
    assert not is_device_error(error)
