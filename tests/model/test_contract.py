"""The contract: metadata that round-trips, and errors that name the key or tensor at fault."""

from dataclasses import replace

import pytest

from fullframe.errors import InvalidModel
from fullframe.model.contract import LOGITS_FROM_FEATURES, Contract, TensorInfo, Tiles

CONTRACT = Contract(
    name="tiny",
    labels=("cat", "dog"),
    stride=(4, 4),
    receptive_field=(23, 21),
    start=(-3, -3),
    smallest_size=(1, 2),
    feature_channels=8,
    normalisation={"mean": [0.5], "std": [0.25]},
    training={"accuracy": {"32": 0.5}},
)
INPUTS = [TensorInfo("images", "tensor(uint8)", ("N", "H", "W", 3))]
OUTPUTS = [
    TensorInfo("features", "tensor(float)", ("N", 8)),
    TensorInfo("logits", "tensor(float)", ("N", 2)),
    TensorInfo("feature_map", "tensor(float)", ("N", 8, "h", "w")),
    TensorInfo("class_map", "tensor(float)", ("N", 2, "h", "w")),
]


def test_metadata_round_trips() -> None:
    assert Contract.from_metadata(CONTRACT.to_metadata()) == CONTRACT


@pytest.mark.parametrize("tiles", [Tiles((4, 8)), Tiles((4, 8), ("Mul 'm' does this", "Add 'a' does that"))])
def test_what_is_said_of_tiles_round_trips(tiles: Tiles) -> None:
    contract = replace(CONTRACT, tiles=tiles)
    assert Contract.from_metadata(contract.to_metadata()) == contract
    assert tiles.possible == (not tiles.obstacles)


def test_a_file_that_says_nothing_of_tiles_is_read_as_before() -> None:
    assert "fullframe.tiles" not in CONTRACT.to_metadata()
    assert Contract.from_metadata(CONTRACT.to_metadata()).tiles is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("contract", "7", "reads version '1'"),
        ("labels", "cat,dog", "labels is not JSON"),
        ("labels", "[]", "at least one string"),
        ("labels", "[1, 2]", "at least one string"),
        ("stride", "[4]", "stride must be two integers of at least 1"),
        ("stride", "[0, 4]", "stride must be two integers of at least 1"),
        ("start", '["a", 1]', "start must be two integers: "),
        ("logits", "magic", "logits is 'magic'"),
        ("feature_channels", "true", "feature_channels must be a JSON int"),
        ("training", "[]", "training must be a JSON dict"),
        ("smallest_size", "", "no metadata fullframe.smallest_size"),
        ("tiles", "yes", "tiles is not JSON"),
        ("tiles", "[]", "tiles must be a JSON dict"),
        ("tiles", '{"alignment": [4, 4]}', "tiles must have 'obstacles', a list of strings"),
        ("tiles", '{"alignment": [4, 4], "obstacles": [1]}', "tiles must have 'obstacles', a list of strings"),
        ("tiles", '{"alignment": [4, 0], "obstacles": []}', "tiles.alignment must be two integers of at least 1"),
        ("tiles", '{"obstacles": []}', "tiles.alignment must be two integers of at least 1"),
        ("ragged", "often", "ragged is 'often'; it must be 'true' or 'false'"),
    ],
)
def test_broken_metadata_is_named(key: str, value: str, message: str) -> None:
    metadata = CONTRACT.to_metadata() | {f"fullframe.{key}": value}
    with pytest.raises(InvalidModel, match=message.replace("[", r"\[")):
        Contract.from_metadata(metadata)


def test_a_file_for_batches_of_different_sizes_has_their_sizes_beside_the_images() -> None:
    ragged = replace(CONTRACT, ragged=True)
    assert Contract.from_metadata(ragged.to_metadata()) == ragged
    sizes = TensorInfo("sizes", "tensor(int64)", ("N", 2))
    map_sizes = TensorInfo("map_sizes", "tensor(int64)", ("N", 2))
    ragged.check_graph([*INPUTS, sizes], [*OUTPUTS, map_sizes])
    with pytest.raises(InvalidModel, match="inputs are images; the contract has images, sizes"):
        ragged.check_graph(INPUTS, [*OUTPUTS, map_sizes])
    with pytest.raises(InvalidModel, match="no output 'map_sizes'"):
        ragged.check_graph([*INPUTS, sizes], OUTPUTS)
    with pytest.raises(InvalidModel, match="inputs are images, sizes; the contract has images"):
        CONTRACT.check_graph([*INPUTS, sizes], OUTPUTS)


def test_any_other_onnx_file_is_told_apart() -> None:
    with pytest.raises(InvalidModel, match="does not follow the contract"):
        Contract.from_metadata({"author": "someone"})


def test_a_graph_that_keeps_the_contract() -> None:
    CONTRACT.check_graph(INPUTS, OUTPUTS)
    replace(CONTRACT, logits=LOGITS_FROM_FEATURES).check_graph(INPUTS, OUTPUTS[:3])


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ([], OUTPUTS, "inputs are none"),
        ([TensorInfo("x", "tensor(uint8)", ("N", "H", "W", 3))], OUTPUTS, "inputs are x"),
        ([TensorInfo("images", "tensor(float)", ("N", "H", "W", 3))], OUTPUTS, r"'images' is tensor\(float\)"),
        ([TensorInfo("images", "tensor(uint8)", ("N", 224, "W", 3))], OUTPUTS, "axis 1 of 'images' is fixed to 224"),
        ([TensorInfo("images", "tensor(uint8)", ("N", "H", "W"))], OUTPUTS, "'images' has 3 axes"),
        (INPUTS, OUTPUTS[1:], "no output 'features'"),
        (INPUTS, OUTPUTS[:3], "no output 'class_map'"),
        (INPUTS, [*OUTPUTS[:1], TensorInfo("logits", "tensor(float)", ("N", 3)), *OUTPUTS[2:]], "axis 1 of 'logits'"),
    ],
)
def test_a_graph_that_breaks_it_is_named(inputs: list[TensorInfo], outputs: list[TensorInfo], message: str) -> None:
    with pytest.raises(InvalidModel, match=message):
        CONTRACT.check_graph(inputs, outputs)
