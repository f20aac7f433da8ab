"""Any ONNX graph, followed from its image: what the cells of each map see, its size, and why it can't be tiled."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, prod
from typing import TYPE_CHECKING, Final, TypeAlias

from fullframe.errors import InvalidInput, InvalidModel
from fullframe.model.contract import INPUT
from fullframe.model.geometry.axis import Axis, Disagreement, Reach, Step
from fullframe.model.geometry.context import Context
from fullframe.model.geometry.nodes import Node, constant
from fullframe.model.geometry.operators import apply
from fullframe.model.geometry.tensors import SOME, Dim, Dims, Obstacle, Side, Tensor
from fullframe.model.graphs import opset_of

if TYPE_CHECKING:
    import onnx

Pixels: TypeAlias = int | Fraction
"""A fraction where cells lie closer than pixels."""

_CHANNELS: Final = range(1, 5)
_SIDE_NAMES: Final = ("h", "w")
_UNKNOWN: Final = Tensor(None, fed=True, unsized=True)


@dataclass(frozen=True)
class TensorGeometry:
    """One map of a graph; pairs are (height, width).

    Cell c sees the pixels from start + c * jump on, receptive_field of them.

    Attributes:
        name: the tensor's own.
        node: what makes it; empty for the image.
        shape: numbers, names, "h" and "w" where its height and width are; "?" is not known.
        jump: pixels between neighbouring cells.
        receptive_field: pixels that one cell sees through windows.
        start: the first pixel that cell 0 sees; negative where it sees padding.
        obstacles: why a cell may depend on more than that; none: it can be computed in tiles.
        numbers: which tensor of the graph's axes it is; maps of the same numbers have the same cells.
    """

    name: str
    node: str
    shape: tuple[int | str, ...]
    jump: tuple[Pixels, Pixels]
    receptive_field: tuple[Pixels, Pixels]
    start: tuple[Pixels, Pixels]
    obstacles: tuple[Obstacle, ...]
    numbers: tuple[int, int] = field(repr=False)


class GraphGeometry:
    """Every map of a graph.

    Attributes:
        tensors: by name, in the graph's order.
        smallest_size: the smallest image for which every window has a place, height and width.
        doubts: nodes of which it is not known what sizes they take; none: every image from the smallest size on works,
            but for `disagreements`.
        disagreements: joins whose branches differ in size for some images.
        outputs: the names of the graph's outputs.
    """

    def __init__(self, model: "onnx.ModelProto") -> None:
        """Raises InvalidModel where there is no image to begin with, or no size up to axis.LARGEST works."""
        graph = model.graph
        opset = opset_of(model)
        self._context = Context(opset)
        self._known: dict[str, Tensor] = {each.name: constant(each) for each in graph.initializer}
        image = self._inputs(graph)
        self.outputs = tuple(output.name for output in graph.output)
        self.tensors: dict[str, TensorGeometry] = {}
        self._convolutions: list[tuple[str, Dims, int | None]] = []
        self._made_by: dict[str, Node] = {}
        self._list(image, "")
        for each in graph.node:
            self._visit(Node(each))
        self.smallest_size = self._axes[0].smallest(), self._axes[1].smallest()
        self.doubts = tuple(self._context.doubts)
        self.disagreements = tuple(
            _as_obstacle(found, name)
            for axis, name, least in zip(self._axes, ("high", "wide"), self.smallest_size, strict=True)
            for found in axis.disagreements(least)
        )

    @property
    def _axes(self) -> tuple[Axis, Axis]:
        return self._context.axes

    def known(self, name: str) -> Tensor:
        """What is known of any tensor, a map or not; of one that is not in the graph nothing."""
        return self._known.get(name, _UNKNOWN)

    def step(self, side: Side) -> Step | None:
        """What makes a side of others; None: it is the image's."""
        return self._axes[side.axis].step(side.number)

    def size_of(self, name: str, height: int, width: int) -> tuple[int | None, int | None]:
        """A map's height and width for an image's, None where one can't be followed.

        Raises:
            InvalidInput: the image is too small, or its size one at which branches differ.
            InvalidModel: there is no such map.
        """
        heights, widths = self._sizes(height, width)
        rows, columns = self._map(name).numbers
        return heights[rows], widths[columns]

    def multiply_adds(self, name: str, height: int, width: int) -> int:
        """Of the convolutions between the image and a tensor.

        Raises as size_of does, and InvalidModel where a size can't be followed.
        """
        path = self._ancestors(name)
        sizes = self._sizes(height, width)
        total = 0
        for output, dims, weights in self._convolutions:
            if output in path:
                cells = [sizes[dim.axis][dim.number] if isinstance(dim, Side) else dim for dim in dims[2:]]
                if weights is None or not all(isinstance(cell, int) for cell in cells):
                    raise InvalidModel(f"the work for {name!r} can't be followed: {self._made_by[output].title}")
                total += prod(cell for cell in cells if isinstance(cell, int)) * weights
        return total

    def alignment(self, name: str) -> tuple[int, int]:
        """Pixels by which an image can be shifted so that a map, and all it is computed from, shift by whole cells."""
        height, width = (axis.alignment(n) for axis, n in zip(self._axes, self._map(name).numbers, strict=True))
        return height, width

    def obstacles(self, name: str) -> tuple[Obstacle, ...]:
        """What stands against computing a map in tiles; none: it can be."""
        return tuple(dict.fromkeys((*self._map(name).obstacles, *self.disagreements)))

    def check_sizes(self) -> None:
        """Raise InvalidModel unless every image from the smallest size on is known to work."""
        for obstacle in (*self.disagreements, *self.doubts):
            raise InvalidModel(f"not every image size is known to work: {obstacle}")

    def _map(self, name: str) -> TensorGeometry:
        if name not in self.tensors:
            raise InvalidModel(f"{name!r} is no map that can be followed from the image: {self.why(name)}")
        return self.tensors[name]

    def why(self, name: str) -> str:
        """What stands against following a tensor as a map, in words."""
        tensor = self._known.get(name)
        if tensor is None:
            return "the graph has no tensor of that name"
        for obstacle in (*tensor.obstacles, tensor.latent):
            if obstacle is not None:
                return str(obstacle)
        return "it has other dimensions" if tensor.fed else "it is not computed from the image"

    def maker(self, name: str) -> str:
        """The node that makes a tensor, for people."""
        return self._made_by[name].title if name in self._made_by else "the graph"

    def _sizes(self, height: int, width: int) -> tuple[list[int | None], list[int | None]]:
        if height < self.smallest_size[0] or width < self.smallest_size[1]:
            least = "{} x {}".format(*self.smallest_size)
            raise InvalidInput(
                f"the image is {height} x {width} pixels (height x width); this model needs at least {least}",
                field="images",
            )
        for axis, name, pixels in zip(self._axes, ("high", "wide"), (height, width), strict=True):
            for found in axis.differing(pixels):
                raise InvalidInput(
                    f"{found.node} joins branches of {_and(found.cells)} cells for an image {pixels} pixels {name}; "
                    "this model does not work at that size",
                    field="images",
                )
        return self._axes[0].sizes(height), self._axes[1].sizes(width)

    def _inputs(self, graph: "onnx.GraphProto") -> str:
        """Note the graph's inputs; returns the image's name."""
        image = ""
        for each in graph.input:
            if each.name in self._known:
                continue
            given = each.type.tensor_type.shape.dim
            dims: tuple[Dim, ...] = tuple(dim.dim_value or dim.dim_param or SOME for dim in given)
            if len(dims) == 4 and not image:
                image = each.name
                last = dims[3] in _CHANNELS and dims[1] not in _CHANNELS
                axes = (1, 2) if last or each.name == INPUT else (2, 3)
                dims = tuple(Side(axes.index(i), 0) if i in axes else dim for i, dim in enumerate(dims))
                dims = ("N", *dims[1:])
            self._known[each.name] = Tensor(dims, fed=each.name == image)
        if not image:
            raise InvalidModel("the graph has no input [N, height, width, channels] or [N, channels, height, width]")
        return image

    def _visit(self, node: Node) -> None:
        inputs = [self._known.get(name, _UNKNOWN) if name else None for name in node.inputs]
        outputs = apply(self._context, node, inputs)
        for number, name in enumerate(node.outputs):
            if name:
                self._known[name] = outputs[number] if number < len(outputs) else _UNKNOWN
                self._made_by[name] = node
                self._list(name, node.title)
        if node.op == "Conv" and (dims := outputs[0].dims) is not None:
            weights = self._known.get(node.inputs[1], _UNKNOWN).dims
            numbers = [dim for dim in weights or () if isinstance(dim, int)]
            known = weights is not None and len(numbers) == len(weights)
            self._convolutions.append((node.outputs[0], dims, prod(numbers) if known else None))

    def _list(self, name: str, node: str) -> None:
        tensor = self._known[name]
        height, width = tensor.where(0), tensor.where(1)
        if tensor.dims is None or height is None or width is None:
            return
        numbers = [dim.number for dim in (tensor.dims[height], tensor.dims[width]) if isinstance(dim, Side)]
        seen = [_in_pixels(axis.reaches[number]) for axis, number in zip(self._axes, numbers, strict=True)]
        (jump, start, field_of_view), across = seen
        self.tensors[name] = TensorGeometry(
            name=name,
            node=node,
            shape=tuple(_SIDE_NAMES[dim.axis] if isinstance(dim, Side) else dim or SOME for dim in tensor.dims),
            jump=(jump, across[0]),
            start=(start, across[1]),
            receptive_field=(field_of_view, across[2]),
            obstacles=tensor.obstacles,
            numbers=(numbers[0], numbers[1]),
        )

    def _ancestors(self, name: str) -> set[str]:
        """The tensor and all those it is computed from."""
        found, waiting = {name}, [name]
        while waiting:
            node = self._made_by.get(waiting.pop())
            new = set(node.inputs) - found - {""} if node else set()
            found |= new
            waiting += new
        return found


def _in_pixels(reach: Reach) -> tuple[Pixels, Pixels, Pixels]:
    """Jump, start and receptive field; whole where the jump is."""
    if reach.jump.denominator > 1:
        return reach.jump, reach.start, reach.end - reach.start
    start = ceil(reach.start)  # between two pixels there is nothing to see
    return int(reach.jump), start, ceil(reach.end) - start


def _as_obstacle(found: Disagreement, name: str) -> Obstacle:
    strides = f" and strides {_and(found.jumps)}" if len(found.jumps) > 1 else ""
    return Obstacle(
        found.node,
        "branches",
        f"joins branches of different sizes{strides}: {_and(found.cells)} cells for an image {found.pixels} pixels "
        f"{name}, the first size at which they differ; their paddings must make them equal at every size",
    )


def _and(values: Iterable[object]) -> str:
    return " and ".join(map(str, values))
