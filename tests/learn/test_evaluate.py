"""Nearest neighbours and pictures, on figures that can be checked by hand."""

from pathlib import Path

import numpy as np
import pytest

from fullframe.engine.ort import OrtEngine
from fullframe.engine.pooling import Pooling, pool
from fullframe.errors import InvalidInput
from fullframe.learn.data import Image
from fullframe.learn.evaluate import ask, neighbour_accuracy, resize_shorter_side
from fullframe.learn.plot import plot_accuracy, plot_confusion
from fullframe.model.repository import BUNDLED


def directions(*degrees: float) -> np.ndarray:
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def test_the_nearest_by_angle_decide() -> None:
    bank = directions(0, 5, 10, 90, 95, 100) * np.array([[1], [50], [3], [1], [0.1], [9]], np.float32)
    labels = np.array([0, 0, 1, 1, 1, 0])
    queries, truth = directions(2, 94, 7, 94), np.array([0, 1, 1, 0])
    assert neighbour_accuracy(bank, labels, queries, truth, k=3) == 0.5
    assert neighbour_accuracy(bank, labels, queries[:2], truth[:2], k=3) == 1
    assert neighbour_accuracy(bank, labels, queries, np.array([0, 1, 0, 1]), k=1) == 1


def test_a_vector_of_zeros_has_neighbours_too() -> None:
    bank = np.concatenate([np.zeros((3, 2), np.float32), directions(0, 90)])
    assert (
        neighbour_accuracy(bank, np.zeros(5, np.int64), np.zeros((2, 2), np.float32), np.zeros(2, np.int64), k=2) == 1
    )


@pytest.fixture(scope="module")
def noise() -> list[Image]:
    rng = np.random.default_rng(0)
    return [Image(str(i), b"", i % 10, rng.integers(0, 256, (20, 30 + i, 3), np.uint8)) for i in range(12)]


def test_features_are_the_engine_s_in_the_images_order(noise: list[Image]) -> None:
    engine = OrtEngine(BUNDLED)
    found = ask(BUNDLED, noise, engine.contract.labels, 40, ["max", "avg@1,2"]).pooled
    for index, image in enumerate(noise):
        feature_map = engine.run(resize_shorter_side(image.pixels(), 40), ["feature_map"])["feature_map"]
        for name, rows in found.items():
            np.testing.assert_allclose(rows[index], pool(feature_map, Pooling.parse(name)), rtol=1e-6, atol=1e-6)


def test_predictions_index_the_asked_labels(noise: list[Image]) -> None:
    known = OrtEngine(BUNDLED).contract.labels
    all_of_them = ask(BUNDLED, noise, known, 0).classes
    backwards = ask(BUNDLED, noise, known[::-1], 0).classes
    assert np.array_equal(backwards, 9 - all_of_them)
    rest = [label for index, label in enumerate(known) if index != all_of_them[0]]
    assert ask(BUNDLED, noise[:1], rest, 0).classes.tolist() == [-1]
    with pytest.raises(InvalidInput, match="no class shark"):
        ask(BUNDLED, noise, ["cat", "shark"], 0)
    with pytest.raises(InvalidInput, match="no images"):
        ask(BUNDLED, [], known, 0)


def test_accuracy_by_size_is_a_picture() -> None:
    ours, other = {"24": 0.5, "32": 0.75}, {"24": 0.25, "32": 0.75}
    picture = plot_accuracy({"float32": ours, "ResNet-20": other})
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture != plot_accuracy({"float32": other, "ResNet-20": ours})


def test_a_confusion_matrix_is_a_picture(tmp_path: Path) -> None:
    picture = plot_confusion(np.array([[8, 2], [0, 0]]), ["cat", "dog"])
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture != plot_confusion(np.array([[2, 8], [0, 0]]), ["cat", "dog"])
