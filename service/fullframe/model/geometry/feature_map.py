"""The geometry of a served model: its feature map's, and whether that can be computed in tiles."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fullframe.errors import InvalidModel
from fullframe.model.geometry.graph import GraphGeometry, Pixels
from fullframe.model.geometry.tensors import Obstacle

if TYPE_CHECKING:
    import onnx

OUTPUT: Final = "feature_map"
CLASS_MAP: Final = "class_map"


@dataclass(frozen=True)
class Geometry:
    """Sizes and receptive fields of a graph's feature map; pairs are (height, width).

    Attributes:
        stride: pixels between neighbouring cells.
        receptive_field: pixels that one cell sees through windows.
        start: the first pixel that cell 0 sees; negative where it sees padding.
        smallest_size: the smallest image. Every larger one works, but for what graph.check_sizes names.
        obstacles: why the maps can't be computed in tiles; none: they can, in strips where model/strips knows how.
        graph: every other map of the graph.
    """

    stride: tuple[int, int]
    receptive_field: tuple[int, int]
    start: tuple[int, int]
    smallest_size: tuple[int, int]
    obstacles: tuple[Obstacle, ...] = field(compare=False)
    graph: GraphGeometry = field(repr=False, compare=False)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """The feature map's size for an image's.

        Raises InvalidInput for one at which the model does not work, InvalidModel where it can't be followed.
        """
        rows, columns = self.graph.size_of(OUTPUT, height, width)
        if rows is None or columns is None:
            raise InvalidModel(f"the size of {OUTPUT!r} can't be followed: {self.graph.why(OUTPUT)}")
        return rows, columns

    def multiply_adds(self, height: int, width: int) -> int:
        """Of the convolutions between the image and the feature map; raises InvalidInput as output_size."""
        return self.graph.multiply_adds(OUTPUT, height, width)


def graph_geometry(model: "onnx.ModelProto") -> Geometry:
    """The geometry of a graph from its image to `feature_map`, float32 [N, C, h, w].

    Windows towards other outputs count for the smallest size too.

    Raises:
        InvalidModel: there is no such output, it is no map that can be followed from the image (the message names the
            node after which it can't), its cells lie closer than pixels, or no size up to axis.LARGEST works.
    """
    graph = GraphGeometry(model)
    found = graph.tensors.get(OUTPUT)
    if OUTPUT not in graph.outputs or found is None or len(found.shape) != 4 or found.shape[2:] != ("h", "w"):
        raise InvalidModel(f"the graph has no output {OUTPUT!r} [N, C, h, w] that can be followed: {graph.why(OUTPUT)}")
    stride, receptive_field, start = (_whole(pair) for pair in (found.jump, found.receptive_field, found.start))
    return Geometry(stride, receptive_field, start, graph.smallest_size, _obstacles(graph), graph)


def _whole(pair: tuple[Pixels, Pixels]) -> tuple[int, int]:
    if not (isinstance(pair[0], int) and isinstance(pair[1], int)):
        raise InvalidModel(f"the cells of {OUTPUT!r} lie closer than the image's pixels: every {pair[0]} x {pair[1]}")
    return pair[0], pair[1]


def _obstacles(graph: GraphGeometry) -> tuple[Obstacle, ...]:
    """Those of the feature map and, if there is one, of the class map, which must have the same cells."""
    found = list(graph.obstacles(OUTPUT))
    if CLASS_MAP in graph.outputs:
        classes = graph.tensors.get(CLASS_MAP)
        if classes is not None:
            found += graph.obstacles(CLASS_MAP)
        if classes is None or classes.numbers != graph.tensors[OUTPUT].numbers:
            reason = f"makes {CLASS_MAP!r} of other cells than {OUTPUT!r}'s"
            found.append(Obstacle(classes.node if classes else graph.maker(CLASS_MAP), "unknown", reason))
    return tuple(dict.fromkeys(found))
