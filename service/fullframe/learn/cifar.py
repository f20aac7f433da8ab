"""CIFAR-10 as its authors give it out, cifar-10-binary.tar.gz -> images in splits and classes."""

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from fullframe.errors import InvalidInput

NAMES = "batches.meta.txt"
_SPLITS = {"test_batch": "test"} | {f"data_batch_{number}": "train" for number in range(1, 6)}
_SHAPE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32  # a label and its pixels (https://www.cs.toronto.edu/~kriz/cifar.html)


def is_part(name: str) -> bool:
    """Whether a file is one of the archive's; raises InvalidInput for those of cifar-10-python.tar.gz."""
    file = PurePosixPath(name)
    if file.name in _SPLITS:
        raise InvalidInput(
            f"{name} is a Python pickle, which could run code: take cifar-10-binary.tar.gz, from the same page", "data"
        )
    return file.name == NAMES or (file.suffix == ".bin" and file.stem in _SPLITS)


def images(parts: Mapping[str, bytes]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Each image's name, SPLIT/CLASS/NUMBER, and its pixels, uint8 [32, 32, 3]; raises InvalidInput."""
    files = {PurePosixPath(name).name: content for name, content in sorted(parts.items())}
    names = files.pop(NAMES, b"").decode("ascii", "replace").split()
    for file, content in files.items():
        if len(content) % _RECORD:
            raise InvalidInput(f"{file} has {len(content)} bytes, no multiple of {_RECORD}: it is cut short", "data")
        records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
        if (most := records[:, 0].max(initial=0)) >= len(names):
            raise InvalidInput(f"{file} has class {most}, and {NAMES} beside it names {len(names)} classes", "data")
        split, batch = _SPLITS[PurePosixPath(file).stem], PurePosixPath(file).stem
        for number, record in enumerate(records):
            pixels = np.ascontiguousarray(record[1:].reshape(_SHAPE).transpose(1, 2, 0))
            yield f"{split}/{names[record[0]]}/{batch}-{number:04}", pixels
