"""Where graphs run: on the CPU, and with `-m gpu` on a GPU, in float32 proper."""

from collections.abc import Iterator

import pytest
import torch

from tests.learn.conftest import one_thread

__all__ = ["one_thread"]  # a fixture for these tests too


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """TF32 is off."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield torch.device(request.param)
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
