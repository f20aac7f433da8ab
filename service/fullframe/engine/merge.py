"""The pieces of an image's maps -> its answer: sums, largest values and maps that grow where the pieces are."""

from fullframe.engine.answer import best_classes
from fullframe.engine.maps import MapState
from fullframe.engine.pooling import Pooling, State
from fullframe.engine.query import Answer, Query
from fullframe.engine.tiles import Head, Piece
from fullframe.model.contract import Contract


class Merging:
    """What is known of an image so far.

    Args:
        query: what is asked.
        contract: the model's.
        size: the feature map's, height and width.
        head: of a model whose logits come from its features; None: they are the mean of its class map.

    Attributes:
        outputs: the graph's outputs whose pieces are needed.

    Raises:
        InvalidInput: a map is too large to be returned.
    """

    def __init__(self, query: Query, contract: Contract, size: tuple[int, int], head: Head | None = None) -> None:
        self._query, self._labels, self._head = query, contract.labels, head
        channels = {"feature_map": contract.feature_channels, "class_map": len(contract.labels)}
        wanted = {"feature_map": query.feature_map, "class_map": query.class_map}
        self._maps = {
            name: MapState(name, channels[name], *size, query.max_map_side) for name, asked in wanted.items() if asked
        }
        self._pooled = [pooling.begin(channels["feature_map"], *size) for pooling in query.poolings]
        self._logits: State | None = None
        source = "class_map" if head is None else "feature_map"
        if query.wants_logits:
            pooling = Pooling() if head is None else Pooling.parse(contract.pooling)
            self._logits = pooling.begin(channels[source], *size)
        # Each with the output whose pieces it takes.
        self._states: list[tuple[str, State | MapState]] = [("feature_map", state) for state in self._pooled]
        self._states += self._maps.items()
        self._states += [(source, self._logits)] if self._logits else []
        self.outputs = sorted({name for name, _ in self._states}) or ["feature_map"]

    def add(self, piece: Piece) -> None:
        """Count a piece; for a device's computation nothing waits."""
        for name, state in self._states:
            state.add(piece.maps[name], piece.top, piece.left)

    def answer(self, height: int, width: int) -> Answer:
        """The answer, once every piece is there and computed."""
        logits = None if self._logits is None else self._logits.finish()
        if logits is not None and self._head is not None:
            logits = self._head(logits)
        maps = {name: state.finish() for name, state in self._maps.items()}
        return Answer(
            height,
            width,
            classes=[] if logits is None else best_classes(logits, self._labels, self._query.top_k),
            embeddings=[state.finish() for state in self._pooled],
            logits=logits if self._query.logits else None,
            feature_map=maps.get("feature_map"),
            class_map=maps.get("class_map"),
        )
