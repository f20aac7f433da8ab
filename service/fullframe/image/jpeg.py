"""Plain JPEGs by libjpeg-turbo alone, at half of libvips' cost: size from the file's markers, the same pixels.

Plain is what most photographs on the web are: baseline, gray or YCbCr, upright, no ICC profile or one in a single
segment, up to two megapixels. Anything else is not read here.
"""

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

import simplejpeg

from fullframe.image.colour import Pixels

_LARGEST_PIXELS: Final = 2_000_000  # a decode cannot be broken off
_MOST_SEGMENTS: Final = 64

# Markers, from table B.1 of https://www.w3.org/Graphics/JPEG/itu-t81.pdf
_FRAMES: Final = (0xC0, 0xC1)  # sequential, Huffman coded
_SCAN: Final = 0xDA
_APP1, _APP2, _APP14 = 0xE1, 0xE2, 0xEE
_PASSED_OVER: Final = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})  # tables, comments, applications' own
_BYTE_ORDERS: Final = {b"II*\0": "<", b"MM\0*": ">"}  # of Exif, as TIFF has them
_ORIENTATION, _SHORT = 0x0112, 3  # a tag and a type of TIFF
_PROFILE: Final = b"ICC_PROFILE\0"
_YCBCR: Final = 1  # Adobe's number for it


class PlainHeader(NamedTuple):
    """What a plain JPEG says of itself; `profile` is its ICC profile, b"" for none."""

    height: int
    width: int
    profile: bytes


def read_plain(data: bytes) -> PlainHeader | None:
    """The header of a plain JPEG; None for any other file, damaged or odd ones included."""
    frame: tuple[int, int, int] | None = None
    profile = b""
    for marker, body in _segments(data):
        if marker == _SCAN:
            if frame is None or not _is_whole_scan(body, frame[2]) or (profile and frame[2] != 3):
                return None
            return PlainHeader(*frame[:2], profile)
        if marker in _FRAMES and frame is None:
            frame = _frame(body)
            if frame is None:
                return None
        elif marker == _APP2 and body.startswith(_PROFILE):
            if profile or body[len(_PROFILE) :][:2] != b"\1\1":  # the first segment of one
                return None
            profile = body[len(_PROFILE) + 2 :]
        elif marker not in _PASSED_OVER or _changes_pixels(marker, body):
            return None
    return None


def decode_plain(data: bytes, height: int, width: int) -> Pixels | None:
    """uint8 [height, width, 3], as stored; None if libjpeg-turbo finds any fault with the file, or another size."""
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
    except (ValueError, RuntimeError):
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and body of each segment, up to the first that is none."""
    position = 2  # behind the start of image
    for _ in range(_MOST_SEGMENTS):
        head = data[position : position + 4]
        if len(head) < 4 or head[0] != 0xFF:
            return
        size = head[2] << 8 | head[3]  # its own two bytes included
        body = data[position + 4 : position + 2 + size]
        if size < 2 or len(body) != size - 2:
            return
        yield head[1], body
        position += 2 + size


def _frame(body: bytes) -> tuple[int, int, int] | None:
    """Height, width and number of components of a frame that is plain."""
    if len(body) < 6:
        return None
    depth, height, width, count = struct.unpack_from(">BHHB", body)
    if depth != 8 or count not in (1, 3) or len(body) != 6 + 3 * count or not 0 < height * width <= _LARGEST_PIXELS:
        return None
    if count == 3 and body[6::3] != b"\1\2\3":  # names that say YCbCr, whatever else does
        return None
    return height, width, count


def _is_whole_scan(body: bytes, components: int) -> bool:
    """Whether one scan holds all of the picture; a file of very many could take long."""
    return len(body) == 4 + 2 * components and body[0] == components and body[-3:] == b"\0\x3f\0"


def _changes_pixels(marker: int, body: bytes) -> bool:
    """Whether an application's segment turns the picture, or says that its colours are not YCbCr."""
    if marker == _APP1:
        return body.startswith(b"Exif") and not _is_upright(body[6:])
    return marker == _APP14 and body.startswith(b"Adobe") and body[11:12] != bytes([_YCBCR])


def _is_upright(exif: bytes) -> bool:
    """Whether Exif data, a TIFF file, is in order so far that its first directory surely tells of no orientation."""
    order = _BYTE_ORDERS.get(exif[:4])
    try:
        if order is None:
            return False
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        tags = struct.iter_unpack(order + "HHIHH", exif[start + 2 : start + 2 + 12 * count])
        told = [entry[1:4] for entry in tags if entry[0] == _ORIENTATION]
    except struct.error:
        return False
    return all(orientation == (_SHORT, 1, 1) for orientation in told)
