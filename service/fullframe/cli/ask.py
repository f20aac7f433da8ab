"""`classify` and `embed`: many files, in this process or on a server, as a table, JSON lines or .npz."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullframe.cli import complain
from fullframe.cli.answers import Answers
from fullframe.cli.files import check_output, find_images
from fullframe.cli.options import (
    MOST_MEGAPIXELS,
    Asked,
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
from fullframe.errors import FullframeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fullframe.engine.query import Answer

ImagesArgument = Annotated[
    list[str], typer.Argument(metavar="IMAGE", help="Files, folders (searched through), globs.", show_default=False)
]


def classify(
    images: ImagesArgument,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Classes for each image.")] = 5,
    explain: Annotated[
        Path | None,
        typer.Option(metavar="OUT.png", help="Draw where the image shows its best class, over the image."),
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
    """Name the most probable classes of images."""
    files = find_images(images)
    check_output(explain, ".png", "--explain")
    if explain and len(files) != 1:
        raise typer.BadParameter(f"takes one image, not {len(files)}", param_hint="--explain")
    with asked(server, model, engine, precision, compute, max_megapixels, timeout) as chosen:
        answers = Answers(files, partial(chosen.stream, files, top_k=top_k, **_map_for(explain, chosen)))
        outcomes = _explained(answers, explain, chosen, max_megapixels) if explain else answers
        _print_classes(outcomes, as_json)
    raise typer.Exit(1 if answers.failed else 0)


def embed(
    images: ImagesArgument,
    pooling: Annotated[
        str,
        typer.Option(
            help='Kinds (avg, max, min, sum, lp(p), gem(p), lse(p), std) joined by "+"; "@" and levels for a spatial '
            'pyramid: "gem(3)+max@1,2,4".'
        ),
    ] = "avg",
    normalize: Annotated[bool, typer.Option("--normalize", help="Give each vector unit length.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write path, height, width, features, error there: FILE.npz; or, of one folder, FILE.parquet, with "
            "classes too, stored as it is done: the same command goes on after a stop.",
        ),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="With .parquet: begin anew, whatever is finished or stored.")
    ] = False,
    save_every: Annotated[
        float, typer.Option("--save-every", min=0, help="With .parquet: seconds of work that a stop may cost.")
    ] = 10,
    as_json: JsonOption = False,
    server: ServerOption = "",
    model: ModelOption = "",
    engine: EngineOption = "auto",
    precision: PrecisionOption = "float32",
    compute: ComputeOption = "float32",
    max_megapixels: MegapixelsOption = MOST_MEGAPIXELS,
    timeout: TimeoutOption = 30,
) -> None:
    """Compute pooled features of images."""
    from fullframe.engine.pooling import Pooling

    check_output(output, (".npz", ".parquet"), "--output")
    if output and as_json:
        raise typer.BadParameter("goes without --json", param_hint="--output")
    try:
        parsed = Pooling.parse(pooling, l2_normalize=normalize)
    except FullframeError as error:
        raise typer.BadParameter(str(error), param_hint="--pooling") from error
    if output and output.suffix.lower() == ".parquet":
        from fullframe.cli.tables import RETRIES, embed_folder, folder_of

        folder = folder_of(images, output, restart)
        with asked(server, model, engine, precision, compute, max_megapixels, timeout, RETRIES) as chosen:
            fine = embed_folder(folder, output, parsed, chosen, restart=restart, save_every=save_every)
        raise typer.Exit(0 if fine else 1)
    if restart:
        raise typer.BadParameter("goes with a .parquet", param_hint="--restart")
    files = find_images(images)
    with asked(server, model, engine, precision, compute, max_megapixels, timeout) as chosen:
        answers = Answers(files, partial(chosen.stream, files, top_k=0, poolings=[parsed]))
        if output:
            _write_features(output, answers)
        else:
            _print_features(answers, as_json)
    raise typer.Exit(1 if answers.failed else 0)


Outcomes = Iterable[tuple[str, "Answer | FullframeError"]]


def _print_classes(outcomes: Outcomes, as_json: bool) -> None:
    if as_json:
        for file, outcome in outcomes:
            print_json(_fields(file, outcome, lambda answer: {"classes": [asdict(score) for score in answer.classes]}))
        return
    rows = []
    for file, outcome in outcomes:
        if isinstance(outcome, FullframeError):
            continue
        heads = [(file, size_text(outcome.height, outcome.width)), *[("", "")] * (len(outcome.classes) - 1)]
        rows += [
            (*head, score.label, f"{score.probability:.1%}") for head, score in zip(heads, outcome.classes, strict=True)
        ]
    if rows:
        print_table(("image", "size", "class", "probability"), rows, right=(1, 3))


def _print_features(outcomes: Outcomes, as_json: bool) -> None:
    if as_json:
        for file, outcome in outcomes:
            print_json(_fields(file, outcome, lambda answer: {"features": _decimals(answer.embeddings[0])}))
        return
    rows = [
        (
            file,
            size_text(outcome.height, outcome.width),
            str(len(outcome.embeddings[0])),
            " ".join(f"{value:.4g}" for value in outcome.embeddings[0][:5]) + " ...",
        )
        for file, outcome in outcomes
        if not isinstance(outcome, FullframeError)
    ]
    if rows:
        print_table(("image", "size", "length", "features"), rows, right=(1, 2))


def _fields(file: str, outcome: "Answer | FullframeError", found: Any) -> dict[str, Any]:
    if isinstance(outcome, FullframeError):
        return {"image": file, "error": str(outcome)}
    return {"image": file, "height": outcome.height, "width": outcome.width, **found(outcome)}


def _decimals(values: "NDArray[np.float32]") -> list[float]:
    """The shortest decimals that are these float32 values."""
    return [float(str(value)) for value in values]


def _write_features(path: Path, outcomes: Outcomes) -> None:
    """Arrays with one row for each image; where `error` is not empty, `features` is NaN and the size 0."""
    import numpy as np

    files, sizes, errors = [], [], []
    vectors: list[NDArray[np.float32] | None] = []
    for file, outcome in outcomes:
        if isinstance(outcome, FullframeError):
            size, vector, error = (0, 0), None, str(outcome)
        else:
            size, vector, error = (outcome.height, outcome.width), outcome.embeddings[0], ""
        files.append(file)
        sizes.append(size)
        vectors.append(vector)
        errors.append(error)
    length = next((len(vector) for vector in vectors if vector is not None), 0)
    features = np.full((len(files), length), np.nan, np.float32)
    for row, vector in zip(features, vectors, strict=True):
        if vector is not None:
            row[:] = vector
    height, width = np.array(sizes, np.uint32).T
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("wb") as stream:
        np.savez(stream, path=files, height=height, width=width, features=features, error=errors)
    unfinished.replace(path)
    complain(f"wrote {path}: {len(files)} x {length} features")


def _map_for(explain: Path | None, chosen: Asked) -> dict[str, Any]:
    """What to ask for besides classes."""
    if explain is None:
        return {}
    from fullframe.cli.explain import longest_map_side

    return {"class_map": True, "max_map_side": longest_map_side(chosen.contract)}


def _explained(outcomes: Outcomes, path: Path, chosen: Asked, megapixels: float) -> Iterator[Any]:
    """The same outcomes; an answer's best class is drawn over its picture into `path`."""
    from fullframe.cli.explain import explain

    for file, outcome in outcomes:
        yield file, outcome
        if not isinstance(outcome, FullframeError):
            complain(explain(file, outcome, chosen.contract, path, megapixels))
