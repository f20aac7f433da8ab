"""Resident memory stays flat while thousands of image sizes come by; a control shows that the test can fail."""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fullframe import Client
from tests.models import write_model
from tests.pictures import encode
from tests.serving import COMMAND, resident, serving

REQUESTS = 3000
SETTLED = 500
CALLERS = 4
# Once two of the largest images meet, soon or late, ONNX Runtime's arena doubles for the last time.
ALLOWED_GROWTH = 1.25

# A server that never lets go of one image in twenty.
FORGETFUL = """
import sys
from fullframe.engine.ort import OrtEngine
from fullframe.server.lifecycle import run
from fullframe.settings import read_settings

seen, kept, run_model = 0, [], OrtEngine.run

def run_and_keep(engine, pixels, outputs, **how):
    global seen
    seen += 1
    if seen % 20 == 0:
        kept.append(pixels)
    return run_model(engine, pixels, outputs, **how)

OrtEngine.run = run_and_keep
sys.exit(run(read_settings()))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("memory") / "net.onnx", depth=3)


def test_memory_is_flat_over_thousands_of_sizes(model: Path) -> None:
    assert growth(model, COMMAND) < ALLOWED_GROWTH


def test_the_control_grows(model: Path) -> None:
    assert growth(model, [sys.executable, "-c", FORGETFUL]) > ALLOWED_GROWTH


def growth(model: Path, command: Sequence[str]) -> float:
    """Resident memory at the end over that after SETTLED requests; the most of several looks at either time."""
    random = np.random.default_rng(0)
    sizes = [tuple(map(int, size)) for size in random.integers(16, 1025, (REQUESTS, 2))]
    seen = []
    with serving(command=command, models=str(model), workers=2) as running, Client(running.target) as client:

        def ask(size: tuple[int, int]) -> None:
            client.classify(encode(np.full((*size, 3), 128, np.uint8), "JPEG"))

        with ThreadPoolExecutor(CALLERS) as pool:
            for start in range(0, REQUESTS, 100):
                list(pool.map(ask, sizes[start : start + 100]))
                seen.append(resident(running.pid))
    settled = SETTLED // 100
    print([round(value / 2**20) for value in seen], "MiB")
    return max(seen[-settled:]) / max(seen[:settled])
