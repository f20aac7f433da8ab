"""What a node of each ONNX operator does, in PyTorch; by ONNX's own definitions, opset 13 to 18 and what came since.

A map is [N, C, H, W]. In bfloat16 and float16 maps are of that type, and what is reduced to few numbers or computed
from sizes is float32; where both meet, the larger one's type decides.
"""

from fullframe.engine.graph.operators import elementwise, layers, reductions, scaling, shapes, windows
from fullframe.engine.graph.operators.table import OPERATORS, QUANTIZING, Operator

__all__ = ["OPERATORS", "QUANTIZING", "Operator", "elementwise", "layers", "reductions", "scaling", "shapes", "windows"]
