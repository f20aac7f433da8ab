"""How many elements a node would make of constants: from shapes and numbers alone, before any memory is taken."""

from collections.abc import Sequence
from itertools import zip_longest
from math import ceil, prod

from torch import Tensor

from fullframe.engine.graph.ir import Node
from fullframe.engine.graph.operators import OPERATORS
from fullframe.engine.graph.operators.table import ints, number, numbers


def elements(node: Node, values: Sequence[Tensor | None]) -> int:
    """The elements of its largest output, and of what it makes on the way there.

    Args:
        values: of its inputs; None: left out.

    Raises what Python raises for numbers that make no sense.
    """
    operator = OPERATORS[node.op]
    shapes: list[list[int]] = [
        list(v.shape) for position, v in enumerate(values) if v is not None and not operator.on_host(position)
    ]
    given = [*values, None, None, None, None]
    match node.op:
        case "ConstantOfShape":
            return prod(ints(given[0]) or [])
        case "Range":
            start, limit, delta = (float(number(each)) for each in given[:3])
            return max(0, ceil((limit - start) / delta))
        case "Expand":
            return prod(_met([*shapes, ints(given[1]) or []]))
        case "Tile":
            return prod(side * often for side, often in zip(shapes[0], ints(given[1]) or [], strict=True))
        case "Resize":
            factors = numbers(given[2]) or [1] * len(shapes[0])
            targets = ints(given[3]) or [int(side * by) for side, by in zip(shapes[0], factors, strict=True)]
            return prod(map(max, shapes[0], targets))
        case "Pad":
            pads, axes = ints(given[1]) or [], ints(given[3]) or range(len(shapes[0]))
            for place, axis in enumerate(axes):
                shapes[0][axis] += pads[place] + pads[place + len(pads) // 2]
            return prod(shapes[0])
        case "Gather":
            axis = node.get("axis", 0) % len(shapes[0])
            return prod([*shapes[0][:axis], *shapes[0][axis + 1 :], *shapes[1]])
        case "MatMul":
            first, second = ([1, *shapes[0]], [*shapes[1], 1] if len(shapes[1]) == 1 else shapes[1])
            return prod(_met([first[:-2], second[:-2]])) * first[-2] * second[-1]
        case "Gemm":
            rows, columns = int(bool(node.get("transA", 0))), int(not node.get("transB", 0))
            return shapes[0][rows] * shapes[1][columns]
        case "Concat":
            return sum(map(prod, shapes))
    return prod(_met(shapes))


def _met(shapes: Sequence[Sequence[int]]) -> list[int]:
    """The shape of what is made of these by broadcasting."""
    return [max(sides) for sides in zip_longest(*(shape[::-1] for shape in shapes), fillvalue=1)]
