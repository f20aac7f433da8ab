"""Translation of every operator that means something in evaluation to standard ONNX operators, for maps of any size."""

from collections.abc import Callable
from os import PathLike
from typing import Any, Final

import onnx_ir as ir
import torch
from torch import nn

from fusedpool.export.operators import translations

OPSET: Final = 18
"""Of ONNX; runtimes' accelerated kernels of later versions are missing in places."""


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The `custom_translation_table` of torch.onnx.export(..., dynamo=True, opset_version=18) for modules that pool."""
    return translations()


def export_onnx(
    module: nn.Module,
    args: tuple[Any, ...],
    path: str | PathLike[str] | None = None,
    *,
    dynamic_shapes: Any = None,
    **options: Any,
) -> ir.Model:
    """Write a module that pools as one ONNX file in standard operators, and return the graph.

    Args:
        args: example inputs.
        path: None: write nothing.
        dynamic_shapes: which of the inputs' sizes may differ, as torch.export takes it: for an input x of any number
            and size of maps, ({0: Dim("n"), 2: Dim("h"), 3: Dim("w")},).
        options: further ones of torch.onnx.export.

    Raises:
        torch.onnx.errors.ConversionError: something has no meaning in evaluation; the message says what to do.
    """
    settings: dict[str, Any] = {"verbose": False, "external_data": False, **options}
    with torch.no_grad():
        program = torch.onnx.export(
            module,
            args,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dynamic_shapes,
            custom_translation_table=onnx_translations(),
            **settings,
        )
    assert program is not None
    if path is not None:
        program.save(path)
    model: ir.Model = program.model
    return model
