"""The caller's words -> requests; responses -> the engine's words."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fullframe.client.uploads import unreadable
from fullframe.engine.pooling import Pooling
from fullframe.engine.query import Answer, ClassScore, FloatArray, Query, Timings
from fullframe.model.contract import FLOAT32, Contract, Tiles
from fullframe.v1 import vision_pb2 as pb

if TYPE_CHECKING:
    from fullframe.image import ImageSource

_NO_LIMIT: Final = 2**62  # pixels: limits are the server's to set


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that a server answers with.

    Attributes:
        default: it answers where no name is given.
        digest: SHA-256 of its file; "" where the server does not say.
    """

    name: str
    version: str
    default: bool
    contract: Contract
    digest: str


def options_message(query: Query) -> pb.PredictOptions:
    """A query as it travels, where a top_k of 0 asks for the server's default and -1 for none."""
    return pb.PredictOptions(
        top_k=query.top_k or -1,
        poolings=[_pooling(pooling) for pooling in query.poolings],
        logits=query.logits,
        feature_map=query.feature_map,
        class_map=query.class_map,
        max_map_side=query.max_map_side,
    )


def image_message(image: "ImageSource") -> pb.Image:
    """Files travel as they are; arrays and PIL images as raw pixels.

    Raises:
        InvalidInput: a file that cannot be read (the message names it), or an array of another kind.
        TypeError: none of what can be an image.
    """
    if isinstance(image, bytes):
        return pb.Image(encoded=image)
    if isinstance(image, str | os.PathLike):
        try:
            return pb.Image(encoded=Path(image).read_bytes())
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise unreadable(image, error) from error
    from fullframe.image import Limits, open_source  # loads libvips, which files do not need

    pixels = open_source(image, Limits(max_pixels=_NO_LIMIT)).pixels()
    height, width, _ = pixels.shape
    return pb.Image(raw=pb.RawImage(height=height, width=width, data=pixels.tobytes()))


def file_of(image: pb.Image) -> bytes:
    """An image as an encoded file; raw pixels become a PNG, which holds them exactly."""
    if image.WhichOneof("source") == "encoded":
        return image.encoded
    from fullframe.image import encode_png

    pixels = np.frombuffer(image.raw.data, np.uint8)
    return encode_png(pixels.reshape(image.raw.height, image.raw.width, 3))


def answer_from(message: pb.Prediction) -> Answer:
    """What a server says of one image whose status is OK."""
    info = message.info
    return Answer(
        info.height,
        info.width,
        classes=[ClassScore(c.index, c.label, c.probability, c.logit) for c in message.classes],
        embeddings=[_vector(vector) for vector in message.embeddings],
        logits=_vector(message.logits) if message.HasField("logits") else None,
        feature_map=_map(message.feature_map) if message.HasField("feature_map") else None,
        class_map=_map(message.class_map) if message.HasField("class_map") else None,
        timings=Timings(info.timings.decode_ms / 1000, info.timings.queue_ms / 1000, info.timings.compute_ms / 1000),
    )


def served_model(message: pb.ModelInfo) -> ServedModel:
    """A model's contract as its server tells it."""
    more: dict[str, Any] = {key: json.loads(value) for key, value in message.metadata.items()}
    contract = Contract(
        name=more.get("name", message.model.name),
        labels=tuple(message.labels),
        stride=_pair(message.stride),
        receptive_field=_pair(message.receptive_field),
        start=tuple(more["start"]),
        smallest_size=_pair(message.smallest_size),
        feature_channels=message.feature_channels,
        pooling=more["pooling"],
        logits=more["logits"],
        precision=more.get("precision", FLOAT32),
        normalisation=more.get("normalisation", {}),
        training=more.get("training", {}),
        tiles=Tiles.from_fields(more["tiles"]) if more.get("tiles") else None,
        ragged=more.get("ragged", False),
    )
    ref = message.model
    return ServedModel(ref.name, ref.version, message.default, contract, ref.digest)


def model_ref(model: str | ServedModel, version: str) -> pb.ModelRef:
    """What a request names: a model by name and version, or the very one that a server told of."""
    if isinstance(model, ServedModel):
        return pb.ModelRef(name=model.name, version=model.version, digest=model.digest)
    return pb.ModelRef(name=model, version=version)


def _pooling(pooling: Pooling) -> pb.Pooling:
    terms = [pb.Pooling.Term(kind=f"KIND_{term.kind.upper()}", p=term.p) for term in pooling.terms]
    return pb.Pooling(terms=terms, levels=pooling.levels, l2_normalize=pooling.l2_normalize)


def _vector(message: pb.Vector) -> FloatArray:
    # Packed floats end the message as a little-endian array's own bytes: reading those is many times as fast.
    data, count = message.SerializeToString(), len(message.values)
    return np.frombuffer(data, "<f4", count, len(data) - 4 * count).astype(np.float32)


def _map(message: pb.FeatureMap) -> FloatArray:
    values = np.frombuffer(message.data, "<f4").astype(np.float32)  # a copy: an answer's arrays are the caller's
    return values.reshape(message.channels, message.height, message.width)


def _pair(extent: pb.Extent) -> tuple[int, int]:
    return extent.height, extent.width
