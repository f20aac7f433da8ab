"""The source's preprocessing, inside the graph: from uint8 pixels to what it takes."""

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from fullframe.convert.draft import Draft
from fullframe.convert.options import Options
from fullframe.model.contract import INPUT


def take_pixels(draft: Draft, options: Options) -> None:
    """The graph takes uint8 RGB [N, H, W, 3] and makes (pixels / 255 - mean) / std * input_range of them."""
    scale, offset = np.array(options.std) * (255 / options.input_range), np.array(options.mean) * 255
    pixels, nodes = INPUT, []
    if options.bgr:
        nodes.append(draft.make("Gather", [INPUT, draft.add_constant(np.array([2, 1, 0]), "bgr")], axis=3))
        pixels, scale, offset = nodes[-1].output[0], scale[::-1], offset[::-1]
    nodes.append(draft.make("Transpose", [pixels], perm=[0, 3, 1, 2]))
    nodes.append(draft.make("Cast", [nodes[-1].output[0]], to=TensorProto.FLOAT))
    for op, values, neutral in (("Sub", offset, 0), ("Div", scale, 1)):
        if (values != neutral).any():
            constant = draft.add_constant(values.astype(np.float32).reshape(3, 1, 1), op.lower())
            nodes.append(draft.make(op, [nodes[-1].output[0], constant]))
    nodes[-1].output[0] = draft.image
    draft.insert(nodes, draft.nodes[0] if draft.nodes else None)
    draft.image, draft.takes_pixels = INPUT, True
    draft.touch()
    order = "blue, green, red" if options.bgr else "red, green, blue"
    draft.note(
        f"preprocessing inside: {INPUT}, uint8 [N, H, W, 3], become (pixels / 255 - mean) / std"
        f"{' * 255' if options.input_range == 255 else ''}, in the order {order}"
    )


def source_images(options: Options, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The same by numpy: what the source takes of uint8 [N, H, W, 3], float32 [N, 3, H, W]."""
    values = (pixels / 255 - np.array(options.mean)) / np.array(options.std) * options.input_range
    return np.ascontiguousarray(np.moveaxis(values[..., ::-1] if options.bgr else values, -1, 1), np.float32)
