"""A graph in PyTorch beside the same graph in ONNX Runtime."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from fullframe.engine.graph import TorchSession

PROMISE: Final = 1e-4
FUSED: Final = (False, True)
Array = NDArray[Any]


def serialized(model: onnx.ModelProto | bytes | Path) -> bytes:
    if isinstance(model, Path):
        return model.read_bytes()
    return model if isinstance(model, bytes) else bytes(model.SerializeToString())


def in_onnx_runtime(model: bytes, feeds: Mapping[str, Array], outputs: Sequence[str] = ()) -> dict[str, Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    # It hands a pool more padding than the pool takes.
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"], disabled_optimizers=["Pad_Fusion"])
    names = list(outputs or [each.name for each in session.get_outputs()])
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def largest_difference(found: Array, wanted: Array) -> float:
    """Relative to max(1, the largest wanted); of the same type and shape, infinite where the other is."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    if not wanted.size:
        return 0.0
    wide, exact = found.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(exact)
    if not np.array_equal(wide[~finite], exact[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    gap = float(np.abs(wide - exact)[finite].max() / max(1.0, float(np.abs(exact[finite]).max())))
    return gap if np.isfinite(gap) else float("inf")


def differences(
    model: onnx.ModelProto | bytes | Path,
    feeds: Mapping[str, Array],
    subsets: Sequence[Sequence[str]] = (),
    **session: Any,
) -> dict[str, float]:
    """The largest difference of each output, asked for with all others and in each of the subsets."""
    graph = serialized(model)
    wanted = in_onnx_runtime(graph, feeds)
    opened = TorchSession(graph, **session)
    worst = dict.fromkeys(wanted, 0.0)
    for names in (list(wanted), *subsets):
        found = opened.run(names, feeds)
        for name, each in zip(names, found, strict=True):
            worst[name] = max(worst[name], largest_difference(each, wanted[name]))
    return worst
