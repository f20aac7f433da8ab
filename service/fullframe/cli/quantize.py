"""`quantize`: a model's int8 copy, and how far its answers are the model's."""

from pathlib import Path
from typing import Annotated, Final

import typer

from fullframe.cli import complain
from fullframe.cli.files import check_output
from fullframe.cli.show import print_table
from fullframe.model.repository import int8_copy


def quantize(
    model: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="A float32 model.", show_default=False)],
    calibrate: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Images like those it will see: folder or tar; val/ and test/ are left out."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.onnx", help="[default: FILE.int8.onnx, where serve looks for it]"),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Most images to calibrate with, spread evenly.")] = 300,
    sizes: Annotated[
        str, typer.Option(help="Shorter sides to calibrate and compare at, commas between; 0: the images' own.")
    ] = "0",
    evaluate: Annotated[
        Path | None, typer.Option(metavar="DATA", help="Compare on these held-out images, as train reads them.")
    ] = None,
) -> None:
    """Make a model's int8 copy, faster on a CPU.

    The copy follows the same contract; the two are compared, and the copy records what was found. `--precision int8`
    serves it.
    """
    from rich.console import Console
    from rich.progress import Progress

    from fullframe.convert.metadata import add_training_facts
    from fullframe.convert.quantize import quantize as make_copy
    from fullframe.learn.data import load_images, sample_images
    from fullframe.learn.evaluate import compare, resized
    from fullframe.learn.options import check_is_other, numbers

    check_output(output, ".onnx", "--output")
    sides = numbers(sizes, int, "sizes")
    copy = output or int8_copy(model)
    check_is_other(copy, model)
    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(f"reading {calibrate}", total=None)
        chosen = sample_images(calibrate, images)
        bars.update(bar, description="calibrating", total=len(chosen) * len(sides))
        shown = [(image, side) for side in sides for image in chosen]
        contract = make_copy(model, copy, (resized(image, side) for image, side in bars.track(shown, task_id=bar)))
        if evaluate is None:
            compared, labels = chosen, contract.labels
        else:
            held_out = load_images(evaluate)
            compared, labels = held_out.validation, held_out.labels
        bar = bars.add_task("comparing", total=2 * len(compared) * len(sides))
        found = compare(model, copy, compared, labels, sides, lambda: bars.advance(bar))
    add_training_facts(copy, {"compared": {"images": len(compared), "by_size": found}})
    columns = {key: heading for key, heading in _HEADINGS.items() if all(key in each for each in found.values())}
    rows = [
        [size if int(size) else "own", *(f"{100 * each[key]:.2f}" for key in columns)] for size, each in found.items()
    ]
    print_table(("shorter side", *columns.values()), rows, right=range(len(columns) + 1))
    complain(f"wrote {copy}; --precision int8 serves it")


_HEADINGS: Final = {
    "agreement": "same class, %",
    "cosine": "cosine of features, %",
    "float32": "float32 right, %",
    "int8": "int8 right, %",
}
