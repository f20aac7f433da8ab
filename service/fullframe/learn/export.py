"""A trained network -> one ONNX file that follows the contract, compared with the network before it exists."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fullframe.convert.metadata import get_contract, set_contract
from fullframe.convert.modules import quiet, strip
from fullframe.convert.runtime import open_session, tensors
from fullframe.errors import InvalidModel
from fullframe.files import write_atomically
from fullframe.learn.nets import Net
from fullframe.learn.plot import PLOTTED
from fullframe.learn.runs import load_run
from fullframe.learn.settings import Recipe
from fullframe.model.contract import (
    INPUT,
    LOGITS_FROM_FEATURES,
    LOGITS_FROM_MAP,
    OPSET,
    OUTPUTS,
    Contract,
)
from fullframe.model.geometry import graph_geometry
from fullframe.model.strips import tiles_of

TOLERANCE = 1e-4
POOLING_NAMES = {"gem": "gem(3)"}  # the others have one name in both rooms
CHECKED_SIZES = (
    *((1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 2, 2), (1, 3, 3), (1, 5, 7), (1, 7, 5), (1, 8, 8), (1, 9, 17)),
    *((1, 1, 500), (1, 500, 1), (1, 700, 20), (1, 20, 700), (2, 31, 33), (1, 32, 32), (2, 33, 32), (1, 64, 64)),
    *((1, 63, 65), (1, 97, 41), (1, 128, 127), (1, 224, 224), (2, 225, 151), (1, 300, 451), (1, 481, 640)),
)
"""Images, height, width."""


class Served(nn.Module):
    """The network as it is served: uint8 [N, H, W, 3] in, the contract's outputs out, in the contract's order."""

    mean: Tensor
    scale: Tensor

    def __init__(self, net: Net, recipe: Recipe) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(recipe.mean).view(3, 1, 1) * 255)
        self.register_buffer("scale", 1 / (torch.tensor(recipe.std).view(3, 1, 1) * 255))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """features, logits, feature_map and, where the net has one, class_map."""
        pixels = images.permute(0, 3, 1, 2).to(torch.float32)
        out = self.net.outputs((pixels - self.mean) * self.scale)
        present = (out.features, out.logits, out.feature_map)
        return present if out.class_map is None else (*present, out.class_map)


def fold_batch_norms(net: Net) -> Net:
    """A copy in evaluation mode whose convolutions hold their batch norms."""
    folded = deepcopy(net).eval()
    for module in folded.modules():
        if isinstance(module, nn.Sequential) and len(module) > 1 and isinstance(module[1], nn.BatchNorm2d):
            conv = module[0]
            assert isinstance(conv, nn.Conv2d)
            module[0], module[1] = fuse_conv_bn_eval(conv, module[1]), nn.Identity()
    return folded


def build_graph(net: Net, recipe: Recipe) -> onnx.ModelProto:
    """The ONNX graph of `net` behind its normalisation, dynamic in images, height and width; no metadata yet."""
    served = Served(fold_batch_norms(net), recipe).eval()
    outputs = OUTPUTS if net.config.global_pooling == "avg" else OUTPUTS[:3]
    axes = {axis: torch.export.Dim(name) for axis, name in enumerate(("N", "H", "W"))}
    with quiet():
        program = torch.onnx.export(
            served,
            (torch.zeros(2, 45, 37, 3, dtype=torch.uint8),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(outputs),
            dynamic_shapes={INPUT: axes},
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    strip(model)
    return model


def describe(
    model: onnx.ModelProto, net: Net, *, name: str, recipe: Recipe, labels: Sequence[str], training: dict[str, Any]
) -> Contract:
    """Write the contract of a graph that build_graph made of `net` into it, and return it.

    Raises InvalidModel where the graph can't be followed, or some image size is not known to work.
    """
    geometry = graph_geometry(model)
    geometry.graph.check_sizes()
    pooling = net.config.global_pooling
    cost = {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "multiply_adds_per_pixel": round(geometry.multiply_adds(1024, 1024) / 1024**2),
    }
    contract = Contract(
        name=name,
        labels=tuple(labels),
        stride=geometry.stride,
        receptive_field=geometry.receptive_field,
        start=geometry.start,
        smallest_size=geometry.smallest_size,
        feature_channels=net.feature_channels,
        pooling=POOLING_NAMES.get(pooling, pooling),
        logits=LOGITS_FROM_MAP if pooling == "avg" else LOGITS_FROM_FEATURES,
        normalisation={"mean": recipe.mean, "std": recipe.std},
        training=cost | training,
        tiles=tiles_of(model),
    )
    set_contract(model, contract)
    return contract


def check(model: onnx.ModelProto, net: Net, recipe: Recipe) -> float:
    """Run the file under ONNX Runtime beside the network, on noise of CHECKED_SIZES.

    Returns the largest difference, relative to max(1, the reference's largest value). Raises InvalidModel where it
    passes TOLERANCE, naming size and output, or where the graph breaks the contract in its metadata.
    """
    session = open_session(model.SerializeToString(), "the exported graph")
    inputs, outputs = tensors(session)
    get_contract(model).check_graph(inputs, outputs)
    served = Served(net, recipe).eval()
    names = [tensor.name for tensor in outputs]
    rng = np.random.default_rng(0)
    worst = 0.0
    for size in CHECKED_SIZES:
        images = rng.integers(0, 256, (*size, 3), np.uint8)
        with torch.no_grad():
            expected = [tensor.numpy() for tensor in served(torch.from_numpy(images))]
        for name, want, got in zip(names, expected, session.run(names, {INPUT: images}), strict=True):
            if want.shape != got.shape:
                raise InvalidModel(f"{name!r} is {got.shape} at {_words(size)}; the network's is {want.shape}")
            difference = float(np.abs(want - got).max() / max(1.0, float(np.abs(want).max())))
            if not difference <= TOLERANCE:
                raise InvalidModel(
                    f"{name!r} differs from the network by {difference:.1e} at {_words(size)}; "
                    f"at most {TOLERANCE:.0e} is allowed"
                )
            worst = max(worst, difference)
    return worst


def write_model(model: onnx.ModelProto, net: Net, recipe: Recipe, output: Path) -> float:
    """Write the file where `check` passes, else leave what was there; returns the largest difference."""
    onnx.checker.check_model(model, full_check=True)
    worst = check(model, net, recipe)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, model.SerializeToString())
    return worst


def export_run(run: Path, output: Path, name: str) -> tuple[Contract, float]:
    """Export a run's averaged weights; returns the contract and the largest difference that `check` found.

    Raises InvalidInput where the run has no checkpoint, InvalidModel where the file would not be the network.
    """
    net, settings, progress = load_run(run)
    recipe = Recipe.from_json(settings["recipe"])
    training = _training_record(settings, progress["history"])
    model = build_graph(net, recipe)
    contract = describe(model, net, name=name, recipe=recipe, labels=settings["labels"], training=training)
    return contract, write_model(model, net, recipe, output)


def _training_record(settings: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What the file says of its training: this run, and under "init" the one whose weights it began with."""
    record = {
        "data": {key: settings[key] for key in ("source", "train_images", "validation_images")},
        **{key: settings[key] for key in ("net", "recipe", "torch", "device")},
        "epochs": len(history),
        "history": {name: [round(row[name], 4) for row in history] for name in PLOTTED},
        "seconds": round(sum(row["seconds"] for row in history)),
    }
    if init := settings.get("init"):
        record["init"] = _training_record(init["settings"], init["history"])
    return record


def _words(size: tuple[int, int, int]) -> str:
    count, height, width = size
    return f"{height} x {width} pixels (height x width, {count} image{'s' if count > 1 else ''})"
