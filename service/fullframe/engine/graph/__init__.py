"""ONNX graphs on PyTorch: read, simplified, fused, run on any device. Whoever imports it imports torch."""

from fullframe.engine.graph.failures import is_device_error, is_out_of_memory
from fullframe.engine.graph.replay import CudaGraphs, Replays
from fullframe.engine.graph.session import TorchSession

__all__ = ["CudaGraphs", "Replays", "TorchSession", "is_device_error", "is_out_of_memory"]
