"""`demo`: a real server in a process of its own, asked over gRPC about pictures of very different sizes."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fullframe.cli import complain, fail
from fullframe.cli.answers import Answers
from fullframe.cli.files import find_images
from fullframe.cli.show import console, print_table, size_text
from fullframe.errors import FullframeError, Unavailable

if TYPE_CHECKING:
    from fullframe.engine.query import Answer
    from fullframe.image import ImageSource

PHOTOGRAPHS: Final = (
    "chelsea.png",
    "coffee.png",
    "astronaut.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "retina.jpg",
)
"""Colour photographs in scikit-image's wheel."""

_LARGE: Final = (3000, 3600)  # height, width: 10.8 megapixels
_STOPPING: Final = 60.0  # seconds


def demo(
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGE", help="Your own files, folders, globs.  [default: the demo extra's]"),
    ] = None,
    model: Annotated[list[str] | None, typer.Option(metavar="NAME=PATH", help="Serve this model instead.")] = None,
) -> None:
    """Start a server and ask it about pictures of many sizes."""
    pictures = [(file, file) for file in find_images(files)] if files else list(_pictures())
    from fullframe.client import Client

    names, sources = [name for name, _ in pictures], [source for _, source in pictures]
    with _server(model or []) as target, Client(target, timeout=120) as client:
        served = client.model()
        console().print(f"A server on {target} answers with the model {served.name!r}.\n", markup=False)
        # One at a time, so that the times are those of a picture that has the server to itself.
        asked = partial(client.stream, sources, top_k=3, poolings=["avg"], in_flight=1)
        answers = Answers(names, asked)
        rows = [_row(name, answer) for name, answer in answers if not isinstance(answer, FullframeError)]
    headings = ("picture", "size", "most probable classes", "features", "decode ms", "queue ms", "compute ms")
    print_table(headings, rows, right=(1, 3, 4, 5, 6))
    console().print("\nThe server has stopped.")
    raise typer.Exit(1 if answers.failed else 0)


def _row(name: str, answer: "Answer") -> tuple[str, ...]:
    times = answer.timings
    return (
        name,
        size_text(answer.height, answer.width),
        ", ".join(f"{score.label} {score.probability:.0%}" for score in answer.classes),
        str(len(answer.embeddings[0])),
        *(f"{seconds * 1000:.1f}" for seconds in (times.decode, times.queue, times.compute)),
    )


def _pictures() -> "Iterator[tuple[str, ImageSource]]":
    import numpy as np

    from fullframe.image import Limits, open_source

    package = find_spec("skimage")
    if package is None or package.origin is None:
        fail(
            "the photographs come with the demo extra: pip install 'fullframe[demo]'; "
            "or name your own: fullframe demo MY.jpg"
        )
    folder = Path(package.origin).parent / "data"
    cat = open_source(folder / PHOTOGRAPHS[0], Limits()).pixels()
    height, width, _ = cat.shape
    yield "one pixel", cat[height // 2 : height // 2 + 1, width // 2 : width // 2 + 1]
    for name in PHOTOGRAPHS:
        yield name, folder / name
    around = ((0, _LARGE[0] - height), (0, _LARGE[1] - width), (0, 0))
    yield f"{PHOTOGRAPHS[0]}, mirrored", np.pad(cat, around, mode="symmetric")


@contextmanager
def _server(models: Sequence[str]) -> Iterator[str]:
    """A server process on a free loopback port; stopped, its work finished, at the end."""
    command = [sys.executable, "-m", "fullframe", "serve", "--host", "127.0.0.1", "--port", "0", "--metrics-port", "-1"]
    command += ["--log-format", "json", "--log-level", "info"]
    command += [part for model in models for part in ("--model", model)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield f"127.0.0.1:{_ready_port(process)}"
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOPPING)
        if process.returncode != 0:
            complain(f"the server did not end well (exit code {process.returncode})")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _ready_port(process: "subprocess.Popen[str]") -> int:
    """Wait for the server's log to say that it is ready; from then on nobody reads the log."""
    assert process.stderr
    other = []
    for line in process.stderr:
        try:
            event = json.loads(line)
        except ValueError:
            other.append(line)
            continue
        if event.get("event") == "ready":
            threading.Thread(target=process.stderr.read, daemon=True).start()  # lest the pipe fills up
            return int(event["port"])
    raise Unavailable("".join(other).strip().removeprefix("fullframe: ") or "the server ended before it was ready")
