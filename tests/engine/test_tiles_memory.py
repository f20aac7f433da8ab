"""An image in pieces takes the memory of a piece, from the file to the answer: measured in a fresh process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import pyvips

from fullframe.model.repository import BUNDLED
from tests.image.forged import repeating_tiff
from tests.pictures import pixels

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")

MEASURE = """
import json, re, sys, threading, time
from concurrent.futures import CancelledError
from pathlib import Path
from fullframe.engine.plane import open_plane
from fullframe.engine.query import Query
from fullframe.image import Limits, open_source

path, model, tile_pixels, patience = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
limits = Limits(max_pixels=10**11, max_bytes=2**50)
plane = open_plane([model], limits=limits, tile_pixels=tile_pixels, max_pixels_in_flight=10**12)
before, done = anonymous(), threading.Event()
peak = before
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
[future] = plane.submit(plane.model(), [open_source(path, limits)], Query(logits=True))
estimate = plane.counters().memory_in_flight / 2**20
logits = None
if patience:
    time.sleep(patience)
    assert not future.done()
    assert future.cancel()
    plane.close()  # at the end of a step, not of the image
else:
    logits = future.result().logits.tolist()
done.set()
watcher.join()
print(json.dumps([peak, logits, plane.counters().cancelled, peak - before, estimate]))
"""


class Measured(NamedTuple):
    """In megabytes; `cancelled` is how many images were, `taken` the peak above what was there before the image."""

    peak: float
    logits: list[float]
    cancelled: int
    taken: float
    estimate: float


def measure(path: Path, model: Path, tile_pixels: int = 4_000_000, patience: float = 0) -> Measured:
    """One image in a process of its own; with patience, cancelled after so many seconds."""
    command = [sys.executable, "-c", MEASURE, str(path), str(model), str(tile_pixels), str(patience)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr
    return Measured(*json.loads(done.stdout))


def picture(height: int, width: int, path: Path) -> Path:
    """A JPEG of smooth noise."""
    noise = pyvips.Image.gaussnoise(width // 8 + 1, height // 8 + 1, mean=128, sigma=60, seed=1)
    bands = [noise.resize(8, vscale=8).crop(0, 0, width, height).linear(1, shift) for shift in (-10, 0, 10)]
    bands[0].bandjoin(bands[1:]).cast("uchar").copy(interpretation="srgb").jpegsave(str(path), Q=80)
    return path


def test_pieces_take_less_memory_than_the_whole_and_give_its_answer(tmp_path: Path) -> None:
    path = picture(2000, 3000, tmp_path / "p.jpg")
    in_pieces, whole = measure(path, BUNDLED), measure(path, BUNDLED, tile_pixels=10**9)
    np.testing.assert_allclose(in_pieces.logits, whole.logits, atol=1e-4)
    assert in_pieces.peak < 350 < 800 < whole.peak
    for measured in (in_pieces, whole):
        assert measured.taken < measured.estimate < 2 * measured.taken


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_three_hundred_megapixels_take_less_than_600_megabytes(tmp_path: Path) -> None:
    measured = measure(picture(15_000, 20_000, tmp_path / "p.jpg"), BUNDLED)
    assert len(measured.logits) == 10
    assert measured.peak < 600
    assert measured.taken < measured.estimate


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_gigapixels_are_started_bounded_and_cancelled(tmp_path: Path) -> None:
    tiles = np.stack([pixels(256, 256, seed=seed) for seed in range(7)])
    path = tmp_path / "huge.tif"
    path.write_bytes(repeating_tiff(100_000, 100_000, tiles))
    measured = measure(path, BUNDLED, patience=60)
    assert measured.peak < 600
    assert measured.cancelled == 1
