"""Converted models on a real server: what the PyTorch module says of the same pixels, at any size."""

from collections.abc import Iterator

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from fullframe import Client
from fullframe.convert.modules import export_module
from fullframe.convert.options import Options
from fullframe.convert.pipeline import convert
from fullframe.engine.query import Answer, FloatArray
from fullframe.errors import InvalidInput
from tests.convert.families import FAMILIES, made
from tests.convert.families.classic import Resnet
from tests.convert.families.parts import CLASSES
from tests.pictures import Pixels, encode, pixels
from tests.serving import Running, serving

TOLERANCE = 1e-4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LABELS = tuple(f"class {number}" for number in range(CLASSES))
SIZES = [(1, 1), (1, 300), (7, 5), (64, 64), (225, 151), (300, 451), (767, 1023)]
TILE_PIXELS = 200_000


@pytest.fixture(scope="module")
def nets() -> dict[str, nn.Module]:
    """One that can be served in strips, one whose head is not linear."""
    return {name: made(FAMILIES[name]) for name in ("resnet", "mobilenet-v3")}


@pytest.fixture(scope="module")
def served(nets: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    for name, net in nets.items():
        options = Options(name, labels=LABELS, mean=MEAN, std=STD)
        (folder / name / "1").mkdir(parents=True)
        onnx.save(convert(export_module(net, (64, 64)), options).model, folder / name / "1" / "model.onnx")
    with serving(models=str(folder), tile_pixels=TILE_PIXELS) as running:
        yield running


def in_pytorch(net: nn.Module, picture: Pixels) -> tuple[FloatArray, FloatArray]:
    """Features and logits of the module as it was exported."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    image = (torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255 - mean) / std
    with torch.no_grad():
        body = (
            nn.Sequential(net.stem, net.blocks) if isinstance(net, Resnet) else nn.Sequential(*list(net.children())[:8])
        )
        return body(image[None]).mean((2, 3))[0].numpy(), net(image[None])[0].numpy()


def ask(server: Running, model: str, image: Pixels | bytes) -> Answer:
    with Client(server.target) as client:
        return client.predict(image, poolings=["avg"], logits=True, top_k=1, model=model)


def within_the_promise(answer: FloatArray, reference: FloatArray) -> bool:
    return bool(np.abs(answer - reference).max() <= TOLERANCE * max(1.0, float(np.abs(reference).max())))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("name", ["resnet", "mobilenet-v3"])
def test_answers_are_the_modules(
    nets: dict[str, nn.Module], served: Running, name: str, height: int, width: int
) -> None:
    picture = pixels(height, width)
    if name == "mobilenet-v3" and height * width > TILE_PIXELS:
        with pytest.raises(InvalidInput, match="whole image"):
            ask(served, name, picture)
        return
    answer = ask(served, name, encode(picture, "PNG"))
    features, logits = in_pytorch(nets[name], picture)
    assert answer.logits is not None
    assert within_the_promise(answer.embeddings[0], features)
    assert within_the_promise(answer.logits, logits)
    assert answer.classes[0].label == LABELS[int(logits.argmax())]


def test_a_resized_image_would_not_be_within_the_promise(nets: dict[str, nn.Module], served: Running) -> None:
    """The control."""
    picture = pixels(300, 451)
    resized = np.asarray(Image.fromarray(picture).resize((224, 224)))
    answer = ask(served, "resnet", resized)
    assert not within_the_promise(answer.embeddings[0], in_pytorch(nets["resnet"], picture)[0])
