"""Any region of any file is that region of the whole decode, bit by bit, whichever way it is read."""

import io
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import pyvips
import skimage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fullframe.errors import Overloaded
from fullframe.image import (
    Limits,
    Picture,
    Pixels,
    Regions,
    open_encoded,
    open_raw,
    open_source,
    regions,
    source,
    stored,
)
from fullframe.image.colour import to_pixels, to_srgb
from fullframe.image.encoded import InMemory
from fullframe.image.stored import open_vips
from tests.image.forged import png, tiff
from tests.pictures import encode, pixels

LIMITS = Limits()
HEIGHT, WIDTH = 150, 210
PICTURE = pixels(HEIGHT, WIDTH)
TILE = (32, 48)
ADOBE_RGB = Image.open(Path(skimage.__file__).parent / "data" / "rocket.jpg").info["icc_profile"]


def save(mode: str, format: str, **options: object) -> bytes:
    image = Image.fromarray(PICTURE).convert(mode)
    if mode.endswith("A"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def turned(orientation: int, format: str, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save("RGB", format, exif=exif, **options)


def by_libvips(save: str, **options: object) -> bytes:
    image = pyvips.Image.new_from_memory(PICTURE, WIDTH, HEIGHT, 3, "uchar").copy(interpretation="srgb")
    return bytes(getattr(image, save)(**options))


def tiled(samples: Pixels, **options: object) -> bytes:
    return tiff(samples, tile=TILE, compression="zlib", **options)


def sixteen_bits() -> bytes:
    samples = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, 3)).astype(">u2")
    return png(WIDTH, HEIGHT, rows=b"".join(b"\0" + row.tobytes() for row in samples), depth=16)


