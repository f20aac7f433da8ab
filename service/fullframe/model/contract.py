"""The contract of a served model: what its ONNX file holds, beside the graph, that an engine needs.

Input `images` uint8 [N, H, W, 3]; outputs `features` [N, C], `logits` [N, K], `feature_map` [N, C, h, w] and,
where the head is linear after average pooling, `class_map` [N, K, h, w], all float32. The rest is metadata
under `fullframe.`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from fullframe.errors import InvalidModel

VERSION: Final = "1"
OPSET: Final = 18
"""What an exported file has, and a converted one at least."""
PREFIX: Final = "fullframe."
INPUT: Final = "images"
SIZES: Final = "sizes"
MAP_SIZES: Final = "map_sizes"
MAPS: Final = ("feature_map", "class_map")
OUTPUTS: Final = ("features", "logits", *MAPS)

FLOAT32: Final = "float32"
INT8: Final = "int8"

LOGITS_FROM_MAP: Final = "mean(class_map)"
LOGITS_FROM_FEATURES: Final = "head(features)"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One input or output of a graph: `shape` holds an int, a symbol's name, or None for each axis."""

    name: str
    dtype: str
    shape: Sequence[int | str | None]


@dataclass(frozen=True)
class Tiles:
    """Whether a model's maps can be put together from tiles of an image, exactly.

    Attributes:
        alignment: tiles begin at multiples of these, (height, width) in pixels; multiples of the stride.
        obstacles: why they can't, each naming a node of the graph; none: they can.
    """

    alignment: tuple[int, int]
    obstacles: tuple[str, ...] = ()

    @property
    def possible(self) -> bool:
        """Whether they can."""
        return not self.obstacles

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Tiles":
        """What asdict made; raises InvalidModel naming the field that is missing or wrong."""
        alignment, obstacles = fields.get("alignment"), fields.get("obstacles")
        if not isinstance(obstacles, list | tuple) or not all(isinstance(each, str) for each in obstacles):
            raise InvalidModel(f"{PREFIX}tiles must have 'obstacles', a list of strings")
        return cls(_as_pair("tiles.alignment", alignment, minimum=1), tuple(obstacles))


