"""Options that several subcommands share, and the model that they choose."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fullframe.defaults import OWN_PIXELS
from fullframe.engine.choice import Compute, EngineName
from fullframe.model.repository import Precision

if TYPE_CHECKING:
    from fullframe.client.messages import ServedModel
    from fullframe.engine.plane import Served
    from fullframe.engine.query import Answer
    from fullframe.errors import FullframeError
    from fullframe.model.contract import Contract

MOST_MEGAPIXELS: Final = OWN_PIXELS // 10**6
RETRIES: Final = 4
"""Some four seconds: somebody is waiting, and the address may be wrong."""

EngineOption = Annotated[
    EngineName,
    typer.Option(
        "--engine", help="What runs the model in this process; auto: torch where there is a device for it, else onnx."
    ),
]
ComputeOption = Annotated[
    Compute, typer.Option("--compute", help="What the torch engine computes in. Without --server.")
]
PrecisionOption = Annotated[
    Precision,
    typer.Option("--precision", help="int8: the copy that quantize made; auto: where there is one. Without --server."),
]
ServerOption = Annotated[
    str, typer.Option("--server", metavar="HOST:PORT", help="Ask this server; without, the model runs in this process.")
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="An .onnx file or a model's folder; with --server NAME or NAME/VERSION.  [default: the bundled one, "
        "or the server's]",
    ),
]
TimeoutOption = Annotated[float, typer.Option("--timeout", help="Seconds to wait for an answer of the server.")]
MegapixelsOption = Annotated[
    float, typer.Option("--max-megapixels", help="Largest image, in this process; a server has its own limit.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]


@dataclass(frozen=True)
class Asked:
    """A model, here or on a server.

    Attributes:
        stream: Client's or Predictor's.
        served: its name, version, contract and digest.
        compute: what it computes in; "" where only the server knows.
    """

    stream: "Callable[..., Iterator[tuple[int, Answer | FullframeError]]]"
    served: "Served | ServedModel"
    compute: str

    @property
    def contract(self) -> "Contract":
        """The model's own metadata."""
        return self.served.contract


@contextmanager
def asked(
    server: str,
    model: str,
    engine: EngineName,
    precision: Precision,
    compute: Compute,
    megapixels: float,
    timeout: float,
    retries: int = RETRIES,
) -> Iterator[Asked]:
    """The model that the options choose; a server that is full or away is asked again so often for each image."""
    if server:
        from fullframe.client import Client

        name, _, version = model.partition("/")
        with Client(server, timeout=timeout, retries=RETRIES) as client:
            served = client.model(name, version)  # a wrong name or address is told once, not for each image
        with Client(server, timeout=timeout, retries=retries) as client:
            # The very model: a server that comes back may have a newer one, or another of its name.
            yield Asked(partial(client.stream, model=served), served, compute="")
        return
    from fullframe.engine.predictor import load
    from fullframe.image import own_limits

    if not 0 < megapixels < float("inf"):
        raise typer.BadParameter(f"{megapixels} must be above 0", param_hint="--max-megapixels")
    limits = own_limits(int(megapixels * 1e6))
    with load(model or None, engine, precision=precision, compute=compute, limits=limits) as predictor:
        yield Asked(predictor.stream, predictor.served, compute)


def pixels_of(size: str) -> tuple[int, int]:
    """Height and width of what a user writes as WxH; raises typer.BadParameter."""
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", size)
    if match is None:
        raise typer.BadParameter(f"{size!r} is no size; write 640x480 (width x height)", param_hint="--size")
    return int(match[2]), int(match[1])
