"""A file is replaced whole or stays as it was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fullframe.files import write_atomically


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    program = (
        "import sys, itertools\n"
        "from pathlib import Path\n"
        "from fullframe.files import write_atomically\n"
        "for i in itertools.count(): write_atomically(Path(sys.argv[1]), bytes([i % 256]) * 3_000_000)\n"
    )
    seen = set()
    for delay in (0.0, 0.007, 0.013):
        writer = subprocess.Popen([sys.executable, "-c", program, str(path)])
        while not path.exists() or path.stat().st_mtime_ns in seen:
            time.sleep(0.01)
        time.sleep(0.05 + delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        seen.add(path.stat().st_mtime_ns)
        content = path.read_bytes()
        assert len(content) == 3_000_000
        assert len(set(content)) == 1
