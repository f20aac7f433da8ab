"""What every room's tests may share: a small contract model, and one server that serves it."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, settings

from tests.models import write_model
from tests.serving import Running, serving

_ASKS_FOR_GPU: Final = re.compile(r"(?<!not )\bgpu\b")
_ON_GPU: Final = _ASKS_FOR_GPU.search(" ".join([os.environ.get("PYTEST_ADDOPTS", ""), *sys.argv]))
if not _ON_GPU:  # Triton reads it when it is imported: kernels run on the CPU, in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Without a GPU `-m gpu` ends here, not with each of its tests."""
    if _ASKS_FOR_GPU.search(session.config.getoption("markexpr")):
        import torch  # not before TRITON_INTERPRET is decided

        if not torch.cuda.is_available():
            pytest.exit("-m gpu runs on a GPU, and PyTorch sees none", returncode=4)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what runs on a GPU unless `gpu` is asked for: `-m slow` is for every machine."""
    if left_out := [] if _ON_GPU else [item for item in items if item.get_closest_marker("gpu")]:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


# A slow machine fails no test.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# A shell's background jobs ignore Ctrl-C, and so would every process that the tests start from one.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .onnx file that follows the contract, quick to run."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny.onnx")


@pytest.fixture(scope="session")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that takes about half a second of one core for a megapixel."""
    return write_model(tmp_path_factory.mktemp("models") / "slow.onnx", name="slow", channels=64, depth=8)


@pytest.fixture(scope="session")
def server(tiny_model: Path) -> Iterator[Running]:
    """A server process with the tiny model, for tests that leave it as they found it."""
    with serving(models=f"tiny={tiny_model}", log_level="debug") as running:
        yield running
