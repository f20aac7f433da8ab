"""Hostile and unlucky files: refused with a message that helps, before they cost anything."""

import io
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import skimage
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fullframe.errors import InvalidInput
from fullframe.image import Limits, open_encoded
from tests.image.forged import chunk, png, tiff, tiff_header
from tests.pictures import animated_gif, encode, pixels, png_header

LIMITS = Limits()
SMALL = Limits(max_pixels=100_000)
PICTURE = pixels(48, 64)
FILES = {
    "jpeg": encode(PICTURE, "JPEG"),
    "progressive jpeg": encode(PICTURE, "JPEG", progressive=True),
    "png": encode(PICTURE, "PNG"),
    "webp": encode(PICTURE, "WEBP"),
    "lossless webp": encode(PICTURE, "WEBP", lossless=True),
    "gif": encode(PICTURE, "GIF"),
    "tiff": encode(PICTURE, "TIFF"),
    "striped tiff": tiff(PICTURE, photometric="rgb", rowsperstrip=7, compression="zlib"),
    "raw tiff": tiff(PICTURE, photometric="rgb"),
    "raw tiled tiff": tiff(PICTURE, photometric="rgb", tile=(16, 16)),
    "lzw tiff": encode(PICTURE, "TIFF", compression="tiff_lzw"),
    "tiled tiff": tiff(PICTURE, photometric="rgb", tile=(16, 16), compression="zlib"),
}
MAGIC = [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8 ", b"II*\0", b"MM\0*", b"II+\0", b"GIF89a"]


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Bound the processor time of all threads."""
    start = time.process_time()
    yield
    assert time.process_time() - start < seconds


def refusal(data: bytes, limits: Limits = LIMITS) -> str:
    """The message with which `data` is refused, whether at its header or at its pixels."""
    with pytest.raises(InvalidInput) as caught:
        open_encoded(data, limits).pixels()
    assert caught.value.field == "images"
    message = str(caught.value)
    assert len(message) < 300 and "vips" not in message.lower() and "/" not in message
    return message


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"\0", "no known image format"),
        (b"not a picture, whatever its name says\n" * 20, "text"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "svg"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "avif"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "heif"),
        (b"%PDF-1.7\n", "pdf"),
        (b"BM" + bytes(60), "bmp"),
    ],
)
def test_what_is_no_supported_image_is_named(data: bytes, says: str) -> None:
    message = refusal(data)
    assert says in message and "gif, jpeg, png" in message


def test_only_allowed_formats_are_read() -> None:
    limits = Limits(formats=frozenset({"png"}))
    assert open_encoded(FILES["png"], limits).format == "png"
    assert refusal(FILES["jpeg"], limits) == "this is jpeg; supported are png"
    with pytest.raises(ValueError, match="heif"):
        Limits(formats=frozenset({"png", "heif"}))


def test_a_huge_header_is_refused_by_its_size() -> None:
    with within(1):
        message = refusal(png_header(60_000, 60_000))
    assert message == "60000x60000 (width x height) is 3600.0 megapixels; the limit is 32"


@pytest.mark.parametrize(("width", "height"), [(2**31 - 1, 2**31 - 1), (0, 5), (5, 0), (2**32 - 1, 1)])
def test_impossible_png_sizes(width: int, height: int) -> None:
    with within(1):
        refusal(png(width, height, rows=b"\0"))


def test_limits_hold_to_the_unit() -> None:
    data = encode(pixels(10, 20))
    assert open_encoded(data, Limits(max_pixels=200, max_bytes=len(data))).pixels().shape == (10, 20, 3)
    assert "20x10" in refusal(data, Limits(max_pixels=199))
    assert f"limit of {len(data) - 1} bytes" in refusal(data, Limits(max_bytes=len(data) - 1))
    assert open_encoded(animated_gif(7), Limits(max_frames=7)).pixels().shape == (1, 1, 3)
    assert "7 frames" in refusal(animated_gif(7), Limits(max_frames=6))
    pages = tiff(np.zeros((7, 4, 4, 3), np.uint8), photometric="rgb")
    assert "7 frames or pages" in refusal(pages, Limits(max_frames=6))


def test_an_animation_of_ten_thousand_frames() -> None:
    with within(2):
        assert "10000 frames" in refusal(animated_gif(10_000))


def test_the_header_alone_decides() -> None:
    """The same header without most of its pixels is refused alike."""
    data = encode(pixels(400, 300), "JPEG")
    assert refusal(data[: len(data) // 10], SMALL) == refusal(data, SMALL)


@pytest.mark.parametrize("name", FILES)
def test_truncated_files_are_refused(name: str) -> None:
    data = FILES[name]
    whole = open_encoded(data, LIMITS).pixels()
    assert whole.shape == PICTURE.shape
    for length in sorted({1, 3, 12, *range(20, len(data) - 12, max(1, len(data) // 60))}):
        try:
            # What follows the pixels (an index, metadata, padding) may be missing; no pixel may.
            assert np.array_equal(open_encoded(data[:length], LIMITS).pixels(), whole), length
        except InvalidInput as error:
            assert length < 13 or "ends early" in str(error)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_in_half_is_refused(name: str) -> None:
    data = FILES[name]
    assert "ends early" in refusal(data[: len(data) // 2])


def test_damage_found_while_decoding_is_refused_each_time() -> None:
    data = FILES["jpeg"]
    picture = open_encoded(data[: len(data) * 3 // 4], LIMITS)
    for _ in range(2):
        with pytest.raises(InvalidInput, match="ends early"):
            picture.pixels()


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(MAGIC), st.binary(max_size=300))
def test_random_bytes_behind_a_signature(magic: bytes, tail: bytes) -> None:
    with within(2):
        try:
            open_encoded(magic + tail, SMALL).pixels()
        except InvalidInput as error:
            assert str(error)


@settings(deadline=None, max_examples=250)
@given(st.sampled_from(sorted(FILES)), st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=8))
@example("tiff", [])
def test_damaged_bytes_end_in_pixels_or_refusal(name: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(FILES[name])
    for position, value in changes:
        data[position % len(data)] = value
    with within(2):
        try:
            picture = open_encoded(bytes(data), SMALL)
            assert picture.pixels().shape == (picture.height, picture.width, 3)
        except InvalidInput as error:
            assert str(error)


def test_absurd_exif() -> None:
    plain = FILES["jpeg"]
    directory = struct.pack("<H", 65535) + struct.pack("<HHII", 0x0112, 3, 2**32 - 1, 2**32 - 1) * 20
    for body in (b"", b"\xff" * 60_000, b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0" + directory):
        exif = b"Exif\0\0" + body
        data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
        assert np.array_equal(open_encoded(data, LIMITS).pixels(), open_encoded(plain, LIMITS).pixels())


def test_a_progressive_jpeg_of_many_scans_is_cut_off() -> None:
    data = encode(np.full((2000, 2000, 3), 90, np.uint8), "JPEG", progressive=True)
    scans = [position for position in range(len(data)) if data.startswith(b"\xff\xda", position)]
    last = data[scans[-1] : -2]
    with within(5):
        refusal(data[:-2] + last * 3000 + b"\xff\xd9")


def swollen(kind: bytes, head: bytes) -> bytes:
    return png(5, 5, chunk(kind, head + zlib.compress(bytes(200_000_000), 9)))


# Each costs far less memory than it claims; the claim is beside it.
COSTLY: dict[str, Callable[[], bytes]] = {
    "3.6 gigapixel PNG": lambda: png_header(60_000, 60_000),
    "1 GB PNG": lambda: png_header(18_500, 18_500),
    "1 GB TIFF tile": lambda: tiff_header(
        (tag, 1, value)
        for tag, value in {
            256: 1,
            257: 1,
            258: 8,
            259: 1,
            262: 1,
            277: 1,
            322: 32768,
            323: 32768,
            324: 200,
            325: 9,
        }.items()
    ),
    "2 billion TIFF strips": lambda: tiff_header(
        [
            (256, 1, 9),
            (257, 1, 9),
            (258, 1, 8),
            (259, 1, 1),
            (262, 1, 1),
            (273, 2**31 - 1, 8),
            (277, 1, 1),
            (279, 2**31 - 1, 8),
        ]
    ),
    "65535 TIFF channels": lambda: tiff_header(
        (tag, 1, value)
        for tag, value in {256: 5000, 257: 5000, 258: 8, 259: 1, 262: 1, 273: 8, 277: 65535, 278: 5000, 279: 9}.items()
    ),
    "4.3 gigapixel GIF": lambda: b"GIF89a" + b"\xff\xff\xff\xff" + animated_gif(1)[10:],
    "200 MB zTXt": lambda: swollen(b"zTXt", b"a\0\0"),
    "200 MB iCCP": lambda: swollen(b"iCCP", b"a\0\0"),
    "200 MB iTXt": lambda: swollen(b"iTXt", b"a\0\1\0\0\0"),
    "200 MB IDAT for 5x5": lambda: png(5, 5, rows=bytes(200_000_000)),
    "30 MB chunk nobody knows": lambda: png(5, 5, chunk(b"abCd", bytes(30_000_000))),
}
MEASURE = """
import re, sys
from pathlib import Path
from fullframe.errors import InvalidInput
from fullframe.image import Limits, open_encoded
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
data = Path(sys.argv[1]).read_bytes()
before = peak()
try:
    open_encoded(data, Limits()).pixels()
except InvalidInput:
    pass
print(peak() - before)
"""


def peak_megabytes(data: bytes, folder: Path) -> float:
    """By how much reading `data` raises a fresh process's largest resident memory."""
    (folder / "data").write_bytes(data)
    command = [sys.executable, "-c", MEASURE, str(folder / "data")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=os.environ)
    assert done.stderr == ""
    return float(done.stdout)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


@needs_proc
@pytest.mark.parametrize("name", COSTLY)
def test_a_bomb_costs_little_memory(name: str, tmp_path: Path) -> None:
    assert peak_megabytes(COSTLY[name](), tmp_path) < 40


@needs_proc
def test_a_real_picture_of_that_size_would_be_noticed(tmp_path: Path) -> None:
    assert peak_megabytes(png(4000, 4000), tmp_path) > 40


def test_no_warning_of_hostile_text_reaches_stderr(tmp_path: Path) -> None:
    """A profile's name that is not UTF-8 is quoted in a warning, which pyvips would fail to decode."""
    gray = Image.open(Path(skimage.__file__).parent / "data" / "page.png").info["icc_profile"]
    (tmp_path / "data").write_bytes(png(5, 5, chunk(b"iCCP", b"na\xffme\0\0" + zlib.compress(gray))))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert done.stderr == b""
    direct = "import pyvips, sys; pyvips.Image.new_from_file(sys.argv[1]).avg()"
    command = [sys.executable, "-c", direct, str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert b"UnicodeDecodeError" in done.stderr, "the warning that this test waits for was not given"


def test_a_good_picture_after_all_that() -> None:
    for data in (b"", png_header(60_000, 60_000), FILES["jpeg"][:300], FILES["tiff"][:300]):
        refusal(data)
        image = Image.fromarray(PICTURE)
        image.putalpha(255)
        file = io.BytesIO()
        image.save(file, "PNG")
        assert np.array_equal(open_encoded(file.getvalue(), LIMITS).pixels(), PICTURE)
