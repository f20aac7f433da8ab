"""Labelled images from folders of classes, or from a tar of them."""

import hashlib
import lzma
import os
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from fullframe.errors import FullframeError, InvalidInput
from fullframe.image import Limits, open_encoded
from fullframe.learn import cifar

Pixels = NDArray[np.uint8]

TRAIN = ("train", "training")
VALIDATION = ("val", "valid", "validation", "test")


def decode(data: bytes) -> Pixels:
    """uint8 [H, W, 3] of an encoded image, as a served model would see it; raises FullframeError."""
    return open_encoded(data, Limits()).pixels()


@dataclass(slots=True)
class Image:
    """One image of the set: where it comes from, and its pixels while they fit in memory."""

    name: str
    source: bytes | Path
    label: int = -1
    cached: Pixels | None = None

    def pixels(self) -> Pixels:
        """uint8 [H, W, 3]."""
        return decode(_read(self.source)) if self.cached is None else self.cached


@dataclass(frozen=True)
class ImageSet:
    """Training and validation images with their classes.

    Attributes:
        source: the folder's or tar's name.
        validation_share: what was asked to be held out where the data has no split of its own.
        labels: class names, sorted; an image's label is an index into them.
        skipped: what could not be read, one "name: reason" each.
    """

    source: str
    validation_share: float
    labels: tuple[str, ...]
    train: list[Image]
    validation: list[Image]
    skipped: list[str] = field(default_factory=list)

    def fingerprint(self) -> str:
        """A digest of which images are in which split and class."""
        digest = hashlib.sha256("\0".join(self.labels).encode())
        for split in (self.train, self.validation):
            digest.update(b"\1" + "\0".join(f"{image.name}\0{image.label}" for image in split).encode())
        return digest.hexdigest()


def load_images(path: Path, *, validation: float = 0.1, seed: int = 0, cache_bytes: int = 4 << 30) -> ImageSet:
    """Read a folder, .tar, .tar.gz or .tar.xz of class folders, or cifar-10-binary.tar.gz; raises InvalidInput.

    With `train` and `val` or `test` folders around the classes, those are the splits (`val` before `test`);
    otherwise the share `validation` of each class is drawn with `seed`. Every file is decoded once, so that a
    bad one is known before training; pixels are kept while they fit in `cache_bytes`. A folder's other images are
    decoded again when needed; a tar's stay in memory encoded.
    """
    images, skipped = _readable(_sources(path), cache_bytes)
    _drop_shared_folders(images)
    images.sort(key=lambda image: image.name)
    placed = _places(images)
    skipped += [f"{image.name}: not in a class folder" for image, _, label in placed if not label]
    labels = tuple(sorted({label for _, _, label in placed if label}))
    if len(labels) < 2:
        raise InvalidInput(f"training needs readable images in at least two class folders; {path} has not", "data")
    splits: dict[str, list[Image]] = defaultdict(list)
    for image, split, label in placed:
        if label:
            image.label = labels.index(label)
            splits[split].append(image)
    if "" in splits:
        train, held_out = _draw_split(splits[""], validation, seed)
    else:
        train = [image for name in TRAIN for image in splits.get(name, [])]
        held_out = next(splits[name] for name in VALIDATION if name in splits)
    return ImageSet(path.resolve().name, validation, labels, train, held_out, sorted(skipped))


