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
