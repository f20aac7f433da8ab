"""Images/s and latency of the server beside the same work in a bare ONNX Runtime loop, interleaved in one run.

    python -m benchmarks.serve [--photos FOLDER_OR_TAR] [--model NAME=PATH] [--seconds 1.5] [--rounds 9] [--pairs 300]

Both sides get the same JPEG bytes, use the same decoder and model, and share the machine with the client.

- Many callers: the bare loop runs `concurrency` of them, at most one on each core, over one session with one thread
  each. Rounds of both sides alternate, each going first in turn; the ratio is the median of the rounds' ratios.
- A lone caller, who waits for each answer: each photograph goes to both sides, one right after the other, each going
  first in turn. What the server adds is the median of the differences. The bare loop uses all cores or one thread,
  whichever had the lower median over the photographs before.

Writes benchmarks/results/serve.csv; --photos defaults to the photographs in the `demo` extra.
"""

import argparse
import asyncio
import itertools
import tarfile
import threading
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import grpc.aio
import numpy as np
import onnxruntime as ort
import pyvips

from benchmarks.recording import append_rows, machine, show
from fullframe.engine.machine import available_cores
from fullframe.image import Limits, open_encoded
from fullframe.model.repository import find_models
from fullframe.v1 import vision_pb2 as pb
from fullframe.v1.vision_pb2_grpc import VisionServiceStub
from tests.serving import serving

RESULTS = Path(__file__).parent / "results" / "serve.csv"
CONCURRENCY = (1, 4, 16)
LIMITS = Limits()


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
    # As in the server: threads that went on spinning after a run would slow down the other side's next one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def bare(run: ort.InferenceSession, photo: bytes) -> float:
    """Seconds that one photograph takes without a server."""
    started = time.perf_counter()
    pixels = open_encoded(photo, LIMITS).pixels()
    run.run(["logits"], {"images": pixels[np.newaxis]})
    return time.perf_counter() - started


def bare_loop(run: ort.InferenceSession, photos: list[bytes], callers: int, seconds: float) -> Measured:
    """Decode and run in `callers` threads until the time is up."""
    latencies, lock, stop = list[float](), threading.Lock(), time.perf_counter() + seconds
    work = itertools.cycle(photos)

    def call() -> None:
        while time.perf_counter() < stop:
            with lock:
                photo = next(work)
            latencies.append(bare(run, photo))

    threads = [threading.Thread(target=call) for _ in range(callers)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Measured(latencies, time.perf_counter() - started)


def asked(classify: Any, photo: bytes) -> float:
    """Seconds that one call takes which waits for its answer."""
    request = pb.ClassifyRequest(images=[pb.Image(encoded=photo)])
    started = time.perf_counter()
    check(classify(request))
    return time.perf_counter() - started


def check(response: pb.ClassifyResponse) -> None:
    assert response.results[0].info.status.code == 0, response


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
                asked_at = time.perf_counter()
                check(await classify(next(work)))
                latencies.append(time.perf_counter() - asked_at)

        await asyncio.gather(*(call() for _ in range(callers)))
        return Measured(latencies, time.perf_counter() - start)


def in_rounds(
    target: str, run: ort.InferenceSession, photos: list[bytes], callers: int, seconds: float, rounds: int
) -> dict[str, str]:
    """Both sides in turn, `rounds` times after one to warm up."""
    loops, servers = [], []
    for number in range(rounds + 1):
        if number % 2:
            servers.append(served(target, photos, callers, seconds))
        loops.append(bare_loop(run, photos, min(callers, available_cores()), seconds))
        if not number % 2:
            servers.append(served(target, photos, callers, seconds))
    loops, servers = loops[1:], servers[1:]
    return {
        "server_images_per_s": f"{median([s.rate for s in servers]):.1f}",
        "bare_images_per_s": f"{median([b.rate for b in loops]):.1f}",
        "ratio": f"{median([s.rate / b.rate for s, b in zip(servers, loops, strict=True)]):.3f}",
        **{f"p{q}_ms": f"{median([s.percentile(q) for s in servers]):.1f}" for q in (50, 95, 99)},
        "bare_p50_ms": f"{median([b.percentile(50) for b in loops]):.1f}",
        "added_p50_ms": "",
    }


def in_pairs(target: str, runs: list[ort.InferenceSession], photos: list[bytes], pairs: int) -> dict[str, str]:
    """A lone caller's photographs, each to both sides."""
    ours, theirs = list[float](), list[float]()
    # The first trial of each is to warm up.
    trials = [[bare(run, photo) for photo in photos] for run in runs for _ in range(2)]
    fastest = min(zip(trials[1::2], runs, strict=True), key=lambda trial: median(trial[0]))[1]
    with grpc.insecure_channel(target) as channel:
        classify = VisionServiceStub(channel).Classify
        for photo in photos:
            asked(classify, photo)
        for number, photo in enumerate(itertools.islice(itertools.cycle(photos), pairs)):
            if number % 2:
                ours.append(asked(classify, photo))
            theirs.append(bare(fastest, photo))
            if not number % 2:
                ours.append(asked(classify, photo))
    server, loop = Measured(ours, sum(ours)), Measured(theirs, sum(theirs))
    added = median([one - other for one, other in zip(ours, theirs, strict=True)]) * 1e3
    return {
        "server_images_per_s": f"{server.rate:.1f}",
        "bare_images_per_s": f"{loop.rate:.1f}",
        "ratio": f"{server.rate / loop.rate:.3f}",
        **{f"p{q}_ms": f"{server.percentile(q):.1f}" for q in (50, 95, 99)},
        "bare_p50_ms": f"{loop.percentile(50):.1f}",
        "added_p50_ms": f"{added:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pairs", type=int, default=300)
    arguments = parser.parse_args()
    native = photographs(arguments.photos)
    workloads = {"native": native, "224x224": [cropped(photo, 224) for photo in native]}
    path = find_models([arguments.model] if arguments.model else [])[0].path
    one, many = session(path, 1), session(path, available_cores())
    rows = []
    with serving(models=arguments.model or "") as running:
        for name, photos in workloads.items():
            for callers in CONCURRENCY:
                if callers == 1:
                    figures = in_pairs(running.target, [one, many], photos, arguments.pairs)
                else:
                    figures = in_rounds(running.target, one, photos, callers, arguments.seconds, arguments.rounds)
                rows.append({**setting(arguments, path), "workload": name, "concurrency": str(callers), **figures})
    append_rows(RESULTS, rows)
    show(rows, "fullframe serve beside a bare ONNX Runtime loop")


def setting(arguments: argparse.Namespace, path: Path) -> dict[str, str]:
    """When, where and with what."""
    given = f"--seconds {arguments.seconds:g} --rounds {arguments.rounds} --pairs {arguments.pairs}"
    here = machine()
    return {
        **here,
        "versions": f"{here['versions']}, grpcio {version('grpcio')}",
        "command": f"python -m benchmarks.serve {given}" + (" --photos ..." if arguments.photos else ""),
        "model": path.stem,
    }


if __name__ == "__main__":
    main()
