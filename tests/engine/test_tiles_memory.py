"""An image in pieces takes the memory of a piece, from the file to the answer: measured in a fresh process."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import pyvips

from fullframe.engine.ort import OrtEngine
from fullframe.engine.plane import open_plane
from fullframe.engine.query import Query
from fullframe.engine.tiles import Tiler, memory_for_pieces
from fullframe.errors import InvalidInput
from fullframe.image import Limits, Picture, open_encoded
from fullframe.model.memory import map_memory
from fullframe.model.repository import BUNDLED, int8_copy
from tests.image.forged import png, repeating_tiff
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


def noise(height: int, width: int) -> pyvips.Image:
    """Smooth, in colours."""
    coarse = pyvips.Image.gaussnoise(width // 8 + 1, height // 8 + 1, mean=128, sigma=60, seed=1)
    bands = [coarse.resize(8, vscale=8).crop(0, 0, width, height).linear(1, shift) for shift in (-10, 0, 10)]
    return bands[0].bandjoin(bands[1:]).cast("uchar").copy(interpretation="srgb")


def picture(height: int, width: int, path: Path) -> Path:
    """A JPEG of smooth noise."""
    noise(height, width).jpegsave(str(path), Q=80)
    return path


def test_pieces_take_less_memory_than_the_whole_and_give_its_answer(tmp_path: Path) -> None:
    path = picture(2000, 3000, tmp_path / "p.jpg")
    in_pieces, whole = measure(path, BUNDLED), measure(path, BUNDLED, tile_pixels=10**9)
    np.testing.assert_allclose(in_pieces.logits, whole.logits, atol=1e-4)
    assert in_pieces.peak < 350 < 800 < whole.peak
    for measured in (in_pieces, whole):
        assert measured.taken < measured.estimate < 2 * measured.taken


def encoded(height: int, width: int, format: str) -> Picture:
    """A file of that size, of which the header will do."""
    if format == "tiled tiff":
        data = repeating_tiff(height, width, pixels(256, 256)[None])
    else:
        data = png(width, height, rows=b"")
    return open_encoded(data, Limits(max_pixels=10**11, max_held_pixels=10**9))


@pytest.mark.parametrize("model", [BUNDLED, int8_copy(BUNDLED)])
def test_the_estimate_holds_what_can_be_counted(model: Path) -> None:
    engine = OrtEngine(model)
    tiler = Tiler(engine)
    for height, width in ((600, 60_000), (6000, 6000), (60_000, 600), (100_000, 100_000)):
        bands = list(tiler.bands(width))
        widest = max(band.right - band.left for band in bands)
        strip = max(bottom - top for top, bottom in pairwise(tiler.rows(height, widest)))
        piece = map_memory(model).bytes_per_pixel * strip * widest
        read = 3 * strip * widest
        for format in ("tiled tiff", "png"):
            if format == "png":
                read = 3 * (512 + strip) * width  # libvips' rows behind the one that is read
            # A tiled file is read band by band; of the others all bands have come as far as the rows that are read.
            carried = engine.carried_bytes * (
                widest if format == "tiled tiff" else sum(b.right - b.left for b in bands)
            )
            estimate = memory_for_pieces(engine, encoded(height, width, format))
            assert piece + carried + read < estimate < 1.3 * (4 * piece + carried + read) + 10**8


@pytest.mark.parametrize(
    "size",
    [
        (400_000, 1),
        pytest.param((1, 1_000_000), marks=pytest.mark.slow),
        pytest.param((1_000_000, 2), marks=pytest.mark.slow),
        pytest.param((3_900_000, 1), marks=pytest.mark.slow),
    ],
)
def test_the_estimate_holds_for_flat_images(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(png(size[1], size[0]))
    measured = measure(path, BUNDLED)
    assert measured.taken < measured.estimate < 2 * measured.taken


def test_a_flat_image_takes_as_much_in_pieces_when_it_is_turned() -> None:
    engine = OrtEngine(BUNDLED)
    wide, high = (memory_for_pieces(engine, encoded(*size, "png")) for size in ((1, 5_000_000), (5_000_000, 1)))
    assert high / 2 < wide < 2 * high
    assert max(wide, high) < 10**9
    assert memory_for_pieces(engine, encoded(200, 5_000_000, "png")) > 20e9, "what its strips carry"


def test_how_wide_a_tiled_file_is_costs_next_to_nothing() -> None:
    """Under a budget in which rows so long, which must be held, find no room."""
    plane = open_plane([], limits=Limits(max_pixels=10**11, max_held_pixels=10**9), memory_budget=6 * 10**8)
    model, query = plane.model(), Query()
    [future] = plane.submit(model, [encoded(100_000, 100_000, "tiled tiff")], query)
    taken = plane.counters().memory_in_flight
    future.cancel()
    with pytest.raises(InvalidInput, match="of memory; at most 600 MB"):
        plane.submit(model, [encoded(100_000, 100_000, "png")], query)
    plane.close()
    narrow, high = (
        memory_for_pieces(model.engine, encoded(height, width, "tiled tiff"))
        for height, width in ((20_000, 20_000), (200_000, 20_000))
    )
    assert narrow < taken < 1.2 * narrow and high < 1.01 * narrow


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("format", ["jpg", "png", "tif", "tiled.tif"])
@pytest.mark.parametrize("size", [(600, 60_000), (6000, 6000), (60_000, 600)])
def test_the_estimate_is_above_what_is_taken_and_not_far(tmp_path: Path, size: tuple[int, int], format: str) -> None:
    image = noise(*size)
    path = tmp_path / f"p.{format}"
    options = {"tile": True, "tile_width": 256, "tile_height": 256} if format == "tiled.tif" else {}
    image.write_to_file(str(path), **options)
    measured = measure(path, BUNDLED)
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
