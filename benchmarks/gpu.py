"""The engine on a GPU beside PyTorch and ONNX Runtime on the same graph: same-size and mixed-size images, new sizes.

    python -m benchmarks.gpu [--photos FOLDER_OR_TAR] [--model MODEL.onnx] [--images 256] [--rounds 5]
        [--compute float32,float16] [--sides NAME,...] [--device cuda|cpu] [--tiny] [--minutes 9] [--out FOLDER]

Mixed images have the native sizes of --photos, else sides drawn between 96 and 512 pixels; same-size ones are squares
of as many pixels in all; those around 224 pixels have sides between 192 and 256. They are noise, in memory, uint8.
The first three of these take turns, in another order each round; the others follow, each by itself:

- fullframe: the engine behind the server, all images queued at once, batches of different sizes;
- pytorch one by one: the same graph, no operator fused, an image at a time;
- pytorch padded to the largest: 32 images at a time padded to their largest and no mask, which changes their answers;
- onnxruntime one by one: on a GPU where its CUDA provider is installed;
- torch.compile one by one: as pytorch one by one, compiled once for every size (dynamic=True).

What can't be had is named, with the reason. "of_same_size" is a side's pixels a second as a share of its own on images
of the same size; "times_one_by_one" and "times_padded" are against those two sides. Latency is of a lone image that is
answered before the next is asked for. Of sizes that no side has seen each has the first and later images timed.
"error" is the largest difference of logits from ONNX Runtime's on a CPU, relative to max(1, the largest of them). A
profile on the mixed images says what share of the time each kernel has: fullframe's on a GPU; on a CPU, where a
profiler sees its own thread alone, each operator's of plain PyTorch.

On a GPU it adds rows to gpu.csv and gpu_kernels.csv in benchmarks/results, each as soon as it is measured, and draws
gpu.png there. After --minutes it begins nothing new; what was measured by then, or until SIGTERM or Ctrl-C, is kept
and drawn. On a CPU it tries the same with few images (--tiny: small ones too), and keeps what it finds only in --out.
"""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Final, cast, get_args

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_sides import LOGITS, SIDES, TURNS, Fullframe, OneByOne, PaddedToLargest, Side, usable
from benchmarks.recording import append_rows, machine, show
from benchmarks.workloads import CLASS, MIXED, SAME, Size, Workload, noise, workloads
from fullframe.engine.choice import Compute
from fullframe.engine.ort import OrtEngine
from fullframe.errors import FullframeError, InvalidInput, first_line
from fullframe.image import Pixels
from fullframe.model.repository import ModelFile, find_models

RESULTS: Final = Path(__file__).parent / "results"
LONE: Final = 64
"""Images whose latency is measured."""
NEW_SIZES: Final = 12
CHECKED: Final = 8
KERNELS: Final = 25
AIMS: Final = (
    (MIXED, "of_same_size", "mixed sizes have {} of the pixels a second of one size; the aim is 0.8 or more"),
    (CLASS, "times_one_by_one", "around 224 pixels it is {} times as fast as PyTorch one by one; the aim is 4 or more"),
    (MIXED, "times_seen_size", "the first image of a new size takes {} times a later one's; the aim is 1.5 or less"),
)
"""Of fullframe."""

Row = dict[str, str]


class OutOfTime(Exception):
    """No measurement is to begin any more."""


@dataclass
class Run:
    """One run of the benchmark: until when it may begin something, and what it has found.

    Args:
        setting: what every row has.
        folder: where rows are kept; none: nowhere.
        deadline: of time.monotonic().
    """

    setting: Row
    folder: Path | None
    deadline: float
    rows: list[Row] = field(default_factory=list)
    shares: list[Row] = field(default_factory=list)

    def begin(self, what: str) -> None:
        """Say on stderr what comes now; raises OutOfTime where it is too late for it."""
        if time.monotonic() > self.deadline:
            raise OutOfTime(what)
        self._say(what)

    def add(self, row: Row) -> None:
        """Keep a row of gpu.csv."""
        self._say(f"{row['side']}, {row['compute']}: {row['workload']}: {row['megapixels_per_s']} megapixels a second")
        self.rows.append(row)
        self._keep("gpu", row)

    def add_share(self, row: Row) -> None:
        """Keep a row of gpu_kernels.csv."""
        self.shares.append(row)
        self._keep("gpu_kernels", row)

    def _say(self, what: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)

    def _keep(self, name: str, row: Row) -> None:
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            append_rows(self.folder / f"{name}.csv", [{**self.setting, **row}])


