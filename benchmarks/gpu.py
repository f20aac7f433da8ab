"""The engine on a GPU beside PyTorch and ONNX Runtime on the same graph: same-size and mixed-size images, new sizes.

    python -m benchmarks.gpu [--photos FOLDER_OR_TAR] [--model MODEL.onnx] [--images 256] [--rounds 5]
        [--compute float32,float16] [--sides TEXT,...]

Mixed images have the native sizes of --photos, else sides drawn between 96 and 512 pixels; same-size ones are squares
of as many pixels in all. They are noise, in memory, uint8. These take turns, in another order each round:

- fullframe: the engine behind the server, all images queued at once, batches of different sizes;
- pytorch one by one: the same graph, no operator fused, an image at a time;
- torch.compile one by one: the same, compiled once for every size (dynamic=True);
- pytorch padded to the largest: 32 images at a time padded to their largest and no mask, which changes their answers;
- onnxruntime cuda one by one: where its CUDA provider is installed.

Latency is of a lone image that is answered before the next is asked for. Of sizes that no side has seen each has the
first and later images timed. "error" is the largest difference of logits from ONNX Runtime's on a CPU, relative to
max(1, the largest of them). A profile of fullframe on the mixed images says what share of its time each kernel has.

Adds rows to benchmarks/results/gpu.csv and gpu_kernels.csv and draws gpu.png. Without a GPU it refuses: --device cpu
--tiny tries the script itself there, its figures mean nothing, and so it needs --out FOLDER.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import onnxruntime as ort
import torch
from matplotlib.figure import Figure
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from benchmarks.recording import append_rows, machine, show
from fullframe.engine.choice import Compute
from fullframe.engine.fused import TorchEngine
from fullframe.engine.graph import TorchSession
from fullframe.engine.ort import OrtEngine
from fullframe.engine.plane import Plane, Served
from fullframe.engine.query import FloatArray, Query
from fullframe.engine.ragged import padded
from fullframe.errors import first_line
from fullframe.image import Limits, Picture, Pixels, open_encoded, open_raw
from fullframe.model.repository import ModelFile, find_models

RESULTS: Final = Path(__file__).parent / "results"
SIDES: Final = (96, 512)
"""Of synthetic images, in pixels."""
BATCH: Final = 32
"""Images padded to the largest of them."""
LONE: Final = 64
"""Images whose latency is measured."""
NEW_SIZES: Final = 12
CHECKED: Final = 8
KERNELS: Final = 25
ONNX: Final = ["logits"]

Row = dict[str, str]
Size = tuple[int, int]


class Side:
    """One way to compute logits, of many images or of one."""

    name: str

    def __init__(self, file: ModelFile, device: str, compute: Compute) -> None:
        raise NotImplementedError

    def ready(self, images: Sequence[Pixels]) -> Sequence[Any]:
        """The images as this side takes them, which is not timed."""
        return images

    def run(self, images: Sequence[Any]) -> list[FloatArray]:
        """float32 [K] of each, in their order."""
        return [self.one(image) for image in images]

    def one(self, image: Any) -> FloatArray:
        """Of a lone image, once its logits are on the host."""
        return self.run([image])[0]

    def close(self) -> None:
        """End its threads."""


class Fullframe(Side):
    """The engine behind the server."""

    name = "fullframe"

    def __init__(self, file: ModelFile, device: str, compute: Compute) -> None:
        engine = TorchEngine(file.path, device=device, compute=compute)
        models = [Served(file.name, file.version, True, engine)]
        self._plane = Plane(models, limits=Limits(), max_pixels_in_flight=10**10, batching="ragged")
        self._plane.warm_up()

    def ready(self, images: Sequence[Pixels]) -> list[Picture]:
        """As a request brings them."""
        return [open_raw(image.tobytes(), image.shape[0], image.shape[1], self._plane.limits) for image in images]

    def run(self, images: Sequence[Picture]) -> list[FloatArray]:
        """All queued at once."""
        futures = self._plane.submit(self._plane.model(), images, Query(top_k=0, logits=True))
        return [logits for future in futures if (logits := future.result().logits) is not None]

    def close(self) -> None:
        """As Side's."""
        self._plane.close()


class OneByOne(Side):
    """The graph's own operators in PyTorch."""

    name = "pytorch one by one"

    def __init__(self, file: ModelFile, device: str, compute: Compute) -> None:
        self._device = device
        self._session = TorchSession(file.path, device=device, dtype=getattr(torch, compute), fused=False)

    def one(self, image: Pixels) -> FloatArray:
        """As Side's."""
        logits: FloatArray = self._logits(image[np.newaxis])[0]
        return logits

    def _logits(self, images: Pixels) -> FloatArray:
        """[N, K] of uint8 [N, H, W, 3]."""
        return self._graph(torch.from_numpy(images).to(self._device)).cpu().numpy()

    def _graph(self, images: torch.Tensor) -> torch.Tensor:
        return self._session.run_tensors(ONNX, {"images": images})[0]


