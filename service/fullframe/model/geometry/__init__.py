"""What each cell of a model's maps sees of the image, the maps' sizes, and whether tiles can be put together again.

All of it is read off the ONNX graph, operator by operator; nothing is run.
"""

from fullframe.model.geometry.axis import LARGEST
from fullframe.model.geometry.feature_map import OUTPUT, Geometry, graph_geometry
from fullframe.model.geometry.graph import GraphGeometry, TensorGeometry
from fullframe.model.geometry.tensors import Obstacle

__all__ = ["LARGEST", "OUTPUT", "Geometry", "GraphGeometry", "Obstacle", "TensorGeometry", "graph_geometry"]
