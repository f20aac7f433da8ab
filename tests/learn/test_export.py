from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fullframe.engine.ort import OrtEngine
from fullframe.engine.pooling import Pooling, pool
from fullframe.errors import InvalidInput, InvalidModel
from fullframe.files import write_atomically
from fullframe.learn import runs
from fullframe.learn.checkpoint import FILE, save_checkpoint
from fullframe.learn.export import (
    CHECKED_SIZES,
    TOLERANCE,
    Served,
    build_graph,
    describe,
    export_run,
    fold_batch_norms,
    write_model,
)
from fullframe.learn.nets import Net
from fullframe.learn.settings import NetConfig, Recipe
from fullframe.model.contract import Tiles

RECIPE = Recipe(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
LABELS = ("a", "b", "c")


def network(global_pooling: str = "avg", activation: str = "relu", block_pooling: str = "max", levels: int = 1) -> Net:
    """A small network whose batch norms, gates and classifier have something to say."""
    torch.manual_seed(0)
    block = "residual" if levels > 1 else "inception"
    config = NetConfig(3, 16, (1, 1), 4, activation, block_pooling, global_pooling, block=block, levels=levels)
    net = Net(config)
    if levels > 1:
        nn.init.normal_(net.gate.weight)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            for values in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(values, 0.3, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    nn.init.normal_(net.classifier.weight)
    return net.eval()


def graph(net: Net) -> onnx.ModelProto:
    model = build_graph(net, RECIPE)
    describe(model, net, name="small", recipe=RECIPE, labels=LABELS, training={"note": 1})
    return model


@pytest.fixture(scope="module")
def small() -> onnx.ModelProto:
    return graph(network())


@pytest.fixture(scope="module")
def exported(small: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.onnx"
    assert write_model(small, network(), RECIPE, path) < TOLERANCE
    return path


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (31, 33), (240, 111)])
def test_the_file_is_the_network(exported: Path, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    with torch.no_grad():
        want = Served(network(), RECIPE)(torch.from_numpy(pixels)[None])
    names = ("features", "logits", "feature_map", "class_map")
    got = OrtEngine(exported).run(pixels, names)
    for name, reference in zip(names, want, strict=True):
        scale = max(1.0, float(reference.abs().max()))
        assert np.abs(got[name] - reference[0].numpy()).max() <= 1e-4 * scale


def test_the_file_says_what_it_is(exported: Path) -> None:
    contract = OrtEngine(exported).contract
    assert contract.name == "small"
    assert contract.labels == LABELS
    assert contract.stride == (4, 4)
    assert contract.smallest_size == (1, 1)
    assert contract.feature_channels == 32
    assert contract.pooling == "avg"
    assert contract.has_class_map
    assert contract.normalisation == {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    assert contract.training["note"] == 1
    assert contract.training["parameters"] == sum(p.numel() for p in network().parameters())


@pytest.mark.parametrize("levels", [1, 3])
def test_geometry_and_cost_are_those_of_the_network(levels: int, tmp_path: Path) -> None:
    net = network(block_pooling="avg", levels=levels)
    assert write_model(graph(net), net, RECIPE, tmp_path / "m.onnx") < TOLERANCE
    contract = OrtEngine(tmp_path / "m.onnx").contract
    assert contract.stride == ((4, 4) if levels == 1 else (16, 16))
    assert contract.tiles == Tiles(contract.stride)
    assert contract.training["multiply_adds_per_pixel"] == cost_per_pixel(net)
    assert seen_by((5, 6), net, contract.stride) == (contract.start, contract.receptive_field)


def cost_per_pixel(net: Net, side: int = 64) -> int:
    """What its convolutions multiply and add, all but the classifier's."""
    sizes: list[int] = []

    def count(conv: nn.Module, _: object, output: torch.Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        sizes.append(output[0, 0].numel() * conv.weight.numel())

    hooks = [
        module.register_forward_hook(count)
        for module in net.modules()
        if isinstance(module, nn.Conv2d) and module is not net.classifier
    ]
    net(torch.zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    return round(sum(sizes) / side**2)


def seen_by(cell: tuple[int, int], net: Net, stride: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The first pixel that cell 0 sees and how many a cell sees, from the gradient of `cell`."""
    net = net.double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.abs_()  # so that nothing cancels and every pixel in the field counts
        if net.config.levels > 1:
            net.gate.weight.mul_(1e-3)  # a gate that is full passes nothing on
    side = 12 * stride[0]
    x = torch.full((1, 3, side, side), 5.0, dtype=torch.float64, requires_grad=True)
    net.outputs(x).feature_map[0, :, cell[0], cell[1]].sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    seen = x.grad[0].abs().sum(0).nonzero()
    first, last = seen.min(0).values, seen.max(0).values
    start = first - torch.tensor(cell) * torch.tensor(stride)
    return tuple(start.tolist()), tuple((last - first + 1).tolist())


def test_nothing_of_the_maker_s_machine_is_in_the_file(exported: Path) -> None:
    content = exported.read_bytes()
    for word in (b".py", b"File ", b"torch.ops", str(Path.home()).encode(), b"class_hierarchy"):
        assert word not in content
    assert [entry.name for entry in exported.parent.iterdir()] == ["small.onnx"], "weights are inside the file"


@pytest.mark.parametrize(("pooling", "spelled", "channels"), [("gem", "gem(3)", 32), ("avg+max", "avg+max", 64)])
def test_other_poolings_are_named_as_the_engine_names_them(
    tmp_path: Path, pooling: str, spelled: str, channels: int
) -> None:
    net = network(pooling, activation="gelu", block_pooling="avg")
    write_model(graph(net), net, RECIPE, tmp_path / "m.onnx")
    engine = OrtEngine(tmp_path / "m.onnx")
    assert engine.contract.pooling == spelled
    assert not engine.contract.has_class_map
    pixels = np.random.default_rng(0).integers(0, 256, (45, 70, 3), np.uint8)
    got = engine.run(pixels, ("features", "feature_map"))
    assert got["features"].shape == (channels,)
    np.testing.assert_allclose(pool(got["feature_map"], Pooling.parse(spelled)), got["features"], rtol=1e-5, atol=1e-6)


def test_folding_batch_norms_changes_nothing_and_leaves_none(exported: Path) -> None:
    net = network()
    folded = fold_batch_norms(net)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    x = torch.randn(1, 3, 20, 30)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-4)
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(exported).graph.node}


def test_a_file_that_differs_is_not_written(small: onnx.ModelProto, tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(small)
    path = tmp_path / "m.onnx"
    weights = next(i for i in model.graph.initializer if "three.1" in i.name)
    values = onnx.numpy_helper.to_array(weights).copy()
    values[:, :, 0, 0] += 1  # a corner of the kernels: on a single pixel it meets padding alone
    weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
    with pytest.raises(InvalidModel, match=r"'features' differs from the network by .* at \d+ x \d+ pixels") as caught:
        write_model(model, network(), RECIPE, path)
    assert " at 1 x 1 pixels" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []

    path.write_text("the file before")
    weights.CopyFrom(onnx.numpy_helper.from_array(values * np.float32(np.nan), weights.name))
    with pytest.raises(InvalidModel, match="differs from the network by nan"):
        write_model(model, network(), RECIPE, path)
    assert path.read_text() == "the file before"


def test_a_contract_of_other_labels_is_not_written(small: onnx.ModelProto, tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(small)
    describe(model, network(), name="small", recipe=RECIPE, labels=("a", "b"), training={})
    with pytest.raises(InvalidModel, match="logits"):
        write_model(model, network(), RECIPE, tmp_path / "m.onnx")


def test_enough_sizes_are_checked() -> None:
    assert len({size[1:] for size in CHECKED_SIZES}) >= 20
    assert {(1, 1, 1), (1, 1, 500)} <= set(CHECKED_SIZES)
    assert any(count > 1 for count, _, _ in CHECKED_SIZES)


def test_a_run_without_a_checkpoint_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="holds no training run"):
        export_run(tmp_path, tmp_path / "m.onnx", "m")
    write_atomically(tmp_path / runs.SETTINGS, b"{}")
    with pytest.raises(InvalidInput, match="no checkpoint yet"):
        export_run(tmp_path, tmp_path / "m.onnx", "m")
    save_checkpoint(tmp_path / FILE, {}, {})
    write_atomically(tmp_path / runs.SETTINGS, b'{"net": {"classes": 3}, "recipe": {}, "labels": []}')
    with pytest.raises(InvalidInput, match="holds no weights"):
        export_run(tmp_path, tmp_path / "m.onnx", "m")
