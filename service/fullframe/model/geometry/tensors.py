"""What is known of a tensor: its dimensions, small contents, and what its cells may see beyond their windows."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias


class Side(NamedTuple):
    """A dimension that grows with the image: axis 0 with its height, 1 with its width; `number` is the Axis's."""

    axis: int
    number: int


Dim: TypeAlias = int | str | Side | None
"""A number; a name where it is not known and no image's size changes it; a Side; None: it may change, and how is not
known."""

Dims: TypeAlias = tuple[Dim, ...]

SOME: Final = "?"
"""A dimension that no image's size changes."""

Kind = Literal["whole image", "image size", "branches", "unknown"]


@dataclass(frozen=True)
class Obstacle:
    """Why the cells of a map can't be had from tiles.

    Attributes:
        node: which node, "Conv 'layer1.conv'".
        kind: a value of the whole image or of its size meets the map; branches differ in size; or it is not known
            what a node does.
        reason: the same in words that follow the node's name.
    """

    node: str
    kind: Kind
    reason: str

    def __str__(self) -> str:
        return f"{self.node} {self.reason}"

    def entering(self, node: str) -> "Obstacle":
        """Of a value that a later node puts back into a map."""
        return Obstacle(self.node, self.kind, f"{self.reason}, and {node} puts that back into the map")


class Unfollowed(Exception):
    """A rule can't tell what its node makes; the message follows the node's name."""


@dataclass(frozen=True)
class Tensor:
    """What is known of one tensor.

    Attributes:
        dims: None: not even how many there are.
        data: the contents of a small vector or scalar, a Side for a number that is a map's size.
        fed: it is computed from the image.
        unsized: where dims are None, whether the image's size may change them.
        latent: what stands against tiles if this tensor, no map itself, meets a map again.
        obstacles: what stands against tiles already.
    """

    dims: Dims | None
    data: tuple[Dim | float, ...] | None = None
    fed: bool = False
    unsized: bool = False
    latent: Obstacle | None = None
    obstacles: tuple[Obstacle, ...] = ()

    @property
    def varies(self) -> bool:
        """Whether its shape, or a size that it holds, may change with the image's."""
        if self.dims is None:
            return self.unsized
        size_inside = self.latent is not None and self.latent.kind == "image size"
        return size_inside or any(varies(dim) for dim in self.dims)

    def where(self, axis: int) -> int | None:
        """Which dimension is the image's height (axis 0) or width (1), if one is."""
        found = [i for i, dim in enumerate(self.dims or ()) if isinstance(dim, Side) and dim.axis == axis]
        return found[0] if len(found) == 1 else None

    @property
    def is_map(self) -> bool:
        """Whether it has cells by height and width."""
        return self.where(0) is not None and self.where(1) is not None


def made(
    node: str,
    sources: Iterable[Tensor],
    dims: Dims | None,
    *,
    data: tuple[Dim | float, ...] | None = None,
    unsized: bool = False,
    latent: Obstacle | None = None,
    obstacles: Iterable[Obstacle] = (),
) -> Tensor:
    """A tensor that `node` makes of the sources; `latent` and `obstacles` are those that it adds to theirs."""
    sources = list(sources)
    against = [obstacle for source in sources for obstacle in source.obstacles]
    latents = [each for each in (*(source.latent for source in sources), latent) if each is not None]
    tensor = Tensor(dims, data, any(source.fed for source in sources), unsized)
    if tensor.is_map:
        against += [each.entering(node) for each in latents if each.node != node]
        against += [each for each in latents if each.node == node]
        latents = []
    against += obstacles
    return Tensor(dims, data, tensor.fed, unsized, latents[0] if latents else None, tuple(dict.fromkeys(against)))


def held(node: str, sources: Iterable[Tensor], dims: Dims, data: tuple[Dim | float, ...]) -> Tensor:
    """A small vector or scalar of these contents; where no image's size is among them, it owes nothing to the image."""
    if any(varies(each) for each in data):
        return made(node, sources, dims, data=data)
    return Tensor(dims, data)


def varies(dim: Dim | float) -> bool:
    """Whether a dimension may change with the image's size."""
    return dim is None or isinstance(dim, Side)


def product(dims: Sequence[Dim]) -> Dim:
    """The dimension that these make when flattened."""
    rest = [dim for dim in dims if dim != 1]
    if len(rest) == 1:
        return rest[0]
    if any(varies(dim) for dim in rest):
        return None
    numbers = [dim for dim in rest if isinstance(dim, int)]
    return math.prod(numbers) if len(numbers) == len(rest) else SOME


def reshaped(dims: Dims, target: Sequence[Dim]) -> tuple[Dims, bool]:
    """Dimensions after a Reshape, 0 (the same) and -1 (the rest) filled in, and whether every cell stays in its place.

    It does where the sides follow each other as before and as much lies before, between and behind them.
    """
    wanted = [dims[i] if dim == 0 and i < len(dims) else dim for i, dim in enumerate(target)]
    if -1 not in wanted:
        return tuple(wanted), _same_layout(dims, wanted)
    rest = wanted.index(-1)
    sides = [dim for dim in dims if varies(dim)]
    for guess in (_rest(dims, wanted), *sides):
        filled = (*wanted[:rest], guess, *wanted[rest + 1 :])
        if _same_layout(dims, filled):
            return filled, True
    return (*wanted[:rest], None if sides else _rest(dims, wanted), *wanted[rest + 1 :]), False


def _rest(dims: Sequence[Dim], wanted: Sequence[Dim]) -> Dim:
    """What -1 stands for if it is none of the sides."""
    before, after = ([dim for dim in each if dim != -1 and not varies(dim)] for each in (dims, wanted))
    for name in [dim for dim in after if isinstance(dim, str)]:
        if name in before and name != SOME:
            before.remove(name)
            after.remove(name)
    numbers = [dim for dim in (*before, *after) if isinstance(dim, int)]
    if len(numbers) < len(before) + len(after):
        return before[0] if len(before) == 1 and not after else SOME
    ours, theirs = math.prod(numbers[: len(before)]), math.prod(numbers[len(before) :])
    return ours // theirs if theirs and ours % theirs == 0 else SOME


def _same_layout(dims: Sequence[Dim], other: Sequence[Dim]) -> bool:
    if None in dims or None in other:
        return False
    ours, theirs = _segments(dims), _segments(other)
    if [side for side, _ in ours] != [side for side, _ in theirs]:
        return False
    different = [(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True) if a != b]
    # The totals are equal, so a single stretch that seems to differ in something not known can't.
    return not different or (len(different) == 1 and any(SOME in names for names, _ in different[0]))


def _segments(dims: Sequence[Dim]) -> list[tuple[Side | None, tuple[list[str], int]]]:
    """Each side with the names and the product of what lies before it; None with what lies behind all."""
    found: list[tuple[Side | None, tuple[list[str], int]]] = []
    names: list[str] = []
    numbers = 1
    for dim in (*dims, None):
        if isinstance(dim, int):
            numbers *= dim
        elif isinstance(dim, str):
            names.append(dim)
        else:
            found.append((dim, (sorted(names), numbers)))
            names, numbers = [], 1
    return found
