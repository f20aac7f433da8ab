"""`convert`: somebody's classifier -> one file of the contract, with a report of what was done to it."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from fullframe.cli import complain
from fullframe.cli.files import check_output
from fullframe.cli.options import pixels_of
from fullframe.cli.show import console, print_table, size_text
from fullframe.model.repository import checked_name

if TYPE_CHECKING:
    from fullframe.convert.pipeline import Converted

Range = Literal["1", "255"]
_LONGEST: Final = 128


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="FILE.onnx, torchvision:NAME, timm:NAME, python:package.module:factory or a RUN of train.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.onnx", help="The file to write.", show_default=False)
    ],
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Names of the classes, one a line, in the scores' order.")
    ] = None,
    mean: Annotated[
        str, typer.Option(metavar="R,G,B", help="Taken off pixels of 0 to 1.  [default: source's, or 0]")
    ] = "",
    std: Annotated[str, typer.Option(metavar="R,G,B", help="Then divided by.  [default: source's, or 1]")] = "",
    input_range: Annotated[
        Range | None, typer.Option(help="Then multiplied by: 255 where the source takes raw pixels.  [default: 1]")
    ] = None,
    bgr: Annotated[
        bool, typer.Option("--bgr", help="The source takes blue first. R,G,B above stay as they are.")
    ] = False,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE.safetensors", help="For a network in PyTorch, instead of its own.")
    ] = None,
    size: Annotated[
        str, typer.Option(metavar="WxH", help="The size it was made for, where it does not say.  [default: 224x224]")
    ] = "",
    name: Annotated[str, typer.Option(help="What the model calls itself.  [default: the file's name]")] = "",
    license_note: Annotated[
        str, typer.Option("--license", metavar="TEXT", help="Of the weights, for the record.")
    ] = "",
) -> None:
    """Make any convolutional classifier a model that is served.

    It takes images of any size then. Its layers stay what they are; what ties them to one image size is rewritten, and
    each step is named. The file is written when it gives the source's scores at the source's size and runs at others;
    else it says what stands in the way.
    """
    from fullframe.convert.options import read_labels
    from fullframe.convert.pipeline import convert as make_model
    from fullframe.convert.sources import open_source
    from fullframe.files import write_atomically
    from fullframe.learn.commands import export
    from fullframe.learn.options import check_is_other, numbers

    check_output(output, ".onnx", "--output")
    check_is_other(output, source)
    name = checked_name(name) if name else _servable(output.stem)
    if Path(source).is_dir():
        others = [labels, mean, std, input_range, bgr, weights, size, license_note]
        if any(others):
            raise typer.BadParameter(f"the run in {source} knows all this itself; --name alone may be given")
        export(Path(source), output, name=name)
        return
    said: dict[str, Any] = {
        "name": name,
        "labels": labels and read_labels(labels),
        "mean": mean and numbers(mean, float, "mean"),
        "std": std and numbers(std, float, "std"),
        "input_range": input_range and int(input_range),
        "bgr": bgr,
        "license": license_note,
        "size": pixels_of(size) if size else None,
    }
    opened = open_source(source, weights=weights, size=said["size"])
    options = replace(opened.options, **{option: value for option, value in said.items() if value})
    converted = make_model(opened.model, options)
    write_atomically(output, converted.model.SerializeToString())
    _print_report(converted)
    complain(f"wrote {output}; fullframe serve --model {shlex.quote(f'{name}={output}')} serves it")


def _print_report(converted: "Converted") -> None:
    print_table(("step", ""), [(str(number), line) for number, line in enumerate(converted.report, 1)])
    contract = converted.contract
    tiles = "yes" if contract.tiles and contract.tiles.possible else "no: fullframe inspect says why"
    facts = {
        "classes": str(len(contract.labels)),
        "features": str(contract.feature_channels),
        "smallest image": f"{size_text(*contract.smallest_size)} pixels",
        "huge images": tiles,
    }
    for key, value in facts.items():
        console().print(f"{key:14}  {value}", markup=False)


def _servable(stem: str) -> str:
    """A file's name as one that `serve` takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:_LONGEST] or "model"