def sample_images(path: Path, count: int) -> list[Image]:
    """Up to `count` readable images spread evenly over a folder or tar, in classes or not; raises InvalidInput.

    Where it has `train` and `val` or `test` folders, they are those of `train`.
    """
    images, _ = _readable(_sources(path), room=0)
    _drop_shared_folders(images)
    chosen = [
        image for image, split, _ in _places(sorted(images, key=lambda image: image.name)) if split in ("", *TRAIN)
    ]
    if not chosen or count < 1:
        raise InvalidInput(f"{path} holds {len(chosen)} readable images; {max(count, 1)} were asked for", "data")
    return [chosen[number * len(chosen) // count] for number in range(count)] if count < len(chosen) else chosen


def _readable(sources: Iterator[Image], room: int) -> tuple[list[Image], list[str]]:
    """The images that decode, their pixels kept while there is room for them, and why the others don't."""
    images: list[Image] = []
    skipped: list[str] = []
    for image, outcome in _decoded(sources):
        if isinstance(outcome, str):
            skipped.append(f"{image.name}: {outcome}")
            continue
        if outcome.nbytes <= room:
            room -= outcome.nbytes
            image.cached, image.source = outcome, b""
        images.append(image)
    return images, skipped


def _sources(path: Path) -> Iterator[Image]:
    """An image for each file, but those of CIFAR-10's own files: as many as they hold."""
    parts: dict[str, bytes] = {}
    for name, source in _files(path):
        if cifar.is_part(name):
            parts[name] = _read(source)
        else:
            yield Image(name, source)
    for name, pixels in cifar.images(parts):
        yield Image(name, b"", cached=pixels)


def _files(path: Path) -> Iterator[tuple[str, bytes | Path]]:
    """Every file below a folder or in a tar, hidden ones left out."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path).as_posix()
            if file.is_file() and _visible(name):
                yield name, file
        return
    if not path.is_file():
        raise InvalidInput(f"{path} is neither a folder nor a file", "data")
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isfile() and _visible(name):
                    content = archive.extractfile(member)
                    assert content is not None
                    yield name, content.read()
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise InvalidInput(f"{path} is not a folder or a readable .tar, .tar.gz or .tar.xz: {error}", "data") from error


def _visible(name: str) -> bool:
    return not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def _decoded(sources: Iterator[Image]) -> Iterator[tuple[Image, Pixels | str]]:
    """Each source with its pixels, or with why it has none; decoded in parallel, in order."""

    def attempt(image: Image) -> Pixels | str:
        try:
            return image.pixels()
        except (FullframeError, OSError) as error:
            return str(error)

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        while chunk := list(islice(sources, 8 * workers)):
            yield from zip(chunk, pool.map(attempt, chunk), strict=True)


def _read(source: bytes | Path) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()


def _drop_shared_folders(images: list[Image]) -> None:
    """Shorten the names by the leading folders that all have, so that a packed folder is what the folder is."""
    folders = [PurePosixPath(image.name).parts[:-1] for image in images]
    shared = next((depth for depth, parts in enumerate(zip(*folders, strict=False)) if len({*parts}) > 1), None)
    depth = min(map(len, folders), default=0) if shared is None else shared
    for image in images:
        image.name = "/".join(PurePosixPath(image.name).parts[depth:])


def _places(images: list[Image]) -> list[tuple[Image, str, str]]:
    """Each image with its split and its class, which are its first folders; "" for none."""
    folders = [PurePosixPath(image.name).parts[:-1] for image in images]
    names = {parts[0].lower() for parts in folders if parts}
    if names <= {*TRAIN, *VALIDATION} and names & {*TRAIN} and names & {*VALIDATION}:
        padded = [(*parts, "", "") for parts in folders]
        return [(image, parts[0].lower(), parts[1]) for image, parts in zip(images, padded, strict=True)]
    return [(image, "", parts[0] if parts else "") for image, parts in zip(images, folders, strict=True)]


def _draw_split(images: list[Image], share: float, seed: int) -> tuple[list[Image], list[Image]]:
    """Hold out `share` of each class, at least one image where the class has two."""
    if not 0 <= share < 1:
        raise InvalidInput(f"validation is {share}; it must be a share in [0, 1)", "validation")
    by_label: dict[int, list[Image]] = defaultdict(list)
    for image in images:
        by_label[image.label].append(image)
    held_out: set[str] = set()
    rng = np.random.default_rng(seed)
    for label in sorted(by_label):
        members = by_label[label]
        count = min(max(1, round(share * len(members))), len(members) - 1) if share else 0
        held_out.update(members[i].name for i in rng.permutation(len(members))[:count])
    train = [image for image in images if image.name not in held_out]
    return train, [image for image in images if image.name in held_out]
