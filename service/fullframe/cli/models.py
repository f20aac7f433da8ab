"""`models` and `inspect`: what can be asked, on a server or in files, in a readable form."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullframe.cli.options import JsonOption, ServerOption, pixels_of
from fullframe.cli.show import console, print_json, print_table, size_text
from fullframe.errors import InvalidModel

if TYPE_CHECKING:
    from fullframe.model.contract import Contract, Tiles
    from fullframe.model.geometry import GraphGeometry, TensorGeometry


@dataclass(frozen=True)
class _Listed:
    name: str
    version: str
    default: bool
    contract: "Contract"
    logits_obstacle: str | None = None
    """Why a huge image has no logits; empty: it has them; None: not looked for."""


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
    graph: Annotated[
        bool, typer.Option("--graph", help="Show what the cells of every map in the file's graph see instead.")
    ] = False,
    size: Annotated[
        str, typer.Option("--size", metavar="WxH", help="With --graph: show the maps' sizes for such an image too.")
    ] = "",
) -> None:
    """Show a model's contract: labels, geometry, training record."""
    if size and not graph:
        raise typer.BadParameter("the sizes of maps are shown with --graph", param_hint="--size")
    if graph:
        if server:
            raise typer.BadParameter("a server does not tell its models' graphs; give a file", param_hint="--graph")
        _print_graphs(model, pixels_of(size) if size else None, as_json)
        return
    name, _, version = model.partition("/")
    found = list(_served(server, name, version) if server else _stored([model] if model else [], graphs=True))
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


def _stored(specs: Sequence[str], graphs: bool = False) -> "Iterator[_Listed]":
    """Models in files; with `graphs`, what they don't say of huge images is read off their graphs."""
    from fullframe.engine.choice import open_model
    from fullframe.engine.ort import OrtEngine
    from fullframe.model.repository import BUNDLED_NAME, find_models

    files = find_models([] if list(specs) == [BUNDLED_NAME] else specs)
    for file in files:
        contract, obstacle = open_model(file, OrtEngine).contract, None
        if graphs:
            contract, obstacle = _with_tiles(contract, file.path), _logits_obstacle(contract, file.path)
        yield _Listed(file.name, file.version, file.name == files[0].name, contract, obstacle)


def _with_tiles(contract: "Contract", path: Path) -> "Contract":
    if contract.tiles is not None:
        return contract
    from fullframe.convert.metadata import load_model
    from fullframe.model.contract import Tiles
    from fullframe.model.strips import tiles_of

    try:
        tiles = tiles_of(load_model(path))
    except InvalidModel as error:
        tiles = Tiles(contract.stride, (str(error),))
    return replace(contract, tiles=tiles)


def _logits_obstacle(contract: "Contract", path: Path) -> str:
    if contract.has_class_map:
        return ""
    from fullframe.model.heads import head_graph

    try:
        head_graph(path)
    except InvalidModel as error:
        return str(error)
    return ""


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
        "logits": f"{contract.logits}, {_logits_text(model)}",
        "precision": contract.precision,
        "stride": f"{size_text(*contract.stride)} pixels (width x height) between cells of the feature map",
        "receptive field": f"{size_text(*contract.receptive_field)} pixels seen by one cell",
        "first cell": f"sees from pixel {contract.start[1]}, {contract.start[0]} (x, y)",
        "smallest image": f"{size_text(*contract.smallest_size)} pixels",
        "tiles": _tiles_text(contract.tiles),
        **({"batches": "of images of different sizes, which it is told as sizes [N, 2]"} if contract.ragged else {}),
        "normalisation": contract.normalisation,
        "training": contract.training,
    }
    printer = console()
    for name, value in lines.items():
        for line in _lines(name, value):
            printer.print(line, markup=False, soft_wrap=True)


def _logits_text(model: _Listed) -> str:
    if model.contract.has_class_map:
        return "so class maps explain them"
    if model.logits_obstacle:
        return f"but not of an image in pieces: {model.logits_obstacle}"
    return "of a huge image's merged features too"


def _tiles_text(tiles: "Tiles | None") -> str:
    if tiles is None:
        return "not known: the file does not say"
    if tiles.possible:
        return f"possible, from multiples of {size_text(*tiles.alignment)} pixels"
    return "not possible: " + "; ".join(tiles.obstacles)


def _print_graphs(model: str, size: tuple[int, int] | None, as_json: bool) -> None:
    """The maps of graphs as tables, or each map as a line of JSON; files need not follow the contract."""
    from fullframe.convert.metadata import load_model
    from fullframe.model.geometry import GraphGeometry
    from fullframe.model.repository import BUNDLED_NAME, find_models

    for file in find_models([] if model in ("", BUNDLED_NAME) else [model]):
        graph = GraphGeometry(load_model(file.path))
        sizes = {name: graph.size_of(name, *size) for name in graph.tensors} if size else {}
        if not as_json:
            _print_graph(f"{file.name}, version {file.version}", graph, sizes)
            continue
        for tensor in graph.tensors.values():
            print_json({"model": file.name, "version": file.version} | _map_fields(tensor, sizes))


_Sizes = Mapping[str, tuple[int | None, int | None]]


def _map_fields(tensor: "TensorGeometry", sizes: _Sizes) -> dict[str, Any]:
    """A map for programs; pairs are [height, width], and only cells closer than pixels have fractions."""
    pairs = {name: getattr(tensor, name) for name in ("jump", "receptive_field", "start")}
    return {
        "tensor": tensor.name,
        "node": tensor.node,
        "shape": tensor.shape,
        **{name: [int(x) if x == int(x) else float(x) for x in pair] for name, pair in pairs.items()},
        **({"size": sizes[tensor.name]} if sizes else {}),
        "obstacles": [str(obstacle) for obstacle in tensor.obstacles],
    }


def _print_graph(title: str, graph: "GraphGeometry", sizes: _Sizes) -> None:
    def text(pair: Sequence[object], between: str = "x") -> str:
        return between.join("?" if each is None else str(each) for each in reversed(pair))

    rows = [
        (
            tensor.name,
            ",".join(map(str, tensor.shape)),
            text(tensor.jump),
            text(tensor.receptive_field) + ("+" if tensor.obstacles else ""),
            text(tensor.start, ", "),
            *([text(sizes[tensor.name])] if sizes else []),
            tensor.node,
        )
        for tensor in graph.tensors.values()
    ]
    printer = console()
    printer.print(title, markup=False)
    headings = ("map", "shape", "jump", "sees", "from x, y", *(["cells"] if sizes else []), "made by")
    print_table(headings, rows, right=range(2, len(headings) - 1))
    obstacles = [each for tensor in graph.tensors.values() for each in tensor.obstacles]
    notes = {
        "smallest image": [f"{size_text(*graph.smallest_size)} pixels"],
        "sizes that fail": graph.disagreements,
        "sizes not known": graph.doubts,
        "+ sees more": [each for each in obstacles if each not in graph.doubts],
    }
    for name, values in notes.items():
        for value in dict.fromkeys(map(str, values)):
            printer.print(f"{name:16}  {value}", markup=False, soft_wrap=True)


def _lines(name: str, value: Any, indent: str = "") -> Iterator[str]:
    """`name  value`, a mapping's items below its name."""
    if isinstance(value, Mapping):
        yield f"{indent}{name}"
        for key, item in value.items():
            yield from _lines(str(key), item, indent + "  ")
        return
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    yield f"{indent + name:26}  {text}"
