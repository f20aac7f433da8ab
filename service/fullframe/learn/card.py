"""A model's card in Markdown, written from what its file says of itself."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fullframe.convert.metadata import get_contract, load_model
from fullframe.errors import InvalidModel
from fullframe.learn.options import spelled
from fullframe.learn.settings import Augmentation, NetConfig, Recipe


def recipe_command(source: str, net: NetConfig, recipe: Recipe, out: str = "RUN", init: str = "") -> str:
    """The `fullframe train` command of these settings; options at their default are left out."""
    words = ["fullframe train", source, f"--out {out}", *([f"--init {init}"] if init else [])]
    for settings, default in (
        (net, NetConfig(net.classes)),
        (recipe, Recipe()),
        (recipe.augmentation, Augmentation()),
    ):
        usual = spelled(default)
        words += [
            f"--{name.replace('_', '-')} {value}".removesuffix(" True")
            for name, value in spelled(settings).items()
            if value != usual[name]
        ]
    return " ".join(words)


def model_card(model: Path, about: str = "", curve: str = "", confusion: str = "", sizes: str = "") -> str:
    """The card of an exported file.

    Args:
        model: written by `fullframe export`; raises InvalidModel for others.
        about: a sentence on the data.
        curve, confusion, sizes: the pictures of the training curve, of the confusion matrix and of the accuracy by
            size, relative to the card.
    """
    contract = get_contract(load_model(model))
    facts = contract.training
    if missing := {"net", "recipe", "data", "parameters", "multiply_adds_per_pixel"} - set(facts):
        raise InvalidModel(f"the file has no training record of {', '.join(sorted(missing))}")
    parts = [
        f"# {contract.name}\n\nA fully convolutional classifier of {len(contract.labels)} classes: "
        f"{', '.join(contract.labels)}. The figures are those in the file's metadata.",
        _table(
            {
                "Input": "uint8 RGB [N, H, W, 3], any size from {} x {}".format(*contract.smallest_size),
                "Features": f"{contract.feature_channels} channels, {contract.pooling} pooling",
                "Feature map": "a cell every {} x {} pixels, ".format(*contract.stride)
                + "each seeing {} x {}".format(*contract.receptive_field),
                "Class map": "yes" if contract.has_class_map else "no",
                "Parameters": f"{facts['parameters']:,}",
                "Multiply-adds": f"{facts['multiply_adds_per_pixel']:,} per pixel",
                "File": f"{model.stat().st_size / 1e6:.2f} MB",
            }
        ),
        _accuracy(facts),
        f"![accuracy by size]({sizes})" if sizes else "",
        _rival(facts),
        _copy(facts),
        f"![per cent of each class's images by answer]({confusion})" if confusion else "",
        _neighbours(facts),
        _photographs(facts),
        f"## Training\n\n{about}\n\n{_training(facts)}",
        f"![loss and accuracy by epoch]({curve})" if curve else "",
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _shares(heading: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """A table of percentages by size; the first row has all sizes."""
    sizes = next(iter(rows.values()))
    lines = [f"| {heading} | {' | '.join(map(_side, sizes))} |", f"|---|{'---|' * len(sizes)}"]
    lines += [f"| {name} | {' | '.join(f'{100 * each:.2f}' for each in row.values())} |" for name, row in rows.items()]
    return "\n".join(lines)


def _accuracy(facts: Any) -> str:
    if "accuracy" not in facts:
        return ""
    measured = facts["accuracy"]
    return (
        f"## Accuracy\n\nTop-1 on {measured['images']:,} images not trained on, shorter side resized bicubically, "
        "nothing cropped, measured on the files with ONNX Runtime.\n\n"
        + _shares("shorter side, % right", accuracies(facts))
    )


def accuracies(facts: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Shares of right answers by size, of the file, its int8 copy and its rival, as far as they were measured."""
    rows = {"float32": facts["accuracy"]["by_size"]}
    if "int8" in facts:
        rows["int8"] = facts["int8"]["by_size"]
    if "rival" in facts:
        rows[facts["rival"]["name"]] = facts["rival"]["by_size"]
    return rows


