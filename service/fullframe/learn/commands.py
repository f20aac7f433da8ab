"""The commands `train`, `export` and `evaluate`."""

import shutil
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fullframe.errors import InvalidInput
from fullframe.learn import train as training
from fullframe.learn.augment import Augmentation
from fullframe.learn.card import model_card
from fullframe.learn.checkpoint import write_atomically
from fullframe.learn.data import Image, ImageSet, load_images
from fullframe.learn.evaluate import accuracy_by_size
from fullframe.learn.export import add_training_facts, export_run
from fullframe.learn.nets import ACTIVATIONS, BLOCK_POOLINGS, GLOBAL_POOLINGS, NetConfig
from fullframe.learn.recipe import OPTIMIZERS, PRECISIONS, Recipe

Number = TypeVar("Number", int, float)
console = Console(stderr=True)
CACHE_MIB = 4096

_DATA = "Folder, .tar, .tar.gz or .tar.xz of class folders, within train/ and val/ or test/ if there are such."
Data = Annotated[Path, typer.Argument(metavar="DATA", help=_DATA)]
Validation = Annotated[float, typer.Option(help="Share of each class held out where there is no val/ or test/.")]
Seed = Annotated[int, typer.Option(help="Decides the held-out images, first weights, order and augmentation.")]
Sizes = Annotated[str, typer.Option(help="Sizes of the images' shorter side, commas between; 0: their own.")]


