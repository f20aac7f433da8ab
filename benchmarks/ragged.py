"""Images of different sizes one by one beside the same images in masked batches, interleaved in one run.

    python -m benchmarks.ragged [--model NAME=PATH] [--rounds 7] [--images 32] [--seed 0]

Both sides are the engine behind the server with one worker, so that each has one core: the same raw images are queued
at once, and the time is taken until the last answer. Rounds of both sides alternate, each going first in turn; the
ratio is the median of the rounds' ratios, above 1 where batches are the slower. Writes benchmarks/results/ragged.csv.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Final

import numpy as np

from benchmarks.recording import append_rows, machine, show
from fullframe.engine.plane import Plane, open_plane
from fullframe.engine.query import FloatArray, Query
from fullframe.engine.ragged import RaggedEngine
from fullframe.image import Limits, Picture, Pixels, open_raw

RESULTS = Path(__file__).parent / "results" / "ragged.csv"
MIXES: Final = {
    "all 64x64": (64, 64),
    "32 to 96": (32, 96),
    "96 to 320": (96, 320),
    "200 to 500": (200, 500),
}
"""The smallest and the largest side, in pixels; sides are drawn evenly between them."""


def pictures(sides: tuple[int, int], count: int, seed: int) -> list[Picture]:
    """Noise."""
    rng = np.random.default_rng(seed)
    shapes = [(int(height), int(width)) for height, width in rng.integers(sides[0], sides[1] + 1, (count, 2))]
    return [open_raw(rng.bytes(3 * height * width), height, width, Limits()) for height, width in shapes]


def seconds(plane: Plane, images: Sequence[Picture]) -> float:
    """Until the last of them is answered."""
    started = time.perf_counter()
    for future in plane.submit(plane.model(), images, Query()):
        future.result()
    return time.perf_counter() - started


class Batches:
    """How many images were run together, and how much was padded, as the engine ran them."""

    def __init__(self) -> None:
        self.reset()
        run = RaggedEngine.run

        def noting(
            self_: RaggedEngine, images: Sequence[Pixels], outputs: Sequence[str]
        ) -> list[dict[str, FloatArray]]:
            self.sizes.append([image.shape[:2] for image in images])
            return run(self_, images, outputs)

        RaggedEngine.run = noting  # type: ignore[method-assign,assignment]

    def reset(self) -> None:
        """Forget what was run so far."""
        self.sizes: list[list[tuple[int, ...]]] = []

    def figures(self) -> dict[str, str]:
        """For the record."""
        own = sum(height * width for batch in self.sizes for height, width in batch)
        padded = sum(len(batch) * int(np.prod(np.max(batch, axis=0))) for batch in self.sizes)
        return {"images_per_batch": f"{mean(map(len, self.sizes)):.1f}", "padded": f"{padded / own - 1:.3f}"}


def measure(one: Plane, ragged: Plane, images: Sequence[Picture], rounds: int) -> dict[str, str]:
    """Both sides in turn, `rounds` times after one to warm up."""
    found = []
    for number in range(rounds + 1):
        sides = [one, ragged] if number % 2 else [ragged, one]
        taken = {id(plane): seconds(plane, images) for plane in sides}
        found.append((taken[id(one)], taken[id(ragged)]))
    alone, together = zip(*found[1:], strict=True)
    ratios = sorted(b / a for a, b in zip(alone, together, strict=True))
    return {
        "one_by_one_images_per_s": f"{len(images) / median(alone):.1f}",
        "batches_images_per_s": f"{len(images) / median(together):.1f}",
        "time_ratio": f"{median(ratios):.3f}",
        "ratio_quartiles": f"{np.quantile(ratios, 0.25):.3f} to {np.quantile(ratios, 0.75):.3f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    specs = [arguments.model] if arguments.model else []
    one, ragged = (open_plane(specs, workers=1, batching=batching) for batching in ("one", "ragged"))
    batches = Batches()
    command = f"python -m benchmarks.ragged --rounds {arguments.rounds} --images {arguments.images}"
    command += f" --seed {arguments.seed}"
    rows = []
    for name, sides in MIXES.items():
        images = pictures(sides, arguments.images, arguments.seed)
        batches.reset()
        figures = measure(one, ragged, images, arguments.rounds) | batches.figures()
        rows.append({**machine(), "command": command, "model": one.model().name, "sides": name, **figures})
    append_rows(RESULTS, rows)
    show(rows, "one by one beside masked batches")
    one.close()
    ragged.close()


if __name__ == "__main__":
    main()
