"""Which files a folder's images are, in which order, and how their names become text and back."""

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fullframe.cli.files import file_at, paths_inside, text_of

# Bytes as a file system takes them, many of them backslashes, parts of escapes and of UTF-8.
NAMES = st.lists(
    st.sampled_from([b"\\", b"x", b"e", b"9", b"5c", b"\xe9", b"\xc3", b"\xa9", b"-", b".", "ü".encode(), b"a"]),
    min_size=1,
    max_size=8,
).map(b"".join)


def refused(path: str, error: OSError) -> None:
    raise AssertionError(path) from error


@given(NAMES)
def test_every_name_has_a_text_of_its_own(name: bytes) -> None:
    text = text_of(os.fsdecode(name))
    text.encode()  # it is Unicode
    assert os.fsencode(file_at("folder", text)) == os.fsencode(Path("folder", os.fsdecode(name)))


@given(st.sets(NAMES, max_size=8), st.sets(NAMES, max_size=3))
def test_texts_are_as_many_as_names(some: set[bytes], others: set[bytes]) -> None:
    names = some | others
    assert len({text_of(os.fsdecode(name)) for name in names}) == len(names)


def test_usual_names_are_their_own_text() -> None:
    for name in ("cat.jpg", "übersicht 猫.png", "back\\slash.png", "\\x", "100%.png"):
        assert text_of(name) == name
        assert file_at("photos", name) == f"photos/{name}"


def test_images_of_a_tree_in_the_order_of_their_paths(tmp_path: Path) -> None:
    names = [
        b"a-b/1.png",
        b"a/1.png",
        b"a/b/2.JPG",
        b"a.png",
        b"a/b.png",
        b"a\xe9/1.webp",
        "ä/1.gif".encode(),
        b"z.tiff",
    ]
    others = [b"a/notes.txt", b".hidden.png", b".folder/1.png", b"a/.also.png", b"png"]
    for name in names + others:
        file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    (tmp_path / "around").symlink_to(".")
    (tmp_path / "around.png").symlink_to("a")
    (tmp_path / "nowhere.png").symlink_to("missing")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "empty").mkdir()
    texts = [text_of(os.fsdecode(name)) for name in names]
    found = list(paths_inside(str(tmp_path), refused))
    assert found == sorted([*texts, "nowhere.png", "loop.png"])
    assert {os.fsencode(file_at(str(tmp_path), text)) for text in texts} == {
        os.fsencode(tmp_path) + b"/" + name for name in names
    }