def throughput(sides: Sequence[Side], work: Workload, rounds: int) -> dict[str, float]:
    """Seconds for all images, the median of the rounds after one to warm up, by side."""
    taken: dict[str, list[float]] = {side.name: [] for side in sides}
    ready = {side.name: side.ready(work.images) for side in sides}
    for number in range(rounds + 1):
        turn = number % len(sides)
        for side in [*sides[turn:], *sides[:turn]]:
            taken[side.name].append(_milliseconds(side.run, ready[side.name]) / 1e3)
    return {name: median(each[1:]) for name, each in taken.items()}


def latencies(side: Side, images: Sequence[Pixels]) -> list[float]:
    """Milliseconds of each, alone, its size having been seen."""
    found = []
    for image in side.ready(images):
        side.one(image)
        found.append(_milliseconds(side.one, image))
    return found


def new_sizes(side: Side, sizes: Sequence[Size]) -> tuple[float, float]:
    """Milliseconds, medians: of the first image of a size, and of later ones."""
    times = [[_milliseconds(side.one, image) for _ in range(4)] for image in side.ready(noise(sizes, 3))]
    return median(first for first, *_ in times), median(median(later) for _, *later in times)


def _milliseconds(work: Callable[[Any], object], given: Any) -> float:
    started = time.perf_counter()
    work(given)
    return (time.perf_counter() - started) * 1e3


def error(side: Side, reference: OrtEngine, images: Sequence[Pixels]) -> str:
    """The largest relative difference of a few images' logits, computed as when they are timed."""
    wanted = [reference.run(image, [LOGITS])[LOGITS] for image in images]
    found = side.run(side.ready(images))
    gaps = [np.abs(a - b).max() / max(1.0, np.abs(b).max()) for a, b in zip(found, wanted, strict=True)]
    return f"{float(max(gaps)):.1e}"


def measured(
    sides: Sequence[Side],
    works: Sequence[Workload],
    reference: OrtEngine,
    rounds: int,
    seconds: dict[tuple[str, str], float],
    begin: Callable[[str], None],
) -> Iterator[Row]:
    """A row for each workload and side; the first workload is the one of one size.

    Args:
        seconds: of all images by workload and side, of sides that were measured before; those of these are added.
        begin: is told what is about to be measured.
    """
    mixed = next(work for work in works if work.name == MIXED)
    lengths = [length for image in mixed.images for length in image.shape[:2]]
    new = {}
    for side in sides:
        begin(f"{side.name}: new sizes")
        # Others for each: what one side has seen, the libraries of the next know.
        rng = np.random.default_rng([4, SIDES.index(type(side))])
        sizes = rng.integers(min(lengths), max(lengths) + 1, (NEW_SIZES, 2)).tolist()
        new[side.name] = new_sizes(side, [(height, width) for height, width in sizes])
    for work in works:
        begin(f"{', '.join(side.name for side in sides)}: {work.name}")
        seconds |= {(work.name, name): taken for name, taken in throughput(sides, work, rounds).items()}
        for side in sides:
            alone = latencies(side, work.images[:LONE])
            wrong = error(side, reference, work.images[:CHECKED])
            yield {**_rates(side, works[0], work, seconds), **_delays(alone, *new[side.name]), "error": wrong}


def _rates(side: Side, same: Workload, work: Workload, seconds: dict[tuple[str, str], float]) -> Row:
    taken = seconds[work.name, side.name]
    rate, of_same = work.megapixels / taken, same.megapixels / seconds[same.name, side.name]
    against = {
        name: seconds.get((work.name, other.name))
        for name, other in (("times_one_by_one", OneByOne), ("times_padded", PaddedToLargest))
    }
    return {
        "workload": work.name,
        "side": side.name,
        "images": str(len(work.images)),
        "megapixels": f"{work.megapixels:.3f}",
        "images_per_s": f"{len(work.images) / taken:.1f}",
        "megapixels_per_s": f"{rate:.2f}",
        "of_same_size": f"{rate / of_same:.3f}",
        **{name: f"{other / taken:.2f}" if other else "" for name, other in against.items()},
    }


