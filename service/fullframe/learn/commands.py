"""The commands `train`, `export` and `evaluate`; torch is imported when one runs, so that --help need not wait."""

import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fullframe.errors import InvalidInput
from fullframe.learn.options import check_is_other, numbers, spread_settings
from fullframe.learn.settings import Augmentation, NetConfig, Recipe

if TYPE_CHECKING:
    from fullframe.learn.data import Image, ImageSet
    from fullframe.learn.train import Progress as Standing
    from fullframe.learn.train import Trainer

console = Console(stderr=True)
CACHE_MIB = 4096

_DATA = (
    "Folder, .tar, .tar.gz or .tar.xz of class folders, within train/ and val/ or test/ if there are such; or "
    "cifar-10-binary.tar.gz."
)
Data = Annotated[Path, typer.Argument(metavar="DATA", help=_DATA)]
Validation = Annotated[float, typer.Option(help="Share of each class held out where there is no val/ or test/.")]
Seed = Annotated[int, typer.Option(help="Decides the held-out images.")]
Sizes = Annotated[str, typer.Option(help="Sizes of the images' shorter side, commas between; 0: their own.")]


@spread_settings
def train(
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="RUN", help="Folder for checkpoint, log and curve.")],
    recipe: Recipe = Recipe(),  # noqa: B008 (frozen)
    net: NetConfig = NetConfig(classes=1),  # noqa: B008 (known once the images are)
    augmentation: Augmentation = Augmentation(),  # noqa: B008
    init: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Run to begin with the averaged weights of, where they fit.")
    ] = None,
    validation: Validation = 0.1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    pooling: Annotated[str, typer.Option(help="Whose pools: torch or fused; the trained model is the same.")] = "torch",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: as many as torch takes.")] = 0,
    cache_mib: Annotated[int, typer.Option(help="Memory for decoded images.")] = CACHE_MIB,
) -> None:
    """Train a network on a folder or tar of classes.

    Each epoch ends with a checkpoint, log.csv and curve.png in RUN. Killed or stopped with Ctrl-C, the same command
    continues.
    """
    import torch

    from fullframe.learn.train import Trainer

    if threads:
        torch.set_num_threads(threads)
    images = _load(data, validation, recipe.seed, cache_mib)
    recipe = replace(recipe, augmentation=augmentation)
    run = Trainer(out, net.for_classes(len(images.labels)), recipe, images, device, init, pooling)
    run.open()
    _fit(run)


def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="Folder that train filled; for --repository or --ragged a model's file will do."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.onnx", help="The file to write.")
    ] = None,
    repository: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write a model repository of Triton Inference Server, or add to it."),
    ] = None,
    ragged: Annotated[
        bool,
        typer.Option("--ragged", help="Write it for batches of different sizes: it takes the images' sizes too."),
    ] = False,
    name: Annotated[str, typer.Option(help="What the model calls itself.  [default: the file's name]")] = "",
    evaluate: Annotated[
        Path | None, typer.Option(metavar="DATA", help="Also record the accuracy on these held-out images.")
    ] = None,
    sizes: Sizes = "0",
    card: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Also write a model card, with the curve beside it.")
    ] = None,
    about: Annotated[str, typer.Option(help="A sentence on the data, for the card.")] = "",
) -> None:
    """Turn trained weights into a served model, checked at many sizes.

    The file is written only if ONNX Runtime gives the network's numbers at each of them.
    """
    from fullframe.convert.inference_server import model_file, write_repository

    sides = numbers(sizes, int, "sizes")
    title = name or (output or run).stem
    if ragged and repository is not None:
        raise typer.BadParameter("--ragged goes to --output, not to --repository", param_hint="--ragged")
    if ragged and run.is_file():
        if output is None or evaluate or card:
            raise typer.BadParameter(f"{run} is a model's file: say --output FILE.onnx, and nothing else")
        check_is_other(output, run)
        _export_ragged(run, output, name)
        return
    if repository is not None and run.is_file():
        if output or evaluate or card:
            raise typer.BadParameter(f"{run} is a model's file: it can go to --repository, and nothing else")
        console.print(f"wrote {write_repository(run, repository, title)}")
        return

    from fullframe.convert.metadata import add_training_facts
    from fullframe.files import write_atomically
    from fullframe.learn.card import model_card
    from fullframe.learn.export import export_run
    from fullframe.learn.runs import PLOT, read_settings

    output = output or (repository and model_file(repository, title))
    if output is None:
        raise typer.BadParameter("say where to: --output FILE.onnx, --repository DIR or both")
    with console.status("exporting and checking"), TemporaryDirectory() as folder:
        plain = Path(folder) / output.name if ragged else output
        _, worst = export_run(run, plain, title)
        if ragged:
            _export_ragged(plain, output, title)
    console.print(f"{output}: largest difference from the network {worst:.1e}")
    if evaluate is not None:
        settings = read_settings(run)
        images = _load(evaluate, settings["validation_share"], settings["recipe"]["seed"], CACHE_MIB)
        if images.fingerprint() != settings["data"]:
            raise InvalidInput(f"{run} was trained on other images than {evaluate}", "evaluate")
        accuracies = _evaluate(output, images, images.validation, sides)
        facts = {"images": len(images.validation), "by_size": {str(k): v for k, v in accuracies.items()}}
        add_training_facts(output, {"accuracy": facts})
    if repository is not None:
        console.print(f"wrote {write_repository(output, repository, title)}")
    if card is not None:
        curve = card.with_name(f"{card.stem}-curve.png")
        shutil.copyfile(run / PLOT, curve)
        write_atomically(card, model_card(output, about, curve.name).encode())


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="An exported model.")],
    data: Data,
    sizes: Sizes = "0",
    every: Annotated[bool, typer.Option("--all", help="Use all images, not only those held out.")] = False,
    validation: Validation = 0.1,
    seed: Seed = Recipe.seed,
) -> None:
    """Measure a model's accuracy at several sizes.

    Without val/ or test/ folders, the images held out are those that train holds out with the same share and seed.
    """
    sides = numbers(sizes, int, "sizes")
    images = _load(data, validation, seed, CACHE_MIB)
    _evaluate(model, images, images.validation + (images.train if every else []), sides)


