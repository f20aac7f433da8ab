"""A graph's tensors along one axis of the image, as a program on sizes: how many cells each has and what they see.

Cell c of a tensor sees pixels start + c * jump to end + c * jump, end excluded, following Araujo, Norris and Sim,
"Computing receptive fields of convolutional neural networks", Distill, 2019.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Final, NamedTuple, TypeAlias

from fullframe.errors import InvalidModel

LARGEST: Final = 4096
"""A model that needs larger images than this, or has a larger stride, is taken for a mistake."""

Sizes: TypeAlias = Sequence[int | None]
"""Every tensor's cells, by its number; None: not known."""


class Reach(NamedTuple):
    """The pixels that cell 0 sees, end excluded, and how far on cell 1 is; fractions where cells are the finer."""

    jump: Fraction
    start: Fraction
    end: Fraction


class Window(NamedTuple):
    """A convolution, pooling, padding or crop; `extent` is the dilated kernel's, (k - 1) * dilation + 1.

    Padding below 0 is a crop.
    """

    source: int
    extent: int
    stride: int = 1
    before: int = 0
    after: int = 0
    ceil_mode: bool = False

    @property
    def sources(self) -> tuple[int, ...]:
        """The tensors it reads."""
        return (self.source,)

    def of(self, size: int) -> int:
        """floor((size + padding - extent) / stride) + 1 cells; below 1 where the window does not fit.

        With ceil_mode the division rounds up, less the window that would start in the end padding, as in
        torch.nn.MaxPool2d and ONNX Runtime.
        """
        slack = size + self.before + self.after - self.extent
        if not self.ceil_mode:
            return slack // self.stride + 1
        count = -(-slack // self.stride) + 1
        return count - ((count - 1) * self.stride >= size + self.before)

    def output(self, sizes: Sizes) -> int | None:
        """Its cells."""
        size = sizes[self.source]
        return None if size is None else self.of(size)

    def reach(self, reaches: Sequence[Reach]) -> Reach:
        """What its cells see."""
        jump, start, end = reaches[self.source]
        return Reach(jump * self.stride, start - self.before * jump, end + (self.extent - 1 - self.before) * jump)

    @property
    def hides_cells(self) -> bool:
        """Whether a cell that would come before the first, or after the last, could still be seen by the image alone.

        Without, a tensor's missing cells all see past the image, so that whoever sees one of them sees that too.
        """
        return self.before <= -self.stride or self.after < 0


class Repeat(NamedTuple):
    """Enlargement by a whole factor, one of `taps` for each new cell of an old one: the first and last it is made of.

    Taps count from the old cell.
    """

    source: int
    taps: tuple[tuple[int, int], ...]

    @property
    def sources(self) -> tuple[int, ...]:
        """The tensors it reads."""
        return (self.source,)

    def output(self, sizes: Sizes) -> int | None:
        """Its cells."""
        size = sizes[self.source]
        return None if size is None else size * len(self.taps)

    def reach(self, reaches: Sequence[Reach]) -> Reach:
        """What its cells see: the hull over the new cells of an old one."""
        jump, start, end = reaches[self.source]
        fine = jump / len(self.taps)
        return Reach(
            fine,
            start + min(first * jump - number * fine for number, (first, _) in enumerate(self.taps)),
            end + max(last * jump - number * fine for number, (_, last) in enumerate(self.taps)),
        )


class Join(NamedTuple):
    """Tensors that meet cell by cell; `fixed` are the sizes of those whose size is no image's."""

    sources: tuple[int, ...]
    fixed: tuple[int, ...] = ()

    def met(self, sizes: Sizes) -> list[int]:
        """The different numbers of cells that meet."""
        known = {size for source in self.sources if (size := sizes[source]) is not None}
        return sorted(known | set(self.fixed))

    def output(self, sizes: Sizes) -> int | None:
        """Its cells where all agree."""
        return next((size for source in self.sources if (size := sizes[source]) is not None), None)

    def reach(self, reaches: Sequence[Reach]) -> Reach:
        """What all of them see; their jumps are equal unless they disagree."""
        jumps, starts, ends = zip(*(reaches[source] for source in self.sources), strict=True)
        return Reach(jumps[0], min(starts), max(ends))


class Unsized(NamedTuple):
    """A tensor in step with its source whose size can't be known."""

    source: int
    node: str

    @property
    def sources(self) -> tuple[int, ...]:
        """The tensors it reads."""
        return (self.source,)

    def output(self, sizes: Sizes) -> None:
        """Unknown."""

    def reach(self, reaches: Sequence[Reach]) -> Reach:
        """Its source's."""
        return reaches[self.source]


class Computed(NamedTuple):
    """No tensor: a number that the graph computes from a size, for a shape; `op` is "Add", "Mul" or "Div"."""

    source: int
    op: str
    operand: int

    @property
    def sources(self) -> tuple[int, ...]:
        """The sizes it is computed from."""
        return (self.source,)

    def output(self, sizes: Sizes) -> int | None:
        """The number; division rounds down."""
        size = sizes[self.source]
        if size is None:
            return None
        match self.op:
            case "Add":
                return size + self.operand
            case "Mul":
                return size * self.operand
            case _:
                return size // self.operand

    def reach(self, reaches: Sequence[Reach]) -> Reach:
        """Of a tensor of that size, its jump."""
        jump, start, end = reaches[self.source]
        factor = {"Add": Fraction(1), "Mul": Fraction(1, self.operand), "Div": Fraction(self.operand)}[self.op]
        return Reach(jump * factor, start, end)


Step: TypeAlias = Window | Repeat | Join | Unsized | Computed


class Disagreement(NamedTuple):
    """A join whose tensors differ in size: the first pixels for which, from the smallest size on."""

    node: str
    jumps: tuple[Fraction, ...]
    cells: tuple[int, ...]
    pixels: int


class Axis:
    """The program; tensor 0 is the image."""

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._nodes: list[str] = []
        self._numbers: dict[Step, int] = {}
        self.reaches = [Reach(Fraction(1), Fraction(0), Fraction(1))]

    def add(self, step: Step, node: str) -> int:
        """The number of the step's output; equal steps share one."""
        if isinstance(step, Window) and step == Window(step.source, 1):
            return step.source
        if isinstance(step, Repeat) and step.taps == ((0, 0),):
            return step.source
        if step not in self._numbers:
            self._numbers[step] = len(self.reaches)
            self._steps.append(step)
            self._nodes.append(node)
            self.reaches.append(step.reach(self.reaches))
        return self._numbers[step]

    def step(self, number: int) -> Step | None:
        """What makes a tensor; None for the image."""
        return self._steps[number - 1] if number else None

    def join(self, sources: Iterable[int], fixed: Iterable[int], node: str) -> int:
        """The number of the tensor that sees what all of the sources see."""
        step = Join(tuple(sorted(set(sources))), tuple(sorted(set(fixed))))
        return step.sources[0] if len(step.sources) == 1 and not step.fixed else self.add(step, node)

    def sizes(self, pixels: int) -> list[int | None]:
        """Every tensor's size; below 1 from where the image is too small."""
        sizes: list[int | None] = [pixels]
        for step in self._steps:
            sizes.append(step.output(sizes))
        return sizes

    def smallest(self) -> int:
        """The least size from which on every tensor whose size is known has a cell.

        Raises:
            InvalidModel: there is none up to LARGEST.
        """
        # A larger image never makes a tensor smaller, so bisection finds it.
        smallest = 1 + bisect_left(range(1, LARGEST + 1), True, key=self._fits)
        if max(smallest, self.alignment()) > LARGEST:
            raise InvalidModel(f"the graph's smallest size or stride is more than {LARGEST} pixels")
        return smallest

    def _fits(self, pixels: int) -> bool:
        sizes = zip(self._steps, self.sizes(pixels)[1:], strict=True)
        return all(size is None or size >= 1 or isinstance(step, Computed) for step, size in sizes)

    def agree(self, one: int, other: int) -> bool:
        """Whether two sizes are equal for every image that is large enough."""
        period = math.lcm(self.alignment(one), self.alignment(other))
        least = self.smallest()
        # As in disagreements, one period stands for all.
        sizes = (self.sizes(pixels) for pixels in range(least, least + period + 1) if period <= LARGEST)
        pairs = [(each[one], each[other]) for each in sizes]
        return bool(pairs) and all(a is not None and a == b for a, b in pairs)

    def disagreements(self, smallest: int) -> list[Disagreement]:
        """The joins of tensors that differ in size for some image from `smallest` on, each with the first such one."""
        found: dict[str, Disagreement] = {}
        if any(isinstance(step, Join) for step in self._steps):
            # With one period more of pixels a tensor grows by period / jump cells exactly, so one period stands for
            # all; the one size more tells growths apart.
            for pixels in range(smallest, smallest + self.alignment() + 1):
                for each in self.differing(pixels):
                    found.setdefault(each.node, each)
        return sorted(found.values(), key=lambda each: self._nodes.index(each.node))

    def differing(self, pixels: int) -> Iterator[Disagreement]:
        """The joins of tensors that differ in size for an image of so many pixels."""
        sizes = self.sizes(pixels)
        for step, node in zip(self._steps, self._nodes, strict=True):
            if isinstance(step, Join) and len(met := step.met(sizes)) > 1:
                jumps = sorted({self.reaches[source].jump for source in step.sources})
                yield Disagreement(node, tuple(jumps), tuple(met), pixels)

    def alignment(self, number: int | None = None) -> int:
        """Pixels by which an image can be shifted so that all tensors shift by whole cells.

        All tensors, or all that the one of this number is computed from.
        """
        numbers = set(range(len(self.reaches))) if number is None else self._ancestors(number)
        return math.lcm(*(self.reaches[each].jump.numerator for each in numbers))

    def _ancestors(self, number: int) -> set[int]:
        found = {number}
        for each in range(number, 0, -1):
            if each in found:
                found.update(self._steps[each - 1].sources)
        return found
