"""Where kernel tests run: plain PyTorch on the CPU, the kernels in Triton's interpreter, the kernels on a GPU (-m gpu).

A test that takes `device` runs on each path in turn; one that takes `kernel_device`, on the kernels alone. Tensors made
on it take that path; nothing needs forcing. Both suit hypothesis' @given.
"""

from collections.abc import Iterator
from typing import Final

import pytest
import torch

_GPU: Final = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(scope="module", params=["reference", "triton", _GPU])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the test's tensors go, on the CPU path and on the kernels."""
    return torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.fixture(scope="module", params=["triton", _GPU])
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """Where the test's tensors go, on the kernels."""
    return torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.fixture(autouse=True)
def _path(request: pytest.FixtureRequest) -> Iterator[None]:
    """Force the path that `device` or `kernel_device` stands for, for this test alone."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    path = params.get("device", params.get("kernel_device"))
    if path is None:
        yield
        return
    from fusedpool import runtime  # not before TRITON_INTERPRET is decided

    with runtime.force("reference" if path == "reference" else "triton"):
        yield
