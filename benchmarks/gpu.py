"""The engine on a GPU beside PyTorch and ONNX Runtime on the same graph: same-size and mixed-size images, new sizes.

    python -m benchmarks.gpu [--photos FOLDER_OR_TAR] [--model MODEL.onnx] [--images 256] [--rounds 5]
        [--compute float32,float16] [--sides TEXT,...] [--device cuda|cpu] [--tiny] [--out FOLDER]

Mixed images have the native sizes of --photos, else sides drawn between 96 and 512 pixels; same-size ones are squares
of as many pixels in all; those around 224 pixels have sides between 192 and 256. They are noise, in memory, uint8.
These take turns, in another order each round:

- fullframe: the engine behind the server, all images queued at once, batches of different sizes;
- pytorch one by one: the same graph, no operator fused, an image at a time;
- torch.compile one by one: the same, compiled once for every size (dynamic=True);
- pytorch padded to the largest: 32 images at a time padded to their largest and no mask, which changes their answers;
- onnxruntime one by one: on a GPU where its CUDA provider is installed.

What can't be had is named, with the reason. "of_same_size" is a side's pixels a second as a share of its own on images
of the same size; "times_one_by_one" and "times_padded" are against those two sides. Latency is of a lone image that is
answered before the next is asked for. Of sizes that no side has seen each has the first and later images timed.
"error" is the largest difference of logits from ONNX Runtime's on a CPU, relative to max(1, the largest of them). A
profile on the mixed images says what share of the time each kernel has: fullframe's on a GPU; on a CPU, where a
profiler sees its own thread alone, each operator's of plain PyTorch.

On a GPU it adds rows to gpu.csv and gpu_kernels.csv in benchmarks/results and draws gpu.png there. On a CPU it tries
the same with few images (--tiny: small ones too), and keeps what it finds only in --out.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, Final, cast, get_args

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_sides import LOGITS, SIDES, Fullframe, OneByOne, PaddedToLargest, Side, usable
from benchmarks.recording import append_rows, machine, show
from benchmarks.workloads import CLASS, MIXED, SAME, Size, Workload, noise, workloads
from fullframe.engine.choice import Compute
from fullframe.engine.ort import OrtEngine
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


def measured(sides: Sequence[Side], works: Sequence[Workload], reference: OrtEngine, rounds: int) -> Iterator[Row]:
    """A row for each workload and side; the first workload is the one of one size."""
    mixed = next(work for work in works if work.name == MIXED)
    lengths = [length for image in mixed.images for length in image.shape[:2]]
    # Others for each: what one side has seen, the libraries of the next know.
    drawn = np.random.default_rng(4).integers(min(lengths), max(lengths) + 1, (len(sides), NEW_SIZES, 2)).tolist()
    new = {side.name: new_sizes(side, [(h, w) for h, w in sizes]) for side, sizes in zip(sides, drawn, strict=True)}
    rates: dict[tuple[str, str], float] = {}
    for work in works:
        seconds = throughput(sides, work, rounds)
        for side in sides:
            taken, (first, later) = seconds[side.name], new[side.name]
            rates[side.name, work.name] = rate = work.megapixels / taken
            alone = latencies(side, work.images[:LONE])
            against = {"times_one_by_one": OneByOne.name, "times_padded": PaddedToLargest.name}
            yield {
                "workload": work.name,
                "side": side.name,
                "images": str(len(work.images)),
                "megapixels": f"{work.megapixels:.3f}",
                "images_per_s": f"{len(work.images) / taken:.1f}",
                "megapixels_per_s": f"{rate:.2f}",
                "of_same_size": f"{rate / rates[side.name, SAME]:.3f}",
                **{name: f"{seconds[each] / taken:.2f}" if each in seconds else "" for name, each in against.items()},
                **{f"p{q}_ms": f"{np.percentile(alone, q):.3f}" for q in (50, 95, 99)},
                "new_size_ms": f"{first:.3f}",
                "seen_size_ms": f"{later:.3f}",
                "times_seen_size": f"{first / later:.2f}",
                "error": error(side, reference, work.images[:CHECKED]),
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


def measured_with(
    compute: Compute, arguments: argparse.Namespace, file: ModelFile, works: Sequence[Workload], reference: OrtEngine
) -> tuple[list[Row], list[Row]]:
    """The rows of all sides, and of kernels."""
    device, first = arguments.device, works[0].images[:CHECKED]
    profiled = Fullframe if device == "cuda" else OneByOne
    with ExitStack() as stack:
        sides = []
        for make in arguments.sides:
            for side in usable(make, file, device, compute, first):
                stack.callback(side.close)
                sides.append(side)
        found = list(measured(sides, works, reference, arguments.rounds)) if sides else []
        mixed = next(work for work in works if work.name == MIXED)
        return found, [row for side in sides if type(side) is profiled for row in kernels(side, mixed, device)]


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


def keep(found: Sequence[Row], shares: Sequence[Row], here: Row, compute: Compute, folder: Path) -> None:
    """Add rows to the files of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("gpu", found), ("gpu_kernels", shares)):
        if rows:
            append_rows(folder / f"{name}.csv", [{**here, "compute": compute, **row} for row in rows])


def _computes(given: str) -> list[Compute]:
    known = get_args(Compute)
    if unknown := [each for each in given.split(",") if each not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
    return [cast(Compute, each) for each in given.split(",")]


def _sides(given: str) -> list[type[Side]]:
    words = given.split(",")
    if unknown := [word for word in words if not any(word in side.name for side in SIDES)]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is in no name of {', '.join(each.name for each in SIDES)}")
    return [side for side in SIDES if any(word in side.name for word in words)]


def _count(given: str) -> int:
    if (count := int(given)) < 1:
        raise argparse.ArgumentTypeError(f"{given} is below 1")
    return count


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
    parser.add_argument("--sides", type=_sides, default=list(SIDES), help="words of their names (all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is one")
    parser.add_argument("--tiny", action="store_true", help="images of 8 to 24 pixels a side")
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
    file = find_models([arguments.model] if arguments.model else [])[0]
    works, reference = workloads(arguments.images, arguments.photos, arguments.tiny), OrtEngine(file.path)
    if reference.contract.ragged:
        print("benchmarks.gpu: not every side can tell this model its images' sizes; name the one that it was made of")
        return 2
    here, rows, shares = setting(arguments, words, file), list[Row](), list[Row]()
    for compute in arguments.compute:
        found, parts = measured_with(compute, arguments, file, works, reference)
        if arguments.out:
            keep(found, parts, here, compute, arguments.out)
        rows += [{"compute": compute, **row} for row in found]
        shares += [{"compute": compute, **row} for row in parts]
    if not rows:
        return 1
    if arguments.out:
        draw(rows, here["gpu"], arguments.out / "gpu.png")
    hidden = {"images", "megapixels", "p99_ms"}
    shown = [{name: value for name, value in row.items() if name not in hidden} for row in rows]
    show(shown, f"{here['model']}, several ways, on {here['gpu'] if arguments.device == 'cuda' else 'the CPU'}")
    if shares:
        show(shares[:10], "shares of the time")
    if arguments.device == "cuda":
        print("\n".join(aims(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