def _delays(alone: Sequence[float], first: float, later: float) -> Row:
    """Of milliseconds: of images whose size was seen, of the first of a new size and of later ones."""
    return {
        **{f"p{q}_ms": f"{np.percentile(alone, q):.3f}" for q in (50, 95, 99)},
        "new_size_ms": f"{first:.3f}",
        "seen_size_ms": f"{later:.3f}",
        "times_seen_size": f"{first / later:.2f}",
    }


def kernels(side: Side, work: Workload, device: str) -> Iterator[Row]:
    """What share of the time each kernel has, on a CPU each operator of this thread, the longest first."""
    ready = side.ready(work.images)
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        side.run(ready)
    attribute = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    times: list[tuple[float, Any]] = [(float(getattr(each, attribute)), each) for each in found.key_averages()]
    total = sum(spent for spent, _ in times) or 1.0
    for spent, each in sorted(times, key=lambda pair: -pair[0])[:KERNELS]:
        yield {
            "workload": work.name,
            "side": side.name,
            "kernel": each.key[:120],
            "calls": str(each.count),
            "ms": f"{spent / 1e3:.3f}",
            "share": f"{spent / total:.4f}",
        }


def measure_all(
    run: Run, arguments: argparse.Namespace, file: ModelFile, works: Sequence[Workload], reference: OrtEngine
) -> None:
    """Add the rows of all sides, and of kernels; raises OutOfTime."""
    device, first = arguments.device, works[0].images[:CHECKED]
    profiled = Fullframe if device == "cuda" else OneByOne
    mixed = next(work for work in works if work.name == MIXED)
    seconds: dict[Compute, dict[tuple[str, str], float]] = {compute: {} for compute in arguments.compute}
    for turn, compute in product(TURNS, arguments.compute):
        with ExitStack() as stack:
            sides = []
            for make in (each for each in turn if each in arguments.sides):
                run.begin(f"{make.name}, {compute}: its first images")
                for side in usable(make, file, device, compute, first):
                    stack.callback(side.close)
                    sides.append(side)
            found = measured(sides, works, reference, arguments.rounds, seconds[compute], run.begin) if sides else ()
            for row in found:
                run.add({"compute": compute, **row})
            for side in (each for each in sides if type(each) is profiled):
                run.begin(f"{side.name}, {compute}: kernels")
                for row in kernels(side, mixed, device):
                    run.add_share({"compute": compute, **row})


