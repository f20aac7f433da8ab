"""Protobuf messages <-> the engine's words."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Final

import numpy as np
from google.rpc.status_pb2 import Status

from fullframe.engine.plane import EncodedImage, Plane, RawImage, Served
from fullframe.engine.pooling import Pooling, Term
from fullframe.engine.query import Answer, FloatArray, Query
from fullframe.errors import InvalidInput
from fullframe.v1 import vision_pb2 as pb

DEFAULT_TOP_K: Final = 5
MAX_TOP_K: Final = 1_000_000
MAX_POOLINGS: Final = 16

# Of Prediction.poolings' wire format: field 1, a run of bytes.
_VALUES_TAG: Final = b"\x0a"
_AROUND_ARRAYS: Final = 1024  # bytes: generous for everything in a result that is no array
_PER_CLASS: Final = 64

_KINDS: Final = {
    number: "avg" if name == "KIND_UNSPECIFIED" else name.removeprefix("KIND_").lower()
    for name, number in pb.Pooling.Kind.items()
}


def source_of(image: pb.Image) -> EncodedImage | RawImage:
    """What to open; raises InvalidInput for an image with neither file nor pixels."""
    match image.WhichOneof("source"):
        case "encoded":
            return EncodedImage(image.encoded)
        case "raw":
            return RawImage(image.raw.data, image.raw.height, image.raw.width)
    raise InvalidInput("the image has no source: set encoded (a file's bytes) or raw (RGB pixels)", "images")


def classify_query(request: pb.ClassifyRequest) -> Query:
    """Raises InvalidInput for a top_k out of range."""
    return Query(top_k=_top_k(request.top_k))


def embed_query(request: pb.EmbedRequest) -> Query:
    """Raises InvalidInput for a pooling that cannot be."""
    return Query(top_k=0, poolings=(_pooling(request.pooling),))


def predict_query(options: pb.PredictOptions) -> Query:
    """Raises InvalidInput naming the option at fault."""
    if len(options.poolings) > MAX_POOLINGS:
        raise InvalidInput(f"{len(options.poolings)} poolings; one request takes at most {MAX_POOLINGS}", "poolings")
    return Query(
        top_k=0 if options.top_k == -1 else _top_k(options.top_k, none=", or -1 for none"),
        poolings=tuple(_pooling(pooling) for pooling in options.poolings),
        logits=options.logits,
        feature_map=options.feature_map,
        class_map=options.class_map,
        max_map_side=options.max_map_side,
    )


def answer_bytes(answer: Answer) -> int:
    """About how long the answer's message is; never less."""
    maps = [array for array in (answer.logits, answer.feature_map, answer.class_map) if array is not None]
    labels = sum(_PER_CLASS + 4 * len(score.label) for score in answer.classes)
    return _AROUND_ARRAYS + labels + sum(array.nbytes for array in (*answer.embeddings, *maps))


def classification(outcome: Answer | Status) -> pb.ClassifyResponse.Result:
    """One image's classes, or why there are none."""
    if isinstance(outcome, Status):
        return pb.ClassifyResponse.Result(info=pb.ImageInfo(status=outcome))
    return pb.ClassifyResponse.Result(info=_info(outcome), classes=_classes(outcome))


def embedding(outcome: Answer | Status) -> pb.EmbedResponse.Result:
    """One image's features, or why there are none."""
    if isinstance(outcome, Status):
        return pb.EmbedResponse.Result(info=pb.ImageInfo(status=outcome))
    return pb.EmbedResponse.Result(info=_info(outcome), embedding=_vector(outcome.embeddings[0]))


def prediction(outcome: Answer | Status) -> pb.Prediction:
    """All that was asked of one image, or why there is nothing."""
    if isinstance(outcome, Status):
        return pb.Prediction(info=pb.ImageInfo(status=outcome))
    return pb.Prediction(
        info=_info(outcome),
        classes=_classes(outcome),
        embeddings=[_vector(vector) for vector in outcome.embeddings],
        logits=None if outcome.logits is None else _vector(outcome.logits),
        feature_map=None if outcome.feature_map is None else _map(outcome.feature_map),
        class_map=None if outcome.class_map is None else _map(outcome.class_map),
    )


