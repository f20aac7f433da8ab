"""A model's figures on CIFAR-10 and on photographs: into its file, its card and the card's pictures.

    python -m benchmarks.model --data cifar10.tar.xz [--photos photos.tar] [--model MODEL.onnx] [--sizes 24,32,...]
        [--rival NAME=OTHER.onnx]

MODEL.onnx was written by `fullframe export`; without, it is the bundled one. The data is a folder or tar of
train/CLASS/ and test/CLASS/ images, as `fullframe train` takes it. The photographs are files named ..._LABEL.JPEG after
one of CLASSES below, in a folder or tar; others are passed over. Beside them the cat of the `demo` extra is asked for
at half, own and double size. Where MODEL.int8.onnx lies beside the model, its accuracy and its time are measured too.
A rival, another exported network, has its accuracy put beside; what was measured of one is kept until another comes.
Writes MODEL.md, MODEL-confusion.png, MODEL-sizes.png and MODEL-curve.png.
"""

import argparse
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import skimage.data
from rich.console import Console
from rich.progress import Progress

from benchmarks.recording import append_rows, machine
from fullframe.convert.metadata import add_training_facts, get_contract, load_model
from fullframe.engine.ort import OrtEngine
from fullframe.files import write_atomically
from fullframe.learn.card import accuracies, history, model_card
from fullframe.learn.data import ImageSet, Pixels, decode, load_images
from fullframe.learn.evaluate import accuracy_by_size, ask, neighbour_accuracy, resize_shorter_side
from fullframe.learn.plot import plot_accuracy, plot_confusion, plot_history
from fullframe.model.contract import FLOAT32
from fullframe.model.repository import BUNDLED, int8_copy

CLASSES = {
    "airplane": ("warplane",),
    "automobile": ("convertible", "racer"),
    "bird": (*("cock", "robin", "vulture", "African_grey", "jacamar", "white_stork", "limpkin", "oystercatcher"),),
    "dog": (
        *("Chihuahua", "Rhodesian_ridgeback", "English_foxhound", "otterhound", "Kerry_blue_terrier", "Airedale"),
        *("Scotch_terrier", "golden_retriever", "Brittany_spaniel", "schipperke", "collie", "Bernese_mountain_dog"),
        *("Saint_Bernard", "Leonberg", "Pembroke"),
    ),
    "frog": ("tree_frog",),
    "ship": ("trimaran",),
}
"""Which ImageNet labels are which class. Left out: wild cats, antelopes, wolves and foxes, parts of cars, vans."""
POOLINGS = ("avg", "max", "gem(3)", "avg@1,2")
RESULTS = Path(__file__).parent / "results" / "model.csv"
SIZES = "24,32,40,48,64,96,128,192,256"
TIMED_SIZES = (32, 64, 224, 512)
NEIGHBOURS = 20
NEIGHBOUR_SIZES = (32, 64, 128)
CONFUSION_SIZE = 32
ABOUT = (
    "CIFAR-10 (A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009) as JPEG of quality 75: "
    "photographs of 32 x 32 pixels, each filled by one object; the test images are the ones held out. Whatever a "
    "picture shows, the model names one of its ten classes."
)


Tick = Callable[[], None]
Facts = dict[str, Any]


