"""`models` and `inspect`: what can be asked, on a server or in files, in a readable form."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullframe.cli.options import JsonOption, ServerOption
from fullframe.cli.show import console, print_json, print_table, size_text

if TYPE_CHECKING:
    from fullframe.model.contract import Contract


@dataclass(frozen=True)
class _Listed:
    name: str
    version: str
    default: bool
    contract: "Contract"


def models(
    where: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help=".onnx files, models' folders, repositories; none: the bundled one."),
    ] = None,
    as_json: JsonOption = False,
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="List this server's models.")] = "",
) -> None:
    """List a server's models, or those in files and folders."""
    if server and where:
        raise typer.BadParameter("give either a server or files", param_hint="--server")
    found = list(_served(server) if server else _stored(where or []))
    if as_json:
        for model in found:
            print_json(asdict(model))
        return
    headings = ("model", "version", "", "classes", "features", "stride", "smallest image")
    print_table(headings, [_row(model) for model in found], right=(3, 4, 5, 6))


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="An .onnx file or a model's folder; with --server NAME or NAME/VERSION.",
            show_default=False,
        ),
    ] = "",
    as_json: JsonOption = False,
    server: ServerOption = "",
) -> None:
    """Show a model's contract: labels, geometry, training record."""
    name, _, version = model.partition("/")
    found = list(_served(server, name, version) if server else _stored([model] if model else []))
    for listed in found:
        if as_json:
            print_json(asdict(listed))
        else:
            _print_contract(listed)


def _served(server: str, name: str | None = None, version: str = "") -> "Iterator[_Listed]":
    from fullframe.client import Client

    with Client(server, retries=0) as client:
        found = client.models() if name is None else [client.model(name, version)]
    for model in found:
        yield _Listed(model.name, model.version, model.default, model.contract)


def _stored(specs: Sequence[str]) -> "Iterator[_Listed]":
    from fullframe.engine.ort import OrtEngine
    from fullframe.model.repository import BUNDLED_NAME, find_models

    files = find_models([] if list(specs) == [BUNDLED_NAME] else specs)
    for file in files:
        yield _Listed(file.name, file.version, file.name == files[0].name, OrtEngine(file.path).contract)


def _row(model: _Listed) -> tuple[str, ...]:
    contract = model.contract
    return (
        model.name,
        model.version,
        "default" if model.default else "",
        str(len(contract.labels)),
        str(contract.feature_channels),
        size_text(*contract.stride),
        size_text(*contract.smallest_size),
    )


def _print_contract(model: _Listed) -> None:
    contract = model.contract
    lines = {
        "model": f"{model.name}, version {model.version}",
        "classes": f"{len(contract.labels)}: {', '.join(contract.labels)}",
        "features": f"{contract.feature_channels} channels, pooled by {contract.pooling}",
        "logits": contract.logits + (", so class maps explain them" if contract.has_class_map else ""),
        "precision": contract.precision,
        "stride": f"{size_text(*contract.stride)} pixels (width x height) between cells of the feature map",
        "receptive field": f"{size_text(*contract.receptive_field)} pixels seen by one cell",
        "first cell": f"sees from pixel {contract.start[1]}, {contract.start[0]} (x, y)",
        "smallest image": f"{size_text(*contract.smallest_size)} pixels",
        "normalisation": contract.normalisation,
        "training": contract.training,
    }
    printer = console()
    for name, value in lines.items():
        for line in _lines(name, value):
            printer.print(line, markup=False, soft_wrap=True)


def _lines(name: str, value: Any, indent: str = "") -> Iterator[str]:
    """`name  value`, a mapping's items below its name."""
    if isinstance(value, Mapping):
        yield f"{indent}{name}"
        for key, item in value.items():
            yield from _lines(str(key), item, indent + "  ")
        return
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    yield f"{indent + name:26}  {text}"
