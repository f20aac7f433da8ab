"""The promise: a server answers what the network in plain PyTorch does on the same pixels, whatever is in flight.

Within max|difference| <= 1e-4 * max(1, max|reference|), for features and logits, at any size.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from fullframe import Client
from fullframe.engine.query import Answer
from fullframe.learn import export
from fullframe.learn.nets import Net
from fullframe.learn.settings import NetConfig, Recipe
from tests.pictures import Pixels, encode, pixels
from tests.serving import Running, serving

SIZES = [(1, 1), (1, 500), (7, 5), (31, 33), (224, 224), (300, 451), (767, 1023), (2000, 3000)]
TOLERANCE = 1e-4
CLIENTS = 50
RECIPE = Recipe()


@pytest.fixture(scope="module")
def net() -> Net:
    """Random weights; batch norms with statistics of their own, as after training."""
    torch.manual_seed(0)
    made = Net(NetConfig(classes=10, width=16, depth=(1, 1), stem=8))
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    torch.nn.init.normal_(made.classifier.weight)
    return made.eval()


@pytest.fixture(scope="module")
def served(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("promise") / "net.onnx"
    graph = export.build_graph(net, RECIPE)
    export.describe(graph, net, name="net", recipe=RECIPE, labels=[f"class {i}" for i in range(10)], training={})
    export.write_model(graph, net, RECIPE, path)
    with serving(models=f"net={path}") as running:
        yield running


def in_pytorch(net: Net, picture: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features and logits of the network as it was trained: no folding, no export."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (RECIPE.mean, RECIPE.std))
    image = torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255
    with torch.no_grad():
        outputs = net.outputs(((image - mean) / std)[None])
    return outputs.features[0].numpy(), outputs.logits[0].numpy()


def within_the_promise(answer: NDArray[np.float32], reference: NDArray[np.float32]) -> bool:
    return bool(np.abs(answer - reference).max() <= TOLERANCE * max(1.0, float(np.abs(reference).max())))


def ask(client: Client, image: Pixels | bytes) -> Answer:
    return client.predict(image, poolings=["avg"], logits=True)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_served_features_and_logits_are_the_networks(net: Net, served: Running, height: int, width: int) -> None:
    picture = pixels(height, width)
    with Client(served.target) as client:
        answer = ask(client, picture)
    features, logits = in_pytorch(net, picture)
    assert answer.logits is not None
    assert within_the_promise(answer.embeddings[0], features)
    assert within_the_promise(answer.logits, logits)


def test_resizing_would_break_the_promise(net: Net, served: Running) -> None:
    """The control: what other servers do to an image is far outside the line."""
    picture = pixels(300, 451)
    resized = np.asarray(Image.fromarray(picture).resize((224, 224)))
    with Client(served.target) as client:
        answer = ask(client, resized)
    assert not within_the_promise(answer.embeddings[0], in_pytorch(net, picture)[0])


def test_fifty_clients_at_once_get_what_they_get_alone(served: Running) -> None:
    sizes = [(1 + 37 * i % 300, 1 + 53 * i % 400) for i in range(CLIENTS - 2)] + [(767, 1023), (1, 500)]
    files = [encode(pixels(*size, seed=number), "JPEG", quality=85) for number, size in enumerate(sizes)]
    with Client(served.target) as client:
        alone = [bits(ask(client, file)) for file in files]
    together = threading.Barrier(CLIENTS)

    def one_client(file: bytes) -> list[list[bytes]]:
        with Client(served.target) as client:
            together.wait(60)
            return [bits(ask(client, file)) for _ in range(3)]

    with ThreadPoolExecutor(CLIENTS) as pool:
        crowd = list(pool.map(one_client, files))
    for expected, answers in zip(alone, crowd, strict=True):
        assert answers == [expected] * 3
    assert len({tuple(answer) for answer in alone}) == CLIENTS  # no two alike, so that a mix-up would show


def bits(answer: Answer) -> list[bytes]:
    assert answer.logits is not None
    return [answer.embeddings[0].tobytes(), answer.logits.tobytes()]
