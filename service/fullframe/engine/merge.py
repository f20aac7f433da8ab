"""The pieces of an image's maps -> its answer: sums, largest values and maps that grow as pieces come."""

from math import prod
from typing import Final

import numpy as np

from fullframe.engine.answer import best_classes
from fullframe.engine.pooling import Pooling, State
from fullframe.engine.query import Answer, FloatArray, Query
from fullframe.engine.tiles import Piece
from fullframe.errors import InvalidInput
from fullframe.model.contract import LOGITS_FROM_MAP, Contract

MAX_MAP_BYTES: Final = 2**28
"""Of a map that is returned whole."""


class Merging:
    """What is known of an image so far.

    Attributes:
        outputs: the graph's outputs whose pieces are needed.

    Raises:
        InvalidInput: a map is too large to be returned whole, or logits are asked of a model whose head is not linear.
    """

    def __init__(self, query: Query, contract: Contract, size: tuple[int, int]) -> None:
        self._query, self._contract = query, contract
        channels, classes = contract.feature_channels, len(contract.labels)
        wants_logits = query.logits or query.top_k > 0
        if wants_logits and contract.logits != LOGITS_FROM_MAP:
            raise InvalidInput(
                "an image of this size is computed in pieces, and this model's logits can't be, since its head is not "
                "linear: ask for embeddings and no classes (top_k 0)",
                "top_k",
            )
        self._pooled = [pooling.begin(channels, *size) for pooling in query.poolings]
        self._logits = Pooling().begin(classes, *size) if wants_logits else None
        self._maps: dict[str, FloatArray] = {}
        if query.feature_map:
            self._maps["feature_map"] = _empty("feature_map", channels, size)
        if query.class_map:
            self._maps["class_map"] = _empty("class_map", classes, size)
        needed = {"feature_map": self._pooled, "class_map": self._logits}
        self.outputs = [name for name, states in needed.items() if states or name in self._maps] or ["feature_map"]

    def add(self, piece: Piece) -> None:
        """Count a piece."""
        for name, target in self._maps.items():
            part = piece.maps[name]
            target[:, piece.top : piece.top + part.shape[1], piece.left : piece.left + part.shape[2]] = part
        states: list[tuple[str, State]] = [("feature_map", state) for state in self._pooled]
        if self._logits is not None:
            states.append(("class_map", self._logits))
        for name, state in states:
            state.add(piece.maps[name], piece.top, piece.left)

    def answer(self, height: int, width: int) -> Answer:
        """The answer, once every piece is there."""
        logits = None if self._logits is None else self._logits.finish()
        labels, top_k = self._contract.labels, self._query.top_k
        return Answer(
            height,
            width,
            classes=[] if logits is None else best_classes(logits, labels, top_k),
            embeddings=[state.finish() for state in self._pooled],
            logits=logits if self._query.logits else None,
            feature_map=self._maps.get("feature_map"),
            class_map=self._maps.get("class_map"),
        )


def _empty(name: str, channels: int, size: tuple[int, int]) -> FloatArray:
    shape = (channels, *size)
    if (count := 4 * prod(shape)) > MAX_MAP_BYTES:
        raise InvalidInput(
            f"the {name} of this image is {list(shape)}, {count} bytes; at most {MAX_MAP_BYTES} are returned: ask for "
            "pooled embeddings, or for a smaller part of the image",
            name,
        )
    return np.empty(shape, np.float32)
