"""Options that several subcommands share, and the model that they choose."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from fullframe.defaults import OWN_PIXELS
from fullframe.model.repository import Precision

if TYPE_CHECKING:
    from fullframe.engine.query import Answer
    from fullframe.errors import FullframeError
    from fullframe.model.contract import Contract

MOST_MEGAPIXELS: Final = OWN_PIXELS // 10**6
_RETRIES: Final = 4
"""Some four seconds: somebody is waiting, and the address may be wrong."""

Engine = Literal["auto", "onnx"]
EngineOption = Annotated[Engine, typer.Option("--engine", help="What runs the model in this process.")]
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
    """A model, here or on a server; `stream` is Client's and Predictor's."""

    stream: "Callable[..., Iterator[tuple[int, Answer | FullframeError]]]"
    contract: "Contract"


@contextmanager
def asked(
    server: str, model: str, engine: Engine, precision: Precision, megapixels: float, timeout: float
) -> Iterator[Asked]:
    """The model that the options choose."""
    if server:
        from fullframe.client import Client

        name, _, version = model.partition("/")
        with Client(server, timeout=timeout, retries=_RETRIES) as client:
            contract = client.model(name, version).contract  # a wrong name or address is told once, not for each image
            yield Asked(partial(client.stream, model=name, version=version), contract)
        return
    from fullframe.engine.predictor import load
    from fullframe.image import own_limits

    if not 0 < megapixels < float("inf"):
        raise typer.BadParameter(f"{megapixels} must be above 0", param_hint="--max-megapixels")
    with load(model or None, engine, precision=precision, limits=own_limits(int(megapixels * 1e6))) as predictor:
        yield Asked(predictor.stream, predictor.contract)


def pixels_of(size: str) -> tuple[int, int]:
    """Height and width of what a user writes as WxH; raises typer.BadParameter."""
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", size)
    if match is None:
        raise typer.BadParameter(f"{size!r} is no size; write 640x480 (width x height)", param_hint="--size")
    return int(match[2]), int(match[1])
