"""The kernels of training-mode batch normalisation: its sums over each channel, and what is made of them.

A program sums its columns (channels, for channels_last; pixels of one channel, for NCHW) over the row blocks of its
group, each element of the block for itself; what the programs leave is merged by a second kernel, one line for each.
The order is fixed by the shape.

Bytes per input element of size s, with pooled outputs a share r of the inputs: moments s; winner_sums at most
s (1 + r) + r. Partial sums are 12 bytes for every 4096 elements of a large map, or less.
"""

from typing import Final

from fusedpool._triton import tl, triton
from fusedpool.kinds import combine, identity
from fusedpool.layout import dense_offset, extent, strided_offset
from fusedpool.prologue import activate_derivative, load_affine

# A new image size must not compile anything.
_SIZES: Final = ["ROWS", "GROUPS", "H", "W", "OH", "OW", "x_n", "x_c", "x_h", "x_w", "g_n", "g_c", "g_h", "g_w"]


@triton.jit
def _columns(C, WIDTH, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BC: tl.constexpr):
    """(group, c, w, which exist, line of partial sums) of a program: c and w [1, BC], or [1, 1] where there is one."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    one = tl.zeros((1, 1), tl.int32)
    columns = tl.arange(0, BC)[None, :]
    if CHANNELS_LAST:
        blocks = tl.cdiv(C, BC)
        group, c, w = program // blocks, program % blocks * BC + columns, one
        exists, line = c < C, group
    else:
        blocks = tl.cdiv(WIDTH, BC)
        group, c, w = program // blocks // C, program // blocks % C + one, program % blocks * BC + columns
        exists, line = w < WIDTH, group * blocks + program % blocks
    return group, c, w, exists, line


@triton.jit
def _rows(block, H, W, CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, BR: tl.constexpr):
    """(row, n, h, w) of a block's rows [BR, 1]: pixels for channels_last, else lines; FLAT: all w, or all n."""
    row = tl.arange(0, BR)[:, None] + tl.cast(block, tl.int64 if WIDE else tl.int32) * BR
    n, h, w = row, row * 0, row * 0
    if CHANNELS_LAST & FLAT:
        n, h, w = row * 0, row * 0, row
    elif CHANNELS_LAST:
        n, h, w = row // W // H, row // W % H, row % W
    elif not FLAT:
        n, h, w = row // H, row % H, row * 0
    return row, n, h, w


