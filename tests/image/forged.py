"""Image files forged byte by byte: headers that lie, chunks that swell, layouts that Pillow does not write."""

import io
import struct
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk with the right checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, extra: bytes = b"", rows: bytes | None = None, depth: int = 8) -> bytes:
    """An RGB PNG of that header; `rows` (all black if None) is what its IDAT holds, `extra` stands before it."""
    rows = bytes(height * (width * 3 * depth // 8 + 1)) if rows is None else rows
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def tiff_header(entries: Iterable[tuple[int, int, int]]) -> bytes:
    """A little-endian TIFF of (tag, count, value) entries, all LONG, and 500 zero bytes behind."""
    listed = sorted(entries)
    directory = b"".join(struct.pack("<HHII", tag, 4, count, value) for tag, count, value in listed)
    return b"II*\0" + struct.pack("<IH", 8, len(listed)) + directory + bytes(4) + bytes(500)


def tiff(samples: NDArray[np.generic], **options: Any) -> bytes:
    """A TIFF of any samples, as tifffile writes it."""
    file = io.BytesIO()
    tifffile.imwrite(file, samples, **options)
    return file.getvalue()


def repeating_tiff(height: int, width: int, tiles: NDArray[np.uint8]) -> bytes:
    """A tiled TIFF whose tiles, row by row, are `tiles` [count, side, side, 3] again and again, each stored once."""
    count, side, _, _ = tiles.shape
    stored = [zlib.compress(tile.tobytes(), 1) for tile in tiles]
    lengths = np.array([len(data) for data in stored], "<u4")
    starts = (8 + np.cumsum(lengths) - lengths).astype("<u4")
    body = b"".join(stored)
    body += bytes(len(body) % 2)
    used = np.arange(-(-height // side) * -(-width // side)) % count
    position = 8 + len(body)
    depths, offsets, sizes = struct.pack("<4H", 8, 8, 8, 0), starts[used].tobytes(), lengths[used].tobytes()
    values = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 3, position), 259: (3, 1, 8), 262: (3, 1, 2)}
    values |= {277: (3, 1, 3), 322: (4, 1, side), 323: (4, 1, side)}
    values |= {324: (4, len(used), position + 8), 325: (4, len(used), position + 8 + len(offsets))}
    directory = struct.pack("<H", len(values))
    directory += b"".join(struct.pack("<HHII", tag, *value) for tag, value in values.items()) + bytes(4)
    header = b"II*\0" + struct.pack("<I", position + 8 + len(offsets) + len(sizes))
    return b"".join((header, body, depths, offsets, sizes, directory))
