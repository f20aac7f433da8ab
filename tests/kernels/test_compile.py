"""Every kernel compiles for the GPUs we name, into code that is wide, without atomics and without spilled registers."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import pytest

from tests.kernels.launching import CALLS, CONTROL, LAYOUTS, MORE

pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(900)

TARGETS: Final = ("sm_80", "sm_90", "sm_100", "gfx942")
SIZE: Final = [28, 28]
EACH: Final = ("window max", "batch norm max", "whole avg max gem", "channels max", "convolution avg")
"""Calls that launch every kernel."""

PARTIAL: Final = {
    "fusedpool.batchnorm_kernels.merge_moments",
    "fusedpool.batchnorm_kernels.merge_sums",
    "fusedpool.conv_kernels.merge",
    "fusedpool.region_kernels.merge",
}
"""Kernels that read no map, but what others left of it."""

STRIDED: Final = {"fusedpool.groups._forward"}
"""Kernels that read channels which lie a group apart: narrow loads, whose neighbours share what they fetch."""

SPILLED: Final = 32
"""Bytes of a thread: ptxas parks a few values of kernels that have registers left, to fit one more block."""

Row = dict[str, Any]


def job(targets: Iterable[str], calls: Iterable[str], layouts: Iterable[str], compile: bool = True) -> Row:
    return {"targets": [*targets], "calls": [*calls], "layouts": [*layouts], "sizes": [SIZE], "compile": compile}


def ask(folder: Path, *requests: list[Row]) -> list[Row]:
    """The answers of tests.kernels.compiling to requests, asked at once."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    processes = []
    for number, request in enumerate(requests):
        command = [sys.executable, "-m", "tests.kernels.compiling", str(folder / f"{number}.json"), json.dumps(request)]
        root = Path(__file__).parents[2]
        processes.append(subprocess.Popen(command, env=environment, cwd=root, stderr=subprocess.PIPE, text=True))
    try:
        for process in processes:
            errors = process.communicate()[1]
            assert process.returncode == 0, errors[-4000:]
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(len(requests))]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Row:
    """All calls for one target, those that launch every kernel for the others."""
    others = [target for target in TARGETS if target != "sm_90"]
    answers = ask(
        tmp_path_factory.mktemp("triton"),
        [job(["sm_90"], CALLS, ["NHWC"]), job(["sm_90"], EACH, ["NCHW"])],
        [job(others, EACH, ["NHWC"]), job(TARGETS, CONTROL, ["NHWC"])],
    )
    return {"kernels": answers[0]["kernels"], "launches": [row for answer in answers for row in answer["launches"]]}


def ours(answer: Row) -> list[Row]:
    return [row for row in answer["launches"] if row["call"] not in CONTROL]


def named(rows: Iterable[Row], wrong: Callable[[Row], bool]) -> list[str]:
    return [f"{row['kernel']} for {row['call']}, {row['layout']}, {row['target']}" for row in rows if wrong(row)]


def check(answer: Row) -> None:
    """Assert what holds for every launch."""
    rows = ours(answer)
    assert not [f"{row['kernel']} for {row['call']}: {row['error']}" for row in rows if row["error"]]
    assert not named(rows, lambda row: row["atomic"] > 0)
    assert not named(rows, lambda row: row["local"] > 0 or row["spilled"] > SPILLED)
    maps = [row for row in rows if row["layout"] == "NHWC" and row["kernel"] not in PARTIAL | STRIDED]
    assert not named(maps, lambda row: row["wide"] == 0)


def test_every_kernel_is_compiled_for_every_target(compiled: Row) -> None:
    for target in TARGETS:
        launched = {row["kernel"] for row in ours(compiled) if row["target"] == target}
        assert launched == set(compiled["kernels"]), f"add a call to launching.py ({target})"
    assert set(compiled["kernels"]) >= PARTIAL | STRIDED


def test_code_is_wide_and_neither_spills_nor_uses_atomics(compiled: Row) -> None:
    check(compiled)


@pytest.mark.parametrize("target", TARGETS)
def test_careless_code_would_be_noticed(compiled: Row, target: str) -> None:
    (row,) = (row for row in compiled["launches"] if row["call"] in CONTROL and row["target"] == target)
    assert row["error"] == ""
    assert row["atomic"] > 0
    assert row["spilled"] > SPILLED or target == "gfx942"  # it has twice the registers
    assert row["narrow"] > 0
    assert row["wide"] == 0


def test_a_new_size_compiles_nothing(tmp_path: Path) -> None:
    """Sizes of one class, that is with rows of more than 32 values, odd ones: classes are what NCHW compiles for."""
    sizes = [[37, 73], [53, 77], [45, 85], [61, 97]]
    requests = [[{**job(["sm_90"], CALLS, [layout], compile=False), "sizes": sizes}] for layout in LAYOUTS]
    keys = defaultdict(set)
    for answer in ask(tmp_path, *requests):
        for row in answer["launches"]:
            keys[row["call"], row["layout"], row["kernel"]].add(row["key"])
    assert keys
    # Normalisation goes back twice through one kernel, once for its sums and once for the map.
    several = {what: len(found) for what, found in keys.items() if len(found) > 1}
    assert several == {("batch norm avg", layout, "fusedpool.cells._backward"): 2 for layout in LAYOUTS}


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("target", TARGETS)
def test_every_call_compiles_for_every_target(tmp_path: Path, target: str) -> None:
    requests = [[job([target], {**CALLS, **MORE}, [layout])] for layout in LAYOUTS]
    for answer in ask(tmp_path, *requests):
        check(answer)
