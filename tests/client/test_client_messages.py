"""What the client writes the server reads, and the other way round: no meaning is lost between them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from fullframe.client.failures import error_from_status
from fullframe.client.messages import answer_from, file_of, image_message, options_message
from fullframe.engine.pooling import KINDS, Pooling, Term
from fullframe.engine.query import Answer, ClassScore, Query, Timings, as_pooling, make_query
from fullframe.errors import (
    DeadlinePassed,
    FullframeError,
    InvalidInput,
    NotFound,
    Overloaded,
    ServerError,
    Unavailable,
)
from fullframe.image import Limits, open_encoded
from fullframe.server import messages
from fullframe.server.status import status_of
from tests.pictures import encode, pixels

floats = st.floats(width=32)
terms = st.sampled_from(KINDS).flatmap(
    lambda kind: st.builds(
        Term, st.just(kind), st.sampled_from([None, 1.0, 2.5, 3.3]) if kind in ("lp", "gem", "lse") else st.none()
    )
)
poolings = st.builds(
    Pooling,
    st.lists(terms, min_size=1, max_size=3).map(tuple),
    st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    st.booleans(),
)
queries = st.builds(
    Query, st.integers(0, 1000), st.lists(poolings, max_size=3).map(tuple), st.booleans(), st.booleans(), st.booleans()
)
vectors = arrays(np.float32, st.integers(1, 9), elements=floats)
maps = arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)), elements=floats)
answers = st.builds(
    Answer,
    st.integers(1, 2**31),
    st.integers(1, 2**31),
    st.lists(st.builds(ClassScore, st.integers(0, 2**31), st.text(), floats, floats), max_size=3),
    st.lists(vectors, max_size=3),
    st.none() | vectors,
    st.none() | maps,
    st.none() | maps,
    st.builds(Timings, *[st.floats(0, 1e3)] * 3),
)


@given(queries)
def test_a_query_arrives_as_it_was_asked(query: Query) -> None:
    assert messages.predict_query(options_message(query)) == query


@settings(max_examples=50)
@given(answers)
def test_an_answer_arrives_as_it_was_given(answer: Answer) -> None:
    told = answer_from(messages.prediction(answer))
    assert (told.height, told.width) == (answer.height, answer.width)
    assert len(told.classes) == len(answer.classes)
    for mine, given_ in zip(told.classes, answer.classes, strict=True):
        assert (mine.index, mine.label) == (given_.index, given_.label)
        np.testing.assert_array_equal([mine.probability, mine.logit], [given_.probability, given_.logit])
    ours = [*told.embeddings, told.logits, told.feature_map, told.class_map]
    theirs = [*answer.embeddings, answer.logits, answer.feature_map, answer.class_map]
    for array, expected in zip(ours, theirs, strict=True):
        assert (array is None) == (expected is None)
        if array is not None and expected is not None:
            assert array.dtype == np.float32
            assert array.flags.writeable
            np.testing.assert_array_equal(array, expected)
    expected_times = [answer.timings.decode, answer.timings.queue, answer.timings.compute]
    np.testing.assert_allclose(
        [told.timings.decode, told.timings.queue, told.timings.compute], expected_times, 1e-6, 1e-9
    )


@pytest.mark.parametrize(
    "error",
    [
        InvalidInput("no such thing", "top_k"),
        InvalidInput("no such thing"),
        NotFound("no model"),
        Overloaded("full", 1.25),
        DeadlinePassed("late"),
        Unavailable("draining"),
    ],
)
def test_an_error_arrives_as_it_was_raised(error: FullframeError) -> None:
    told = error_from_status(status_of(error))
    assert type(told) is type(error)
    assert str(told) == str(error)
    assert vars(told) == vars(error)


def test_an_unexpected_error_arrives_as_the_server_s() -> None:
    told = error_from_status(status_of(KeyError("secret")))
    assert isinstance(told, ServerError)
    assert told.code == "INTERNAL"
    assert "secret" not in str(told)


@pytest.mark.parametrize("height, width", [(1, 1), (7, 5), (31, 400)])
def test_images_travel_as_they_are(height: int, width: int, tmp_path: Path) -> None:
    picture = pixels(height, width)
    file = tmp_path / "picture.png"
    file.write_bytes(encode(picture))
    assert image_message(file).encoded == image_message(str(file)).encoded == image_message(file.read_bytes()).encoded
    for image in (picture, np.asfortranarray(picture), Image.fromarray(picture)):
        raw = image_message(image).raw
        assert (raw.height, raw.width, raw.data) == (height, width, picture.tobytes())
    upload = open_encoded(file_of(image_message(picture)), Limits())
    np.testing.assert_array_equal(upload.pixels(), picture)


def test_what_is_no_image_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"cannot read .*nothing\.jpg: No such file") as missing:
        image_message(tmp_path / "nothing.jpg")
    assert missing.value.field == "images"
    with pytest.raises(InvalidInput, match=r"cannot read .*: Is a directory"):
        image_message(tmp_path)
    with pytest.raises(InvalidInput, match=r"uint8 .height, width, 3."):
        image_message(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(TypeError, match="an image is a path"):
        image_message(17)  # type: ignore[arg-type]


def test_poolings_and_top_k_as_people_write_them() -> None:
    assert as_pooling("gem(3)+max@1,2", normalize=True) == Pooling.parse("gem(3)+max@1,2", l2_normalize=True)
    assert as_pooling(Pooling.parse("max"), normalize=True).l2_normalize
    assert as_pooling(Pooling.parse("max", l2_normalize=True), normalize=False).l2_normalize
    with pytest.raises(InvalidInput, match="top_k is -1; it must be 0") as negative:
        make_query(-1, (), False, False, False)
    assert negative.value.field == "top_k"
