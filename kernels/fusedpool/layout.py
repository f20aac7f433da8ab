"""Where the elements of maps lie in memory, for kernels.

Lengths and strides come in units (runtime.alignment): rows that are known to be multiples of 8 elements of 2 bytes can
be read and written 16 bytes at a time.
"""

from fusedpool._triton import tl, triton


@triton.jit
def extent(units, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """A length from its number of units, in 64 bits where WIDE."""
    return tl.cast(units, tl.int64 if WIDE else tl.int32) * UNIT


@triton.jit
def strided_offset(n, c, h, w, s_n, s_c, s_h, s_w, s_inner, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """The offset of an element of a map that has those runtime.Strides."""
    if CHANNELS_LAST:
        offset = (n * s_n + h * s_h + w * s_w) * ALIGN + c * s_inner
    else:
        offset = (n * s_n + c * s_c + h * s_h) * ALIGN + w * s_inner
    return offset


@triton.jit
def dense_offset(n, c, h, w, C, H, W, CHANNELS_LAST: tl.constexpr):
    """The offset of an element of a dense [N, C, H, W], channels_last or not."""
    return ((n * H + h) * W + w) * C + c if CHANNELS_LAST else ((n * C + c) * H + h) * W + w
