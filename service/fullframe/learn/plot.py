"""The training curve, accuracy by image size and the confusion matrix as pictures."""

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Final

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

PLOTTED: Final = ("loss", "train_accuracy", "validation_loss", "validation_accuracy")
"""The columns of a run's log that `plot_history` draws."""


def plot_history(history: Mapping[str, Sequence[float]]) -> bytes:
    """A PNG of loss and accuracy by epoch: PLOTTED, each with a value per epoch, of one run or of several in turn."""
    epochs = range(1, len(history["loss"]) + 1)
    figure = Figure(figsize=(8, 3.2), dpi=100, layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for axes, title, train, validation in (
        (loss, "Loss", "loss", "validation_loss"),
        (accuracy, "Accuracy", "train_accuracy", "validation_accuracy"),
    ):
        marker = "o" if len(epochs) < 3 else ""
        axes.plot(
            epochs,
            history[train],
            marker=marker,
            color="0.55",
            label="training (augmented, smoothed)" if axes is loss else "training (augmented)",
        )
        axes.plot(
            epochs,
            history[validation],
            marker=marker,
            color="C0",
            label="validation (averaged weights)",
        )
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return _png(figure)


def plot_accuracy(by_size: Mapping[str, Mapping[str, float]]) -> bytes:
    """A PNG of each named model's share of right answers by the images' shorter side in pixels."""
    figure = Figure(figsize=(8, 3.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    for (name, shares), style in zip(by_size.items(), cycle(("-", "--", "-.")), strict=False):
        axes.plot([int(side) for side in shares], list(shares.values()), linestyle=style, marker=".", label=name)
    sides = sorted({int(side) for shares in by_size.values() for side in shares})
    axes.set_xscale("log")
    axes.set_xticks(sides, [str(side) for side in sides])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set(title="Accuracy", xlabel="shorter side, pixels", ylim=(0, 1))
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _png(figure)


def plot_confusion(counts: NDArray[np.int64], labels: Sequence[str]) -> bytes:
    """A PNG of how often each class (row) was taken for each (column), in per cent of the row's images."""
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 1.5 + 0.45 * len(labels)
    figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for row, column in np.ndindex(*shares.shape):
        if shares[row, column] >= 0.5:
            colour = "white" if shares[row, column] > 50 else "black"
            axes.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color=colour, size=8)
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="answer", ylabel="image")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", pil_kwargs={"optimize": True})
    return picture.getvalue()