ALPHA = np.dstack([PICTURE, PICTURE[::-1, :, :1]])
FILES = {
    "jpeg": save("RGB", "JPEG"),
    "gray jpeg": save("L", "JPEG"),
    "CMYK jpeg": save("CMYK", "JPEG"),
    "Adobe RGB jpeg": save("RGB", "JPEG", icc_profile=ADOBE_RGB),
    "progressive jpeg": save("RGB", "JPEG", progressive=True),
    "png": save("RGB", "PNG"),
    "png with alpha": save("RGBA", "PNG"),
    "gray png with alpha": save("LA", "PNG"),
    "palette png": save("P", "PNG", transparency=7),
    "one bit png": save("1", "PNG"),
    "16 bit png": sixteen_bits(),
    "interlaced png": by_libvips("pngsave_buffer", interlace=True),
    "webp": save("RGB", "WEBP"),
    "webp with alpha": save("RGBA", "WEBP", lossless=True),
    "gif": save("P", "GIF"),
    "striped tiff": tiff(PICTURE, photometric="rgb", rowsperstrip=7, compression="zlib"),
    "tiff of one strip": tiff(PICTURE, photometric="rgb", rowsperstrip=HEIGHT, compression="zlib"),
    "lzw tiff": save("RGB", "TIFF", compression="tiff_lzw"),
    "planar tiff": tiff(PICTURE.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
    "palette tiff": save("P", "TIFF"),
    "tiled tiff": tiled(PICTURE, photometric="rgb"),
    "tiled big tiff": tiled(PICTURE, photometric="rgb", bigtiff=True),
    "tiled tiff of large bytes first": tiled(PICTURE, photometric="rgb", byteorder=">"),
    "tiled tiff with alpha": tiled(ALPHA, photometric="rgb", extrasamples=["unassalpha"]),
    "tiled CMYK tiff": tiled(ALPHA, photometric="separated"),
    "tiled gray tiff": tiled(PICTURE[..., 0], photometric="miniswhite"),
    "pyramid": by_libvips("tiffsave_buffer", tile=True, tile_width=32, tile_height=16, pyramid=True),
    "tiled jpeg tiff": by_libvips("tiffsave_buffer", tile=True, tile_width=64, tile_height=64, compression="jpeg"),
    "tiled Adobe RGB tiff": tiled(PICTURE, photometric="rgb", iccprofile=ADOBE_RGB),
    "raw tiled tiff": tiff(PICTURE, photometric="rgb", tile=TILE),
    **{f"jpeg turned {way}": turned(way, "JPEG") for way in range(2, 9)},
    **{f"png turned {way}": turned(way, "PNG") for way in (2, 6)},
    **{f"webp turned {way}": turned(way, "WEBP") for way in (2, 5)},
    **{
        f"tiled tiff turned {way}": tiled(PICTURE, photometric="rgb", extratags=[(274, "H", 1, way, True)])
        for way in range(2, 9)
    },
}
RANDOM = {name for name in FILES if "tiled" in name or name == "pyramid"}


def whole(data: bytes) -> Pixels:
    """What libvips makes of the file at once, without any of our cutting and turning."""
    encoded = InMemory(data)
    image = to_srgb(open_vips(encoded, open_encoded(data, LIMITS).format))
    return to_pixels(image.copy_memory().autorot())


WHOLE = {name: whole(data) for name, data in FILES.items()}


@contextmanager
def on_disk(data: bytes, folder: Path) -> Iterator[Picture]:
    """The file opened in place, however small it is."""
    (folder / "picture").write_bytes(data)
    with mock.patch.object(source, "_READ_WHOLE_BYTES", 0):
        yield open_source(folder / "picture", LIMITS)


def read_in_tiles(opened: Regions, size: int, halo: int) -> Pixels:
    """The whole picture, tile by tile in strips, each with a halo that is thrown away."""
    result = np.empty((opened.height, opened.width, 3), np.uint8)
    for top in range(0, opened.height, size):
        for left in range(0, opened.width, size):
            bottom, right = min(top + size, opened.height), min(left + size, opened.width)
            above, before = max(top - halo, 0), max(left - halo, 0)
            height, width = min(bottom + halo, opened.height) - above, min(right + halo, opened.width) - before
            tile = opened.read(above, before, height, width)
            assert tile.shape == (height, width, 3) and tile.dtype == np.uint8
            assert tile.flags.c_contiguous and tile.flags.writeable
            result[top:bottom, left:right] = tile[top - above :, left - before :][: bottom - top, : right - left]
    return result


@pytest.mark.parametrize("name", FILES)
def test_tiles_in_strips_make_the_whole_decode(name: str, tmp_path: Path) -> None:
    data = FILES[name]
    picture = open_encoded(data, LIMITS)
    assert np.array_equal(picture.pixels(), WHOLE[name])
    with picture.regions() as opened:
        assert (opened.height, opened.width) == WHOLE[name].shape[:2]
        assert np.array_equal(read_in_tiles(opened, 37, 11), WHOLE[name])
    with on_disk(data, tmp_path) as picture, picture.regions() as opened:
        assert np.array_equal(read_in_tiles(opened, 64, 0), WHOLE[name])
        assert np.array_equal(picture.pixels(), WHOLE[name])


def test_another_picture_is_not_equal() -> None:
    """The comparison above can fail: a pixel further on is another picture."""
    with open_encoded(FILES["png"], LIMITS).regions() as opened:
        assert not np.array_equal(opened.read(0, 1, HEIGHT, 100), WHOLE["png"][:, :100])


def cuts(size: int) -> st.SearchStrategy[tuple[int, int]]:
    """Start and length of a piece of `size`."""
    return st.tuples(st.integers(0, size - 1), st.integers(1, size)).map(
        lambda cut: (cut[0], min(cut[1], size - cut[0]))
    )


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(FILES)), st.data(), st.sampled_from([1, 5000, 2**22]), st.sampled_from([1, 2**23]))
def test_regions_anywhere(name: str, data: st.DataObject, block_pixels: int, cached_pixels: int) -> None:
    expected = WHOLE[name]
    height, width, _ = expected.shape
    areas = data.draw(st.lists(st.tuples(cuts(height), cuts(width)), min_size=1, max_size=6))
    with (
        mock.patch.object(regions, "_BLOCK_PIXELS", block_pixels),
        mock.patch.object(stored, "_CACHED_PIXELS", cached_pixels),
        open_encoded(FILES[name], LIMITS).regions() as opened,
    ):
        assert opened.random_access or name not in RANDOM
        if not opened.random_access:
            areas.sort(key=lambda area: area[0][0])
        for (top, rows), (left, columns) in areas:
            region = opened.read(top, left, rows, columns)
            assert np.array_equal(region, expected[top : top + rows, left : left + columns])


@pytest.mark.parametrize("name", ["png", "jpeg turned 2", "striped tiff"])
def test_rows_are_read_once(name: str) -> None:
    with open_encoded(FILES[name], LIMITS).regions() as opened:
        assert not opened.random_access
        opened.read(100, 0, 10, 10)
        opened.read(100, 50, 50, 10)
        with pytest.raises(ValueError, match="row 99 is above row 100"):
            opened.read(99, 0, 10, 10)


@pytest.mark.parametrize(
    "area", [(0, 0, 0, 5), (0, 0, 5, 0), (-1, 0, 5, 5), (0, -1, 5, 5), (146, 0, 5, 5), (0, 206, 5, 5)]
)
@pytest.mark.parametrize("name", ["png", "jpeg", "tiled tiff"])
def test_regions_that_are_none(name: str, area: tuple[int, int, int, int]) -> None:
    with open_encoded(FILES[name], LIMITS).regions() as opened, pytest.raises(ValueError, match="is within 210x150"):
        opened.read(*area)


