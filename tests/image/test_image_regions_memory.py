"""What reading in pieces costs is bounded by the pieces: resident anonymous memory, measured in a fresh process."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pyvips

from tests.image.forged import repeating_tiff
from tests.pictures import pixels

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")

TILES = np.stack([pixels(256, 256, seed=seed) // 64 * 64 for seed in range(7)])
MEASURE = """
import json, re, sys, threading, time
from pathlib import Path
from fullframe.image import Limits, open_source

path, how, tile, halo, stop = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
limits = Limits(max_pixels=10**11, max_bytes=2**40)
picture = open_source(path, limits)
before = peak = anonymous()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
total = 0
if how == "whole":
    total = int(picture.pixels()[::64, ::64].sum())
else:
    with picture.regions() as opened:
        for top in range(0, min(stop, picture.height), tile):
            for left in range(0, picture.width, tile):
                height = min(tile + halo, picture.height - top)
                width = min(tile + halo, picture.width - left)
                inner = opened.read(top, left, height, width)[:tile, :tile]
                total += int(inner[-top % 64 :: 64, -left % 64 :: 64].sum())
done.set()
watcher.join()
estimate = max(picture.opening_bytes, picture.reading_bytes(tile + halo)) / 2**20
print(json.dumps([peak - before, total, estimate + 2 * 3 * (tile + halo) ** 2 / 2**20]))
"""


def measure(path: Path, how: str = "regions", tile: int = 1024, stop: int = 10**9) -> tuple[float, int]:
    """Peak growth in megabytes, and the sum of every 64th pixel of every 64th row; of rows above `stop` alone.

    In regions the growth must be within what the picture says that it takes, and not far.
    """
    command = [sys.executable, "-c", MEASURE, str(path), how, str(tile), "128", str(stop)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=3000)
    assert done.stderr == ""
    peak, total, estimate = json.loads(done.stdout)
    if how == "regions":
        assert peak < estimate < 2 * peak
    return peak, total


def waves(height: int, width: int) -> pyvips.Image:
    """An RGB picture of that size, computed as it is written."""
    at = pyvips.Image.xyz(width, height)
    bands = [(at[0] / 3 + at[1] / 5) % 256, (at[0] + at[1] * 2) % 256, (at[0] * at[1] / 9000) % 256]
    return bands[0].bandjoin(bands[1:]).cast("uchar").copy(interpretation="srgb")


def turned(image: pyvips.Image, orientation: int) -> pyvips.Image:
    image = image.copy()
    image.set_type(pyvips.GValue.gint_type, "orientation", orientation)
    return image


def test_a_jpeg_in_strips(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    waves(9000, 12000).jpegsave(str(path))
    (in_strips, total), (at_once, expected) = measure(path), measure(path, "whole")
    assert total == expected
    assert in_strips < 120 < 12000 * 9000 * 3 / 2**20 < at_once


def test_a_jpeg_stored_turned(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    turned(waves(7000, 9000), 6).jpegsave(str(path))
    (in_strips, total), (at_once, expected) = measure(path), measure(path, "whole")
    assert total == expected
    assert in_strips < 80 < 7000 * 9000 * 3 / 2**20 < at_once


def test_a_tiled_tiff(tmp_path: Path) -> None:
    path = tmp_path / "large.tif"
    path.write_bytes(repeating_tiff(9000, 12000, TILES))
    (in_tiles, total), (at_once, expected) = measure(path), measure(path, "whole")
    assert total == expected
    assert in_tiles < 80 < 12000 * 9000 * 3 / 2**20 < at_once


def test_the_size_of_a_tiled_tiff_costs_nothing(tmp_path: Path) -> None:
    """Ten gigapixels, the first row of tiles."""
    path = tmp_path / "huge.tif"
    path.write_bytes(repeating_tiff(100_000, 100_000, TILES))
    peak, _ = measure(path, stop=1)
    assert peak < 80


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_gigapixels_are_begun_and_abandoned(tmp_path: Path) -> None:
    path = tmp_path / "huge.tif"
    path.write_bytes(repeating_tiff(100_000, 100_000, TILES))
    peak, total = measure(path, tile=2048, stop=12_000)
    assert peak < 120
    down, across = np.arange(0, 2048 * 6, 64)[:, None], np.arange(0, 100_000, 64)
    number = (down // 256 * -(-100_000 // 256) + across // 256) % len(TILES)
    assert total == int(TILES[number, down % 256, across % 256].sum(dtype=np.int64))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("format", ["jpg", "png"])
def test_300_megapixels_in_strips(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"huge.{format}"
    image = waves(15_000, 20_000)
    image.jpegsave(str(path)) if format == "jpg" else image.pngsave(str(path), compression=1)
    (in_strips, total), (at_once, expected) = measure(path, tile=2048), measure(path, "whole")
    assert total == expected
    assert in_strips < 300 < 20_000 * 15_000 * 3 / 2**20 < at_once
