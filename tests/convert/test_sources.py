"""What a user names is opened with what its source knows; what can't be opened says how it could."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fullframe.convert.modules import class_count, load_weights, read_weights
from fullframe.convert.options import Options
from fullframe.convert.sources import SIZE, open_source
from fullframe.errors import InvalidInput, InvalidModel
from tests.models import write_model

OWN = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(width, 5)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.fc(self.drop(self.body(x).flatten(1)))

def wide():
    return Small(8)

def two_arguments(a, b):
    return Small()

def no_module():
    return {"model": Small()}

class Pair(Small):
    def forward(self, x):
        return super().forward(x), x

class Feature(Small):
    def forward(self, x):
        return self.body(x) * torch.ones(1, 1, 2, 2)

class Fixed(Small):
    def forward(self, x):
        return super().forward(x.view(1, 3, 32, 32))

class Lies(Small):
    def forward(self, x):
        return super().forward(x) * (2.0 if torch.compiler.is_exporting() else 1.0)

class Draws(Small):
    def forward(self, x):
        return super().forward(x) + torch.rand(1, 5)

class Decides(Small):
    def forward(self, x):
        scores = super().forward(x)
        return scores * 2 if scores.sum() > 0 else scores

class Eigenvalues(Small):
    def forward(self, x):
        scores = super().forward(x)
        return torch.linalg.eigvals(torch.outer(scores[0], scores[0])).real[None]

def raises():
    raise OSError("\\x1b[31mno room\\x1b[0m for it\\nand more")

here = Small()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module in the working folder; its dotted name."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "nets.py").write_text(OWN)
    (tmp_path / "mine" / "broken.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "mine" / "half.py").write_text("def make(:\n")
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "mine.nets", "mine.broken", "mine.half"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "python:mine.nets"


def scores(model: onnx.ModelProto, images: torch.Tensor) -> torch.Tensor:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def test_ones_own_module_is_taken_with_the_weights_of_a_file(own: str, tmp_path: Path) -> None:
    as_made = open_source(f"{own}:Small", size=(40, 56))
    module = sys.modules["mine.nets"].Small().eval()
    assert as_made.options == Options("Small", source=f"{own}:Small", size=(40, 56))
    weights = {
        name: torch.randn_like(value) if value.is_floating_point() else value
        for name, value in module.state_dict().items()
    }
    weights["body.1.running_var"].abs_()
    save_file(weights, tmp_path / "small.safetensors")
    source = open_source(f"{own}:Small", weights=tmp_path / "small.safetensors", size=(40, 56))
    assert source.options.source == f"{own}:Small, weights small.safetensors"
    module.load_state_dict(weights)
    images = torch.randn(1, 3, 40, 56)
    found = scores(source.model, images)
    with torch.no_grad():
        torch.testing.assert_close(found, module(images), rtol=1e-5, atol=1e-5)
    assert (found - scores(as_made.model, images)).abs().max() > 0.1, "the file's weights, not those it was made with"


def test_without_a_size_ones_own_module_has_the_usual(own: str) -> None:
    source = open_source(f"{own}:here")
    assert source.options.size == SIZE
    shape = source.model.graph.input[0].type.tensor_type.shape
    assert [dim.dim_value for dim in shape.dim] == [1, 3, *SIZE]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (":two_arguments", "'two_arguments' that can be called without arguments"),
        (":absent", "'absent' that can be called without arguments"),
        (":no_module", "makes a dict; it must make a torch.nn.Module"),
        ("", "must be python:package.module:factory"),
        (".0x:y", "must be python:package.module:factory"),
    ],
)
def test_a_factory_that_makes_no_module_says_so(own: str, name: str, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        open_source(f"{own}{name}")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Pair", "returns a tuple for one image; a classifier returns scores"),
        ("Feature", r"returns \[1, 4, 2, 2\] for one image"),
        ("Fixed", r"fails on float32 \[1, 3, 224, 224\].*give it a size"),
    ],
)
def test_a_module_that_is_no_classifier_says_so(own: str, name: str, reason: str) -> None:
    with pytest.raises(InvalidModel, match=reason):
        open_source(f"{own}:{name}")


def test_a_module_made_for_one_size_can_be_given_it(own: str) -> None:
    assert open_source(f"{own}:Fixed", size=(32, 32)).options.size == (32, 32)


def test_modules_that_are_not_there_are_named(own: str) -> None:
    for spec in ("python:nowhere:make", "python:mine.nothing:make", "python:mine.nets.inner:make"):
        with pytest.raises(InvalidInput, match="no Python module '"):
            open_source(spec)
    with pytest.raises(InvalidInput, match=r"mine\.broken can't be imported: .* 'a_package_that_is_not_there'"):
        open_source("python:mine.broken:make")
    with pytest.raises(InvalidInput, match=r"mine\.half can't be imported: SyntaxError: "):
        open_source("python:mine.half:make")


@pytest.mark.parametrize("name", ["Lies", "Draws"])
def test_a_graph_that_is_not_the_module_is_refused(own: str, name: str) -> None:
    with pytest.raises(InvalidModel, match=r"scores differ by \d.*e.* of the largest"):
        open_source(f"{own}:{name}", size=(16, 24))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Decides", r"can't export the module: \w+: Could not guard on data-dependent expression"),
        ("Eigenvalues", r"can't export the module: \w+: .*linalg_eig"),
        ("raises", r"mine.nets:raises fails: OSError: no room for it$"),
    ],
)
def test_a_foreign_failure_is_one_line_with_its_reason(
    own: str, name: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((InvalidInput, InvalidModel), match=reason) as failed:
        open_source(f"{own}:{name}", size=(16, 24))
    assert str(failed.value).isprintable()
    assert capfd.readouterr() == ("", ""), "no pages of graphs"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda weights: weights.pop("fc.bias"), "they lack fc.bias$"),
        (lambda weights: weights.update(more=torch.zeros(1)), "they have an unknown more$"),
        (lambda weights: weights.update({"module.a": weights.pop("fc.weight")}), "lack fc.weight; .*unknown module.a"),
        (lambda weights: weights.update({"fc.weight": torch.zeros(5, 9)}), r"fc.weight is \[5, 9\], not \[5, 4\]"),
        (dict.clear, "they lack body.0.weight, body.0.bias, body.1.weight and 5 more"),
    ],
)
def test_weights_of_another_network_are_named(
    own: str, tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], object], reason: str
) -> None:
    open_source(f"{own}:Small", size=(16, 24))
    module = sys.modules["mine.nets"].Small()
    weights = dict(module.state_dict())
    spoil(weights)
    with pytest.raises(InvalidInput, match=reason):
        load_weights(module, weights)


def test_a_file_of_weights_is_safetensors_or_nothing(own: str, tmp_path: Path) -> None:
    torch.save({"fc.bias": torch.zeros(5)}, tmp_path / "pickled.pt")
    with pytest.raises(InvalidInput, match=r"pickled\.pt is no safetensors file"):
        open_source(f"{own}:Small", weights=tmp_path / "pickled.pt")
    with pytest.raises(InvalidInput, match="there is no file"):
        read_weights(tmp_path / "absent.safetensors")
    write_model(tmp_path / "tiny.onnx")
    with pytest.raises(InvalidInput, match="holds its weights"):
        open_source(str(tmp_path / "tiny.onnx"), weights=tmp_path / "pickled.pt")


def test_an_onnx_file_is_what_it_holds(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.onnx")
    source = open_source(str(path))
    assert source.model == onnx.load(path)
    assert source.options == Options("tiny", source="tiny.onnx")
    with pytest.raises(InvalidInput, match="a source is an ONNX file, torchvision:NAME"):
        open_source("tensorflow:resnet")


def test_the_number_of_classes_is_read_off_the_weights() -> None:
    def net(classes: int, width: int = 4) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.Linear(width, classes))

    assert class_count(net(10), net(7).state_dict()) == 7
    assert class_count(net(10), net(10).state_dict()) is None
    assert class_count(net(10), net(7, width=6).state_dict()) is None


def package(name: str) -> Any:
    """A zoo, where it is installed and goes with the installed torch."""
    try:
        return import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name}: {error}")


@pytest.fixture
def torchvision() -> Any:
    return package("torchvision")


def test_torchvision_knows_its_normalisation_and_labels(torchvision: Any, tmp_path: Path) -> None:
    net = torchvision.models.squeezenet1_1(weights=None)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    source = open_source("torchvision:squeezenet1_1", weights=tmp_path / "net.safetensors")
    options = source.options
    assert (options.name, options.size, len(options.labels)) == ("squeezenet1_1", (224, 224), 1000)
    assert options.labels[:2] == ("tench", "goldfish")
    assert (options.mean, options.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with pytest.raises(InvalidInput, match="no classifier 'squeezenet11'; is it squeezenet1_1"):
        open_source("torchvision:squeezenet11")


def test_weights_with_other_classes_have_no_labels_of_the_zoo(torchvision: Any, tmp_path: Path) -> None:
    net = torchvision.models.squeezenet1_1(weights=None, num_classes=6)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    source = open_source("torchvision:squeezenet1_1", weights=tmp_path / "net.safetensors", size=(96, 64))
    assert replace(source.options, mean=(0, 0, 0), std=(1, 1, 1)) == Options(
        "squeezenet1_1", source="torchvision:squeezenet1_1, weights net.safetensors", size=(96, 64)
    )
    assert scores(source.model, torch.zeros(1, 3, 96, 64)).shape == (1, 6)


def test_published_weights_are_never_unpickled(
    torchvision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that would run code when it is unpickled stands where torchvision keeps its downloads."""

    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return Path.touch, (Path(tmp_path / "ran"),)  # type: ignore[return-value]

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    place = tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1]
    place.parent.mkdir(parents=True)
    torch.save(Bomb(), place)
    with pytest.raises(InvalidInput, match=r"can't be had .their file holds more than tensors.* --weights FILE"):
        open_source("torchvision:squeezenet1_1")
    assert not (tmp_path / "ran").exists()
    torch.load(place, weights_only=False)
    assert (tmp_path / "ran").exists(), "the control: the file would have run it"


