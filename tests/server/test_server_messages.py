"""Messages and the engine's words say the same."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullframe.engine.query import Answer, ClassScore
from fullframe.server import messages
from fullframe.v1 import vision_pb2 as pb

FLOATS = st.floats(width=32, allow_nan=False)


@given(st.lists(FLOATS, max_size=300))
def test_vectors_are_what_protobuf_makes_of_the_values(values: list[float]) -> None:
    answer = Answer(1, 1, embeddings=[np.array(values, np.float32)])
    assert messages.embedding(answer).embedding == pb.Vector(values=values)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 4095, 4096, 524_287, 524_288])
def test_vectors_of_lengths_around_a_longer_header(length: int) -> None:
    values = np.arange(length, dtype=np.float32)
    assert list(messages.embedding(Answer(1, 1, embeddings=[values])).embedding.values) == values.tolist()


@given(st.floats(min_value=0.5, max_value=100, width=32))
def test_an_exponent_is_the_decimal_that_was_written(p: float) -> None:
    decimal = float(str(np.float32(p)))
    term = pb.Pooling.Term(kind=pb.Pooling.KIND_GEM, p=decimal)
    query = messages.embed_query(pb.EmbedRequest(pooling=pb.Pooling(terms=[term])))
    assert query.poolings[0].terms[0].p == decimal


def test_every_kind_has_a_pooling() -> None:
    for name, _ in pb.Pooling.Kind.items():
        messages.embed_query(pb.EmbedRequest(pooling=pb.Pooling(terms=[pb.Pooling.Term(kind=name)])))


@given(st.lists(st.text(max_size=50), max_size=20), st.integers(0, 500), st.integers(0, 40))
def test_an_answers_size_is_never_understated(labels: list[str], dimension: int, side: int) -> None:
    answer = Answer(
        2**31,
        2**31,
        classes=[ClassScore(2**31, label, 0.5, -1.0) for label in labels],
        embeddings=[np.ones(dimension, np.float32)] * 2,
        logits=np.ones(dimension, np.float32),
        feature_map=np.ones((3, side, side), np.float32),
        class_map=np.ones((2, side, side), np.float32),
    )
    assert messages.prediction(answer).ByteSize() <= messages.answer_bytes(answer)