@dataclass(frozen=True)
class Contract:
    """A model's metadata; sizes are (height, width) in pixels.

    Attributes:
        name: what the model calls itself; a server may serve it under another name.
        labels: one per class, in the order of the logits.
        stride: input pixels between neighbouring cells of the feature map.
        receptive_field: input pixels that one cell sees.
        start: the first pixel that cell 0 sees; negative where padding is seen.
        smallest_size: the smallest image the graph can take.
        feature_channels: C.
        pooling: how `features` comes from `feature_map`, as engine.pooling spells it.
        logits: LOGITS_FROM_MAP, or LOGITS_FROM_FEATURES where the head is not linear or pools otherwise: then the graph
            computes them from `features` alone, and that part finishes the features merged from a huge image's pieces.
        precision: FLOAT32, or INT8 of a copy whose convolutions are computed in integers.
        normalisation: what the graph does to pixels first, for people: {"mean": [...], "std": [...]}.
        training: data, recipe, accuracy by size: whatever the maker recorded.
        tiles: whether a huge image can be computed in tiles; None: the file does not say.
        ragged: the graph takes images of different sizes together: a second input `sizes` int64 [N, 2] holds each
            one's height and width, and a further output `map_sizes` int64 [N, 2] those of its maps.
    """

    name: str
    labels: tuple[str, ...]
    stride: tuple[int, int]
    receptive_field: tuple[int, int]
    start: tuple[int, int]
    smallest_size: tuple[int, int]
    feature_channels: int
    pooling: str = "avg"
    logits: str = LOGITS_FROM_MAP
    precision: str = FLOAT32
    normalisation: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    tiles: Tiles | None = None
    ragged: bool = False

    @property
    def has_class_map(self) -> bool:
        """Whether the graph offers `class_map`."""
        return self.logits == LOGITS_FROM_MAP

    @property
    def outputs(self) -> tuple[str, ...]:
        """Those of OUTPUTS that the graph offers."""
        return tuple(name for name in OUTPUTS if self.has_class_map or name != "class_map")

    def to_metadata(self) -> dict[str, str]:
        """The ONNX `metadata_props` that from_metadata reads back."""
        return {
            PREFIX + "contract": VERSION,
            PREFIX + "name": self.name,
            PREFIX + "labels": json.dumps(self.labels),
            PREFIX + "stride": json.dumps(self.stride),
            PREFIX + "receptive_field": json.dumps(self.receptive_field),
            PREFIX + "start": json.dumps(self.start),
            PREFIX + "smallest_size": json.dumps(self.smallest_size),
            PREFIX + "feature_channels": json.dumps(self.feature_channels),
            PREFIX + "pooling": self.pooling,
            PREFIX + "logits": self.logits,
            PREFIX + "precision": self.precision,
            PREFIX + "normalisation": json.dumps(self.normalisation),
            PREFIX + "training": json.dumps(self.training),
            **({} if self.tiles is None else {PREFIX + "tiles": json.dumps(asdict(self.tiles))}),
            **({PREFIX + "ragged": "true"} if self.ragged else {}),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "Contract":
        """Read a file's metadata; raises InvalidModel naming the key that is missing or wrong."""
        version = _text(metadata, "contract")
        if version != VERSION:
            raise InvalidModel(f"{PREFIX}contract is {version!r}; this release reads version {VERSION!r}")
        labels = _json(metadata, "labels", list)
        if not labels or not all(isinstance(label, str) for label in labels):
            raise InvalidModel(f"{PREFIX}labels must be a JSON list of at least one string")
        logits = _text(metadata, "logits")
        if logits not in (LOGITS_FROM_MAP, LOGITS_FROM_FEATURES):
            raise InvalidModel(
                f"{PREFIX}logits is {logits!r}; it must be {LOGITS_FROM_MAP!r} or {LOGITS_FROM_FEATURES!r}"
            )
        precision = metadata.get(PREFIX + "precision", FLOAT32)
        if precision not in (FLOAT32, INT8):
            raise InvalidModel(f"{PREFIX}precision is {precision!r}; it must be {FLOAT32!r} or {INT8!r}")
        ragged = metadata.get(PREFIX + "ragged", "false")
        if ragged not in ("true", "false"):
            raise InvalidModel(f"{PREFIX}ragged is {ragged!r}; it must be 'true' or 'false'")
        channels = _json(metadata, "feature_channels", int)
        if channels < 1:
            raise InvalidModel(f"{PREFIX}feature_channels is {channels}; it must be at least 1")
        return cls(
            name=_text(metadata, "name"),
            labels=tuple(labels),
            stride=_pair(metadata, "stride", minimum=1),
            receptive_field=_pair(metadata, "receptive_field", minimum=1),
            start=_pair(metadata, "start"),
            smallest_size=_pair(metadata, "smallest_size", minimum=1),
            feature_channels=channels,
            pooling=_text(metadata, "pooling"),
            logits=logits,
            precision=precision,
            normalisation=_json(metadata, "normalisation", dict),
            training=_json(metadata, "training", dict),
            tiles=Tiles.from_fields(_json(metadata, "tiles", dict)) if metadata.get(PREFIX + "tiles") else None,
            ragged=ragged == "true",
        )

    def check_graph(self, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]) -> None:
        """Compare a graph's inputs and outputs with this contract; raises InvalidModel naming the tensor."""
        wanted = {INPUT: ("uint8", (None, None, None, 3)), **({SIZES: ("int64", (None, 2))} if self.ragged else {})}
        if [tensor.name for tensor in inputs] != list(wanted):
            found = ", ".join(tensor.name for tensor in inputs) or "none"
            raise InvalidModel(f"the graph's inputs are {found}; the contract has {', '.join(wanted)}")
        for tensor in inputs:
            _check_tensor(tensor, *wanted[tensor.name])
        by_name = {tensor.name: tensor for tensor in outputs}
        if self.ragged:
            if MAP_SIZES not in by_name:
                raise InvalidModel(f"the graph has no output {MAP_SIZES!r}, which a ragged one has")
            _check_tensor(by_name[MAP_SIZES], "int64", (None, 2))
        shapes: dict[str, tuple[int | None, ...]] = {
            "features": (None, None),
            "logits": (None, len(self.labels)),
            "feature_map": (None, self.feature_channels, None, None),
            "class_map": (None, len(self.labels), None, None),
        }
        for name in OUTPUTS:
            if name in by_name:
                _check_tensor(by_name[name], "float", shapes[name])
            elif name in self.outputs:
                raise InvalidModel(f"the graph has no output {name!r}; it has {', '.join(by_name) or 'none'}")


def _check_tensor(tensor: TensorInfo, dtype: str, shape: tuple[int | None, ...]) -> None:
    """`None` in `shape` must be dynamic in the graph; a number must be that number or unknown."""
    if tensor.dtype != f"tensor({dtype})":
        raise InvalidModel(f"{tensor.name!r} is {tensor.dtype}; the contract says tensor({dtype})")
    if len(tensor.shape) != len(shape):
        raise InvalidModel(f"{tensor.name!r} has {len(tensor.shape)} axes; the contract says {len(shape)}")
    for axis, (found, wanted) in enumerate(zip(tensor.shape, shape, strict=True)):
        if wanted is not None and isinstance(found, int) and found != wanted:
            raise InvalidModel(f"axis {axis} of {tensor.name!r} is {found}; it must be {wanted}")
        if wanted is None and isinstance(found, int) and tensor.name != "features":
            raise InvalidModel(f"axis {axis} of {tensor.name!r} is fixed to {found}; it must be dynamic")


def _text(metadata: Mapping[str, str], key: str) -> str:
    value = metadata.get(PREFIX + key)
    if not value:
        raise InvalidModel(f"the file has no metadata {PREFIX}{key}; it does not follow the contract")
    return value


def _json(metadata: Mapping[str, str], key: str, kind: type) -> Any:
    text = _text(metadata, key)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidModel(f"{PREFIX}{key} is not JSON: {error}") from error
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InvalidModel(f"{PREFIX}{key} must be a JSON {kind.__name__}")
    return value


def _pair(metadata: Mapping[str, str], key: str, minimum: int | None = None) -> tuple[int, int]:
    return _as_pair(key, _json(metadata, key, list), minimum)


def _as_pair(key: str, value: Any, minimum: int | None) -> tuple[int, int]:
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or not all(type(v) is int and (minimum is None or v >= minimum) for v in value)
    ):
        at_least = "" if minimum is None else f" of at least {minimum}"
        raise InvalidModel(f"{PREFIX}{key} must be two integers{at_least}: [height, width]")
    return value[0], value[1]
