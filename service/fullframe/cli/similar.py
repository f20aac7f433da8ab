"""`similar`: the images of a table that are nearest to another, as a table, JSON lines and a contact sheet."""

from collections.abc import Sequence
from dataclasses import asdict
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fullframe.cli import complain
from fullframe.cli.files import check_output, file_at
from fullframe.cli.options import (
    MOST_MEGAPIXELS,
    ComputeOption,
    EngineOption,
    JsonOption,
    MegapixelsOption,
    ModelOption,
    PrecisionOption,
    ServerOption,
    TimeoutOption,
    asked,
)
from fullframe.cli.show import print_json, print_table, size_text
from fullframe.errors import FullframeError, InvalidInput

if TYPE_CHECKING:
    from fullframe.cli.options import Asked
    from fullframe.engine.query import FloatArray
    from fullframe.table.nearest import Neighbour
    from fullframe.table.recipe import Recipe

_LEAST_COLUMNS: Final = 5
_MOST_TILES: Final = 1000


def similar(
    query: Annotated[
        str,
        typer.Argument(
            metavar="QUERY", help="An image file, or the path of an image in the table.", show_default=False
        ),
    ],
    table: Annotated[
        Path, typer.Argument(metavar="FILE.parquet", help="What `fullframe embed` wrote.", show_default=False)
    ],
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="Images to find.")] = 10,
    sheet: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw the query and what is found as a contact sheet.")
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the table's images are now, for the sheet.  [default: as it says]"),
    ] = None,
    as_json: JsonOption = False,
    server: ServerOption = "",
    model: ModelOption = "",
    engine: EngineOption = "auto",
    precision: PrecisionOption = "float32",
    compute: ComputeOption = "float32",
    max_megapixels: MegapixelsOption = MOST_MEGAPIXELS,
    timeout: TimeoutOption = 30,
) -> None:
    """Find the images of a table that are most like another.

    The nearest are those with the largest cosine between their features.
    """
    from fullframe.table.nearest import Table

    check_output(sheet, ".png", "--sheet")
    if sheet and top > _MOST_TILES:
        raise typer.BadParameter(f"a sheet has room for {_MOST_TILES}, not {top}", param_hint="--top")
    if root and not root.is_dir():
        raise typer.BadParameter(f"there is no folder {str(root)!r}", param_hint="--root")
    with Table(table) as opened:
        folder = str(root or file_at("", opened.recipe.root))
        if Path(query).is_file():
            file = query
            with asked(server, model, engine, precision, compute, max_megapixels, timeout) as chosen:
                feature = _feature(file, chosen, opened.recipe, table)
        else:
            file = file_at(folder, query)
            feature = opened.feature(query)
        found = opened.nearest(feature, top)
    _print(found, as_json)
    if sheet:
        _draw(sheet, file, found, folder)


def _feature(file: str, chosen: "Asked", recipe: "Recipe", table: Path) -> "FloatArray":
    """Of an image, made as the table's were; raises InvalidInput where the model is another one."""
    from fullframe.engine.pooling import Pooling

    if chosen.served.digest != recipe.digest:
        here = f"{chosen.served.name} version {chosen.served.version} ({chosen.served.digest[:12]})"
        raise InvalidInput(
            f"{table} was made with the model {recipe.title}, and this is {here}: name that one with --model", "model"
        )
    pooling = Pooling.parse(recipe.pooling, l2_normalize=recipe.normalize)
    [(_, outcome)] = chosen.stream([file], top_k=0, poolings=[pooling])
    if isinstance(outcome, FullframeError):
        raise outcome
    feature: FloatArray = outcome.embeddings[0]
    return feature


def _print(found: "Sequence[Neighbour]", as_json: bool) -> None:
    if as_json:
        for rank, each in enumerate(found, 1):
            print_json({"rank": rank, **asdict(each)})
        return
    rows = [
        (
            str(rank),
            f"{each.similarity:.4f}",
            each.path,
            size_text(each.height, each.width),
            each.label or "",
            "" if each.probability is None else f"{each.probability:.1%}",
        )
        for rank, each in enumerate(found, 1)
    ]
    if rows:
        print_table(("rank", "similarity", "image", "size", "class", "probability"), rows, right=(0, 1, 3, 5))
    else:
        complain("no image of the table has features")


def _draw(path: Path, query: str, found: "Sequence[Neighbour]", folder: str) -> None:
    """The contact sheet of what was found below `folder`."""
    from fullframe.image import Tile, draw_sheet, encode_png, open_source, own_limits, thumbnail

    def tile(file: str, *caption: str) -> Tile:
        try:
            return Tile(thumbnail(open_source(file, own_limits())), caption)
        except InvalidInput as error:
            reason = str(error).replace(f"cannot read {file}:", "cannot read it:")
            complain(f"{file}: {reason}; its tile is grey")
            return Tile(None, caption)

    tiles = [
        tile(file_at(folder, each.path), f"{rank}   {each.similarity:.4f}", each.path)
        for rank, each in enumerate(found, 1)
    ]
    columns = max(1, min(len(tiles), max(_LEAST_COLUMNS, ceil(sqrt(len(tiles))))))
    drawn = draw_sheet(tile(query, "query", query), tiles, columns)
    path.write_bytes(encode_png(drawn))
    complain(f"wrote {path}: {len(tiles)} pictures")