@triton.jit
def _leave(
    partials, which, total, line, c, C, WIDTH, GROUPS, CHANNELS_LAST: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Store a program's total, [BC] or of its one channel, as partials[which, line, c]."""
    lines = tl.cast(GROUPS, tl.int64)
    if not CHANNELS_LAST:
        lines *= tl.cdiv(WIDTH, BC)
    channel = tl.sum(c, 0)
    tl.store(partials + (which * lines + line) * C + channel, total, channel < C)


@triton.jit
def _join(mean, squares, count, AXIS: tl.constexpr):
    """The moments of all that those along an axis are of."""
    total = tl.sum(count, AXIS)
    joint = tl.sum(mean * count, AXIS) / tl.maximum(total, 1.0)
    away = mean - tl.expand_dims(joint, AXIS)
    return joint, tl.sum(squares + count * away * away, AXIS), total


@triton.jit(do_not_specialize=_SIZES)
def moments(
    x, partials, ROWS, GROUPS, C, H, W, x_n, x_c, x_h, x_w, x_inner,
    FLAT: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr, W_ALIGN: tl.constexpr,
    ACC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """x [N, C, H, W] of any strides -> partials [3, lines, C]: mean, squared deviations, count (Welford 1962).

    Of differences from the channel's first value: a mean far from 0 takes no digits from the deviations. W is in units
    of W_ALIGN, so that a mask of columns keeps wide loads wide.
    """
    W = extent(W, W_ALIGN, WIDE)
    group, c, w, exists, line = _columns(C, W, CHANNELS_LAST, WIDE, BC)
    first_value = strided_offset(0, c, 0, 0, x_n, x_c, x_h, x_w, x_inner, CHANNELS_LAST, ALIGN)
    pivot = tl.load(x + first_value, c < C, 0.0).to(ACC)
    mean, squares, count = tl.zeros((BR, BC), ACC), tl.zeros((BR, BC), ACC), tl.zeros((BR, 1), ACC)
    for first in range(group * UNROLL, tl.cdiv(ROWS, BR), GROUPS * UNROLL):
        for step in tl.static_range(UNROLL):
            row, n, h, pixel = _rows(first + step, H, W, CHANNELS_LAST, FLAT, WIDE, BR)
            inside = (row < ROWS) & exists
            place = strided_offset(n, c, h, pixel + w, x_n, x_c, x_h, x_w, x_inner, CHANNELS_LAST, ALIGN)
            value = tl.load(x + place, inside, 0.0).to(ACC)
            # An element that is inside was inside in every block before.
            count += tl.where(row < ROWS, 1.0, 0.0)
            away = tl.where(inside, value - pivot - mean, 0.0)
            change = away * (1 / tl.maximum(count, 1.0))
            mean += change
            squares += away * (away - change)
    mean, squares, counts = _join(mean, squares, tl.where(exists, count, 0.0), 0)
    if not CHANNELS_LAST:
        mean, squares, counts = _join(mean, squares, counts, 0)
    _leave(partials, 0, mean, line, c, C, W, GROUPS, CHANNELS_LAST, BC)
    _leave(partials, 1, squares, line, c, C, W, GROUPS, CHANNELS_LAST, BC)
    _leave(partials, 2, counts, line, c, C, W, GROUPS, CHANNELS_LAST, BC)


@triton.jit(do_not_specialize=["x_c", "LINES", "COUNT"])
def merge_moments(
    partials, x, weight, bias, statistics, x_c, LINES, COUNT, C, EPS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """partials of `moments`, COUNT values of each channel in all -> [5, C], batchnorm_launch.Statistics."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    like = tl.zeros((BL, BC), ACC)
    a, b, k, i = identity(like, "std")
    for first in range(0, LINES, BL):
        line = first + tl.arange(0, BL)[:, None]
        inside = (line < LINES) & (c < C)[None, :]
        place = line.to(tl.int64) * C + c[None, :]
        second = tl.cast(LINES, tl.int64) * C
        a2 = tl.load(partials + place, inside, 0.0)
        b2 = tl.load(partials + second + place, inside, 0.0)
        k2 = tl.load(partials + 2 * second + place, inside, 0.0)
        a, b, k, i = combine(a, b, k, i, a2, b2, k2, i, "std", True)
    mean, squares, _ = _join(a, b, k, 0)
    mean += tl.load(x + c.to(tl.int64) * x_c, c < C, 0.0).to(ACC)
    variance = squares / tl.cast(COUNT, ACC)
    factor = 1 / tl.sqrt(variance + EPS)
    weights, biases = load_affine(weight, bias, c, c < C, HAS_WEIGHT, HAS_BIAS, ACC)
    scale = weights * factor
    tl.store(statistics + c, mean, c < C)
    tl.store(statistics + C + c, variance, c < C)
    tl.store(statistics + 2 * C + c, factor, c < C)
    tl.store(statistics + 3 * C + c, scale, c < C)
    tl.store(statistics + 4 * C + c, biases - mean * scale, c < C)


@triton.jit(do_not_specialize=_SIZES)
def winner_sums(
    g, x, winner, mean, scale, shift, partials,
    ROWS, GROUPS, C, OH, OW, x_n, x_c, x_h, x_w, x_inner, g_n, g_c, g_h, g_w, g_inner,
    ACTIVATION: tl.constexpr, SENTINEL: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr, G_ALIGN: tl.constexpr,
    W_ALIGN: tl.constexpr, ACC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """g [N, C, OH, OW] -> partials [2, lines, C]: sums of du (x - mean) and of du, u = scale x + shift being activated.

    Only winners have a gradient: x is read at those. OW is in units of W_ALIGN.
    """
    OW = extent(OW, W_ALIGN, WIDE)
    group, c, w, exists, line = _columns(C, OW, CHANNELS_LAST, WIDE, BC)
    s, t = load_affine(scale, shift, c, c < C, True, True, ACC)
    middle = tl.load(mean + c, c < C, 0.0)
    by_scale, by_shift = tl.zeros((BR, BC), ACC), tl.zeros((BR, BC), ACC)
    for first in range(group * UNROLL, tl.cdiv(ROWS, BR), GROUPS * UNROLL):
        for step in tl.static_range(UNROLL):
            row, n, oh, pixel = _rows(first + step, OH, OW, CHANNELS_LAST, False, WIDE, BR)
            ow = pixel + w
            inside = (row < ROWS) & exists
            kept = tl.load(winner + dense_offset(n, c, oh, ow, C, OH, OW, CHANNELS_LAST), inside, SENTINEL).to(tl.int32)
            won = inside & (kept != SENTINEL)
            incoming = strided_offset(n, c, oh, ow, g_n, g_c, g_h, g_w, g_inner, CHANNELS_LAST, G_ALIGN)
            gy = tl.load(g + incoming, inside, 0.0).to(ACC)
            h, v = oh * SH - PH + kept // KW * DH, ow * SW - PW + kept % KW * DW
            place = strided_offset(n, c, h, v, x_n, x_c, x_h, x_w, x_inner, CHANNELS_LAST, ALIGN)
            value = tl.load(x + place, won, 0.0).to(ACC)
            du = tl.where(won, gy * activate_derivative(value * s + t, ACTIVATION), 0.0)
            by_scale += du * (value - middle)
            by_shift += du
    by_scale, by_shift = tl.sum(by_scale, 0), tl.sum(by_shift, 0)
    if not CHANNELS_LAST:
        by_scale, by_shift = tl.sum(by_scale, 0), tl.sum(by_shift, 0)
    _leave(partials, 0, by_scale, line, c, C, OW, GROUPS, CHANNELS_LAST, BC)
    _leave(partials, 1, by_shift, line, c, C, OW, GROUPS, CHANNELS_LAST, BC)


@triton.jit(do_not_specialize=["LINES", "COUNT"])
def merge_sums(
    by_scale, by_shift, factor, scale, dweight, dbias, correction, LINES, COUNT, C, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums [LINES, C] of du (x - mean) and of du -> dweight, dbias [C] and (window_launch.Norm) offset, slope [2, C].

    dx = scale (du - sum(du) / count - xhat sum(du xhat) / count): Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    a, b = tl.zeros((BL, BC), ACC), tl.zeros((BL, BC), ACC)
    for first in range(0, LINES, BL):
        line = first + tl.arange(0, BL)[:, None]
        inside = (line < LINES) & (c < C)[None, :]
        place = line.to(tl.int64) * C + c[None, :]
        a += tl.load(by_scale + place, inside, 0.0)
        b += tl.load(by_shift + place, inside, 0.0)
    f, s = tl.load(factor + c, c < C, 0.0), tl.load(scale + c, c < C, 0.0)
    products, total = tl.sum(a, 0) * f, tl.sum(b, 0)
    if HAS_WEIGHT:
        tl.store(dweight + c, products.to(dweight.dtype.element_ty), c < C)
    if HAS_BIAS:
        tl.store(dbias + c, total.to(dbias.dtype.element_ty), c < C)
    count = tl.cast(COUNT, ACC)
    tl.store(correction + c, s * (total / count), c < C)
    tl.store(correction + C + c, s * f * (products / count), c < C)