class Compiled(OneByOne):
    """The same, compiled."""

    name = "torch.compile one by one"

    def __init__(self, file: ModelFile, device: str, compute: Compute) -> None:
        super().__init__(file, device, compute)
        backend = "inductor" if device == "cuda" else "eager"
        self._graph = torch.compile(self._graph, dynamic=True, backend=backend)  # type: ignore[method-assign]


class PaddedToLargest(OneByOne):
    """What batching does without masks."""

    name = "pytorch padded to the largest"

    def run(self, images: Sequence[Pixels]) -> list[FloatArray]:
        """In the order that they come."""
        found: list[FloatArray] = []
        for first in range(0, len(images), BATCH):
            part = images[first : first + BATCH]
            height, width = (max(image.shape[axis] for image in part) for axis in (0, 1))
            found += list(self._logits(padded(part, np.zeros((len(part), height, width, 3), np.uint8))))
        return found


class OnnxRuntimeCuda(Side):
    """ONNX Runtime's provider, as its users are told to set it for changing sizes."""

    name = "onnxruntime cuda one by one"

    def __init__(self, file: ModelFile, device: str, compute: Compute) -> None:
        options = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}
        self._session = ort.InferenceSession(file.path, providers=[("CUDAExecutionProvider", options)])
        if self._session.get_providers()[0] != "CUDAExecutionProvider":
            raise RuntimeError("the CUDA provider is installed and does not load")

    def one(self, image: Pixels) -> FloatArray:
        """As Side's."""
        logits: FloatArray = self._session.run(ONNX, {"images": image[np.newaxis]})[0][0]
        return logits


def kinds(device: str, compute: Compute, wanted: Sequence[str]) -> list[type[Side]]:
    """Those sides that can be had and have one of the words in their names."""
    there: list[type[Side]] = [Fullframe, OneByOne, Compiled, PaddedToLargest]
    if device == "cuda" and compute == "float32" and "CUDAExecutionProvider" in ort.get_available_providers():
        there.append(OnnxRuntimeCuda)
    return [kind for kind in there if any(word in kind.name for word in wanted)]


@dataclass(frozen=True)
class Workload:
    """Images, and what they are."""

    name: str
    images: list[Pixels]

    @property
    def megapixels(self) -> float:
        return float(sum(image.shape[0] * image.shape[1] for image in self.images)) / 1e6