def train(
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="RUN", help="Folder for checkpoint, log and curve.")],
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = Recipe.epochs,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = Recipe.batch_size,
    optimizer: Annotated[str, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.")] = Recipe.optimizer,
    learning_rate: Annotated[float, typer.Option(help="Its peak; around 0.1 for sgd, 0.002 for adamw.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="On convolution weights.")] = Recipe.weight_decay,
    warmup_epochs: Annotated[float, typer.Option(help="Epochs until that peak.")] = Recipe.warmup_epochs,
    label_smoothing: Annotated[float, typer.Option(help="Probability spread over all classes.")] = 0.1,
    ema: Annotated[float, typer.Option(help="Decay per step of the averaged weights; 0: none.")] = Recipe.ema,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0: any.")] = Recipe.clip,
    frozen_norm_epochs: Annotated[
        int, typer.Option(help="Last epochs with batch norm as when served; for widely differing sizes.")
    ] = Recipe.frozen_norm_epochs,
    precision: Annotated[str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")] = Recipe.precision,
    seed: Seed = Recipe.seed,
    width: Annotated[int, typer.Option(help="Channels of the first stage; each next has twice as many.")] = 64,
    depth: Annotated[str, typer.Option(help="Blocks in each stage.")] = "1,2,2",
    stem: Annotated[int, typer.Option(help="Channels at full resolution.")] = NetConfig.stem,
    activation: Annotated[str, typer.Option(help=f"One of {', '.join(ACTIVATIONS)}.")] = NetConfig.activation,
    block_pooling: Annotated[str, typer.Option(help=f"One of {', '.join(BLOCK_POOLINGS)}.")] = "max",
    global_pooling: Annotated[str, typer.Option(help=f"One of {', '.join(GLOBAL_POOLINGS)}.")] = "avg",
    dropout: Annotated[float, typer.Option(help="On the features.")] = NetConfig.dropout,
    sizes: Annotated[
        str, typer.Option(help="Sides of the training images, one drawn per batch; SIDE:WEIGHT to prefer some.")
    ] = "24,32,40,48,64",
    area: Annotated[str, typer.Option(help="Least and largest share of the image that a crop shows.")] = "0.5,1",
    aspect: Annotated[float, typer.Option(help="Most stretching of a crop.")] = Augmentation.aspect,
    reach: Annotated[float, typer.Option(help="Share of its side that a crop may pass the border.")] = 0.125,
    whole: Annotated[float, typer.Option(help="Share of the images that keep their scale.")] = Augmentation.whole,
    flip: Annotated[float, typer.Option(help="Share of the images mirrored.")] = Augmentation.flip,
    validation: Validation = 0.1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: as many as torch takes.")] = 0,
    cache_mib: Annotated[int, typer.Option(help="Memory for decoded images.")] = CACHE_MIB,
) -> None:
    """Train a network on a folder or tar of classes.

    Each epoch ends with a checkpoint, log.csv and curve.png in RUN. Killed or stopped with Ctrl-C, the same command
    continues.
    """
    sides, weights = _sizes(sizes)
    recipe = Recipe(
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup_epochs=warmup_epochs,
        label_smoothing=label_smoothing,
        ema=ema,
        clip=clip,
        frozen_norm_epochs=frozen_norm_epochs,
        precision=precision,
        seed=seed,
        augmentation=Augmentation(sides, weights, _pair(area), aspect, reach, whole, flip),
    )
    net = NetConfig(
        classes=1,  # known once the images are
        width=width,
        depth=_numbers(depth, int, "depth"),
        stem=stem,
        activation=activation,
        block_pooling=block_pooling,
        global_pooling=global_pooling,
        dropout=dropout,
    )
    if threads:
        torch.set_num_threads(threads)
    images = _load(data, validation, seed, cache_mib)
    run = training.Trainer(out, net.for_classes(len(images.labels)), recipe, images, device)
    run.open()
    _fit(run)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that train filled.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.onnx", help="The file to write.")],
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
    sides = _numbers(sizes, int, "sizes")
    with console.status("exporting and checking"):
        _, worst = export_run(run, output, name or output.stem)
    console.print(f"{output}: largest difference from the network {worst:.1e}")
    if evaluate is not None:
        settings = training.read_settings(run)
        images = _load(evaluate, settings["validation_share"], settings["recipe"]["seed"], CACHE_MIB)
        if images.fingerprint() != settings["data"]:
            raise InvalidInput(f"{run} was trained on other images than {evaluate}", "evaluate")
        accuracies = _evaluate(output, images, images.validation, sides)
        facts = {"images": len(images.validation), "by_size": {str(k): v for k, v in accuracies.items()}}
        add_training_facts(output, {"accuracy": facts})
    if card is not None:
        curve = card.with_name(f"{card.stem}-curve.png")
        shutil.copyfile(run / training.PLOT, curve)
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
    sides = _numbers(sizes, int, "sizes")
    images = _load(data, validation, seed, CACHE_MIB)
    _evaluate(model, images, images.validation + (images.train if every else []), sides)


def _load(data: Path, validation: float, seed: int, cache_mib: int) -> ImageSet:
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


def _fit(run: training.Trainer) -> None:
    """Train with a progress bar and a line per epoch."""
    epochs = run.recipe.epochs
    columns = (
        TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("", total=run.steps, epoch=run.progress.epoch + 1, loss=0.0)

        def on_step(progress: training.Progress) -> None:
            bars.update(bar, completed=progress.step, epoch=progress.epoch + 1, loss=progress.loss / progress.seen)

        def on_epoch(row: dict[str, float]) -> None:
            bars.console.print(
                f"epoch {row['epoch']}/{epochs}: loss {row['loss']:.3f}, accuracy {row['train_accuracy']:.2%}, "
                f"validation {row['validation_accuracy']:.2%}, {row['seconds']:.0f} s"
            )

        try:
            run.fit(on_step, on_epoch)
        except training.Interrupted:
            done = run.progress
            console.print(f"stopped and saved in epoch {done.epoch + 1}; the same command continues there")
            raise typer.Exit(130) from None
    console.print(f"{run.run} is trained; next: fullframe export {run.run} -o model.onnx")


def _evaluate(model: Path, images: ImageSet, chosen: list[Image], sizes: tuple[int, ...]) -> dict[int, float]:
    """Measure with a progress bar, print a table."""
    with Progress(console=console, transient=True) as bars:
        bar = bars.add_task("evaluating", total=len(chosen) * len(sizes))
        accuracies = accuracy_by_size(model, chosen, images.labels, sizes, lambda: bars.advance(bar))
    table = Table("shorter side", "top-1 accuracy")
    for size, accuracy in accuracies.items():
        table.add_row(str(size) if size else "own", f"{accuracy:.2%}")
    Console().print(table)
    return accuracies


def _numbers(text: str, kind: type[Number], name: str) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidInput(f"{name} is {text!r}; it must be numbers with commas between", name) from error


def _pair(text: str) -> tuple[float, float]:
    numbers = _numbers(text, float, "area")
    if len(numbers) != 2:
        raise InvalidInput(f"area is {text!r}; it must be two numbers with a comma between", "area")
    return numbers[0], numbers[1]


def _sizes(text: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Sides and weights of "24:15,32:50"; without weights those are empty."""
    pairs = [part.partition(":") for part in text.split(",")]
    sides = _numbers(",".join(side for side, _, _ in pairs), int, "sizes")
    if not any(colon for _, colon, _ in pairs):
        return sides, ()
    return sides, _numbers(",".join(weight or "1" for _, _, weight in pairs), float, "sizes")