def measure(model: Path, images: ImageSet, every: int, sizes: Sequence[int], tick: Tick) -> Facts:
    """Top-1 accuracy and nearest-neighbour accuracy of each pooling by size; draws the confusions beside the model."""
    bank, held_out = images.train[::every], images.validation[::every]
    classes, truth = (np.array([image.label for image in each]) for each in (bank, held_out))
    known = ask(model, bank, images.labels, 0, POOLINGS, tick).pooled
    by_size: dict[str, float] = {}
    by_pooling: dict[str, dict[str, float]] = {pooling: {} for pooling in POOLINGS}
    for size in sizes:
        poolings = POOLINGS if size in NEIGHBOUR_SIZES else ()
        answers = ask(model, held_out, images.labels, size, poolings, tick)
        by_size[str(size)] = float((answers.classes == truth).mean())
        for pooling, vectors in answers.pooled.items():
            right = neighbour_accuracy(known[pooling], classes, vectors, truth, NEIGHBOURS)
            by_pooling[pooling][str(size)] = right
        if size == CONFUSION_SIZE:
            counts = np.zeros((len(images.labels),) * 2, np.int64)
            np.add.at(counts, (truth, answers.classes), 1)
            write_atomically(beside(model, "confusion"), plot_confusion(counts, images.labels))
    return {
        "accuracy": {"images": len(held_out), "by_size": by_size},
        "neighbours": {"k": NEIGHBOURS, "bank": len(bank), "by_pooling": by_pooling},
    }


def measure_copy(copy: Path, images: ImageSet, every: int, sizes: Sequence[int], tick: Tick) -> Facts:
    """Top-1 accuracy of the int8 copy by size."""
    right = accuracy_by_size(copy, images.validation[::every], images.labels, sizes, tick)
    return {"by_size": {str(size): share for size, share in right.items()}}


def measure_rival(name: str, rival: Path, images: ImageSet, every: int, sizes: Sequence[int], tick: Tick) -> Facts:
    """Top-1 accuracy by size of another network, and how it was trained."""
    right = accuracy_by_size(rival, images.validation[::every], images.labels, sizes, tick)
    training = get_contract(load_model(rival)).training
    return {**training, "name": name, "by_size": {str(size): share for size, share in right.items()}}


