"""Several operators in one of fusedpool's: what a graph's nodes become for the outputs that are asked for.

Inception's parallel branches share no reads: each block has one pool, and its other branches are convolutions, whose
reads are the convolution library's own.
"""

from collections.abc import Sequence

from fullframe.engine.graph.fusions.epilogues import fuse_epilogues
from fullframe.engine.graph.fusions.heads import fuse_heads
from fullframe.engine.graph.fusions.masks import find_masks
from fullframe.engine.graph.fusions.pattern import Pattern
from fullframe.engine.graph.fusions.whole import find_whole, merge_whole
from fullframe.engine.graph.fusions.windows import fuse_windows
from fullframe.engine.graph.ir import Graph, Node, needed

_PASSES = (find_masks, find_whole, fuse_heads, merge_whole, fuse_windows, fuse_epilogues)


def fuse(graph: Graph, outputs: Sequence[str]) -> list[Node]:
    """The nodes that compute the outputs, fused."""
    nodes = needed(graph.nodes, outputs)
    for each in _PASSES:
        nodes = needed(each(Pattern(nodes, outputs, graph)), outputs)
    return nodes
