"""Maps at a chosen resolution over gRPC: the engine's own bits, within what a message may hold."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fullframe
from fullframe.engine.query import Answer
from fullframe.errors import InvalidInput
from tests.pictures import pixels
from tests.serving import Running, serving_here


def test_a_reduced_map_is_that_of_this_process_and_its_mean_the_logits(server: Running, tiny_model: Path) -> None:
    picture = pixels(130, 210)
    asked: Any = {"logits": True, "class_map": True, "feature_map": True, "max_map_side": 7}
    with fullframe.Client(server.target) as client, fullframe.load(str(tiny_model)) as here:
        answers = [client.predict(picture, **asked), here.predict(picture, **asked)]
        [(_, streamed)] = client.stream([picture], **asked)
        with pytest.raises(InvalidInput, match="max_map_side is -1"):
            client.predict(picture, class_map=True, max_map_side=-1)
    for answer in (*answers, streamed):
        assert isinstance(answer, Answer)
        assert answer.logits is not None and answer.class_map is not None and answer.feature_map is not None
        assert answer.class_map.shape == (7, 4, 7) and answer.feature_map.shape == (16, 4, 7)
        np.testing.assert_array_equal(answer.class_map, answers[0].class_map)
        np.testing.assert_allclose(answer.class_map.mean(axis=(1, 2)), answer.logits, atol=1e-5)


def test_a_map_too_long_for_a_message_fits_when_it_is_reduced(tiny_model: Path) -> None:
    with (
        serving_here(models=str(tiny_model), max_message_bytes=2**17, tile_pixels=10_000) as server,
        fullframe.Client(server.target) as client,
    ):
        picture = np.zeros((3000, 10, 3), np.uint8)
        picture[::7] = 200
        with pytest.raises(InvalidInput, match="max_map_side"):
            client.predict(picture, feature_map=True)
        reduced = client.predict(picture, feature_map=True, max_map_side=100).feature_map
        assert reduced is not None and reduced.shape == (16, 100, 1)
