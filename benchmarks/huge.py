"""Seconds per megapixel and memory of images up to hundreds of megapixels, each classified in a process of its own.

    python -m benchmarks.huge [--model MODEL.onnx] [--rounds 3] [--sizes 2000x2000,6000x5000,20000x15000]

The pictures are JPEGs of smooth noise, made on the spot. The rounds go through all sizes in turn. CPU seconds are the
process's, user and system, of all threads: what they say of the work does not depend on what else the machine does.
Memory is resident anonymous memory (RssAnon), read fifty times a second. Writes results/huge.csv and results/huge.png.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import pyvips
from matplotlib.figure import Figure

from benchmarks.recording import append_rows, machine

RESULTS = Path(__file__).parent / "results"
SIZES = "1000x1000,2000x2000,6000x5000,20000x15000"  # width x height


def anonymous() -> float:
    """This process's resident anonymous memory in megabytes."""
    return int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def classify(path: Path, model: str) -> None:
    """Print how long it took, and the memory over time."""
    import fullframe

    predictor = fullframe.load(model or None)
    seen: list[tuple[float, float]] = []
    done = threading.Event()
    started, worked = time.perf_counter(), time.process_time()

    def watch() -> None:
        while not done.wait(0.02):
            seen.append((round(time.perf_counter() - started, 2), round(anonymous(), 1)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    answer = predictor.predict(str(path), top_k=1)
    seconds, cpu = time.perf_counter() - started, time.process_time() - worked
    done.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "cpu": cpu, "decode": answer.timings.decode, "memory": seen}))
    predictor.close()


def picture(width: int, height: int, path: Path) -> Path:
    """A JPEG of smooth noise."""
    noise = pyvips.Image.gaussnoise(width // 8 + 1, height // 8 + 1, mean=128, sigma=60)
    bands = [noise.resize(8, vscale=8).crop(0, 0, width, height).linear(1, shift) for shift in (-10, 0, 10)]
    bands[0].bandjoin(bands[1:]).cast("uchar").copy(interpretation="srgb").jpegsave(str(path), Q=90)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        classify(arguments.child, arguments.model)
        return
    sizes = [(int(width), int(height)) for width, height in (size.split("x") for size in arguments.sizes.split(","))]
    found: dict[tuple[int, int], list[dict[str, float]]] = {size: [] for size in sizes}
    timelines: dict[tuple[int, int], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {size: picture(*size, Path(folder) / "{}x{}.jpg".format(*size)) for size in sizes}
        for _ in range(arguments.rounds):
            for size, file in files.items():
                command = [sys.executable, "-m", "benchmarks.huge", "--child", str(file), "--model", arguments.model]
                result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                timelines[size] = result.pop("memory")
                found[size].append(result | {"peak": max(memory for _, memory in timelines[size])})
                print(size, found[size][-1], flush=True)
    record(found, arguments)
    draw(timelines)


def record(found: dict[tuple[int, int], list[dict[str, float]]], arguments: argparse.Namespace) -> None:
    """A line for each size; the rates beside those of 2000x2000, which is computed whole."""

    def per_megapixel(size: tuple[int, int], figure: str) -> float:
        return median(each[figure] for each in found[size]) / (size[0] * size[1] / 1e6)

    base = (2000, 2000) if (2000, 2000) in found else next(iter(found))
    command = f"python -m benchmarks.huge --rounds {arguments.rounds} --sizes {arguments.sizes}"
    append_rows(
        RESULTS / "huge.csv",
        [
            {
                **machine(),
                "command": command,
                "model": Path(arguments.model).stem or "cifar10",
                "width": str(size[0]),
                "height": str(size[1]),
                "megapixels": f"{size[0] * size[1] / 1e6:g}",
                "seconds": f"{median(each['seconds'] for each in results):.2f}",
                "decode_seconds": f"{median(each['decode'] for each in results):.2f}",
                "seconds_per_megapixel": f"{per_megapixel(size, 'seconds'):.4f}",
                "of_2000x2000": f"{per_megapixel(size, 'seconds') / per_megapixel(base, 'seconds'):.3f}",
                "peak_anonymous_mb": f"{max(each['peak'] for each in results):.0f}",
                "cpu_seconds_per_megapixel": f"{per_megapixel(size, 'cpu'):.4f}",
                "cpu_of_2000x2000": f"{per_megapixel(size, 'cpu') / per_megapixel(base, 'cpu'):.3f}",
            }
            for size, results in found.items()
        ],
    )


def draw(timelines: dict[tuple[int, int], list[tuple[float, float]]]) -> None:
    """Memory over time."""
    figure = Figure(figsize=(8, 3.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    for (width, height), seen in timelines.items():
        axes.plot([at for at, _ in seen], [memory for _, memory in seen], label=f"{width} x {height}")
    axes.set(xlabel="seconds (logarithmic)", ylabel="resident anonymous memory, MB", xscale="log", ylim=(0, None))
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="JPEG, width x height")
    figure.savefig(RESULTS / "huge.png")


if __name__ == "__main__":
    main()
