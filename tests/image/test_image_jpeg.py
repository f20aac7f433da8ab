"""Plain JPEGs: the pixels that libvips gives, and libvips wherever a file is not plain."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import skimage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fullframe.errors import InvalidInput
from fullframe.image import Limits, Pixels, open_encoded
from fullframe.image.decode import PlainJpeg, VipsPicture
from fullframe.image.encoded import InMemory
from fullframe.image.jpeg import decode_plain, read_plain
from fullframe.image.stored import open_vips
from tests.pictures import encode, pixels

LIMITS = Limits()
START, TABLES, FRAME, SCAN = b"\xff\xd8", b"\xff\xdb", b"\xff\xc0", b"\xff\xda"
PLAIN = encode(pixels(9, 11), "JPEG")
SRGB = bytes(Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png").info["icc_profile"])


def by_vips(data: bytes) -> Pixels:
    encoded = InMemory(data)
    return VipsPicture(encoded, "jpeg", open_vips(encoded, "jpeg"), LIMITS).pixels()


def outcome(data: bytes, vips: bool) -> Pixels | str:
    """The pixels, or the message of the refusal; by libvips alone or as files are opened."""
    try:
        if not vips:
            return open_encoded(data, LIMITS).pixels()
        encoded = InMemory(data)
        image = open_vips(encoded, "jpeg")
        LIMITS.check_size(image.height, image.width)
        return VipsPicture(encoded, "jpeg", image, LIMITS).pixels()
    except InvalidInput as error:
        return str(error)
    except Exception:  # libvips' own, of a header: the same refusal
        return "the jpeg file ends early, is damaged or is of a variant that cannot be read"


def same(one: Pixels | str, other: Pixels | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and isinstance(other, str) and one == other
    return np.array_equal(one, other)


def with_segment(data: bytes, marker: int, body: bytes) -> bytes:
    """`data` with one more segment at its beginning."""
    return data[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + data[2:]


def exif(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    tiff = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, 2)
    make = struct.pack(order + "HHII", 0x0110, 2, 4, 0x00636261)
    tag = struct.pack(order + "HHIHH", 0x0112, kind, 1, orientation, 0)
    return b"Exif\0\0" + tiff + make + tag + bytes(4)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 80),
    st.integers(1, 80),
    st.sampled_from(["444", "422", "420", "440", "411", "gray"]),
    st.integers(1, 100),
)
def test_every_subsampling_size_and_quality(height: int, width: int, subsampling: str, quality: int) -> None:
    picture = pixels(height, width)
    if subsampling == "gray":
        data = simplejpeg.encode_jpeg(picture[..., :1].copy(), quality, "GRAY", "Gray")
    else:
        data = simplejpeg.encode_jpeg(picture, quality, "RGB", subsampling)
    opened = open_encoded(data, LIMITS)
    assert isinstance(opened, PlainJpeg) and (opened.height, opened.width) == (height, width)
    assert decode_plain(data, height, width) is not None
    assert np.array_equal(opened.pixels(), by_vips(data))


@pytest.mark.parametrize(
    "options",
    [
        {"restart_marker_blocks": 1},
        {"restart_marker_rows": 1},
        {"optimize": True},
        {"comment": b"a word"},
        {"dpi": (300, 300)},
        {"icc_profile": SRGB},
    ],
)
def test_every_way_to_write_one(options: dict[str, object]) -> None:
    for mode in ("RGB", "L"):
        file = io.BytesIO()
        Image.fromarray(pixels(131, 97)).convert(mode).save(file, "JPEG", **options)
        data = file.getvalue()
        plain = mode == "RGB" or "icc_profile" not in options
        assert isinstance(open_encoded(data, LIMITS), PlainJpeg if plain else VipsPicture)
        assert np.array_equal(open_encoded(data, LIMITS).pixels(), by_vips(data))


def test_photographs_without_their_jfif_segment() -> None:
    data = encode(pixels(300, 200), "JPEG")
    length = struct.unpack_from(">H", data, 4)[0]
    bare = data[:2] + data[4 + length :]
    assert data[2:4] == b"\xff\xe0" and bare[2:4] == TABLES
    assert read_plain(bare) == (300, 200, b"")
    assert np.array_equal(open_encoded(bare, LIMITS).pixels(), by_vips(data))


@pytest.mark.parametrize("order", ["<", ">"])
def test_an_upright_orientation_is_plain(order: str) -> None:
    upright, turned = (with_segment(PLAIN, 0xE1, exif(n, order)) for n in (1, 6))
    assert read_plain(upright) == (9, 11, b"")
    assert read_plain(turned) is None
    assert np.array_equal(open_encoded(upright, LIMITS).pixels(), by_vips(PLAIN))
    assert np.array_equal(open_encoded(turned, LIMITS).pixels(), np.rot90(by_vips(PLAIN), -1))


def test_a_profile_that_moves_colours_is_applied() -> None:
    """The control: libjpeg-turbo alone would show this photograph differently."""
    data = (Path(skimage.__file__).parent / "data" / "rocket.jpg").read_bytes()
    header = read_plain(data)
    assert header is not None and header.profile
    stored = decode_plain(data, header.height, header.width)
    assert stored is not None and not np.array_equal(stored, by_vips(data))
    assert np.array_equal(open_encoded(data, LIMITS).pixels(), by_vips(data))


def odd_files() -> dict[str, bytes]:
    frame, scan = PLAIN.index(FRAME), PLAIN.index(SCAN)
    size = struct.unpack_from(">H", PLAIN, frame + 2)[0] + 2
    profile = b"ICC_PROFILE\0"
    changed = bytearray(PLAIN)
    changed[frame + 10] = ord("R")
    deep = bytearray(PLAIN)
    deep[frame + 4] = 12
    empty = bytearray(PLAIN)
    empty[frame + 5 : frame + 7] = b"\0\0"
    return {
        "progressive": encode(pixels(9, 11), "JPEG", progressive=True),
        "CMYK": _cmyk(),
        "Adobe RGB": with_segment(PLAIN, 0xEE, b"Adobe\0\x64\0\0\0\0\0"),
        "short Adobe": with_segment(PLAIN, 0xEE, b"Adobe"),
        "profile in parts": with_segment(PLAIN, 0xE2, profile + b"\1\2" + SRGB),
        "two profiles": with_segment(with_segment(PLAIN, 0xE2, profile + b"\1\1" + SRGB), 0xE2, profile + b"\1\1a"),
        "orientation of another type": with_segment(PLAIN, 0xE1, exif(1, kind=4)),
        "broken Exif": with_segment(PLAIN, 0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
        "two frames": PLAIN[:scan] + PLAIN[frame : frame + size] + PLAIN[scan:],
        "no frame": PLAIN[:frame] + PLAIN[frame + size :],
        "no rows": bytes(empty),
        "12 bits": bytes(deep),
        "named R": bytes(changed),
        "fill bytes": PLAIN[:2] + b"\xff" + PLAIN[2:],
        "a segment of no length": with_segment(PLAIN, 0xFE, b"")[:4] + b"\0\0" + PLAIN[2:],
        "a part of the picture": PLAIN.replace(SCAN + b"\0\x0c\3\1", SCAN + b"\0\x08\1\1"),
        "hundreds of comments": PLAIN[:2] + b"\xff\xfe\0\2" * 300 + PLAIN[2:],
        "three megapixels": simplejpeg.encode_jpeg(np.zeros((1500, 2000, 3), np.uint8)),
    }


def _cmyk() -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(9, 11)).convert("CMYK").save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize("name", odd_files())
def test_odd_files_are_left_to_libvips(name: str) -> None:
    data = odd_files()[name]
    assert data != PLAIN and read_plain(data) is None
    assert same(outcome(data, vips=False), outcome(data, vips=True))


def test_truncation_at_every_byte_ends_as_with_libvips() -> None:
    for length in range(3, len(PLAIN)):
        assert same(outcome(PLAIN[:length], vips=False), outcome(PLAIN[:length], vips=True)), length
    assert isinstance(outcome(PLAIN, vips=False), np.ndarray)


@pytest.mark.parametrize("height", [8, 10, 40])
def test_a_size_other_than_the_data_ends_as_with_libvips(height: int) -> None:
    data = bytearray(PLAIN)
    data[PLAIN.index(FRAME) + 6] = height
    assert read_plain(bytes(data)) == (height, 11, b"")
    assert same(outcome(bytes(data), vips=False), outcome(bytes(data), vips=True))


@settings(deadline=None, max_examples=400)
@given(st.lists(st.tuples(st.integers(3, len(PLAIN) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_damage_ends_as_with_libvips(changes: list[tuple[int, int]]) -> None:
    data = bytearray(PLAIN)
    for position, value in changes:
        data[position] = value
    assert same(outcome(bytes(data), vips=False), outcome(bytes(data), vips=True))


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200))
def test_garbage_behind_the_start_ends_as_with_libvips(tail: bytes) -> None:
    data = b"\xff\xd8\xff" + tail
    assert same(outcome(data, vips=False), outcome(data, vips=True))


def test_limits_hold_for_plain_files() -> None:
    with pytest.raises(InvalidInput, match="11x9") as caught:
        open_encoded(PLAIN, Limits(max_pixels=98))
    assert caught.value.field == "images"
    assert open_encoded(PLAIN, Limits(max_pixels=99)).pixels().shape == (9, 11, 3)
