"""A model's contract arrives at the client as its server has it."""

from dataclasses import dataclass

import pytest

from fullframe.client.messages import served_model
from fullframe.model.contract import INT8, Contract, Tiles
from fullframe.server import messages
from fullframe.v1 import vision_pb2 as pb


@dataclass
class Loaded:
    contract: Contract
    name: str = "net"
    version: str = "3"
    default: bool = True
    digest: str = "d" * 64


@pytest.mark.parametrize("tiles", [None, Tiles((8, 4)), Tiles((8, 4), ("Mul 'm' weighs by the whole image",))])
def test_a_contract_arrives_as_it_is_served(tiles: Tiles | None) -> None:
    contract = Contract(
        name="inner",
        labels=("cat", "dog"),
        stride=(8, 4),
        receptive_field=(23, 21),
        start=(-3, -2),
        smallest_size=(1, 2),
        feature_channels=8,
        precision=INT8,
        normalisation={"mean": [0.5]},
        training={"accuracy": {"32": 0.5}},
        tiles=tiles,
    )
    told = served_model(messages.model_info(Loaded(contract)))  # type: ignore[arg-type]
    assert told.contract == contract
    assert (told.name, told.version, told.default, told.digest) == ("net", "3", True, "d" * 64)


def test_a_server_that_says_nothing_of_tiles_or_its_file_is_understood() -> None:
    """As older ones do."""
    metadata = {"start": "[0, 0]", "pooling": '"avg"', "logits": '"mean(class_map)"'}
    size = pb.Extent(height=1, width=1)
    info = pb.ModelInfo(labels=["a"], feature_channels=1, stride=size, smallest_size=size, metadata=metadata)
    assert served_model(info).contract.tiles is None
    assert served_model(info).digest == ""
