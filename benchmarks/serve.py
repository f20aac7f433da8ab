"""Images/s and latency of the server beside the same work in a bare ONNX Runtime loop, interleaved in one run.

    python -m benchmarks.serve [--photos FOLDER_OR_TAR] [--model NAME=PATH] [--seconds 4] [--rounds 5]

Both sides get the same JPEG bytes, use the same decoder and model, and share the machine with the client. The bare
loop runs `concurrency` callers, at most one on each core, over one session with one thread each; a lone caller gets
whichever of one thread and all cores is faster for it. Writes benchmarks/results/serve.csv; --photos defaults to the
photographs in the `demo` extra.
"""

import argparse
import asyncio
import csv
import datetime
import itertools
import os
import platform
import tarfile
import threading
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import grpc.aio
import numpy as np
import onnxruntime as ort
import pyvips
from rich.console import Console
from rich.table import Table

from fullframe.image import Limits, open_encoded
from fullframe.model.repository import find_models
from fullframe.v1 import vision_pb2 as pb
from fullframe.v1.vision_pb2_grpc import VisionServiceStub
from tests.serving import serving

RESULTS = Path(__file__).parent / "results" / "serve.csv"
CONCURRENCY = (1, 4, 16)


@dataclass(frozen=True)
class Measured:
    """Latencies in seconds of the images answered within `elapsed` seconds."""

    latencies: list[float]
    elapsed: float

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.elapsed

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.latencies, q)) * 1e3


def photographs(source: Path | None) -> list[bytes]:
    """JPEG bytes at native sizes, from a folder, a tar, or the demo extra."""
    if source is None:
        import skimage

        folder = Path(skimage.__file__).parent / "data"
        names = ("chelsea.png", "astronaut.png", "coffee.png", "rocket.jpg")
        return [_jpeg(pyvips.Image.new_from_file(str(folder / name))) for name in names]
    if source.is_dir():
        return [path.read_bytes() for path in sorted(source.rglob("*.[jJ][pP]*"))]
    with tarfile.open(source) as tar:
        members = [member for member in tar if member.isfile()]
        return [file.read() for member in members if (file := tar.extractfile(member))]


def cropped(photo: bytes, side: int) -> bytes:
    """The middle of a photograph at side x side pixels."""
    return _jpeg(pyvips.Image.thumbnail_buffer(photo, side, height=side, crop="centre"))


def _jpeg(image: pyvips.Image) -> bytes:
    return bytes(image.jpegsave_buffer(Q=90))


def session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def bare_loop(run: ort.InferenceSession, photos: list[bytes], callers: int, seconds: float) -> Measured:
    """Decode and run in `callers` threads until the time is up."""
    limits, latencies, lock, stop = Limits(), list[float](), threading.Lock(), time.perf_counter() + seconds
    work = itertools.cycle(photos)

    def call() -> None:
        while time.perf_counter() < stop:
            with lock:
                photo = next(work)
            started = time.perf_counter()
            pixels = open_encoded(photo, limits).pixels()
            run.run(["logits"], {"images": pixels[np.newaxis]})
            latencies.append(time.perf_counter() - started)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Measured(latencies, time.perf_counter() - started)


def served(target: str, photos: list[bytes], callers: int, seconds: float) -> Measured:
    """`callers` requests in flight from one asyncio client until the time is up."""
    return asyncio.run(_served(target, photos, callers, seconds))


async def _served(target: str, photos: list[bytes], callers: int, seconds: float) -> Measured:
    requests = [pb.ClassifyRequest(images=[pb.Image(encoded=photo)]) for photo in photos]
    work, latencies = itertools.cycle(requests), list[float]()
    async with grpc.aio.insecure_channel(target) as channel:
        classify = VisionServiceStub(channel).Classify
        await classify(requests[0])
        start = time.perf_counter()

        async def call() -> None:
            while time.perf_counter() < start + seconds:
                started = time.perf_counter()
                response = await classify(next(work))
                latencies.append(time.perf_counter() - started)
                assert response.results[0].info.status.code == 0, response

        await asyncio.gather(*(call() for _ in range(callers)))
        return Measured(latencies, time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    native = photographs(arguments.photos)
    workloads = {"native": native, "224x224": [cropped(photo, 224) for photo in native]}
    path = find_models([arguments.model] if arguments.model else [])[0].path
    cores = len(os.sched_getaffinity(0))
    one, many = session(path, 1), session(path, cores)
    rows = []
    with serving(models=arguments.model or "") as running:
        for name, photos in workloads.items():
            for callers in CONCURRENCY:
                bare, ours = [], []
                for _ in range(arguments.rounds + 1):
                    loops = [bare_loop(one, photos, min(callers, cores), arguments.seconds)]
                    if callers == 1:
                        loops.append(bare_loop(many, photos, 1, arguments.seconds))
                    bare.append(max(loops, key=lambda m: m.rate))
                    ours.append(served(running.target, photos, callers, arguments.seconds))
                rows.append(summary(arguments, path, name, callers, bare[1:], ours[1:]))  # the first round warms up
    record(rows)
    show(rows)


def summary(
    arguments: argparse.Namespace, path: Path, workload: str, callers: int, bare: list[Measured], ours: list[Measured]
) -> dict[str, str]:
    """One line of the record; ratios and differences are taken round by round."""

    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": f"python {platform.python_version()}, onnxruntime {ort.__version__}, grpcio {version('grpcio')}",
        "command": f"python -m benchmarks.serve --seconds {arguments.seconds:g} --rounds {arguments.rounds}"
        + (" --photos ..." if arguments.photos else ""),
        "model": path.stem,
        "workload": workload,
        "concurrency": str(callers),
        "server_images_per_s": f"{median([m.rate for m in ours]):.1f}",
        "bare_images_per_s": f"{median([m.rate for m in bare]):.1f}",
        "ratio": f"{median([o.rate / b.rate for o, b in zip(ours, bare, strict=True)]):.3f}",
        "p50_ms": f"{median([m.percentile(50) for m in ours]):.1f}",
        "p95_ms": f"{median([m.percentile(95) for m in ours]):.1f}",
        "p99_ms": f"{median([m.percentile(99) for m in ours]):.1f}",
        "bare_p50_ms": f"{median([m.percentile(50) for m in bare]):.1f}",
        "added_p50_ms": f"{median([o.percentile(50) - b.percentile(50) for o, b in zip(ours, bare, strict=True)]):.2f}",
    }


def record(rows: list[dict[str, str]]) -> None:
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


def show(rows: list[dict[str, str]]) -> None:
    table = Table(title="fullframe serve beside a bare ONNX Runtime loop")
    columns = [name for name in rows[0] if name not in {"date", "machine", "versions", "command"}]
    for name in columns:
        table.add_column(name)
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
