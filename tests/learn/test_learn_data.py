import io
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from fullframe.errors import InvalidInput
from fullframe.learn.data import Image, ImageSet, load_images
from tests.learn.shapes import pack, write_shapes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shapes(tmp_path / "shapes", 10)


def keys(images: list[Image]) -> list[tuple[str, int]]:
    return [(image.name, image.label) for image in images]


def assert_same(a: ImageSet, b: ImageSet) -> None:
    assert a.labels == b.labels
    for mine, other in ((a.train, b.train), (a.validation, b.validation)):
        assert keys(mine) == keys(other)
        assert all(np.array_equal(i.pixels(), j.pixels()) for i, j in zip(mine, other, strict=True))


@pytest.mark.parametrize("suffix", [".tar", ".tar.xz", ".tar.gz"])
def test_a_tar_holds_what_its_folder_holds(folder: Path, tmp_path: Path, suffix: str) -> None:
    direct = load_images(folder)
    packed = load_images(pack(folder, tmp_path / f"s{suffix}"))
    assert_same(direct, packed)
    assert direct.fingerprint() == packed.fingerprint()
    assert direct.labels == ("blue", "green", "red")
    assert len(direct.train) == 27
    assert [image.label for image in direct.validation] == [0, 1, 2]


def test_pixels_are_the_same_without_the_cache(folder: Path, tmp_path: Path) -> None:
    tar = pack(folder, tmp_path / "s.tar")
    cached = load_images(folder)
    assert all(image.cached is not None for image in cached.train)
    for path in (folder, tar):
        lean = load_images(path, cache_bytes=4000)
        assert 0 < sum(image.cached is not None for image in lean.train) < 27
        assert_same(cached, lean)


def test_the_split_follows_the_seed(folder: Path) -> None:
    names = [[image.name for image in load_images(folder, seed=seed).validation] for seed in (1, 1, 2)]
    assert names[0] == names[1] != names[2]
    assert not {*names[0]} & {image.name for image in load_images(folder, seed=1).train}


@pytest.mark.parametrize("held_out", ["test", "val", "Validation"])
def test_given_splits_are_kept(tmp_path: Path, held_out: str) -> None:
    write_shapes(tmp_path / "d" / "train", 4)
    write_shapes(tmp_path / "d" / held_out, 2, seed=1)
    images = load_images(tmp_path / "d")
    assert len(images.train) == 12
    assert {image.name.split("/")[0] for image in images.validation} == {held_out}
    assert len(images.validation) == 6


def test_unreadable_files_are_named_and_left_out(folder: Path) -> None:
    whole = load_images(folder)
    (folder / "red" / "text.jpg").write_text("no image")
    (folder / "red" / "cut.png").write_bytes((folder / "red" / "000.png").read_bytes()[:60])
    (folder / "red" / "empty.png").touch()
    shutil.copy(folder / "red" / "000.png", folder / "stray.png")
    (folder / "red" / ".hidden.png").write_text("not looked at")
    images = load_images(folder)
    assert [line.split(":")[0] for line in images.skipped] == [
        "red/cut.png",
        "red/empty.png",
        "red/text.jpg",
        "stray.png",
    ]
    assert_same(whole, images)


def test_images_of_any_kind_become_rgb(folder: Path) -> None:
    PIL.Image.new("L", (9, 5), 77).save(folder / "red" / "gray.png")
    image = next(i for i in load_images(folder, validation=0).train if i.name == "red/gray.png")
    assert (image.pixels() == np.full((5, 9, 3), 77)).all()


def test_what_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="neither a folder nor a file"):
        load_images(tmp_path / "nothing")
    (tmp_path / "text.tar").write_text("no tar")
    with pytest.raises(InvalidInput, match=r"not a folder or a readable \.tar"):
        load_images(tmp_path / "text.tar")
    write_shapes(tmp_path / "s", 2)
    shutil.rmtree(tmp_path / "s" / "red")
    shutil.rmtree(tmp_path / "s" / "blue")
    with pytest.raises(InvalidInput, match="at least two class folders"):
        load_images(tmp_path / "s")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match="at least two class folders"):
        load_images(tmp_path / "empty")


def test_a_cut_archive_is_refused(folder: Path, tmp_path: Path) -> None:
    for suffix in (".tar.xz", ".tar.gz"):
        path = pack(folder, tmp_path / f"s{suffix}")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(InvalidInput, match="readable"):
            load_images(path)


def test_the_fingerprint_tells_sets_and_splits_apart(folder: Path) -> None:
    first = load_images(folder)
    assert first.fingerprint() == load_images(folder).fingerprint()
    assert first.fingerprint() != load_images(folder, seed=1).fingerprint()
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (3, 3)).save(buffer, "png")
    (folder / "red" / "new.png").write_bytes(buffer.getvalue())
    assert first.fingerprint() != load_images(folder).fingerprint()