def draw(rows: Sequence[Row], gpu: str, path: Path) -> None:
    """Megapixels a second of the workloads, and what a new size costs."""
    names = list(dict.fromkeys(f"{row['side']}, {row['compute']}" for row in rows))
    figure = Figure(figsize=(11, 0.6 * len(names) + 2), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, columns in (
        (left, [(work, "megapixels_per_s", work) for work in (SAME, MIXED, CLASS)]),
        (right, [(MIXED, "new_size_ms", "new"), (MIXED, "seen_size_ms", "seen")]),
    ):
        height = 0.8 / len(columns)
        for number, (work, column, label) in enumerate(columns):
            values = {f"{r['side']}, {r['compute']}": float(r[column]) for r in rows if r["workload"] == work}
            at = [names.index(name) + height * (number + 0.5) - 0.4 for name in values]
            axes.barh(at, list(values.values()), height=0.95 * height, label=label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
    left.set(yticks=range(len(names)), yticklabels=names, xlabel="megapixels a second")
    right.set(xlabel="ms of a lone image, of a new size and of one seen before")
    left.invert_yaxis()
    figure.suptitle(gpu)
    figure.savefig(path)


def setting(arguments: argparse.Namespace, words: Sequence[str], file: ModelFile) -> Row:
    """When, where and with what."""
    here = machine()
    return {
        **here,
        "gpu": torch.cuda.get_device_name() if arguments.device == "cuda" else "none",
        "versions": f"{here['versions']}, torch {torch.__version__}",
        "command": " ".join(["python -m benchmarks.gpu", *words]),
        "model": file.name,
    }


def aims(rows: Sequence[Row]) -> Iterator[str]:
    """What fullframe's figures are beside what they are to be."""
    for row in rows:
        if row["side"] == Fullframe.name:
            for work, column, sentence in AIMS:
                if row["workload"] == work and row[column]:
                    yield f"{row['compute']}: {sentence.format(row[column])}"


def _computes(given: str) -> list[Compute]:
    known = get_args(Compute)
    if unknown := [each for each in given.split(",") if each not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
    return [cast(Compute, each) for each in dict.fromkeys(given.split(","))]


def _sides(given: str) -> list[type[Side]]:
    known = {side.name: side for side in SIDES}
    words = [word.strip() for word in given.split(",")]
    if unknown := [word for word in words if word not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
    return [side for name, side in known.items() if name in words]


def _count(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given!r} is no whole number of 1 or more")
    return int(given)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments; what is left out depends on whether there is a GPU. Exits where one can't be."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--images", type=_count, help="of each workload (256; on a CPU 8)")
    parser.add_argument("--rounds", type=_count, help="after one to warm up (5; on a CPU 1)")
    parser.add_argument("--compute", type=_computes, help="float32, bfloat16, float16 (float32,float16; CPU: float32)")
    parser.add_argument(
        "--sides", type=_sides, default=list(SIDES), help=f"names (all): {', '.join(each.name for each in SIDES)}"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is one")
    parser.add_argument("--tiny", action="store_true", help="images of 8 to 24 pixels a side")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so many")
    parser.add_argument("--out", type=Path, help="a folder (benchmarks/results; from a CPU nothing is kept)")
    found = parser.parse_args(words)
    there = torch.cuda.is_available()
    if found.device == "cuda" and not there:
        parser.error("PyTorch sees no GPU here; --device cpu tries the same on the CPU")
    found.device = found.device or ("cuda" if there else "cpu")
    on_gpu = found.device == "cuda"
    found.images = found.images or (256 if on_gpu else 8)
    found.rounds = found.rounds or (5 if on_gpu else 1)
    found.compute = found.compute or (["float32", "float16"] if on_gpu else ["float32"])
    found.out = found.out or (RESULTS if on_gpu else None)
    return found


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    if arguments.device == "cpu":
        kept = f"kept in {arguments.out}" if arguments.out else "not kept"
        print(f"benchmarks.gpu: on the CPU, which says nothing about a GPU; the figures are {kept}", file=sys.stderr)
    deadline = time.monotonic() + 60 * arguments.minutes
    try:
        file = find_models([arguments.model] if arguments.model else [])[0]
        works, reference = workloads(arguments.images, arguments.photos, arguments.tiny), OrtEngine(file.path)
        if reference.contract.ragged:
            raise InvalidInput("not every side can tell this model its images' sizes; name the one that it was made of")
    except FullframeError as wrong:
        print(f"benchmarks.gpu: {first_line(wrong)}", file=sys.stderr)
        return 2
    run = Run(setting(arguments, words, file), arguments.out, deadline)
    try:
        measure_all(run, arguments, file, works, reference)
    except (OutOfTime, KeyboardInterrupt) as stopped:
        why = f"no time is left for {stopped}" if isinstance(stopped, OutOfTime) else "stopped"
        print(f"benchmarks.gpu: {why}; {len(run.rows)} rows were measured", file=sys.stderr)
    if not run.rows:
        return 1
    report(run, arguments.device)
    return 0


def report(run: Run, device: str) -> None:
    """Draw what was measured beside the rows, and show it."""
    if run.folder:
        draw(run.rows, run.setting["gpu"], run.folder / "gpu.png")
    hidden = {"images", "megapixels", "p99_ms"}
    shown = [{name: value for name, value in row.items() if name not in hidden} for row in run.rows]
    show(shown, f"{run.setting['model']}, several ways, on {run.setting['gpu'] if device == 'cuda' else 'the CPU'}")
    if run.shares:
        show(run.shares[:10], "shares of the time")
    if device == "cuda":
        print("\n".join(aims(run.rows)))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
