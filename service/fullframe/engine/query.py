"""What can be asked of an image and what comes back, in no transport's words."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fullframe.engine.pooling import FloatArray as FloatArray
from fullframe.engine.pooling import Pooling
from fullframe.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Query:
    """What to compute from one pass over an image.

    Attributes:
        top_k: how many classes, best first (more than there are: all of them); 0 for none.
        poolings: one embedding each, in this order.
        logits, feature_map, class_map: return these.
        max_map_side: cells on the longer side of a map that is returned; a larger one is reduced to so many, each the
            mean of an equal share of the map's area. 0: maps are returned as they are.
    """

    top_k: int = 5
    poolings: tuple[Pooling, ...] = ()
    logits: bool = False
    feature_map: bool = False
    class_map: bool = False
    max_map_side: int = 0

    @property
    def wants_logits(self) -> bool:
        """Whether they must be computed, for themselves or for classes."""
        return self.logits or self.top_k > 0


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class of an answer; `probability` is the softmax over all classes."""

    index: int
    label: str
    probability: float
    logit: float


@dataclass(slots=True)
class Timings:
    """Where an image's time went, in seconds."""

    decode: float = 0.0
    queue: float = 0.0
    compute: float = 0.0


@dataclass(slots=True)
class Answer:
    """What came of one image of height x width pixels.

    Attributes:
        embeddings: float32 [D], one per pooling of the query.
        logits: float32 [K].
        feature_map: float32 [C, h, w].
        class_map: float32 [K, h, w]; its spatial mean is the logits, reduced or not.
    """

    height: int
    width: int
    classes: list[ClassScore] = field(default_factory=list)
    embeddings: list[FloatArray] = field(default_factory=list)
    logits: FloatArray | None = None
    feature_map: FloatArray | None = None
    class_map: FloatArray | None = None
    timings: Timings = field(default_factory=Timings)


def make_query(
    top_k: int = 5,
    poolings: Sequence[str | Pooling] = (),
    logits: bool = False,
    feature_map: bool = False,
    class_map: bool = False,
    max_map_side: int = 0,
) -> Query:
    """A query from what people write; raises InvalidInput naming the argument."""
    if top_k < 0:
        raise InvalidInput(f"top_k is {top_k}; it must be 0 (no classes) or more", "top_k")
    if max_map_side < 0:
        raise InvalidInput(f"max_map_side is {max_map_side}; it must be 0 (maps as they are) or more", "max_map_side")
    parsed = tuple(as_pooling(pooling, normalize=False) for pooling in poolings)
    return Query(top_k, parsed, logits, feature_map, class_map, max_map_side)


def as_pooling(pooling: str | Pooling, normalize: bool) -> Pooling:
    """A pooling from what people write; `normalize` asks for unit length whatever it says itself."""
    parsed = Pooling.parse(pooling) if isinstance(pooling, str) else pooling
    return replace(parsed, l2_normalize=True) if normalize else parsed
