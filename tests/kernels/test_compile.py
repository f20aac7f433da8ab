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
SIZE: Final = [28, 80]
"""Rows of NCHW that are whole vectors, and so are those of every call's outputs."""

ODD: Final = [29, 47]
EACH: Final = ("window max", "batch norm max", "whole avg max gem", "channels max", "convolution avg")
"""Calls that launch every kernel."""

NCHW: Final = (*EACH, "window of stride 1 avg", "fractional max", "sized avg", "pyramid max")
"""Calls whose kernels differ most from those for channels_last."""

PARTIAL: Final = {
    "fusedpool.batchnorm_kernels.merge_moments",
    "fusedpool.batchnorm_kernels.merge_sums",
    "fusedpool.conv_kernels.merge",
    "fusedpool.region_kernels.merge",
}
"""Kernels that read no map, but what others left of it."""

ANYWHERE: Final = ("sized", "grid", "pyramid")
"""Calls that read rectangles of NCHW, which begin and end at any column: region_kernels.partials is narrow there."""

VECTORS: Final = {
    "fusedpool.window_kernels.forward",
    "fusedpool.window_kernels.backward",
    "fusedpool.channel_kernels.forward",
    "fusedpool.region_kernels.partials",
    "fusedpool.batchnorm_kernels.moments",
}
"""Kernels all of whose loads of channels_last maps are vectors; others also read a number here and there."""

PARKED: Final = 32
"""Bytes of a thread, for some kinds: ptxas parks a few values though registers are left, to fit one more block."""

Row = dict[str, Any]


def job(
    targets: Iterable[str], calls: Iterable[str], layouts: Iterable[str], sizes: Any = (SIZE,), compile: bool = True
) -> Row:
    return {"targets": [*targets], "calls": [*calls], "layouts": [*layouts], "sizes": [*sizes], "compile": compile}


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
        [job(["sm_90"], CALLS, ["NHWC"]), job(["sm_90"], ["window max", "pyramid max"], ["NCHW"], [ODD])],
        [job(others, EACH, ["NHWC"]), job(["sm_90"], NCHW, ["NCHW"]), job(TARGETS, CONTROL, ["NHWC"])],
    )
    return {"kernels": answers[0]["kernels"], "launches": [row for answer in answers for row in answer["launches"]]}


def ours(answer: Row) -> list[Row]:
    return [row for row in answer["launches"] if row["call"] not in CONTROL]


def named(rows: Iterable[Row], wrong: Callable[[Row], bool]) -> list[str]:
    return [f"{row['kernel']} for {row['call']}, {row['layout']}, {row['target']}" for row in rows if wrong(row)]


def check(answer: Row, parked: int = 0) -> None:
    """Assert what holds for every launch; parked: how many bytes of each thread's registers may be kept elsewhere."""
    rows = ours(answer)
    assert not [f"{row['kernel']} for {row['call']}: {row['error']}" for row in rows if row["error"]]
    assert not named(rows, lambda row: row["atomic"] > 0)
    assert not named(rows, lambda row: row["local"] > 0 or row["spilled"] > parked)
    assert not named(rows, lambda row: row["wide"] == 0 and can_be_wide(row))
    assert not named(rows, lambda row: row["narrow"] > 0 and row["layout"] == "NHWC" and row["kernel"] in VECTORS)


def can_be_wide(row: Row) -> bool:
    if row["kernel"] in PARTIAL or row["size"] == ODD:
        return False
    anywhere = row["kernel"] == "fusedpool.region_kernels.partials" and row["call"].startswith(ANYWHERE)
    return row["layout"] == "NHWC" or not anywhere


def test_every_kernel_is_compiled_for_every_target(compiled: Row) -> None:
    for target in TARGETS:
        launched = {row["kernel"] for row in ours(compiled) if row["target"] == target}
        assert launched == set(compiled["kernels"]), f"add a call to launching.py ({target})"
    assert set(compiled["kernels"]) >= PARTIAL


def test_code_is_wide_and_neither_spills_nor_uses_atomics(compiled: Row) -> None:
    check(compiled)


@pytest.mark.parametrize("target", TARGETS)
def test_careless_code_would_be_noticed(compiled: Row, target: str) -> None:
    (row,) = (row for row in compiled["launches"] if row["call"] in CONTROL and row["target"] == target)
    assert row["error"] == ""
    assert row["atomic"] > 0
    assert row["spilled"] > PARKED or target == "gfx942"  # it has twice the registers
    assert row["narrow"] > 0
    assert row["wide"] == 0


@pytest.mark.parametrize("sizes", [[[37, 73], [53, 77], [45, 85]], [[37, 400], [45, 560]]], ids=["odd", "aligned"])
def test_a_new_size_compiles_nothing(tmp_path: Path, sizes: Any) -> None:
    """Of one class: what rows of maps and outputs are multiples of, and how long they are. NCHW compiles for each."""
    requests = [[job(["sm_90"], CALLS, [layout], sizes, compile=False)] for layout in LAYOUTS]
    keys = defaultdict(set)
    for answer in ask(tmp_path, *requests):
        for row in answer["launches"]:
            keys[row["call"], row["layout"], row["kernel"]].add(row["key"])
    assert keys
    # Normalisation goes back twice through one kernel, once for its sums and once for the map.
    several = {what: len(found) for what, found in keys.items() if len(found) > 1}
    assert several == {("batch norm avg", layout, "fusedpool.window_kernels.backward"): 2 for layout in LAYOUTS}


def test_few_classes_of_rows_are_compiled_for(tmp_path: Path) -> None:
    """Five alignments of rows times lengths, of which x's are one class and y's two. At stride 2, x's align nothing."""
    sizes = [[31, width] for width in range(65, 193)]
    (answer,) = ask(tmp_path, [job(["sm_90"], ["window max"], ["NCHW"], sizes, compile=False)])
    keys = defaultdict(set)
    for row in answer["launches"]:
        keys[row["kernel"]].add(row["key"])
    assert {kernel: len(found) for kernel, found in keys.items()} == {
        "fusedpool.window_kernels.forward": 2 * 5,
        "fusedpool.window_kernels.backward": 5,
    }


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_call_compiles_for_every_target(tmp_path: Path, target: str, layout: str) -> None:
    (answer,) = ask(tmp_path, [job([target], {**CALLS, **MORE}, [layout])])
    check(answer, PARKED)
