"""A run's folder: its settings, weights and log, as the run itself, the next one and the export read them."""

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fullframe.errors import InvalidInput
from fullframe.files import write_atomically
from fullframe.learn.checkpoint import FILE, load_checkpoint
from fullframe.learn.nets import Net
from fullframe.learn.plot import PLOTTED, plot_history
from fullframe.learn.settings import NetConfig

SETTINGS = "run.json"
LOG = "log.csv"
PLOT = "curve.png"
COLUMNS = ("epoch", "learning_rate", "loss", "train_accuracy", "validation_loss", "validation_accuracy", "seconds")
Row = dict[str, float]  # of the log; its keys are COLUMNS
_MAY_DIFFER = {"torch", "device", "pooling", "source", "validation_share"}  # the images themselves are compared


def write_log(run: Path, history: Sequence[Row], init: dict[str, Any] | None) -> None:
    """LOG and PLOT of a run; the plot shows the runs before it too, `init` being the record of the last of them."""
    if not history:
        return
    text = io.StringIO(newline="")
    log = csv.DictWriter(text, COLUMNS)
    log.writeheader()
    log.writerows(history)
    write_atomically(run / LOG, text.getvalue().encode())
    rows = [*_rows_before(init), *history]
    write_atomically(run / PLOT, plot_history({name: [row[name] for row in rows] for name in PLOTTED}))


def read_settings(run: Path) -> dict[str, Any]:
    """The settings a run was started with; raises InvalidInput where there is no run."""
    try:
        settings: dict[str, Any] = json.loads((run / SETTINGS).read_bytes())
    except (OSError, ValueError) as error:
        what = f"holds no training run (no readable {SETTINGS})" if run.exists() else "does not exist"
        raise InvalidInput(f"{run} {what}", "run") from error
    return settings


def load_run(run: Path) -> tuple[Net, dict[str, Any], dict[str, Any]]:
    """A run's averaged network in evaluation mode, its settings, and its progress."""
    settings = read_settings(run)
    weights, progress = _averaged_weights(run)
    net = Net(NetConfig.from_json(settings["net"]))
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise InvalidInput(f"{run} holds no weights for the network that its {SETTINGS} describes", "run") from error
    return net.eval(), settings, progress


def _averaged_weights(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a run's averaged network, and the run's progress."""
    if not (run / FILE).exists():
        raise InvalidInput(f"{run} has no checkpoint yet; it has one after the first epoch", "run")
    tensors, progress = load_checkpoint(run / FILE)
    return {name.removeprefix("ema."): tensor for name, tensor in tensors.items() if name.startswith("ema.")}, progress


def begin_with(net: Net, run: Path) -> dict[str, Any]:
    """Give the net another run's averaged weights wherever names and shapes agree; returns that run's record.

    Raises InvalidInput where the run has none that fit.
    """
    settings = read_settings(run)
    weights, progress = _averaged_weights(run)
    own = net.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    if not fitting.keys() & dict(net.body.named_parameters(prefix="body")).keys():
        raise InvalidInput(f"{run} holds no weights that fit this network", "init")
    net.load_state_dict(own | fitting)
    digest = hashlib.sha256((run / FILE).read_bytes()).hexdigest()
    return {"settings": settings, "history": progress["history"], "checkpoint": digest}


def _rows_before(init: dict[str, Any] | None) -> list[Row]:
    """The logs of the runs that led to the first weights, the earliest first."""
    return [*_rows_before(init["settings"].get("init")), *init["history"]] if init else []


def differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two runs' settings, in words."""
    found: list[str] = []
    for key in sorted((there.keys() | here.keys()) - _MAY_DIFFER):
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif json.dumps(old) != json.dumps(new):
            found.append(
                "other images, or another split of them" if key == "data" else f"{prefix}{key} {old}, not {new}"
            )
    return found
