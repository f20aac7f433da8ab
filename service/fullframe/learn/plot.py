"""The training curve as a picture."""

import io
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter


def plot_history(history: Sequence[dict[str, float]]) -> bytes:
    """A PNG of loss and accuracy by epoch, from the rows of a run's log."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(8, 3.2), dpi=100, layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for axes, title, train, validation in (
        (loss, "Loss", "loss", "validation_loss"),
        (accuracy, "Accuracy", "train_accuracy", "validation_accuracy"),
    ):
        marker = "o" if len(history) < 3 else ""
        axes.plot(
            epochs,
            [row[train] for row in history],
            marker=marker,
            color="0.55",
            label="training (augmented, smoothed)" if axes is loss else "training (augmented)",
        )
        axes.plot(
            epochs,
            [row[validation] for row in history],
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
    picture = io.BytesIO()
    figure.savefig(picture, format="png", pil_kwargs={"optimize": True})
    return picture.getvalue()
