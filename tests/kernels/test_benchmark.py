"""The benchmark's own logic, on a CPU and in miniature: what it checks, times, keeps and skips."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import measure
from benchmarks.kernels.__main__ import _arguments, _cases, main
from benchmarks.kernels.measure import IMPLEMENTATIONS, Case
from benchmarks.kernels.workloads import WORKLOADS, Workload

TINY = ["--device", "cpu", "--tiny", "--dtypes", "float16", "--implementations", "fused,eager"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda work: f"{work.name}, {work.operation.name}")
def test_every_workload_agrees_with_float64(workload: Workload) -> None:
    layout = "NHWC" if len(workload.shape) == 4 else "packed"
    case = Case(workload.tiny(), "bfloat16", layout)
    assert measure.check(case, "cpu") <= measure.TOLERANCE[torch.bfloat16]


def test_a_wrong_operator_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stem = WORKLOADS[0]

    def off_by_a_row(x: Tensor) -> Tensor:
        y: Tensor = stem.operation.fused(x)
        return y.roll(1, 2)

    wrong = replace(stem, operation=replace(stem.operation, fused=off_by_a_row))
    with pytest.raises(ArithmeticError, match="output 0 differs"):
        measure.check(Case(wrong.tiny(), "float32", "NCHW"), "cpu")
    monkeypatch.setattr("benchmarks.kernels.__main__.WORKLOADS", (wrong,))
    assert main([*TINY, "--out", str(tmp_path / "k.csv")]) == 1
    fused = [row for row in rows(tmp_path / "k.csv") if row["implementation"] == "fused"]
    assert [row["ms"] for row in fused] == ["", ""]
    assert all("differs from float64" in row["note"] for row in fused)


def test_rows_are_kept_and_not_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "k.csv"
    words = [*TINY, "--only", "vgg16 pool 1", "--out", str(out)]
    assert main(words) == 0
    kept = [row for row in rows(out) if row["implementation"] != "copy"]
    assert len(kept) == 8  # fused and eager, two layouts, two directions
    assert {row["direction"] for row in kept} == {"forward", "backward"}
    # 2 x 8 x 16 x 16 halves in, a quarter of them out, and a byte for each of those.
    assert {row["megabytes"] for row in kept} == {f"{(4096 * 2 + 1024 * 3) / 1e6:.3f}"}
    assert out.with_suffix(".png").stat().st_size > 0
    assert "4 measured" in capsys.readouterr().out
    assert main(words) == 0
    assert "0 measured" in capsys.readouterr().out
    assert main([*words, "--fresh"]) == 0
    assert "4 measured" in capsys.readouterr().out


def test_a_run_out_of_time_goes_on_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "k.csv"
    words = [*TINY, "--only", "maxout", "--out", str(out)]
    assert main([*words, "--minutes", "0"]) == 0
    said = capsys.readouterr().out
    assert "0 measured" in said and "4 are left" in said
    assert main([*words, "--minutes", "5"]) == 0
    said = capsys.readouterr().out
    assert "4 measured" in said and "left" not in said


def test_what_matters_most_is_measured_first() -> None:
    order, first = _cases(_arguments([])), _cases(_arguments(["--quick"]))
    rest = [name for _, name in order[len(first) :]]
    assert order[: len(first)] == first
    assert rest == sorted(rest, key=IMPLEMENTATIONS.index)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert main(["--device", "cpu"]) == 2
    assert "--out" in capsys.readouterr().err


def test_list_names_every_workload(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(workload.name in listed for workload in WORKLOADS)