@pytest.mark.parametrize("name", ["png", "jpeg", "tiled tiff"])
def test_nothing_is_read_after_closing(name: str) -> None:
    opened = open_encoded(FILES[name], LIMITS).regions()
    opened.close()
    opened.close()
    with pytest.raises(ValueError, match="closed"):
        opened.read(0, 0, 5, 5)


def test_raw_pixels_have_regions_too() -> None:
    with open_raw(PICTURE.tobytes(), HEIGHT, WIDTH, LIMITS).regions() as opened:
        assert np.array_equal(opened.read(3, 4, 50, 60), PICTURE[3:53, 4:64])
        region = opened.read(0, 0, HEIGHT, WIDTH)
        region[:] = 0
        assert np.array_equal(opened.read(0, 0, HEIGHT, WIDTH), PICTURE)


def test_a_picture_may_be_opened_twice_at_once(tmp_path: Path) -> None:
    with on_disk(FILES["png"], tmp_path) as picture, picture.regions() as one, picture.regions() as two:
        for top in range(0, HEIGHT, 50):
            for opened in (one, two):
                assert np.array_equal(opened.read(top, 0, 50, WIDTH), PICTURE[top : top + 50])


@pytest.mark.parametrize("name", ["png", "16 bit png", "Adobe RGB jpeg", "tiled tiff", "striped tiff"])
def test_each_read_may_be_another_threads(name: str) -> None:
    with open_encoded(FILES[name], LIMITS).regions() as opened:
        for top in range(0, HEIGHT - 50, 10):
            with ThreadPoolExecutor(1) as thread:
                region = thread.submit(opened.read, top, 7, 50, 90).result()
            assert np.array_equal(region, WHOLE[name][top : top + 50, 7:97])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_files_are_closed(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    before = len([*descriptors.iterdir()])
    with on_disk(FILES["jpeg turned 2"], tmp_path) as picture, picture.regions() as opened:
        opened.read(0, 0, 70, 70)
        assert len([*descriptors.iterdir()]) > before
    del picture, opened
    assert len([*descriptors.iterdir()]) == before


TALL = pixels(700, 40)
TURNED_LIMITS = Limits(max_held_pixels=512 * 40, max_temporary_bytes=3 * 700 * 40)


def tall(orientation: int, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(TALL, "PNG", exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_huge_picture_stored_turned_is_turned_on_disk(orientation: int) -> None:
    picture = open_encoded(tall(orientation), TURNED_LIMITS)
    with mock.patch.object(tempfile, "TemporaryFile", wraps=tempfile.TemporaryFile) as temporary:
        opened = picture.regions()
    assert temporary.called == (orientation > 2)
    with opened:
        assert opened.random_access == (orientation > 2)
        assert np.array_equal(read_in_tiles(opened, 64, 9), whole(tall(orientation)))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk")
def test_a_full_disk() -> None:
    picture = open_encoded(tall(6), TURNED_LIMITS)
    with (
        mock.patch.object(tempfile, "TemporaryFile", lambda **_: Path("/dev/full").open("w+b", buffering=0)),
        pytest.raises(Overloaded, match=r"no disk space .*\(84000 bytes\).* upright"),
    ):
        picture.regions()
    with picture.regions() as opened:
        assert np.array_equal(opened.read(0, 0, 40, 700), whole(tall(6)))


class Stopped(TimeoutError):
    """An OSError, as a passed deadline may be."""


def stop_after(count: int) -> "mock.Mock":
    return mock.Mock(side_effect=[None] * count + [Stopped] + [None] * 100)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_opening_is_stopped_where_it_decodes(count: int) -> None:
    for data in (tall(6), tall(3)):
        checkpoint = stop_after(count)
        with pytest.raises(Stopped):
            open_encoded(data, TURNED_LIMITS).regions(checkpoint)
        assert checkpoint.call_count == count + 1


def test_reading_is_stopped_and_may_go_on() -> None:
    checkpoint = stop_after(5)
    with open_encoded(tall(1), LIMITS).regions(checkpoint) as opened:
        assert np.array_equal(opened.read(64, 0, 128, 40), TALL[64:192])
        assert checkpoint.call_count == 3
        with pytest.raises(Stopped):
            opened.read(600, 0, 100, 40)
        assert checkpoint.call_count == 6
        assert np.array_equal(opened.read(600, 0, 100, 40), TALL[600:])


def test_reading_of_tiles_is_stopped() -> None:
    with mock.patch.object(regions, "_BLOCK_PIXELS", 1):
        checkpoint = stop_after(6)
        with open_encoded(FILES["tiled tiff"], LIMITS).regions(checkpoint) as opened:
            assert np.array_equal(opened.read(30, 40, 10, 9), PICTURE[30:40, 40:49])
            assert checkpoint.call_count == 4
            with pytest.raises(Stopped):
                opened.read(0, 0, HEIGHT, WIDTH)
            assert checkpoint.call_count == 7
