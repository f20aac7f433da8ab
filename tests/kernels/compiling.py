"""Compiles the kernels that public calls launch, for GPUs that need not be there, and counts what matters in the code.

`python -m tests.kernels.compiling ANSWER REQUEST` is a process of its own, since Triton must not be its interpreter; to
Triton it has one GPU of each target. Types, alignment and constants are those that the calls of launching.py have.
"""

import ast
import importlib
import itertools
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fusedpool
from fusedpool import runtime
from tests.kernels import launching

TARGETS: Final = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_OPTIONS: Final = ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion")

_ATOMIC: Final = r"\b(?:atom|red)\.|(?:global|flat|buffer)_atomic"
_LOCAL: Final = r"\b[ls][dt]\.local|\bscratch_(?:load|store)"
_WIDE: Final = r"\b(?:ld|st)\.global\S*\.(?:v4\.b32|v2\.b64)|\b(?:global|buffer)_(?:load|store)_(?:dwordx4|b128)"
_NARROW: Final = r"\bld\.global(?:(?!\.v)\S)*\.[bu]16\b|\b(?:global|buffer)_load_(?:u?short|[ud]16)\w*"


@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel: what Triton would compile."""

    kernel: str
    key: str
    source: Any
    options: dict[str, Any]


class _Driver:
    """As much of a driver as Triton asks about before it compiles."""

    def __init__(self, target: str) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return list(TARGETS).index(self._target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._target]


@contextmanager
def captured(target: str) -> Iterator[list[Launch]]:
    """The launches that are made inside, on the kernels' path; none runs, so results are whatever memory held."""
    launches: list[Launch] = []

    def record(*, key: Any, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0])
        options = {name: compile[name] for name in _OPTIONS}
        launches.append(Launch(f"{fn.module}.{fn.name}", str(key), source, options))
        return True  # do not compile it, nor launch

    amd = TARGETS[target].backend == "hip"
    triton.runtime.driver.set_active(_Driver(target))
    triton.knobs.runtime.jit_cache_hook = record
    torch.version.hip = "7" if amd else None  # fusedpool and Triton look there for AMD
    try:
        with runtime.force("triton"):
            yield launches
    finally:
        triton.knobs.runtime.jit_cache_hook = torch.version.hip = None


def counts(launch: Launch, target: str) -> dict[str, int]:
    """What the compiled kernel does: see the patterns above; spilled: bytes of registers kept in a thread's stack."""
    compiled = triton.compile(launch.source, target=TARGETS[target], options=launch.options)
    text = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
    patterns = {"atomic": _ATOMIC, "local": _LOCAL, "wide": _WIDE, "narrow": _NARROW}
    found = {name: len(re.findall(pattern, text)) for name, pattern in patterns.items()}
    return {**found, "spilled": _spilled(compiled.asm)}


def _spilled(asm: dict[str, Any]) -> int:
    if "amdgcn" in asm:
        return sum(int(n) for n in re.findall(r"\.private_segment_fixed_size:\s*(\d+)", asm["amdgcn"]))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sum(int(n) for n in re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage))


def kernels() -> set[str]:
    """The names of all kernels of fusedpool: what Triton compiles and no other Triton function calls."""
    functions: dict[str, Any] = {}
    for info in pkgutil.iter_modules(fusedpool.__path__, "fusedpool."):
        for name, value in vars(importlib.import_module(info.name)).items():
            if isinstance(value, triton.JITFunction) and value.fn.__module__ == info.name:
                functions[f"{info.name}.{name}"] = value
    called = set()
    for function in functions.values():
        names = {node.id for node in ast.walk(function.parse()) if isinstance(node, ast.Name)}
        called |= {id(function.fn.__globals__.get(name)) for name in names - {function.fn.__name__}}
    return {name for name, function in functions.items() if id(function) not in called}


def main(answer: str, request: str) -> None:
    """Write to a file what `request` asks for, JSON: a list of "calls" by "layouts" by "sizes" by "targets"."""
    calls = {**launching.CALLS, **launching.MORE, **launching.CONTROL}
    found = []
    for job in json.loads(request):
        for target, name, layout, size in itertools.product(
            *(job[of] for of in ("targets", "calls", "layouts", "sizes"))
        ):
            with captured(target) as launches:
                launching.launch(calls[name], layout, tuple(size))
            for launch in {(launch.kernel, launch.key): launch for launch in launches}.values():
                row = {"target": target, "call": name, "layout": layout, "size": size}
                row |= {"kernel": launch.kernel, "key": launch.key}
                found.append({**row, **(_compiled(launch, target) if job["compile"] else {})})
    Path(answer).write_text(json.dumps({"kernels": sorted(kernels()), "launches": found}))


def _compiled(launch: Launch, target: str) -> dict[str, Any]:
    try:
        return {"error": "", **counts(launch, target)}
    except triton.CompilationError as error:
        return {"error": f"{error}\n{error.__cause__ or ''}"}


if __name__ == "__main__":
    main(*sys.argv[1:])
