"""From a graph's outputs to the answer that a query asks for."""

from collections.abc import Mapping

import numpy as np

from fullframe.engine.maps import reduced
from fullframe.engine.pooling import Pooling, pool
from fullframe.engine.query import Answer, ClassScore, FloatArray, Query
from fullframe.errors import InvalidInput
from fullframe.model.contract import Contract


def outputs_for(query: Query, contract: Contract) -> list[str]:
    """The graph outputs that `query` needs; raises InvalidInput for a map that the model doesn't have."""
    if query.class_map and not contract.has_class_map:
        raise InvalidInput("this model's head is not linear, so that it has no class map", "class_map")
    wanted = {
        "logits": query.wants_logits,
        "features": any(_is_own(pooling, contract) for pooling in query.poolings),
        "feature_map": query.feature_map or not all(_is_own(p, contract) for p in query.poolings),
        "class_map": query.class_map,
    }
    return [name for name, needed in wanted.items() if needed] or ["logits"]


def answer_from(outputs: Mapping[str, FloatArray], query: Query, contract: Contract, height: int, width: int) -> Answer:
    """Build the answer for an image of height x width pixels from what `outputs_for` named."""
    logits = outputs.get("logits")
    wanted = {"feature_map": query.feature_map, "class_map": query.class_map}
    maps = {name: reduced(name, outputs[name], query.max_map_side) for name, asked in wanted.items() if asked}
    return Answer(
        height,
        width,
        classes=[] if logits is None else best_classes(logits, contract.labels, query.top_k),
        embeddings=[_embedding(outputs, pooling, contract) for pooling in query.poolings],
        logits=logits if query.logits else None,
        feature_map=maps.get("feature_map"),
        class_map=maps.get("class_map"),
    )


def best_classes(logits: FloatArray, labels: tuple[str, ...], top_k: int) -> list[ClassScore]:
    """The `top_k` classes of highest logit, best first; equal logits keep the labels' order."""
    order = np.argsort(-logits, kind="stable")[:top_k]
    exponentials = np.exp((logits - logits.max()).astype(np.float64))
    probabilities = (exponentials / exponentials.sum()).astype(np.float32)  # as they travel: the same bits everywhere
    return [ClassScore(int(i), labels[i], float(probabilities[i]), float(logits[i])) for i in order]


def _is_own(pooling: Pooling, contract: Contract) -> bool:
    """Whether the graph itself computes this pooling, as its `features`."""
    return str(pooling) == contract.pooling


def _embedding(outputs: Mapping[str, FloatArray], pooling: Pooling, contract: Contract) -> FloatArray:
    if not _is_own(pooling, contract):
        return pool(outputs["feature_map"], pooling)
    features = outputs["features"]
    length = float(np.linalg.norm(features)) if pooling.l2_normalize else 1.0
    return features / np.float32(length or 1.0)
