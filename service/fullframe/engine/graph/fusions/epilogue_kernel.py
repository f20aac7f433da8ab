"""One pass over a map, in Triton: scale and shift, another map added, an activation, a fill outside of images."""

import torch
from torch import Tensor

from fusedpool._triton import tl, triton
from fusedpool.prologue import activate
from fusedpool.runtime import Tile, channels_last, pointer, present


@triton.jit  # type: ignore[untyped-decorator]
def _activate(u, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """fusedpool's activations and two more."""
    if ACTIVATION == "relu6":
        return tl.where(u <= 0, 0.0, tl.where(u >= 6, 6.0, u))
    elif ACTIVATION == "hard_swish":
        gate = u * (1.0 / 6) + 0.5
        return u * tl.where(gate <= 0, 0.0, tl.where(gate >= 1, 1.0, gate))
    else:
        return activate(u, ACTIVATION)


# Of every batch another, and not to be compiled for; the sizes lie anywhere in a table of all maps'.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["images", "height", "width"], do_not_specialize_on_alignment=["heights", "widths"]
)
def _epilogue(  # type: ignore[no-untyped-def]
    x, y, scale, shift, addend, heights, widths, images, channels, height, width, fill,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_ADDEND: tl.constexpr, HAS_HEIGHTS: tl.constexpr,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A block of BR x BC elements: pixels x channels for channels_last, else (image, channel, line) x its pixels; width
    given / ALIGN."""
    width *= ALIGN
    columns = channels if CHANNELS_LAST else width
    rows = images * height * (width if CHANNELS_LAST else channels)
    blocks = tl.cdiv(columns, BC)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    inside = there
    if CHANNELS_LAST:
        channel, h, w = column[None, :], row // width % height, (row % width)[:, None]
    else:
        channel, h, w = (row // height % channels)[:, None], row % height, column[None, :]
    if HAS_HEIGHTS:
        image = row // (height * (width if CHANNELS_LAST else channels))
        own_height = tl.load(heights + image, row < rows, 0)
        own_width = tl.load(widths + image, row < rows, 0)
        inside = there & (h < own_height)[:, None] & (w < own_width[:, None])
    read = inside if CHANNELS_LAST else there  # of a line no part alone: loads would be narrow
    offset = row[:, None] * columns + column[None, :]
    v = tl.load(x + offset, read, 0.0).to(tl.float32)
    if HAS_SCALE:
        v *= tl.load(scale + channel, channel < channels, 0.0).to(tl.float32)
    if HAS_SHIFT:
        v += tl.load(shift + channel, channel < channels, 0.0).to(tl.float32)
    if HAS_ADDEND:
        v += tl.load(addend + offset, read, 0.0).to(tl.float32)
    v = _activate(v, ACTIVATION)
    if HAS_HEIGHTS:
        v = tl.where(inside, v, fill)
    tl.store(y + offset, v.to(y.dtype.element_ty), there)


def launch(
    x: Tensor,
    y: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    addend: Tensor | None,
    heights: Tensor | None,
    widths: Tensor | None,
    activation: str,
    fill: float,
) -> None:
    """Fill y, which may be x; all maps are dense and lie in memory as x does."""
    n, c, h, w = x.shape
    scale, shift, heights, widths = (None if t is None else t.contiguous() for t in (scale, shift, heights, widths))
    tile = Tile.over(x, h, w)
    tile.launch(
        _epilogue, x, y, pointer(scale, x), pointer(shift, x), pointer(addend, x), pointer(heights, x),
        pointer(widths, x), n, c, h, w // tile.align, fill,
        **present(scale=scale, shift=shift, addend=addend, heights=heights), ACTIVATION=activation, ALIGN=tile.align,
    )  # fmt: skip


def is_dense(x: Tensor) -> bool:
    """Whether a map lies in memory without gaps, NCHW or channels_last."""
    format = torch.channels_last if channels_last(x) else torch.contiguous_format
    return x.is_contiguous(memory_format=format)
