import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullframe.errors import InvalidInput
from fullframe.learn.augment import cut_mix, random_crop
from fullframe.learn.settings import Augmentation


def gradient(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 255 // height, columns * 255 // width, rows * 0], 2).astype(np.uint8)


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 48), st.integers(0, 999))
@settings(max_examples=150, deadline=None)
def test_any_image_gives_the_asked_size(height: int, width: int, size: int, seed: int) -> None:
    crop = random_crop(gradient(height, width), size, Augmentation(reach=0.5), np.random.default_rng(seed))
    assert crop.shape == (3, size, size)
    assert crop.dtype == torch.uint8


def test_a_whole_image_of_the_batch_s_size_is_only_moved() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    how = Augmentation(whole=1, reach=0.125, flip=0)
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    windows = [padded[y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    found = set()
    for seed in range(200):
        crop = random_crop(pixels, 32, how, np.random.default_rng(seed)).permute(1, 2, 0).numpy()
        found.add(next(i for i, window in enumerate(windows) if np.array_equal(window, crop)))
    assert len(found) > 60


def test_area_aspect_and_flip_are_kept() -> None:
    pixels = gradient(100, 100)
    how = Augmentation(whole=0, reach=0, area=(0.25, 0.3), aspect=1.1, flip=0.5)
    mirrored = 0
    for seed in range(100):
        crop = random_crop(pixels, 50, how, np.random.default_rng(seed)).float()
        height = (crop[0, -1, 25] - crop[0, 0, 25]).item() / 255
        width = (crop[1, 25, -1] - crop[1, 25, 0]).item() / 255
        assert 0.21 < height * abs(width) < 0.31
        mirrored += width < 0
    assert 30 < mirrored < 70


def test_sizes_are_drawn_by_weight() -> None:
    how = Augmentation(sizes=(16, 32, 64), size_weights=(1, 3, 0))
    rng = np.random.default_rng(0)
    drawn = [how.draw_size(rng) for _ in range(2000)]
    assert set(drawn) == {16, 32}
    assert 0.7 < drawn.count(32) / 2000 < 0.8


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": ()},
        {"sizes": (0,)},
        {"size_weights": (1,)},
        {"size_weights": (0, 0, 0, 0, 0)},
        {"area": (0, 1)},
        {"area": (0.5, 1.5)},
        {"aspect": 0.5},
        {"reach": -1},
        {"whole": 2},
        {"flip": 2},
    ],
)
def test_a_bad_setting_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(InvalidInput) as caught:
        Augmentation(**change)  # type: ignore[arg-type]
    assert caught.value.field in change


@given(st.integers(2, 9), st.integers(1, 40), st.integers(1, 40), st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_mixed_images_hold_a_rectangle_of_another_and_know_how_much(
    count: int, height: int, width: int, seed: int
) -> None:
    grey = torch.arange(count).view(-1, 1, 1, 1).expand(count, 3, height, width)
    mixed, other, share = cut_mix(grey, np.random.default_rng(seed))
    for index, image in enumerate(mixed):
        foreign = (image != index).any(0)
        if other[index] == index:
            assert not foreign.any()
            continue
        assert share[index] == pytest.approx(1 - foreign.float().mean().item())
        assert (image[:, foreign] == other[index]).all()
        rows, columns = foreign.any(1), foreign.any(0)
        assert torch.equal(foreign, rows[:, None] & columns), "it is a rectangle"
        assert all((line.int().diff() != 0).sum() <= 2 for line in (rows, columns)), "in one piece"
    assert sorted(other.tolist()) == list(range(count))