def _export_ragged(model: Path, output: Path, name: str) -> None:
    from fullframe.convert.ragged import make_ragged

    _, worst = make_ragged(model, output, name)
    console.print(f"{output}: largest difference between an image in a batch and alone {worst:.1e}")


def _load(data: Path, validation: float, seed: int, cache_mib: int) -> "ImageSet":
    from fullframe.learn.data import load_images

    with console.status(f"reading {data}"):
        images = load_images(data, validation=validation, seed=seed, cache_bytes=cache_mib << 20)
    console.print(
        f"{len(images.train)} images to train on, {len(images.validation)} held out, {len(images.labels)} classes"
    )
    if images.skipped:
        console.print(f"{len(images.skipped)} skipped:", *images.skipped[:10], sep="\n  ", markup=False)
        if len(images.skipped) > 10:
            console.print(f"  and {len(images.skipped) - 10} more")
    return images


def _fit(run: "Trainer") -> None:
    """Train with a progress bar and a line per epoch."""
    from fullframe.learn.train import Interrupted

    epochs = run.recipe.epochs
    columns = (
        TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("", total=None, epoch=run.progress.epoch + 1, loss=0.0)

        def on_step(progress: "Standing") -> None:
            loss = progress.loss / progress.seen
            bars.update(bar, completed=progress.step, total=progress.steps, epoch=progress.epoch + 1, loss=loss)

        def on_epoch(row: dict[str, float]) -> None:
            bars.console.print(
                f"epoch {row['epoch']}/{epochs}: loss {row['loss']:.3f}, accuracy {row['train_accuracy']:.2%}, "
                f"validation {row['validation_accuracy']:.2%}, {row['seconds']:.0f} s"
            )

        try:
            run.fit(on_step, on_epoch)
        except Interrupted:
            done = run.progress
            console.print(f"stopped and saved in epoch {done.epoch + 1}; the same command continues there")
            raise typer.Exit(130) from None
    console.print(f"{run.run} is trained; next: fullframe export {run.run} -o model.onnx")


def _evaluate(model: Path, images: "ImageSet", chosen: "list[Image]", sizes: tuple[int, ...]) -> dict[int, float]:
    """Measure with a progress bar, print a table."""
    from fullframe.learn.evaluate import accuracy_by_size

    with Progress(console=console, transient=True) as bars:
        bar = bars.add_task("evaluating", total=len(chosen) * len(sizes))
        accuracies = accuracy_by_size(model, chosen, images.labels, sizes, lambda: bars.advance(bar))
    table = Table("shorter side", "top-1 accuracy")
    for size, accuracy in accuracies.items():
        table.add_row(str(size) if size else "own", f"{accuracy:.2%}")
    Console().print(table)
    return accuracies
