"""Memory that may be used: the machine's, or less where a control group says so."""

from pathlib import Path

import pytest

from fullframe.engine.machine import available_memory

NONE = Path("/nowhere")


def test_a_machine_without_groups_offers_its_own() -> None:
    assert 2**26 < available_memory(NONE, NONE) < 2**50


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/\n", {"memory.max": "50000000\n"}, 50_000_000),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/a/b\n", {"memory.max": "max", "a/memory.max": "70000", "a/b/memory.max": "90000"}, 70_000),
        ("0::/not/mounted\n", {"memory.max": "60000"}, 60_000),
        ("5:cpu:/x\n4:memory:/x\n", {"memory/x/memory.limit_in_bytes": "80000"}, 80_000),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
    ],
)
def test_the_tightest_group_counts(tmp_path: Path, own: str, limits: dict[str, str], expected: int | None) -> None:
    for name, text in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "own").write_text(own)
    assert available_memory(tmp_path, tmp_path / "own") == (expected or available_memory(NONE, NONE))
