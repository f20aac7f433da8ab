"""The quota for uploads: what is refused, what is free again, and that no file outlives whoever wrote it."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullframe.errors import InvalidInput, Overloaded
from fullframe.image import OnDisk
from fullframe.server.spool import Spool, SpooledFile, open_spool
from fullframe.settings import read_settings

ROOM = 1000


def opened(spool: Spool, announced: int = 0) -> SpooledFile:
    file = SpooledFile(spool, announced)
    file.open()
    return file


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_is_written_is_read_and_its_room_is_free_again(tmp_path: Path, in_memory: bool) -> None:
    spool = Spool(None if in_memory else str(tmp_path), ROOM, ROOM)
    file = opened(spool, announced=300)
    assert spool.reserved() == 300
    for chunk in (b"a" * 200, b"b" * 100, b"c" * 50):  # more than was announced: the transport tells, the quota counts
        file.write(chunk)
    assert (spool.reserved(), file.size) == (350, 350)
    data = file.data()
    assert len(data) == 350
    assert (data.head if isinstance(data, OnDisk) else data)[199:201] == b"ab"
    assert not list(tmp_path.iterdir())  # it has no name
    file.close()
    file.close()
    file.write(b"too late")
    assert spool.reserved() == 0
    if isinstance(data, OnDisk):  # held open by a reader, and yet it takes no space
        assert data.has_changed()
        assert os.fstat(data._descriptor).st_size == 0


def test_refusals_take_no_room(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path), 600, ROOM)
    with pytest.raises(InvalidInput, match="an upload of 601 bytes is more than the limit of 600 bytes"):
        SpooledFile(spool, 601)
    one = opened(spool, 600)
    two = SpooledFile(spool, 401)
    with pytest.raises(Overloaded, match="uploads of 600 bytes are being worked on, of at most 1000") as full:
        two.open()
    assert full.value.retry_after > 0
    two.close()
    three = opened(spool)
    three.write(bytes(400))
    with pytest.raises(Overloaded, match="no room for 1 now"):
        three.write(b"x")
    with pytest.raises(InvalidInput, match="601 bytes"):
        three.write(bytes(201))
    assert spool.reserved() == 1000
    one.close()
    three.write(b"x")
    three.close()
    assert spool.reserved() == 0


def test_disk_space_is_left_and_announced_bytes_count_before_they_come(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    free = status.f_bavail * status.f_frsize
    spool = Spool(str(tmp_path), free * 2, free * 2, min_free=free // 2)
    with pytest.raises(Overloaded, match="nearly full"):
        opened(spool, free * 3 // 4)
    first = opened(spool, free // 3)
    with pytest.raises(Overloaded, match="nearly full"):
        opened(spool, free // 3)
    first.close()
    opened(spool, free // 3).close()


def test_a_folder_that_goes_away_fails_uploads_and_leaves_no_trace(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    folder.mkdir()
    spool = Spool(str(folder), ROOM, ROOM)
    folder.rmdir()
    file = SpooledFile(spool, 10)
    with pytest.raises(Overloaded, match="takes no more now: No such file or directory"):
        file.open()
    file.close()
    assert spool.reserved() == 0


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 700), st.booleans()), max_size=40))
def test_the_books_balance(steps: list[tuple[int, int, bool]]) -> None:
    """Files opened, written and closed in any order, refused or not: what is reserved is what is open, within room."""
    spool = Spool(None, 600, ROOM)
    files: dict[int, SpooledFile] = {}
    for number, size, close in steps:
        try:
            if number not in files:
                files[number] = SpooledFile(spool, size)
                files[number].open()
            elif close:
                files.pop(number).close()
            else:
                files[number].write(bytes(size))
        except (InvalidInput, Overloaded):
            if number in files:
                files.pop(number).close()
        assert sum(file.size for file in files.values()) <= spool.reserved() <= ROOM
    for file in files.values():
        file.close()
    assert spool.reserved() == spool._written == 0


def test_without_a_folder_there_is_memory_and_a_wrong_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))  # as where the file system is read-only
    spool = open_spool(read_settings(max_image_bytes=200_000, max_upload_bytes=500_000))
    assert spool.largest == 200_000
    file = opened(spool, 200_000)
    file.write(bytes(200_000))
    assert isinstance(file.data(), bytes)
    assert open_spool(read_settings(max_upload_bytes=5000, spool_folder=str(tmp_path))).largest == 5000
    with pytest.raises(InvalidInput, match=r"FULLFRAME_SPOOL_FOLDER\) can't be written: No such file") as wrong:
        open_spool(read_settings(spool_folder=str(tmp_path / "missing")))
    assert wrong.value.field == "spool_folder"
