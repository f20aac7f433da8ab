"""Random graphs in PyTorch beside ONNX Runtime: whole, and in batches of images of different sizes."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fullframe.errors import InvalidModel
from fullframe.model.geometry import GraphGeometry
from fullframe.model.ragged import ragged_model
from tests.engine.graph.parity import FUSED, PROMISE, differences, in_onnx_runtime, serialized
from tests.model.graphs import build as plain
from tests.model.graphs import stages as plain_stages
from tests.model.test_ragged_graphs import build, graphs
from tests.ragged import drawn, images_of, padded

SUBSETS = (["logits"], ["features", "logits"])


def holds(model: Any, feeds: dict[str, Any], subsets: Any, device: torch.device) -> None:
    for fused in FUSED:
        try:
            found = differences(model, feeds, subsets, device=device, fused=fused)
        except Exception as error:  # of the runtime's own, whose exceptions share no base
            assume("ONNXRuntimeError" not in str(error))
            raise
        if not max(found.values()) <= PROMISE:
            assume(not sees_nothing(model, feeds))
        assert max(found.values()) <= PROMISE, (fused, found)


def sees_nothing(model: Any, feeds: dict[str, Any]) -> bool:
    """Whether a maximum is over nothing but padding, which to ONNX Runtime is the lowest number, and not -inf."""
    wanted = in_onnx_runtime(serialized(model), feeds)
    return any(each.size and np.abs(each).max() >= np.finfo(np.float32).max for each in wanted.values())


def whole(stages: list[Any], data: st.DataObject, device: torch.device) -> None:
    """Every tensor of the graph is an output, and its last one alone."""
    model = plain(*stages, everything=True)
    least = GraphGeometry(model).smallest_size
    assume(max(least) < 60)
    ((height, width),) = data.draw(drawn(least, 14).map(lambda sizes: sizes[:1]))
    images = np.stack(images_of([(height, width)] * 2, seed=data.draw(st.integers(0, 9))))
    holds(model, {"images": images}, [["feature_map"]], device)


def contract(graph: tuple[Any, str, dict[str, bool]], data: st.DataObject, device: torch.device) -> None:
    """With all heads and global pools, alone and, where it can be, in a batch of several sizes."""
    stages, pooling, kind = graph
    model = build(*stages, pooling=pooling, **kind)
    least = GraphGeometry(model).smallest_size
    assume(max(least) < 60)
    images = images_of(data.draw(drawn(least, 14)))
    holds(model, {"images": images[0][np.newaxis]}, SUBSETS, device)
    try:
        ragged = ragged_model(model)
    except InvalidModel:
        return
    holds(ragged, padded(images), SUBSETS, device)


@settings(max_examples=20, deadline=None)
@given(plain_stages, st.data())
def test_random_graphs(device: torch.device, stages: list[Any], data: st.DataObject) -> None:
    whole(stages, data, device)


@settings(max_examples=20, deadline=None)
@given(graphs, st.data())
def test_random_contract_models(device: torch.device, graph: Any, data: st.DataObject) -> None:
    contract(graph, data, device)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=200, deadline=None)
@given(plain_stages, st.data())
def test_two_hundred_random_graphs(device: torch.device, stages: list[Any], data: st.DataObject) -> None:
    whole(stages, data, device)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=200, deadline=None)
@given(graphs, st.data())
def test_two_hundred_random_contract_models(device: torch.device, graph: Any, data: st.DataObject) -> None:
    contract(graph, data, device)
