"""What computes some of a graph's outputs as a torch.nn.Module, which torch.compile follows from end to end."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fullframe.engine.graph.program import Program


class GraphModule(torch.nn.Module):
    """A program's run. Of a module torch.compile takes numbers such as strides for constants, of other objects not.

    Args:
        floats: which of the outputs are to be float32.
    """

    def __init__(self, program: Program, floats: Sequence[bool]) -> None:
        super().__init__()
        self._program, self._floats = program, tuple(floats)
        for each in program.weights:
            torch._dynamo.mark_static(each)  # or an image as high as a map has channels would be a case by itself

    def forward(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs of feeds on the device."""
        found = self._program.run(feeds)
        return [each.to(torch.float32) if float_ else each for each, float_ in zip(found, self._floats, strict=True)]
