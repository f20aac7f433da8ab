"""What a graph's nodes share while they are followed, and how tensors meet in one."""

from collections.abc import Sequence
from typing import Final

from fullframe.model.geometry.axis import Axis, Step
from fullframe.model.geometry.nodes import Node
from fullframe.model.geometry.tensors import SOME, Dim, Dims, Obstacle, Side, Tensor, Unfollowed, made, varies

_SIDES: Final = ("height", "width")


class Context:
    """The sizes of everything met so far.

    Attributes:
        axes: along the image's height and width.
        doubts: what the smallest size does not answer for.
        opset: the version of ONNX's operators.
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.axes = (Axis(), Axis())
        self.doubts: list[Obstacle] = []

    def doubt(self, node: Node, reason: str) -> Obstacle:
        """Note that the node's demands on the image's size are not known."""
        self.doubts.append(Obstacle(node.title, "unknown", reason))
        return self.doubts[-1]

    def step(self, side: Side, step: Step, node: Node) -> Side:
        """The side that a step makes of another."""
        return Side(side.axis, self.axes[side.axis].add(step, node.title))

    def same(self, dim: Dim, others: Sequence[Dim]) -> Dim:
        """The side among the others that always has this size; the dimension itself if there is none."""
        if not isinstance(dim, Side) or dim in others:
            return dim
        sides = (other for other in others if isinstance(other, Side) and other.axis == dim.axis)
        return next((side for side in sides if self.axes[dim.axis].agree(dim.number, side.number)), dim)

    def meet(
        self, node: Node, tensors: Sequence[Tensor], *, skip: int | None = None, broadcast: bool = True
    ) -> tuple[Dims, list[Obstacle]]:
        """The dimensions of tensors that meet cell by cell, and what stands against tiles.

        Args:
            node: where they meet.
            tensors: aligned at their last dimensions, as ONNX broadcasts.
            skip: a dimension along which they need not agree; it becomes SOME.
            broadcast: a dimension of 1 agrees with any.
        """
        obstacles: list[Obstacle] = []
        known = [tensor.dims for tensor in tensors if tensor.dims is not None]
        rank = max(map(len, known))
        if len(known) < len(tensors) and any(varies(dim) for dims in known for dim in dims):
            obstacles.append(self.doubt(node, "takes a value whose shape can't be followed"))
        columns = zip(*((1,) * (rank - len(dims)) + dims for dims in known), strict=True)
        dims = [
            SOME if number == skip else self._meet(node, column, broadcast, obstacles)
            for number, column in enumerate(columns)
        ]
        return tuple(dims), obstacles

    def _meet(self, node: Node, dims: Sequence[Dim], broadcast: bool, obstacles: list[Obstacle]) -> Dim:
        others = [dim for dim in dims if not (broadcast and dim == 1)]
        sides = [dim for dim in others if isinstance(dim, Side)]
        if not sides:
            if others.count(None) > 1:
                obstacles.append(self.doubt(node, "joins values whose sizes can't be followed"))
            return None if None in others else next(iter(others), 1)
        axis = sides[0].axis
        if any(side.axis != axis for side in sides):
            raise Unfollowed("joins an image's height with its width")
        if None in others or any(isinstance(dim, str) for dim in others):
            obstacles.append(self.doubt(node, f"joins a map with a value whose {_SIDES[axis]} can't be followed"))
        fixed = [dim for dim in others if isinstance(dim, int)]
        return Side(axis, self.axes[axis].join((side.number for side in sides), fixed, node.title))


def joined(context: Context, node: Node, tensors: Sequence[Tensor]) -> Tensor:
    """What a node makes that broadcasts its inputs against each other."""
    if all(tensor.dims is None for tensor in tensors):
        raise Unfollowed("takes values whose shapes can't be followed")
    dims, obstacles = context.meet(node, tensors)
    return made(node.title, tensors, dims, obstacles=obstacles)
