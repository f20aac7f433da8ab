"""An image in pieces takes the memory of a piece, from the file to the answer: measured in a fresh process."""

import json
import subprocess
import sys
from pathlib import Path

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
peak, done = anonymous(), threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
[future] = plane.submit(plane.model(), [open_source(path, limits)], Query(logits=True))
logits = None
if patience:
    time.sleep(patience)
    assert not future.done()
    assert future.cancel()
    began = time.monotonic()
    plane.close()
    assert time.monotonic() - began < 10
else:
    logits = future.result().logits.tolist()
done.set()
watcher.join()
print(json.dumps([peak, logits, plane.counters().cancelled]))
"""


def measure(
    path: Path, model: Path, tile_pixels: int = 4_000_000, patience: float = 0
) -> tuple[float, list[float], int]:
    """Peak megabytes, the logits, and how many images were cancelled; with patience, after so many seconds."""
    command = [sys.executable, "-c", MEASURE, str(path), str(model), str(tile_pixels), str(patience)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr
    peak, logits, cancelled = json.loads(done.stdout)
    return peak, logits, cancelled


def picture(height: int, width: int, path: Path) -> Path:
    """A JPEG of smooth noise."""
    noise = pyvips.Image.gaussnoise(width // 8 + 1, height // 8 + 1, mean=128, sigma=60, seed=1)
    bands = [noise.resize(8, vscale=8).crop(0, 0, width, height).linear(1, shift) for shift in (-10, 0, 10)]
    bands[0].bandjoin(bands[1:]).cast("uchar").copy(interpretation="srgb").jpegsave(str(path), Q=80)
    return path


def test_pieces_take_less_memory_than_the_whole_and_give_its_answer(tmp_path: Path) -> None:
    path = picture(2000, 3000, tmp_path / "p.jpg")
    (in_pieces, logits, _), (whole, expected, _) = measure(path, BUNDLED), measure(path, BUNDLED, tile_pixels=10**9)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert in_pieces < 350 < 800 < whole


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_three_hundred_megapixels_take_less_than_600_megabytes(tmp_path: Path) -> None:
    peak, logits, _ = measure(picture(15_000, 20_000, tmp_path / "p.jpg"), BUNDLED)
    assert len(logits) == 10
    assert peak < 600


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_gigapixels_are_started_bounded_and_cancelled(tmp_path: Path) -> None:
    tiles = np.stack([pixels(256, 256, seed=seed) for seed in range(7)])
    path = tmp_path / "huge.tif"
    path.write_bytes(repeating_tiff(100_000, 100_000, tiles))
    peak, _, cancelled = measure(path, BUNDLED, patience=60)
    assert peak < 600
    assert cancelled == 1
