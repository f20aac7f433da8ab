"""What a graph computes from its images' sizes: those of every map, which cells are an image's own, and how many."""

from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fullframe.errors import InvalidModel
from fullframe.model.contract import SIZES
from fullframe.model.geometry import GraphGeometry
from fullframe.model.geometry.axis import Join, Repeat, Window
from fullframe.model.geometry.tensors import Dims, Side

Fill: TypeAlias = Literal["zero", "one", "least", "most"]
"""What padding becomes: the operator's identity."""

_PREFIX: Final = "ragged."


class Sight(NamedTuple):
    """How a pool or convolution sees one side of its source, which is its axis `position`."""

    position: int
    side: Side
    window: Window
    kernel: int
    dilation: int


class Masks:
    """Nodes for a batch's sizes and masks; each size and each mask is computed once.

    Attributes:
        nodes: the graph's, in topological order; those of the model are appended by its owner.
        constants: that the added nodes take.
    """

    def __init__(self, geometry: GraphGeometry, types: dict[str, int]) -> None:
        """`types` are the tensors' element types by name."""
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self._geometry, self._types = geometry, types
        self._made: dict[Any, str] = {}

    def add(self, op: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        """Append a node, unless there is one like it that needs no other name; returns its output."""
        key = (op, *inputs, *attributes.items())
        if output or key not in self._made:
            self._made[key] = output or f"{_PREFIX}{len(self.nodes)}"
            self.nodes.append(helper.make_node(op, inputs, [self._made[key]], **attributes))
        return self._made[key]

    def kind(self, name: str) -> int:
        """A tensor's element type; raises InvalidModel where it is not known."""
        if not (kind := self._types.get(name, 0)):
            raise InvalidModel("takes a map whose type can't be followed")
        return kind

    def ints(self, *values: int) -> str:
        """An int64 [n] constant."""
        return self._constant("ints." + ".".join(map(str, values)), np.array(values, np.int64))

    def masked(self, name: str, fill: Fill, value: str = "") -> str:
        """A map whose padding is `fill`, or the scalar tensor `value`; raises InvalidModel where it can't be masked."""
        return self.add("Where", [self._mask(name), name, value or self._fill(fill, self.kind(name))])

    def map_sizes(self, name: str) -> str:
        """int64 [N, 2]: every image's height and width on a map."""
        sides = [dim for dim in self._dims(name) if isinstance(dim, Side)]
        columns = [self.add("Unsqueeze", [self.size(side), self.ints(1)]) for side in sorted(sides)]
        return self.add("Concat", columns, axis=1)

    def size(self, side: Side) -> str:
        """int64 [N]: every image's cells along a side of a map."""
        if side not in self._made:
            self._made[side] = self._size(side)
        return self._made[side]

    def cells(self, name: str, axes: Sequence[int]) -> str:
        """int64 [N]: how many of an image's own values lie along these axes of a tensor; raises InvalidModel."""
        dims = self._dims(name)
        found = ""
        for dim in (dims[axis] for axis in axes):
            if not isinstance(dim, int | Side):
                raise InvalidModel("takes one value from several images, or from as many channels as is not known")
            factor = self.size(dim) if isinstance(dim, Side) else self.ints(dim)
            found = self.add("Mul", [found, factor]) if found else factor
        return found

    def shares(self, source: str, pool: onnx.NodeProto) -> str:
        """Of the cells that each window of an average pool counts in the batch the share that is the image's own: the
        same pool of the mask, float [N, 1, h, w]."""
        mask = self.add("Cast", [self._mask(source)], to=self.kind(source))
        values = {each.name: helper.get_attribute_value(each) for each in pool.attribute}
        attributes: dict[str, Any] = {
            name: tuple(each) if isinstance(each, list) else each for name, each in values.items()
        }
        return self.add("AveragePool", [mask], "", **attributes)

    def divisors(self, source: str, sight: Sight, pads: bool, pooled: str) -> str:
        """What an average pool's output is multiplied by, so that along one side each window's sum is divided by the
        cells that count in the image alone: those that count in the batch, by those.

        Args:
            source, sight: what the pool takes, and how it sees it.
            pads: it counts padding of its own.
            pooled: what it makes of the batch.

        Returns:
            float [N, 1, h, 1] or [N, 1, 1, w].
        """
        position, window = sight.position, sight.window
        key = ("divisors", self.size(sight.side), position, window._replace(source=0), *sight[3:], pads)
        if key not in self._made:
            first = self.add("Mul", [self._range(pooled, position), self.ints(window.stride)])
            first = self.add("Sub", [first, self.ints(window.before)])
            whole = self.add("Shape", [source], start=position, end=position + 1)
            own = self.add("Unsqueeze", [self.size(sight.side), self.ints(1)])
            counts = [self._counted(size, first, sight, pads) for size in (whole, own)]
            floats = [self.add("Cast", [count], to=self.kind(source)) for count in counts]
            self._made[key] = self._spread(self.add("Div", floats), 4, position)
        return self._made[key]

    def _counted(self, size: str, first: str, sight: Sight, pads: bool) -> str:
        """int64 [N, windows]: how many taps of each window count, those from its first cell on in steps of the
        dilation that lie in the map or, with `pads`, in its padding."""
        window, dilation = sight.window, sight.dilation
        end = self.add("Add", [size, self.ints(window.after)]) if pads and window.after else size
        count = self.add("Min", [self._ceil(self.add("Sub", [end, first]), dilation), self.ints(sight.kernel)])
        if pads or not window.before:
            return count
        before = self._ceil(self.add("Neg", [first]), dilation)
        return self.add("Sub", [count, self.add("Max", [before, self.ints(0)])])

    def _ceil(self, number: str, divisor: int) -> str:
        """The quotient of what is above 0, rounded up; of other numbers something not above 0."""
        if divisor == 1:
            return number
        return self.add("Div", [self.add("Add", [number, self.ints(divisor - 1)]), self.ints(divisor)])

    def _size(self, side: Side) -> str:
        step = self._geometry.step(side)
        match step:
            case None:
                return self.add("Gather", [SIZES, self._constant(f"axis.{side.axis}", np.int64(side.axis))], axis=1)
            case Window():
                return self._windows(self.size(Side(side.axis, step.source)), step)
            case Join():
                return self.size(Side(side.axis, step.sources[0]))
            case Repeat():
                return self.add("Mul", [self.size(Side(side.axis, step.source)), self.ints(len(step.taps))])
            case _:
                raise InvalidModel("has a size that can't be followed")

    def _windows(self, size: str, window: Window) -> str:
        """As Window.of. ONNX rounds towards 0, so that the window's one more is added before the division."""
        padding = window.before + window.after
        slack = padding - window.extent + window.stride + (window.stride - 1 if window.ceil_mode else 0)
        count = self.add("Add", [size, self.ints(slack)]) if slack else size
        if window.stride > 1:
            count = self.add("Div", [count, self.ints(window.stride)])
        if not window.ceil_mode or window.after + window.stride <= window.extent:  # no window begins behind the map
            return count
        last = self.add("Sub", [count, self.ints(1)])
        begins = self.add("Mul", [last, self.ints(window.stride)])
        inside = self.add("Less", [begins, self.add("Add", [size, self.ints(window.before)])])
        return self.add("Add", [last, self.add("Cast", [inside], to=onnx.TensorProto.INT64)])

    def _mask(self, name: str) -> str:
        """bool, which broadcasts to the map: whether a cell is the image's own. Maps of one size share it."""
        dims = self._dims(name)
        if dims[0] != "N":
            raise InvalidModel("sees padding of a map whose images can't be told apart")
        sides = [(position, self.size(dim)) for position, dim in enumerate(dims) if isinstance(dim, Side)]
        mask, *rest = [self._along(name, position, size, len(dims)) for position, size in sides]
        for each in rest:
            mask = self.add("And", [mask, each])
        return mask

    def _along(self, name: str, position: int, size: str, rank: int) -> str:
        key = ("mask", rank, position, size)
        if key not in self._made:
            sizes = self.add("Unsqueeze", [size, self.ints(1)])
            self._made[key] = self._spread(self.add("Less", [self._range(name, position), sizes]), rank, position)
        return self._made[key]

    def _range(self, name: str, position: int) -> str:
        """int64: 0, 1, ... for every cell of a tensor along one axis."""
        length = self.add("Shape", [name], start=position, end=position + 1)
        zero, one = (self._constant(f"number.{value}", np.int64(value)) for value in (0, 1))
        return self.add("Range", [zero, self.add("Squeeze", [length]), one])

    def _spread(self, values: str, rank: int, position: int) -> str:
        """[N, L] as a tensor of so many axes, with L at `position`."""
        axes = [axis for axis in range(1, rank) if axis != position]
        return self.add("Unsqueeze", [values, self.ints(*axes)]) if axes else values

    def _fill(self, fill: Fill, kind: int) -> str:
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        if np.issubdtype(dtype, np.integer):
            raise InvalidModel("sees padding of a map of integers")
        values = {"zero": 0.0, "one": 1.0, "least": -np.inf, "most": np.inf}
        return self._constant(f"{fill}.{dtype}", np.array(values[fill], dtype))

    def _constant(self, name: str, value: Any) -> str:
        name = _PREFIX + name
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _dims(self, name: str) -> Dims:
        dims = self._geometry.known(name).dims
        if dims is None:
            raise InvalidModel("has a shape that can't be followed")
        return dims
