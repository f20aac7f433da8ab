"""Memory stays flat over thousands of images, and threads do not disturb each other."""

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fullframe.errors import InvalidInput
from fullframe.image import Limits, Pixels, open_encoded
from tests.pictures import encode, pixels

LIMITS = Limits()
FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", "GIF"]


def files() -> list[bytes]:
    """40 files of 40 sizes; every eighth is cut short."""
    sizes = np.random.default_rng(0).integers(16, 256, (40, 2))
    made = [encode(pixels(h, w), FORMATS[number % 5]) for number, (h, w) in enumerate(sizes.tolist())]
    return [data[: len(data) // 2] if number % 8 == 7 else data for number, data in enumerate(made)]


def decode(data: bytes) -> Pixels | None:
    try:
        return open_encoded(data, LIMITS).pixels()
    except InvalidInput:
        return None


def resident_megabytes() -> float:
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def growth(warm: int, count: int, keep: bool) -> float:
    """Megabytes that `count` images add after the first `warm`."""
    data, kept = files(), []
    for number in range(warm + count):
        result = decode(data[number % len(data)])
        if keep:
            kept.append(result)
        if number == warm:
            before = resident_megabytes()
    return resident_megabytes() - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_stays_flat_over_two_thousand_images() -> None:
    # Each in a process of its own: memory that earlier work left to the allocator would hide what is added.
    new = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, new, max_tasks_per_child=1) as pool:
        assert pool.submit(growth, warm=300, count=2000, keep=False).result() < 12
        grown = pool.submit(growth, warm=300, count=2000, keep=True).result()
        assert grown > 12, "the measure does not see growth"


def test_threads_get_what_one_alone_gets() -> None:
    data = files()
    alone = [decode(item) for item in data]
    assert sum(result is None for result in alone) == 5
    with ThreadPoolExecutor(8) as pool:
        for number, result in enumerate(pool.map(decode, data * 8)):
            expected = alone[number % len(data)]
            assert (result is None) == (expected is None)
            assert result is None or expected is None or np.array_equal(result, expected)


def test_one_picture_asked_by_many_threads() -> None:
    picture = open_encoded(encode(pixels(200, 300), "JPEG"), LIMITS)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: picture.pixels(), range(32)))
    assert all(np.array_equal(result, results[0]) for result in results)
