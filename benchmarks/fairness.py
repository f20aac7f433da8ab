"""Latency of small images alone and while an image of ten gigapixels is worked on, on one server, in turn.

    python -m benchmarks.fairness [--model NAME=PATH] [--seconds 5] [--rounds 7] [--workers 0] [--callers 1,4]

Thumbnails are the photographs of the `demo` extra cut to 32, 64, 128 and 224 pixels a side. Every round measures them
alone, beside one huge image and beside two; the ratio is the median of the rounds' ratios of p95. The huge images are
tiled TIFFs that store a few tiles again and again; they are cancelled at the end of their part of a round.

Writes benchmarks/results/fairness.csv.
"""

import argparse
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import grpc
import numpy as np

from benchmarks.recording import append_rows, machine, show
from benchmarks.serve import Measured, cropped, photographs, served
from fullframe.engine.machine import available_cores
from fullframe.v1 import vision_pb2 as pb
from fullframe.v1.vision_pb2_grpc import VisionServiceStub
from tests.image.forged import repeating_tiff
from tests.pictures import pixels
from tests.serving import Running, serving

RESULTS = Path(__file__).parent / "results" / "fairness.csv"
SIDE = 100_000
SIDES = (32, 64, 128, 224)
HUGE = (0, 1, 2)  # worked on beside the thumbnails


def working(running: Running) -> int:
    """Images that the server holds."""
    with urllib.request.urlopen(f"http://127.0.0.1:{running.metrics_port}/metrics") as page:
        lines = page.read().decode().splitlines()
    names = tuple(f"fullframe_images_{state} " for state in ("queued", "running", "ready"))
    return sum(int(float(line.split()[1])) for line in lines if line.startswith(names))


def wait_for(running: Running, count: int) -> None:
    while working(running) != count:
        time.sleep(0.05)


@contextmanager
def huge_images(running: Running, file: bytes, count: int) -> Iterator[None]:
    """So many are worked on meanwhile."""
    with grpc.insecure_channel(running.target) as channel:
        request = pb.ClassifyRequest(images=[pb.Image(encoded=file)])
        calls = [VisionServiceStub(channel).Classify.future(request) for _ in range(count)]
        wait_for(running, count)
        time.sleep(1.0 if count else 0.0)  # opening it is over
        yield
        assert not any(call.done() for call in calls)
        for call in calls:
            call.cancel()
        wait_for(running, 0)


def measure(running: Running, thumbnails: list[bytes], file: bytes, callers: int, seconds: float) -> list[Measured]:
    """The thumbnails beside each of HUGE."""
    found = []
    for count in HUGE:
        with huge_images(running, file, count):
            found.append(served(running.target, thumbnails, callers, seconds))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--callers", default="1,4")
    arguments = parser.parse_args()
    thumbnails = [cropped(photo, side) for side in SIDES for photo in photographs(None)]
    file = repeating_tiff(SIDE, SIDE, np.stack([pixels(256, 256, seed=seed) for seed in range(7)]))
    given = f"--seconds {arguments.seconds:g} --rounds {arguments.rounds} --workers {arguments.workers}"
    rows = []
    with serving(models=arguments.model, workers=arguments.workers, max_megapixels=SIDE * SIDE / 1e6) as running:
        for callers in map(int, arguments.callers.split(",")):
            rounds = [
                measure(running, thumbnails, file, callers, arguments.seconds) for _ in range(arguments.rounds + 1)
            ][1:]  # the first is to warm up
            for number, count in enumerate(HUGE):
                beside = [each[number] for each in rounds]
                ratios = [each[number].percentile(95) / each[0].percentile(95) for each in rounds]
                rows.append(
                    {
                        **machine(),
                        "command": f"python -m benchmarks.fairness {given} --callers {arguments.callers}",
                        "model": Path(arguments.model.partition("=")[2]).stem or "cifar10",
                        "workers": str(arguments.workers or available_cores()),
                        "callers": str(callers),
                        "huge_images": str(count),
                        "images_per_s": f"{median([each.rate for each in beside]):.1f}",
                        **{f"p{q}_ms": f"{median([each.percentile(q) for each in beside]):.1f}" for q in (50, 95, 99)},
                        "p95_of_alone": f"{median(ratios):.2f}",
                    }
                )
    append_rows(RESULTS, rows)
    show(rows, "small images beside huge ones")


if __name__ == "__main__":
    main()
