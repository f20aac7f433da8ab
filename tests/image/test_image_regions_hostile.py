"""Files that end early, change or lie while they are read in pieces: refused, with how far they could be read."""

import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fullframe.errors import InvalidInput
from fullframe.image import Limits, Picture, Pixels, open_encoded, open_source
from fullframe.image.encoded import OnDisk
from tests.image.forged import png, repeating_tiff, tiff, tiff_header
from tests.pictures import encode, pixels

LIMITS = Limits()
PICTURE = pixels(1000, 90)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(PICTURE, "JPEG", quality=95, exif=exif)


FILES = {
    "jpeg": encode(PICTURE, "JPEG", quality=95),
    "mirrored jpeg": turned(2),  # libjpeg-turbo alone doesn't read it
    "progressive jpeg": encode(PICTURE, "JPEG", progressive=True),
    "png": encode(PICTURE),
    "webp": encode(PICTURE, "WEBP"),
    "gif": encode(PICTURE, "GIF"),
    "striped tiff": tiff(PICTURE, photometric="rgb", rowsperstrip=7, compression="zlib"),
    "raw tiff": tiff(PICTURE, photometric="rgb", rowsperstrip=10),
    "tiled tiff": tiff(PICTURE, photometric="rgb", tile=(16, 16), compression="zlib"),
    "raw tiled tiff": tiff(PICTURE, photometric="rgb", tile=(32, 32)),
}
IN_PIECES = sorted(set(FILES) - {"progressive jpeg", "webp", "gif"})


def in_place(data: bytes, path: Path) -> Picture:
    path.write_bytes(data)
    return open_encoded(OnDisk(os.open(path, os.O_RDONLY)), LIMITS)


def in_strips(picture: Picture, rows: int = 100) -> tuple[list[Pixels], str]:
    """Strips from the top, and the message of the refusal that ended them, if one did."""
    strips: list[Pixels] = []
    try:
        with picture.regions() as opened:
            for top in range(0, picture.height, rows):
                strips.append(opened.read(top, 0, min(rows, picture.height - top), picture.width))
    except InvalidInput as error:
        assert error.field == "images"
        return strips, str(error)
    return strips, ""


def told(message: str, height: int) -> int:
    """How many rows could be read, as the message tells."""
    found = re.search(rf"(\d+) of {height} rows \((\d+) %\)", message)
    assert found, message
    assert int(found[2]) == 100 * int(found[1]) // height
    return int(found[1])


@pytest.mark.parametrize("name", IN_PIECES)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_file_cut_short_is_read_as_far_as_it_goes(name: str, share: float, tmp_path: Path) -> None:
    data = FILES[name]
    whole = open_encoded(data, LIMITS).pixels()
    cut = data[: int(len(data) * share)]
    for picture in (open_encoded(cut, LIMITS), in_place(cut, tmp_path / "cut")):
        strips, message = in_strips(picture)
        assert "ends early" in message
        rows = told(message, 1000)
        assert len(strips) * 100 <= rows < 1000
        assert 0.6 * share * 1000 - 64 < rows
        if strips:
            assert np.array_equal(np.concatenate(strips), whole[: len(strips) * 100])


