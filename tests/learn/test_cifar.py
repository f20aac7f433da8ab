import tarfile
from pathlib import Path

import numpy as np
import pytest

from fullframe.errors import InvalidInput
from fullframe.learn.cifar import NAMES
from fullframe.learn.data import load_images, sample_images

CLASSES = ("cat", "airplane", "dog")


def write_batches(folder: Path, count: int = 4) -> np.ndarray:
    """The files of the binary archive with `count` images each; returns the pixels [6, count, 32, 32, 3]."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, count, 32, 32, 3), np.uint8)
    folder.mkdir(parents=True)
    for number, batch in enumerate(pixels):
        name = "test_batch.bin" if number == 5 else f"data_batch_{number + 1}.bin"
        records = [bytes([index % 3]) + image.transpose(2, 0, 1).tobytes() for index, image in enumerate(batch)]
        (folder / name).write_bytes(b"".join(records))
    (folder / NAMES).write_text("\n".join(CLASSES) + "\n\n")
    (folder / "readme.html").write_text("<html>")
    return pixels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_batches(tmp_path / "cifar-10-batches-bin")
    return tmp_path / "cifar-10-batches-bin"


def test_the_archive_is_read_as_it_is_downloaded(tmp_path: Path) -> None:
    pixels = write_batches(tmp_path / "cifar-10-batches-bin")
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "cifar-10-batches-bin", "cifar-10-batches-bin")
    packed, unpacked = (load_images(tmp_path / name) for name in ("cifar-10-binary.tar.gz", "cifar-10-batches-bin"))
    assert packed.fingerprint() == unpacked.fingerprint()
    assert packed.labels == tuple(sorted(CLASSES))
    assert (len(packed.train), len(packed.validation)) == (20, 4)
    assert [line.split(":")[0] for line in packed.skipped] == ["cifar-10-batches-bin/readme.html"]
    for image in packed.train + packed.validation:
        split, name, place = image.name.split("/")
        batch, index = place.removeprefix("data_batch_").split("-")
        number = 5 if split == "test" else int(batch) - 1
        assert name == CLASSES[int(index) % 3] == packed.labels[image.label]
        assert np.array_equal(image.pixels(), pixels[number, int(index)])


def test_without_room_it_is_the_same(folder: Path) -> None:
    lean, rich = load_images(folder, cache_bytes=0), load_images(folder)
    assert all(np.array_equal(a.pixels(), b.pixels()) for a, b in zip(lean.train, rich.train, strict=True))
    assert {image.name.split("/")[0] for image in sample_images(folder, 7)} == {"train"}


def test_bad_files_are_named(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "data_batch_2.bin").read_bytes()
    (folder / "data_batch_2.bin").write_bytes(whole[:-1])
    with pytest.raises(InvalidInput, match=r"data_batch_2\.bin has 12291 bytes"):
        load_images(folder)
    (folder / "data_batch_2.bin").write_bytes(whole)
    (folder / NAMES).unlink()
    with pytest.raises(InvalidInput, match="names 0 classes"):
        load_images(folder)
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"\x80")
    with pytest.raises(InvalidInput, match="take cifar-10-binary"):
        load_images(tmp_path / "cifar-10-batches-py")
