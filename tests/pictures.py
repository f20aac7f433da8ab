"""Pictures made on the spot: smooth noise of any size, as pixels or as files."""

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def pixels(height: int, width: int, seed: int = 0) -> Pixels:
    """uint8 [height, width, 3], different for every seed."""
    random = np.random.default_rng((height, width, seed))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    waves = [np.sin(x / random.uniform(3, 40) + y / random.uniform(3, 40) + random.uniform(0, 7)) for _ in range(3)]
    noise = random.normal(0, 12, (height, width, 3))
    return np.clip(128 + 80 * np.stack(waves, axis=2) + noise, 0, 255).astype(np.uint8)


def encode(picture: Pixels, format: str = "PNG", **options: object) -> bytes:
    """A file of the picture, as Pillow writes it."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def animated_gif(frames: int) -> bytes:
    """A GIF of that many 1x1 frames."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"\x21\xf9\x04\0\0\0\0\0" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    return head + frame * frames + b";"
