"""Pieces on PyTorch: ONNX Runtime's answers, merged where they are computed, a bounded way ahead of the device."""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fullframe.engine.base import Engine
from fullframe.engine.fused import TorchEngine
from fullframe.engine.merge import Merging
from fullframe.engine.ort import OrtEngine
from fullframe.engine.pooling import KINDS, Pooling
from fullframe.engine.query import Answer, FloatArray, Query
from fullframe.engine.tiles import Piece, Tiler
from fullframe.image import Pixels
from fullframe.image.regions import HeldRegions
from fullframe.model.repository import BUNDLED
from tests.models import write_model
from tests.pictures import pixels

PROMISE = 1e-4
POOLINGS = tuple(Pooling.parse(f"{kind}@1,2") for kind in KINDS)
CUTS = [(15_000, 10**6), (15_000, 150), (10**6, 10**6), (10**6, 150)]
"""Pixels of a piece and of a band: several strips, and bands; one strip, and one in each band."""


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "chain": write_model(folder / "chain.onnx", channels=8, depth=3),
        "head": write_model(folder / "head.onnx", channels=4, depth=1, head="windows"),
        "bundled": BUNDLED,
    }


def merged(engine: Engine, tiler: Tiler, picture: Pixels, query: Query) -> Merging:
    """An image in pieces, up to its answer."""
    height, width, _ = picture.shape
    merging = Merging(query, engine.contract, tiler.map_size(height, width), tiler.head)
    for piece in tiler.pieces(HeldRegions(picture), merging.outputs):
        merging.add(piece)
    return merging


def numbers(answer: Answer) -> Iterator[tuple[str, FloatArray | None]]:
    yield from zip(map(str, POOLINGS), answer.embeddings, strict=True)
    for name in ("logits", "feature_map", "class_map"):
        yield name, getattr(answer, name)


def assert_kept(found: Answer, wanted: Answer) -> None:
    for (name, ours), (_, theirs) in zip(numbers(found), numbers(wanted), strict=True):
        if theirs is None or ours is None:
            assert ours is theirs, name
            continue
        assert isinstance(ours, np.ndarray) and ours.dtype == np.float32 and ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= PROMISE * max(1.0, np.abs(theirs).max()), name


@pytest.mark.parametrize("side", [0, 9])
@pytest.mark.parametrize("name", ["chain", "head", "bundled"])
def test_answers_are_onnx_runtime_s(device: str, models: dict[str, Path], name: str, side: int) -> None:
    ours, theirs = TorchEngine(models[name], device=device), OrtEngine(models[name])
    picture = pixels(330, 260)
    query = Query(3, POOLINGS, True, feature_map=True, class_map=ours.contract.has_class_map, max_map_side=side)
    cuts = CUTS if name != "bundled" else CUTS[:1]
    tilers = Tiler(ours), Tiler(theirs)
    for cut in cuts:
        answers = []
        for tiler in map(copy, tilers):
            tiler._piece_pixels, tiler._band_width = cut
            answers.append(merged(tiler._engine, tiler, picture, query).answer(330, 260))
        assert_kept(*answers)


def test_a_piece_left_out_of_the_merge_would_not_pass(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    ours, theirs = TorchEngine(models["chain"], device="cpu"), OrtEngine(models["chain"])
    picture, query = pixels(330, 260), Query(3, POOLINGS, True)
    wanted = merged(theirs, Tiler(theirs), picture, query).answer(330, 260)
    add = Merging.add

    def forgetful(self: Merging, piece: Piece) -> None:
        add(self, replace(piece, maps={name: each * (piece.top == 0) for name, each in piece.maps.items()}))

    monkeypatch.setattr(Merging, "add", forgetful)
    with pytest.raises(AssertionError):
        assert_kept(merged(ours, Tiler(ours, piece_pixels=15_000), picture, query).answer(330, 260), wanted)


@pytest.mark.parametrize("cut", CUTS)
def test_pieces_stay_where_they_are_computed(device: str, models: dict[str, Path], cut: tuple[int, int]) -> None:
    engine = TorchEngine(models["chain"], device=device)
    tiler = Tiler(engine, piece_pixels=cut[0], band_width=cut[1])
    for piece in tiler.pieces(HeldRegions(pixels(330, 260)), ["feature_map", "class_map"]):
        for part in piece.maps.values():
            assert isinstance(part, torch.Tensor) and part.device.type == device
            assert piece.cells == part.shape[1] * part.shape[2]


def test_one_piece_is_read_while_another_is_computed_and_no_more_are_launched(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a device that has computed what has been waited for, and nothing else."""
    engine = OrtEngine(models["chain"])
    launched, computed, ahead = [0], [0], list[int]()

    def fence() -> Callable[[], object]:
        def wait(number: int = launched[0]) -> None:
            computed[0] = number

        return wait

    monkeypatch.setattr(engine, "fence", fence)
    for _ in Tiler(engine, piece_pixels=9_000).pieces(HeldRegions(pixels(330, 260)), ["feature_map"]):
        launched[0] += 1
        ahead.append(launched[0] - computed[0])
    assert ahead[:3] == [1, 2, 2] and set(ahead) == {1, 2}
    assert len(ahead) > 5


@pytest.mark.gpu
@pytest.mark.parametrize("side", [0, 9])
@pytest.mark.parametrize("cut", CUTS)
def test_the_host_waits_for_nothing_between_pieces(models: dict[str, Path], cut: tuple[int, int], side: int) -> None:
    engine = TorchEngine(models["chain"], device="cuda")
    tiler = Tiler(engine, piece_pixels=cut[0], band_width=cut[1])
    picture, query = pixels(330, 260), Query(3, POOLINGS, True, feature_map=True, class_map=True, max_map_side=side)
    for _ in range(2):  # in which weights go up, kernels are compiled and launches recorded
        wanted = merged(engine, tiler, picture, query).answer(330, 260)
    torch.cuda.set_sync_debug_mode("error")
    try:
        merging = merged(engine, tiler, picture, query)
        with pytest.raises(RuntimeError):
            torch.ones(1, device="cuda").item()  # the control
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_kept(merging.answer(330, 260), wanted)