def model_ref(model: Served) -> pb.ModelRef:
    """Which model and version answered."""
    return pb.ModelRef(name=model.name, version=model.version, digest=model.digest)


def asked_model(plane: Plane, ref: pb.ModelRef) -> Served:
    """The model that a request names; raises NotFound."""
    return plane.model(ref.name, ref.version, ref.digest)


def model_info(model: Served) -> pb.ModelInfo:
    """A model's contract."""
    contract = model.contract
    more = {
        "name": contract.name,
        "start": contract.start,
        "pooling": contract.pooling,
        "logits": contract.logits,
        "precision": contract.precision,
        "normalisation": contract.normalisation,
        "training": contract.training,
        "tiles": None if contract.tiles is None else asdict(contract.tiles),
        "ragged": contract.ragged,
    }
    return pb.ModelInfo(
        model=model_ref(model),
        default=model.default,
        labels=contract.labels,
        feature_channels=contract.feature_channels,
        stride=_extent(contract.stride),
        receptive_field=_extent(contract.receptive_field),
        smallest_size=_extent(contract.smallest_size),
        has_class_map=contract.has_class_map,
        metadata={key: json.dumps(value) for key, value in more.items()},
    )


def _top_k(given: int, none: str = "") -> int:
    if not 0 <= given <= MAX_TOP_K:
        raise InvalidInput(
            f"top_k is {given}; it must be 1 to {MAX_TOP_K}, or 0 for the best {DEFAULT_TOP_K}{none}", "top_k"
        )
    return given or DEFAULT_TOP_K


def _pooling(message: pb.Pooling) -> Pooling:
    terms = tuple(_term(term) for term in message.terms)
    return Pooling(terms or (Term("avg"),), tuple(message.levels) or (1,), message.l2_normalize)


def _term(message: pb.Pooling.Term) -> Term:
    if message.kind not in _KINDS:
        names = ", ".join(pb.Pooling.Kind.keys()[1:])
        raise InvalidInput(f"pooling: no kind has the number {message.kind}; there are {names}", "pooling")
    # A float on the wire stands for the decimal that was written: 3.3, not 3.2999999523.
    return Term(_KINDS[message.kind], float(str(np.float32(message.p))) if message.HasField("p") else None)


def _info(answer: Answer) -> pb.ImageInfo:
    timings = answer.timings
    return pb.ImageInfo(
        height=answer.height,
        width=answer.width,
        timings=pb.Timings(
            decode_ms=timings.decode * 1000, queue_ms=timings.queue * 1000, compute_ms=timings.compute * 1000
        ),
    )


def _classes(answer: Answer) -> Iterable[pb.ClassScore]:
    return [
        pb.ClassScore(index=score.index, label=score.label, probability=score.probability, logit=score.logit)
        for score in answer.classes
    ]


def _vector(values: FloatArray) -> pb.Vector:
    """Packed floats on the wire are a little-endian array's own bytes: parsing those is up to 60 times as fast."""
    data = values.astype("<f4", copy=False).tobytes()
    return pb.Vector.FromString(_VALUES_TAG + _varint(len(data)) + data)


def _varint(number: int) -> bytes:
    """A number as protobuf writes it: seven bits a byte, lowest first, the eighth set while more follow."""
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)


def _map(values: FloatArray) -> pb.FeatureMap:
    channels, height, width = values.shape
    return pb.FeatureMap(channels=channels, height=height, width=width, data=values.astype("<f4", copy=False).tobytes())


def _extent(size: tuple[int, int]) -> pb.Extent:
    return pb.Extent(height=size[0], width=size[1])
