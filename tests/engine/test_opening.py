"""Headers of files, read beside the queue: as many wait as there is room for, and a burst of more is refused."""

from concurrent.futures import Future

import pytest

from fullframe.engine.opening import MOST_OPENING, Opening
from fullframe.engine.plane import EncodedImage, Plane
from fullframe.errors import InvalidInput, Overloaded
from fullframe.image import Limits, Picture
from tests.pictures import encode, pixels
from tests.serving import eventually

TIFF = encode(pixels(9, 7), "TIFF")


def test_a_burst_is_refused_and_not_queued_without_end() -> None:
    plane = Plane([], limits=Limits(), workers=1)
    opened: list[Future[Picture]] = []
    refused = most = 0
    for _ in range(10_000):
        try:
            future = plane.open(EncodedImage(TIFF))
        except Overloaded as full:
            refused += 1
            assert full.retry_after > 0
        else:
            assert isinstance(future, Future), "its header is not among the quick ones"
            opened.append(future)
        most = max(most, plane.counters().opening)
    assert refused > 0 and most <= MOST_OPENING
    assert {(future.result().height, future.result().width) for future in opened} == {(9, 7)}
    eventually(lambda: plane.counters().opening == 0)
    assert (plane.counters().refused, plane.counters().created) == (refused, 0)
    assert len(opened) + refused == 10_000
    plane.close()


def test_what_is_cancelled_or_fails_makes_room() -> None:
    opening, most = Opening(most=4), Limits()
    for _ in range(50):
        futures = [opening.submit(TIFF, most), opening.submit(b"II*\x00 no image", most)]
        futures += [opening.submit(TIFF, most) for _ in range(2)]
        futures[-1].cancel()
        with pytest.raises(InvalidInput):
            futures[1].result(10)
        eventually(lambda: opening.counts() == (0, 0))
    opening.close()