def noise(sizes: Sequence[Size], seed: int) -> list[Pixels]:
    """uint8 [H, W, 3] each."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (height, width, 3), np.uint8) for height, width in sizes]


def native_sizes(photos: Path, count: int) -> list[Size]:
    """Those of photographs in a folder or tar, again from the first where there are too few."""
    from benchmarks.serve import photographs

    opened = [open_encoded(data, Limits()) for data in photographs(photos)]
    sizes = [(picture.height, picture.width) for picture in opened]
    return [sizes[number % len(sizes)] for number in range(count)]


def workloads(arguments: argparse.Namespace) -> list[Workload]:
    """Mixed sizes, then one size of as many pixels."""
    count = arguments.images
    low, high = (8, 24) if arguments.tiny else SIDES
    drawn = np.random.default_rng(0).integers(low, high + 1, (count, 2)).tolist()
    sizes = native_sizes(arguments.photos, count) if arguments.photos else [(h, w) for h, w in drawn]
    side = round((sum(height * width for height, width in sizes) / count) ** 0.5)
    return [Workload("mixed sizes", noise(sizes, 1)), Workload("same size", noise([(side, side)] * count, 2))]


def usable(
    make: type[Side], file: ModelFile, device: str, compute: Compute, images: Sequence[Pixels]
) -> Iterator[Side]:
    """The side, where it computes these images; else a line on stderr."""
    try:
        side = make(file, device, compute)
        side.run(side.ready(images))
    except Exception as wrong:  # a baseline that can't do the work is no reason to lose the others' figures
        print(f"benchmarks.gpu: {make.name} is left out: {first_line(wrong)}", file=sys.stderr)
        return
    yield side


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
    wanted = [reference.run(image, ONNX)["logits"] for image in images]
    found = side.run(side.ready(images))
    gaps = [np.abs(a - b).max() / max(1.0, np.abs(b).max()) for a, b in zip(found, wanted, strict=True)]
    return f"{float(max(gaps)):.1e}"


def measured(sides: Sequence[Side], works: Sequence[Workload], reference: OrtEngine, rounds: int) -> Iterator[Row]:
    """A row for each side and workload: the same size first, since mixed sizes are told in parts of it."""
    lengths = [length for image in works[0].images for length in image.shape[:2]]
    # Others for each: what one side has seen, the libraries of the next know.
    drawn = np.random.default_rng(4).integers(min(lengths), max(lengths) + 1, (len(sides), NEW_SIZES, 2)).tolist()
    new = {side.name: new_sizes(side, [(h, w) for h, w in sizes]) for side, sizes in zip(sides, drawn, strict=True)}
    rates: dict[tuple[str, str], float] = {}
    for work in reversed(works):
        seconds = throughput(sides, work, rounds)
        for side in sides:
            taken = seconds[side.name]
            rates[side.name, work.name] = rate = work.megapixels / taken
            alone = latencies(side, work.images[:LONE])
            yield {
                "workload": work.name,
                "side": side.name,
                "images": str(len(work.images)),
                "megapixels": f"{work.megapixels:.3f}",
                "images_per_s": f"{len(work.images) / taken:.1f}",
                "megapixels_per_s": f"{rate:.2f}",
                "of_same_size": f"{rate / rates[side.name, 'same size']:.3f}",
                "times_one_by_one": f"{seconds[OneByOne.name] / taken:.2f}" if OneByOne.name in seconds else "",
                **{f"p{q}_ms": f"{np.percentile(alone, q):.3f}" for q in (50, 95, 99)},
                "new_size_ms": f"{new[side.name][0]:.3f}",
                "seen_size_ms": f"{new[side.name][1]:.3f}",
                "error": error(side, reference, work.images[:CHECKED]),
            }


def kernels(side: Side, work: Workload, device: str) -> Iterator[Row]:
    """What share of the time each kernel has, on a CPU each operator, the longest first."""
    ready = side.ready(work.images)
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity], experimental_config=_ExperimentalConfig(profile_all_threads=True)) as found:
        side.run(ready)
    attribute = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    times: list[tuple[float, Any]] = [(float(getattr(each, attribute)), each) for each in found.key_averages()]
    total = sum(spent for spent, _ in times) or 1.0
    for spent, each in sorted(times, key=lambda pair: -pair[0])[:KERNELS]:
        yield {
            "workload": work.name,
            "kernel": each.key[:120],
            "calls": str(each.count),
            "ms": f"{spent / 1e3:.3f}",
            "share": f"{spent / total:.4f}",
        }


def draw(rows: Sequence[Row], gpu: str, path: Path) -> None:
    """Megapixels a second of both workloads, and what a new size costs."""
    names = list(dict.fromkeys(f"{row['side']}, {row['compute']}" for row in rows))
    figure = Figure(figsize=(11, 0.5 * len(names) + 2), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, columns in (
        (left, [("same size", "megapixels_per_s"), ("mixed sizes", "megapixels_per_s")]),
        (right, [("mixed sizes", "new_size_ms"), ("mixed sizes", "seen_size_ms")]),
    ):
        for number, (work, column) in enumerate(columns):
            values = {f"{r['side']}, {r['compute']}": float(r[column]) for r in rows if r["workload"] == work}
            at = [names.index(name) + 0.4 * number - 0.2 for name in values]
            axes.barh(at, list(values.values()), height=0.38, label=work if axes is left else column.split("_")[0])
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


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compute", default="float32,float16")
    parser.add_argument("--sides", default="fullframe,pytorch,torch.compile,onnxruntime", help="words of their names")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="images of 8 to 24 pixels a side")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: PyTorch sees no GPU here, and there is nothing to measure", file=sys.stderr)
        return 2
    if arguments.device == "cpu" and arguments.out == RESULTS:
        print("benchmarks.gpu: figures from a CPU are not kept; name another folder with --out", file=sys.stderr)
        return 2
    file = find_models([arguments.model] if arguments.model else [])[0]
    works, reference = workloads(arguments), OrtEngine(file.path)
    here, rows = setting(arguments, words, file), list[Row]()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for compute in arguments.compute.split(","):
        found, shares = measured_with(compute, arguments, file, works, reference)
        for name, each in (("gpu", found), ("gpu_kernels", shares)):
            if each:
                append_rows(arguments.out / f"{name}.csv", [{**here, "compute": compute, **row} for row in each])
        rows += [{"compute": compute, **row} for row in found]
    if not rows:
        return 1
    draw(rows, here["gpu"], arguments.out / "gpu.png")
    hidden = {"images", "megapixels", "p99_ms"}
    shown = [{name: value for name, value in row.items() if name not in hidden} for row in rows]
    show(shown, f"{here['model']}, several ways, on {here['gpu']}")
    return 0


def measured_with(
    compute: Compute,
    arguments: argparse.Namespace,
    file: ModelFile,
    works: Sequence[Workload],
    reference: OrtEngine,
) -> tuple[list[Row], list[Row]]:
    """The rows of all sides, and of the kernels of fullframe's."""
    device, first = arguments.device, works[0].images[:CHECKED]
    with ExitStack() as stack:
        makes = kinds(device, compute, arguments.sides.split(","))
        sides = [side for make in makes for side in usable(make, file, device, compute, first)]
        for side in sides:
            stack.callback(side.close)
        found = list(measured(sides, works, reference, arguments.rounds)) if sides else []
        shares = [row for side in sides if isinstance(side, Fullframe) for row in kernels(side, works[0], device)]
    return found, shares


if __name__ == "__main__":
    sys.exit(main())