def time_ratios(model: Path, copy: Path, rounds: int = 21) -> dict[str, float]:
    """The copy's time on one core as a share of the model's, by the side of a square; medians of rounds in turn."""
    engines = [OrtEngine(path) for path in (model, copy)]
    ratios: dict[str, float] = {}
    for side in TIMED_SIZES:
        pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
        repeats = max(1, 512**2 // side**2 // 8)
        times: list[list[float]] = [[], []]
        for _ in range(rounds):
            for engine, taken in zip(engines, times, strict=True):
                started = time.perf_counter()
                for _ in range(repeats):
                    engine.run(pixels, ["features", "logits"])
                taken.append(time.perf_counter() - started)
        ours, theirs = (median(taken[1:]) for taken in times)
        ratios[str(side)] = round(theirs / ours, 3)
    return ratios


def photographs(model: Path, photos: Path | None) -> Iterator[Facts]:
    """What the model says of the cat, and how often it is right on labelled photographs, by scale."""
    engine = OrtEngine(model)

    def answer(pixels: Pixels, scale: float) -> tuple[str, float]:
        resized = resize_shorter_side(pixels, max(1, round(min(pixels.shape[:2]) * scale)))
        logits = engine.run(resized, ["logits"])["logits"].astype(np.float64)
        shares = np.exp(logits - logits.max())
        return engine.contract.labels[logits.argmax()], float(shares.max() / shares.sum())

    cat = skimage.data.chelsea()  # type: ignore[no-untyped-call]
    named = {str(scale): "{} ({:.2f})".format(*answer(cat, scale)) for scale in (0.5, 1.0, 2.0)}
    yield {"about": "A cat, `skimage.data.chelsea()`, 451 x 300 pixels.", "figure": "answer", "by_scale": named}
    if photos is None:
        return
    classes = {label: name for name, labels in CLASSES.items() for label in labels}
    shown = [(decode(data), classes[label]) for label, data in sorted(labelled(photos)) if label in classes]
    right = {
        str(scale): f"{100 * np.mean([answer(pixels, scale)[0] == name for pixels, name in shown]):.1f}"
        for scale in (0.25, 0.5, 1.0)
    }
    counts = {name: sum(1 for _, found in shown if found == name) for name in CLASSES}
    about = ", ".join(f"{count} of {name}" for name, count in counts.items() if count)
    yield {
        "about": f"{len(shown)} ImageNet photographs whose label falls into a class: {about}.",
        "figure": "accuracy, %",
        "by_scale": right,
    }


def labelled(photos: Path) -> Iterator[tuple[str, bytes]]:
    """The label and the bytes of each file named WNID_LABEL.SUFFIX in a folder or tar."""

    def label(name: str) -> str:
        return Path(name).stem.partition("_")[2]

    if photos.is_dir():
        yield from ((label(file.name), file.read_bytes()) for file in photos.rglob("*") if file.is_file())
        return
    with tarfile.open(photos) as archive:
        for member in archive:
            if content := archive.extractfile(member):
                yield label(member.name), content.read()


def beside(model: Path, what: str) -> Path:
    """The path of one of the card's pictures."""
    return model.with_name(f"{model.stem}-{what}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--rival", help="NAME=FILE of a network to put beside")
    parser.add_argument("--note", help="what else the card says of the training; by default what it says now")
    parser.add_argument("--every", type=int, default=1, help="take one in so many images, for a trial")
    options = parser.parse_args()
    images = load_images(options.data)
    sizes = [int(size) for size in options.sizes.split(",")]
    model: Path = options.model
    copy = int8_copy(model)
    passes = 1 + copy.exists() + bool(options.rival)
    with Progress(console=Console(stderr=True)) as bars:
        total = (passes * len(sizes) * len(images.validation) + len(images.train)) // options.every
        bar = bars.add_task(model.name, total=total)

        def tick() -> None:
            bars.advance(bar)

        facts = measure(model, images, options.every, sizes, tick)
        facts["photographs"] = list(photographs(model, options.photos))
        if copy.exists():
            facts["int8"] = measure_copy(copy, images, options.every, sizes, tick)
            facts["int8"] |= {"bytes": copy.stat().st_size, "time": time_ratios(model, copy)}
        if options.rival:
            name, _, rival = options.rival.partition("=")
            facts["rival"] = measure_rival(name, Path(rival), images, options.every, sizes, tick)
    add_training_facts(model, facts | ({} if options.note is None else {"note": options.note}))
    if copy.exists():
        accuracy = facts["accuracy"] | {"by_size": facts["int8"]["by_size"]}
        add_training_facts(copy, {"accuracy": accuracy, FLOAT32: get_contract(load_model(model)).training})
    write_card(model)
    record(model, options.every)


def write_card(model: Path) -> None:
    """MODEL.md, the curve and the accuracy by size, from what the file says of itself."""
    facts = get_contract(load_model(model)).training
    curve, sizes = beside(model, "curve"), beside(model, "sizes")
    write_atomically(curve, plot_history(history(facts)))
    write_atomically(sizes, plot_accuracy(accuracies(facts)))
    about = f"{ABOUT}\n\n{facts.get('note', '')}".strip()
    card = model_card(model, about, curve.name, beside(model, "confusion").name, sizes.name)
    write_atomically(model.with_suffix(".md"), card.encode())


def record(model: Path, every: int) -> None:
    """A line for each figure in results/model.csv."""
    facts = get_contract(load_model(model)).training
    figures = [("float32", "top-1", facts["accuracy"]["by_size"])]
    if "int8" in facts:
        figures.append(("int8", "top-1", facts["int8"]["by_size"]))
        figures.append(("int8", "time / float32's", facts["int8"]["time"]))
    if "rival" in facts:
        figures.append((f"float32 {facts['rival']['name']}", "top-1", facts["rival"]["by_size"]))
    setting = machine() | {"command": f"python -m benchmarks.model --data ... --every {every}", "model": model.stem}
    append_rows(
        RESULTS,
        [
            {**setting, "precision": precision, "figure": figure, "size": size, "value": f"{value:.4f}"}
            for precision, figure, by_size in figures
            for size, value in by_size.items()
        ],
    )


if __name__ == "__main__":
    main()
