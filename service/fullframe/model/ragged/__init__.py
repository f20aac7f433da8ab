"""A contract model's graph for batches of images of different sizes, each of which gets the answer that it gets alone.

The images are padded to one size, and the graph is told their own, `sizes`, from which it computes every map's. Where
an operator could see an image's padding in place of its border, the padding is masked first (zeros for convolutions,
the least value for maxima), and what is taken from whole maps is taken from the image's own cells.
"""

from fullframe.model.ragged.checked import check_sizes
from fullframe.model.ragged.rewrite import ragged_graph, ragged_model

__all__ = ["check_sizes", "ragged_graph", "ragged_model"]