def _rival(facts: Mapping[str, Any]) -> str:
    if "rival" not in facts:
        return ""
    rival = facts["rival"]
    theirs, ours = (sum(run["epochs"] for run in _runs(each)) for each in (rival, facts))
    return (
        f"{rival['name']}, to compare with: {rival['parameters']:,} parameters, "
        f"{rival['multiply_adds_per_pixel']:,} multiply-adds per pixel, trained on the same images for "
        f"{theirs} epochs (this model: {ours}).\n\n```\n{_commands(rival)}\n```"
    )


def _copy(facts: Mapping[str, Any]) -> str:
    if "int8" not in facts:
        return ""
    copy = facts["int8"]
    times = ", ".join(f"{ratio:.2f} at {side} x {side}" for side, ratio in copy["time"].items())
    return (
        f"The int8 copy (`--precision int8`; {copy['bytes'] / 1e6:.2f} MB) takes this share of the float32 file's time "
        f"on one core: {times} pixels."
    )


def _neighbours(facts: Mapping[str, Any]) -> str:
    if "neighbours" not in facts:
        return ""
    found = facts["neighbours"]
    return (
        f"## Features\n\nHow often most of the {found['k']} training images nearest by cosine are of an image's class, "
        f"the {found['bank']:,} training images at their own size, the others resized.\n\n"
        + _shares("pooling, %", found["by_pooling"])
    )


def _photographs(facts: Mapping[str, Any]) -> str:
    if "photographs" not in facts:
        return ""
    parts = ["## Photographs\n\nOf another origin, never trained or tuned on, by the scale of their sides."]
    for group in facts["photographs"]:
        scales = group["by_scale"]
        parts.append(
            f"{group['about']}\n\n| scale | {' | '.join(scales)} |\n|---|{'---|' * len(scales)}\n"
            f"| {group['figure']} | {' | '.join(scales.values())} |"
        )
    return "\n\n".join(parts)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _side(size: str) -> str:
    return "own" if size == "0" else size


def _training(facts: Mapping[str, Any]) -> str:
    data = facts["data"]
    runs = _runs(facts)
    steps = [
        f"{run['epochs']} epoch{'s' if run['epochs'] > 1 else ''} took {_duration(run['seconds'])} "
        f"on {run['device']} with torch {run['torch']}"
        for run in runs
    ]
    return (
        f"{data['train_images']:,} images to train on, {data['validation_images']:,} held out, used for nothing but "
        f"the curve and the table. {', then '.join(steps)}; the last epoch's averaged weights are the ones here.\n\n"
        f"```\n{_commands(facts)}\n```"
    )


def _commands(facts: Mapping[str, Any]) -> str:
    """What to type for the same training, a line for each run."""
    runs = _runs(facts)
    return "\n".join(
        recipe_command(
            run["data"]["source"],
            NetConfig.from_json(run["net"]),
            _as_run(Recipe.from_json(run["recipe"]), run["epochs"]),
            _folder(number, len(runs)),
            _folder(number - 1, len(runs)) if number else "",
        )
        for number, run in enumerate(runs)
    )


def _runs(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs that led to the weights, the first one first."""
    return [*(_runs(facts["init"]) if "init" in facts else []), facts]


def history(facts: Mapping[str, Any]) -> dict[str, list[float]]:
    """The logs of all runs that led to a file, one after the other, by column; from its training record."""
    logs = [run["history"] for run in _runs(facts)]
    return {name: [value for log in logs for value in log[name]] for name in logs[0]}


def _as_run(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe with the epochs that were run: with a constant rate, stopping early is a shorter run."""
    return replace(recipe, epochs=epochs) if recipe.schedule == "constant" else recipe


def _folder(number: int, runs: int) -> str:
    return f"RUN{number + 1}" if runs > 1 else "RUN"
