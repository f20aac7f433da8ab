"""A model's card in Markdown, written from what its file says of itself."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import onnx

from fullframe.errors import InvalidModel
from fullframe.learn.augment import Augmentation
from fullframe.learn.nets import NetConfig
from fullframe.learn.recipe import Recipe
from fullframe.model.contract import Contract

_NO_OPTION = {"classes", "mean", "std", "augmentation", "size_weights"}


def recipe_command(source: str, net: NetConfig, recipe: Recipe) -> str:
    """The `fullframe train` command of these settings; options at their default are left out."""
    words = ["fullframe train", source, "--out RUN"]
    for settings, default in (
        (net, NetConfig(net.classes)),
        (recipe, Recipe()),
        (recipe.augmentation, Augmentation()),
    ):
        for option in fields(settings):
            if option.name not in _NO_OPTION:
                value, usual = (_spelled(each, option.name) for each in (settings, default))
                if value != usual:
                    words.append(f"--{option.name.replace('_', '-')} {value}")
    return " ".join(words)


def _spelled(settings: Any, name: str) -> str:
    """A setting as its option takes it: "1,3,3", or for sizes with weights "24:15,32:50"."""
    value = getattr(settings, name)
    if name == "sizes" and settings.size_weights:
        pairs = zip(value, settings.size_weights, strict=True)
        return ",".join(f"{size}:{weight:g}" for size, weight in pairs)
    return ",".join(f"{item:g}" for item in value) if isinstance(value, tuple) else str(value)


def model_card(model: Path, about: str = "", curve: str = "") -> str:
    """The card of an exported file.

    Args:
        model: written by `fullframe export`; raises InvalidModel for others.
        about: a sentence on the data.
        curve: the training curve's picture, relative to the card.
    """
    metadata = {entry.key: entry.value for entry in onnx.load(model).metadata_props}
    contract = Contract.from_metadata(metadata)
    facts = contract.training
    if missing := {"net", "recipe", "data", "parameters", "multiply_adds_per_pixel"} - set(facts):
        raise InvalidModel(f"the file has no training record of {', '.join(sorted(missing))}")
    net, recipe = NetConfig.from_json(facts["net"]), Recipe.from_json(facts["recipe"])
    parts = [
        f"# {contract.name}\n\nA fully convolutional, Inception-style classifier of {len(contract.labels)} classes: "
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
        f"## Training\n\n{about}\n\n{_training(facts, recipe_command(facts['data']['source'], net, recipe))}",
        f"![loss and accuracy by epoch]({curve})" if curve else "",
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _accuracy(facts: Any) -> str:
    if "accuracy" not in facts:
        return ""
    measured = facts["accuracy"]
    sizes = measured["by_size"]
    return (
        f"## Accuracy\n\nTop-1 on {measured['images']:,} images not trained on, shorter side resized bicubically, "
        "nothing cropped, measured on this file with ONNX Runtime.\n\n"
        f"| shorter side | {' | '.join(_side(size) for size in sizes)} |\n|---|{'---|' * len(sizes)}\n"
        f"| accuracy, % | {' | '.join(f'{100 * value:.2f}' for value in sizes.values())} |"
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _side(size: str) -> str:
    return "own" if size == "0" else size


def _training(facts: Any, command: str) -> str:
    data = facts["data"]
    return (
        f"{data['train_images']:,} images to train on, {data['validation_images']:,} held out, used for nothing but "
        f"the curve and the table. {facts['epochs']} epochs took {_duration(facts['seconds'])} on "
        f"{facts['device']} with torch {facts['torch']}; the last epoch's averaged weights are the ones here.\n\n"
        f"```\n{command}\n```"
    )
