"""One row of results: a workload by one implementation, checked against float64, its two directions timed apart."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.kernels.workloads import Workload

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products need

IMPLEMENTATIONS: Final = ("fused", "eager", "compile", "compile deterministic")
DIRECTIONS: Final = ("forward", "backward")
DTYPES: Final = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
TOLERANCE: Final = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4}
"""Of max|difference| over max|reference|, for each result: its rounding, and that of sums of many terms."""

_QUEUED: Final = 2_000_000  # cycles, about a millisecond


@dataclass(frozen=True)
class Case:
    """A workload at a type and a memory format."""

    workload: Workload
    dtype: str
    layout: str

    def input(self, device: str) -> Tensor:
        """Random x: multiples of 1/64 in [-4, 4), exact in every type, so that ties are ties in each."""
        generator = torch.Generator(device).manual_seed(0)
        numbers = torch.randint(-256, 256, self.workload.shape, device=device, generator=generator, dtype=torch.int16)
        x = numbers.to(DTYPES[self.dtype]).div_(64)
        return x.to(memory_format=torch.channels_last) if self.layout == "NHWC" else x


@dataclass(frozen=True)
class Measured:
    """Of one direction."""

    milliseconds: float
    bytes: int
    peak_bytes: int


def check(case: Case, device: str) -> float:
    """The fused operator's largest relative difference from plain PyTorch in float64, results and gradients alike.

    Raises ArithmeticError where it is more than the type's rounding explains.
    """
    operation = case.workload.operation
    x = case.input(device).requires_grad_()
    inputs = (x, *operation.inputs(x.detach()))
    doubles = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in inputs]
    found = _with_gradients(operation.fused(*inputs), inputs)
    expected = _with_gradients((operation.exact or operation.plain)(*doubles), doubles)
    errors = {name: float((found[name] - exact).abs().max() / exact.abs().max()) for name, exact in expected.items()}
    for name, error in errors.items():
        if not error <= TOLERANCE[x.dtype]:
            raise ArithmeticError(f"{name} differs from float64 by {error:.2g} of its largest value")
    return max(errors.values())


def _with_gradients(result: Any, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """An operator's outputs and, for fixed gradients by them, those by its inputs; by name, float64."""
    outputs = _outputs(result)
    generator = torch.Generator(outputs[0].device).manual_seed(2)
    upstream = [torch.randint(-2, 3, y.shape, device=y.device, generator=generator).to(y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, _wanted(inputs), upstream)
    named = {f"output {number}": y.detach().double() for number, y in enumerate(outputs)}
    return {**named, **{f"gradient {number}": g.double() for number, g in enumerate(gradients)}}


def measure(case: Case, implementation: str, device: str) -> dict[str, Measured]:
    """Milliseconds, bytes by the formula and peak memory, by direction. No forward is timed as part of a backward."""
    operation = case.workload.operation
    x = case.input(device).requires_grad_()
    inputs = (x, *operation.inputs(x.detach()))
    with _settings(implementation):
        run = operation.fused if implementation == "fused" else operation.plain
        if implementation.startswith("compile"):
            torch.compiler.reset()
            run = torch.compile(run, fullgraph=True, dynamic=False)
        outputs = _outputs(run(*inputs))
        upstream = [torch.randn_like(y) for y in outputs]
        wanted = _wanted(inputs)

        def forward() -> Any:
            return run(*inputs)

        def backward() -> Any:
            return torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)

        size = (x.element_size(), x.numel(), sum(y.numel() for y in outputs))
        results = {}
        for direction, work in zip(DIRECTIONS, (forward, backward), strict=True):
            moved = operation.bytes(direction, *size)
            results[direction] = Measured(timed(work, device), moved, _peak(work, device))
    return results


def copy_rate(megabytes: int, device: str) -> float:
    """Bytes per second, reads and writes together, of a copy within the device that moves that many megabytes."""
    source = torch.zeros(megabytes * 500_000, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return megabytes * 1e6 / (timed(lambda: target.copy_(source), device) / 1e3)


def timed(work: Callable[[], Any], device: str) -> float:
    """Milliseconds, the median; of a GPU's own time where there is one."""
    if device == "cuda":
        return _timed_on_a_gpu(work)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return median(times) * 1e3


def _timed_on_a_gpu(work: Callable[[], Any]) -> float:
    """As triton.testing.do_bench, which empties the cache before each run, but without the time that Python takes.

    The GPU is kept busy until the work is in its queue: an operator on small maps takes less than its launch.
    """
    cuda: Any = torch.cuda  # parts of it have no types
    cache = torch.empty(2**28, dtype=torch.uint8, device="cuda")

    def runs(number: int) -> float:
        events = [[cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(number)]
        for start, end in events:
            cache.zero_()
            cuda._sleep(_QUEUED)
            start.record()
            work()
            end.record()
        torch.cuda.synchronize()
        return float(median(start.elapsed_time(end) for start, end in events))

    for _ in range(3):  # compile what is compiled, and warm up
        work()
    return runs(min(100, max(10, int(100 / max(runs(5), 1e-3)))))


def _peak(work: Callable[[], Any], device: str) -> int:
    """The most memory allocated at once on top of what was there."""
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _wanted(inputs: Any) -> list[Tensor]:
    return [t for t in inputs if t.requires_grad]


@contextmanager
def _settings(implementation: str) -> Iterator[None]:
    """What makes the comparison fair: no baseline rounds to TF32, fills fresh memory or may not keep its graph."""
    import torch._functorch.config

    torch.backends.cudnn.allow_tf32 = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch._functorch.config.donated_buffer = False
    torch.use_deterministic_algorithms(implementation.endswith("deterministic"))
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