def test_published_weights_are_taken_where_they_are(
    torchvision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a download: torchvision's own folder holds the file."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    published = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    net = torchvision.models.squeezenet1_1(weights=None)
    place = tmp_path / "hub" / "checkpoints" / published.url.rsplit("/", 1)[1]
    place.parent.mkdir(parents=True)
    torch.save(net.state_dict(), place)
    source = open_source("torchvision:squeezenet1_1", size=(64, 64))
    assert source.options.source == f"torchvision:squeezenet1_1, weights {published}"
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(scores(source.model, images), net.eval()(images), rtol=1e-4, atol=1e-4)


def test_timm_knows_its_size_and_license(tmp_path: Path) -> None:
    timm = package("timm")
    net = timm.create_model("resnet10t")
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    options = open_source("timm:resnet10t", weights=tmp_path / "net.safetensors").options
    assert (options.name, options.size, len(options.labels)) == ("resnet10t", (176, 176), 1000)
    assert options.labels[0] == "tench, Tinca tinca"
    assert options.mean == (0.485, 0.456, 0.406)
    with pytest.raises(InvalidInput, match="no classifier 'resnet10'"):
        open_source("timm:resnet10")


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_a_package_that_is_not_there_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InvalidInput, match=f"pip install {name}"):
        open_source(f"{name}:resnet18")


def test_torch_waits_until_a_network_in_pytorch_is_named() -> None:
    program = "import sys, fullframe.convert.sources, fullframe.cli.convert; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
