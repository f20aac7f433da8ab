"""`fullframe.load`: the same answers without a server, for every kind of image source."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fullframe
from fullframe.engine.plane import open_plane
from fullframe.engine.predictor import Predictor
from fullframe.engine.progress import Progress
from fullframe.engine.query import Answer
from fullframe.errors import FullframeError, InvalidInput, InvalidModel, NotFound
from fullframe.image import ImageSource
from tests.models import write_model
from tests.pictures import encode, pixels


@pytest.fixture(scope="module")
def predictor(tiny_model: Path) -> Iterator[Predictor]:
    with fullframe.load(str(tiny_model)) as opened:
        yield opened


def test_every_source_gives_the_same_answer(predictor: Predictor, tmp_path: Path) -> None:
    picture = pixels(33, 41)
    file = tmp_path / "picture.png"
    file.write_bytes(encode(picture))
    sources: list[ImageSource] = [str(file), file, encode(picture), picture, Image.fromarray(picture)]
    first, *others = [predictor.embed(source, "gem(3)+max@1,2") for source in sources]
    for other in others:
        assert other.tobytes() == first.tobytes()


def test_classify_embed_and_predict_agree(predictor: Predictor) -> None:
    picture = pixels(50, 60)
    answer = predictor.predict(picture, top_k=3, poolings=["avg", "max"], logits=True, class_map=True)
    assert predictor.classify(picture, top_k=3) == answer.classes
    assert predictor.embed(picture).tobytes() == answer.embeddings[0].tobytes()
    assert answer.class_map is not None and answer.logits is not None
    np.testing.assert_allclose(answer.class_map.mean((1, 2)), answer.logits, atol=1e-5)
    unit = predictor.embed(picture, "max", normalize=True)
    np.testing.assert_allclose(unit * np.linalg.norm(answer.embeddings[1]), answer.embeddings[1], rtol=1e-5)


def test_a_stream_keeps_order_reads_lazily_and_survives_bad_images(predictor: Predictor) -> None:
    read = 0

    def images() -> Iterator[ImageSource]:
        nonlocal read
        for number in range(30):
            read += 1
            yield b"broken" if number % 7 == 3 else pixels(number + 1, 20)

    seen = []
    for number, outcome in predictor.stream(images(), in_flight=4):
        assert read <= number + 4 + 1
        seen.append(number)
        if number % 7 == 3:
            assert isinstance(outcome, FullframeError)
        else:
            assert isinstance(outcome, Answer) and outcome.height == number + 1
    assert seen == list(range(30))


def test_a_stream_waits_for_room_in_the_engine(tiny_model: Path) -> None:
    plane = open_plane([str(tiny_model)], workers=1, max_pixels_in_flight=1000)
    with Predictor(plane) as predictor:
        outcomes = [outcome for _, outcome in predictor.stream([pixels(30, 30)] * 8)]
    assert [type(outcome) for outcome in outcomes] == [Answer] * 8


def test_progress_of_images_in_pieces(tiny_model: Path) -> None:
    heard: list[tuple[int, Progress]] = []
    with Predictor(open_plane([str(tiny_model)], tile_pixels=500_000, workers=1)) as predictor:
        images = [pixels(30, 30), pixels(900, 1100), pixels(1000, 700)]
        outcomes = list(predictor.stream(images, on_progress=lambda number, progress: heard.append((number, progress))))
        assert all(isinstance(outcome, Answer) for _, outcome in outcomes)
        for number, least in ((0, 0), (1, 3), (2, 2)):
            shares = [progress.computed for which, progress in heard if which == number]
            assert shares == sorted(set(shares)) and len(shares) >= least
            assert not shares or shares[-1] == 1

        def stop(progress: Progress) -> None:
            raise RuntimeError("enough")

        with pytest.raises(RuntimeError, match="enough"):
            predictor.predict(images[1], on_progress=stop)
        assert predictor.predict(images[0], on_progress=stop).height == 30


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no model at"):
        fullframe.load(str(tmp_path / "absent.onnx"))
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(InvalidModel, match=r"text\.onnx can't be loaded"):
        fullframe.load(str(tmp_path / "text.onnx"))
    with pytest.raises(InvalidInput, match="engine is 'magic'"):
        fullframe.load(engine="magic")  # type: ignore[arg-type]


def test_bad_questions_name_the_argument(predictor: Predictor) -> None:
    with pytest.raises(InvalidInput, match="top_k is -1") as error:
        predictor.classify(pixels(3, 3), top_k=-1)
    assert error.value.field == "top_k"
    with pytest.raises(InvalidInput, match="unknown kind"):
        predictor.embed(pixels(3, 3), "median")
    with pytest.raises(InvalidInput, match="in_flight is 0"):
        next(predictor.stream([], in_flight=0))


def test_a_failure_of_the_runtime_is_one_image_s(tmp_path: Path) -> None:
    model = write_model(tmp_path / "breaks.onnx", breaks_above=30)
    with fullframe.load(str(model)) as breaking:
        outcomes = [outcome for _, outcome in breaking.stream([pixels(20, 20), pixels(40, 20), pixels(30, 20)])]
    assert [isinstance(outcome, Answer) for outcome in outcomes] == [True, False, True]
    assert isinstance(outcomes[1], FullframeError)
    assert str(outcomes[1]).startswith("the model failed: ")
