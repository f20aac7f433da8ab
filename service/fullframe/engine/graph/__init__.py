"""ONNX graphs on PyTorch: read, simplified, fused, run on any device. Whoever imports it imports torch."""

from fullframe.engine.graph.session import TorchSession

__all__ = ["TorchSession"]
