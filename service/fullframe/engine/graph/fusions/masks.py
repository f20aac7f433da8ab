"""Maps with a fill outside of their images' own rows and columns, and what average pools over them are divided by."""

from typing import Final, NamedTuple

import torch
from torch import Tensor

from fullframe.engine.graph.fusions.epilogue_kernel import launch
from fullframe.engine.graph.fusions.pattern import Pattern
from fullframe.engine.graph.ir import Node
from fullframe.engine.graph.operators.elementwise import MAP_TYPE
from fullframe.engine.graph.operators.own import OWN
from fullframe.engine.graph.operators.table import operator
from fullframe.engine.graph.operators.windows import average_pool
from fusedpool import runtime

MASKED: Final = "fullframe.Masked"
"""(x, rows, columns) -> x with `fill` outside of the images' own rows and columns, int64 [N]."""
SHARES: Final = "fullframe.Shares"
"""(x, rows, columns) -> [N, 1, h, w]: an average pool, by its attributes, of 1 where MASKED would keep x, else 0."""


def outside(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """bool [N, 1, h, w]: which cells are not the images' own."""
    height, width = (torch.arange(size, device=x.device) for size in x.shape[2:])
    return (height >= rows[:, None])[:, None, :, None] | (width >= columns[:, None])[:, None, None]


@operator(MASKED, table=OWN, fresh=True)
def masked(node: Node, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A copy."""
    return x.masked_fill(outside(x, rows, columns), node.attributes["fill"])


@operator(SHARES, table=OWN)
def shares(node: Node, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Of the maps' type."""
    own = torch.ones((x.shape[0], 1, *x.shape[2:]), device=x.device)
    if runtime.use_triton(own):
        launch(own, own, None, None, None, rows, columns, "none", 0.0)
    else:
        own.masked_fill_(outside(own, rows, columns), 0.0)
    found = average_pool(node, own)
    assert isinstance(found, Tensor)
    return found.to(node.get(MAP_TYPE, torch.float32))


def find_masks(pattern: Pattern) -> list[Node]:
    """MASKED and SHARES nodes in the place of those that compare each cell with the sizes."""
    found: list[Node] = []
    made: set[str] = set()
    for node in pattern.nodes:
        node = _masked(pattern, node) or _shares(pattern, node, made) or node
        found.append(node)
        made.update(node.outputs)
    return found


def _masked(pattern: Pattern, node: Node) -> Node | None:
    if node.op != "Where" or pattern.rank(node.inputs[1]) != 4 or (fill := pattern.number(node.inputs[2])) is None:
        return None
    own = _own(pattern, node.inputs[0])
    return own and Node(MASKED, (node.inputs[1], *own), node.outputs, node.title, {"fill": fill})


def _shares(pattern: Pattern, node: Node, made: set[str]) -> Node | None:
    """A pool of a mask, by which a pool of a map with the same mask is divided: the map's shape is the mask's."""
    cast = pattern.maker(node.inputs[0], "Cast") if node.op == "AveragePool" else None
    own = _own(pattern, cast.inputs[0]) if cast else None
    if cast is None or own is None:
        return None
    for reader in pattern.of(node.outputs[0]):
        pool = pattern.maker(reader.inputs[0], "AveragePool") if reader.op == "Div" else None
        where = pattern.maker(pool.inputs[0], "Where") if pool and pool.attributes == node.attributes else None
        if where and where.inputs[0] == cast.inputs[0] and where.outputs[0] in made:
            return node.having(op=SHARES, inputs=(where.outputs[0], *own))
    return None


def _own(pattern: Pattern, mask: str) -> tuple[str, str] | None:
    """The rows and columns that a mask [N, 1, h, w] is true within."""
    both = pattern.maker(mask, "And")
    sides = dict(filter(None, (_within(pattern, each) for each in both.inputs))) if both else {}
    return (sides[2], sides[3]) if set(sides) == {2, 3} else None


def _within(pattern: Pattern, name: str) -> tuple[int, str] | None:
    """The axis of a map along which a mask says which cells are below a size, and the size."""
    spread = pattern.maker(name, "Unsqueeze")
    less = spread and pattern.maker(spread.inputs[0], "Less")
    if not spread or not less:
        return None
    cells, sizes = pattern.maker(less.inputs[0], "Range"), pattern.maker(less.inputs[1], "Unsqueeze")
    axes = pattern.ints(spread.inputs[1])
    axis = 2 if axes == [1, 3] else 3 if axes == [1, 2] else None
    if axis is None or cells is None or sizes is None or pattern.ints(sizes.inputs[1]) != [1]:
        return None
    if (pattern.number(cells.inputs[0]), pattern.number(cells.inputs[2])) != (0, 1):
        return None
    return axis, sizes.inputs[0]


class Mask(NamedTuple):
    """What a MASKED node does."""

    source: str
    own: tuple[str, str]
    fill: float


def mask_of(pattern: Pattern, name: str) -> Mask | None:
    """What a tensor is, if it is a masked map."""
    node = pattern.maker(name, MASKED)
    return Mask(node.inputs[0], (node.inputs[1], node.inputs[2]), node.attributes["fill"]) if node else None
