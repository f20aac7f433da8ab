"""Fifty clients at once, images of many sizes: every answer has the bits that the same request gets alone."""

import asyncio
import random
from typing import Any

import grpc
import numpy as np

from fullframe.v1 import vision_pb2 as pb
from fullframe.v1.vision_pb2_grpc import VisionServiceStub
from tests.pictures import Pixels, encode, pixels
from tests.serving import CHANNEL_OPTIONS, Running, stub

CLIENTS = 50
SIZES = [(1, 1), (1, 500), (500, 1), (7, 5), (31, 33), (64, 64), (224, 224), (300, 451), (767, 1023), (1200, 900)]
OPTIONS = pb.PredictOptions(
    top_k=3, poolings=[pb.Pooling(), pb.Pooling(levels=[1, 2])], logits=True, feature_map=True, class_map=True
)


def request(*pictures: Pixels) -> pb.PredictRequest:
    images = [pb.Image(encoded=encode(picture, "JPEG", quality=95)) for picture in pictures]
    return pb.PredictRequest(images=images, options=OPTIONS)


def bits(response: pb.PredictResponse) -> bytes:
    """The answer without its timings, which alone may differ."""
    for result in response.results:
        assert result.info.status.code == 0
        result.info.ClearField("timings")
    return response.SerializeToString(deterministic=True)


def test_answers_in_a_crowd_are_those_alone(server: Running) -> None:
    pictures = [pixels(*size) for size in SIZES]
    requests = [request(picture) for picture in pictures] + [request(*pictures[2:6]), request(*pictures[5:8])]
    with stub(server.target) as client:
        alone = [bits(client.Predict(r)) for r in requests]
    assert len(set(alone)) == len(alone)

    async def client_of_its_own(seed: int) -> None:
        order = random.Random(seed).sample(range(len(requests)), 5)
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(server.target, options=options) as channel:
            predict: Any = VisionServiceStub(channel).Predict
            answers = await asyncio.gather(*(predict(requests[i]) for i in order))
        for i, answer in zip(order, answers, strict=True):
            assert bits(answer) == alone[i], f"client {seed}: request {i} was answered differently"

    async def crowd() -> None:
        await asyncio.gather(*map(client_of_its_own, range(CLIENTS)))

    asyncio.run(crowd())


def test_the_comparison_can_fail(server: Running) -> None:
    """A picture padded by one column, or with one pixel a little brighter, does not pass for the same."""
    picture = pixels(64, 64)
    brighter = picture.copy()
    brighter[20, 20] = np.where(brighter[20, 20] > 127, 0, 255)
    with stub(server.target) as client:
        one, again, padded, touched = (
            bits(client.Predict(request(p)))
            for p in (picture, picture, np.pad(picture, ((0, 0), (0, 1), (0, 0))), brighter)
        )
    assert one == again
    assert one != padded
    assert one != touched
