"""Pictures of coloured shapes on noise: a data set that a small network learns in seconds."""

import gzip
import io
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image

COLOURS = {"blue": (30, 30, 200), "green": (30, 200, 30), "red": (200, 30, 30)}


def write_shapes(folder: Path, count: int, seed: int = 0) -> Path:
    """`count` PNGs of sizes 12 to 39 in each of three class folders."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            height, width = rng.integers(12, 40, 2)
            pixels = rng.integers(0, 80, (height, width, 3))
            pixels[height // 4 : -(height // 4), width // 4 : -(width // 4)] = colour
            PIL.Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:03}.png")
    return folder


def pack(folder: Path, path: Path) -> Path:
    """The folder as a tar, compressed as the suffix says, its members in no particular order."""
    compressors: dict[str, Callable[[bytes], bytes]] = {".tar": bytes, ".xz": lzma.compress, ".gz": gzip.compress}
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for index in np.random.default_rng(0).permutation(len(files)):
            file = files[index]
            member = tarfile.TarInfo(f"./{folder.name}/{file.relative_to(folder).as_posix()}")
            content = file.read_bytes()
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    path.write_bytes(compressors[path.suffix](buffer.getvalue()))
    return path