@pytest.mark.parametrize("name", FILES)
def test_every_cut_ends_in_the_same_pixels_or_a_refusal(name: str) -> None:
    data = FILES[name]
    whole = open_encoded(data, LIMITS).pixels()
    for length in range(0, len(data), max(1, len(data) // 25)):
        try:
            picture = open_encoded(data[:length], LIMITS)
        except InvalidInput:
            continue
        strips, message = in_strips(picture)
        assert message or np.array_equal(np.concatenate(strips), whole), length


def large(format: str) -> tuple[bytes, Pixels]:
    """A file of more than any reader takes in at once."""
    picture = np.random.default_rng(0).integers(0, 256, (2000, 400, 3), dtype=np.uint8)
    if format == "TIFF":
        return tiff(picture, photometric="rgb", tile=(64, 64)), picture
    return encode(picture, format, **({"quality": 95} if format == "JPEG" else {})), picture


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("change", ["cut short", "longer", "other content"])
def test_a_file_that_changes_while_it_is_read(format: str, change: str, tmp_path: Path) -> None:
    """None of it ends the process, as reading a mapped file beyond its end would."""
    data, _ = large(format)
    path = tmp_path / "changing"
    picture = in_place(data, path)
    with picture.regions() as opened:
        opened.read(0, 0, 200, 400)
        if change == "cut short":
            os.truncate(path, len(data) // 3)
        elif change == "longer":
            with path.open("ab") as file:
                file.write(b"more")
        else:
            path.write_bytes(data[: len(data) // 2] + bytes(len(data) // 2))
            os.utime(path, ns=(1, 1))
        with pytest.raises(InvalidInput, match="the file changed when") as caught:
            for top in range(200, 2000, 200):
                opened.read(top, 0, 200, 400)
    assert 0 < told(str(caught.value), 2000) < 2000


@pytest.mark.parametrize("removed", [False, True])
def test_a_file_that_is_replaced_or_removed_is_read_to_its_end(removed: bool, tmp_path: Path) -> None:
    data, expected = large("PNG")
    path = tmp_path / "picture.png"
    picture = in_place(data, path)
    with picture.regions() as opened:
        opened.read(0, 0, 200, 400)
        if removed:
            path.unlink()
        else:
            (tmp_path / "other").write_bytes(FILES["png"])
            (tmp_path / "other").rename(path)
        assert np.array_equal(opened.read(1000, 0, 1000, 400), expected[1000:])
    assert np.array_equal(picture.pixels(), expected)


def test_a_directory_in_the_files_place(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot read"):
        open_source(tmp_path, LIMITS)


def test_a_header_that_promises_more_rows_than_there_are() -> None:
    rows = b"".join(b"\0" + row.tobytes() for row in PICTURE)
    strips, message = in_strips(open_encoded(png(90, 2000, rows=rows), LIMITS))
    assert 1000 - 64 <= told(message, 2000) <= 1000
    assert np.array_equal(np.concatenate(strips), PICTURE[: 100 * len(strips)])


@pytest.mark.parametrize("place", [2**31, 2**32 - 1])
def test_tiles_beyond_the_end(place: int) -> None:
    tiles = np.stack([pixels(16, 16, seed=seed) for seed in range(3)])
    data = bytearray(repeating_tiff(160, 48, tiles))
    offsets = data.rindex(struct.pack("<HHI", 324, 4, 30)) + 8
    (where,) = struct.unpack_from("<I", data, offsets)
    struct.pack_into("<I", data, where + 4 * 15, place)
    with open_encoded(bytes(data), LIMITS).regions() as opened:
        assert np.array_equal(opened.read(0, 0, 80, 48)[-16:, 16:32], tiles[1])
        with pytest.raises(InvalidInput, match=r"80 of 160 rows \(50 %\) could be read"):
            opened.read(80, 0, 16, 16)
        assert np.array_equal(opened.read(144, 32, 16, 16), tiles[2])


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0)])
def test_pictures_without_pixels(height: int, width: int) -> None:
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 277: 1, 322: 16, 323: 16, 324: 200, 325: 256}
    for data in (png(width, height, rows=b"\0"), tiff_header((tag, 1, value) for tag, value in tags.items())):
        with pytest.raises(InvalidInput):
            open_encoded(data, LIMITS)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("progressive jpeg", "all of this progressive jpeg must be held in memory at once, and 0.1 megapixels"),
        ("webp", "all of this webp"),
        ("gif", "all of this gif"),
        ("png", "512 rows of this png"),
        ("jpeg turned", "takes 270000 bytes of disk; the limit is 269999 bytes"),
    ],
)
def test_what_cannot_be_read_piece_by_piece_is_refused_by_its_header(name: str, says: str) -> None:
    data = turned(6) if name == "jpeg turned" else FILES[name]
    held = 512 * 90 if name == "jpeg turned" else 512 * 90 - 1
    with pytest.raises(InvalidInput) as caught:
        open_encoded(data, Limits(max_held_pixels=held, max_temporary_bytes=3 * 90_000 - 1))
    assert says in str(caught.value) and "tiled TIFF" in str(caught.value)
    enough = Limits(max_held_pixels=max(held + 1, 90_000 * (name in ("progressive jpeg", "webp", "gif"))))
    assert open_encoded(data, enough).pixels().size == PICTURE.size


def test_large_tiles_are_refused_by_their_header() -> None:
    data = tiff(PICTURE, photometric="rgb", tile=(1024, 96), compression="zlib")
    with pytest.raises(InvalidInput, match="a tile of this tiff"):
        open_encoded(data, Limits(max_held_pixels=1024 * 96 - 1))
    with open_encoded(data, Limits(max_held_pixels=1024 * 96)).regions() as opened:
        assert np.array_equal(opened.read(900, 50, 100, 40), PICTURE[900:, 50:])


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(sorted(FILES)), st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=8))
def test_damaged_bytes_end_in_what_a_whole_decode_ends_in(name: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(FILES[name])
    for position, value in changes:
        data[position % len(data)] = value
    try:
        picture = open_encoded(bytes(data), Limits(max_pixels=200_000))
    except InvalidInput:
        return
    strips, message = in_strips(picture)
    try:
        whole = picture.pixels()
    except InvalidInput:
        assert message
        return
    assert not message and np.array_equal(np.concatenate(strips), whole)
