"""Size classes: few, and near to what they stand for."""

from fullframe.engine.size_classes import count_class, side_class


def test_few_sides_are_enough_for_all_sizes() -> None:
    classes = [side_class(side) for side in range(1, 4097)]
    assert classes == sorted(classes)
    assert all(side <= padded <= side * 9 / 8 for side, padded in enumerate(classes, 1))
    assert len(set(classes)) == 16 + 8 * 8


def test_few_counts_are_enough_for_all_batches() -> None:
    classes = [count_class(count) for count in range(1, 33)]
    assert sorted(set(classes)) == [*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32]
    assert all(count <= padded < count * 5 / 4 for count, padded in enumerate(classes, 1))
