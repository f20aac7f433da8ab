"""`serve`, whose options are the server's settings, and `probe`."""

import inspect
from collections.abc import Iterator
from typing import Annotated, Any, Final

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from fullframe.errors import InvalidInput
from fullframe.settings import Settings, address, describe, read_settings

_EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses to listen on, and where to ask then."""


def _serve(**given: Any) -> None:
    """Serve models over gRPC until SIGTERM or Ctrl-C.

    Every option can be given in the environment too: --port 8001 as FULLFRAME_PORT=8001, --model as FULLFRAME_MODELS.
    """
    try:
        settings = read_settings(**given)
    except InvalidInput as error:
        raise typer.BadParameter(str(error)) from error
    from fullframe.server.lifecycle import run

    raise typer.Exit(run(settings))


def _with_settings(command: Any) -> Any:
    """The same command with an option for each setting."""
    command.__signature__ = inspect.Signature(list(_parameters()))
    command.__annotations__ = {}
    return command


def _parameters() -> Iterator[inspect.Parameter]:
    for name, field in Settings.model_fields.items():
        # None where nothing is given: then the environment is asked, and only then the default.
        metavar = "NAME=PATH" if name == "models" else None
        option = typer.Option(
            f"--{_dashed(name)}", metavar=metavar, help=f"{describe(name)}  [default: {_default(field)}]"
        )
        kind: Any = _type(field)
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def _dashed(name: str) -> str:
    return "model" if name == "models" else name.replace("_", "-")


def _type(field: FieldInfo) -> Any:
    kind: Any = field.annotation
    return {tuple[str, ...]: list[str], ByteSize: str}.get(kind, kind) | None


def _default(field: FieldInfo) -> str:
    if isinstance(field.default, ByteSize):
        return field.default.human_readable()
    return str(field.default) if field.default != () else "the bundled model"


serve = _with_settings(_serve)


def probe(
    target: Annotated[
        str | None,
        typer.Argument(metavar="HOST:PORT", help="Default: where `serve` listens here.", show_default=False),
    ] = None,
    model: Annotated[str, typer.Option(help="Ask about one model instead of the whole server.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 3.0,
) -> None:
    """Ask a server whether it can answer; exit code 0 if so, else 1."""
    from fullframe.client import Client

    with Client(target or _own_target(), timeout=timeout, retries=0) as client:
        serving = client.health(model)
    print("serving" if serving else "not serving")
    raise typer.Exit(0 if serving else 1)


def _own_target() -> str:
    settings = read_settings()
    host = _EVERYWHERE.get(settings.host, settings.host)
    return address(host, settings.port)
