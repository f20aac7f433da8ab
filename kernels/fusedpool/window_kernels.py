"""Pooling over windows of one shape, whatever places them: the kernels.

Both memory formats are one tile of [rows, columns]: channels_last puts pixels on rows and channels on columns, NCHW
puts (image, channel, line) on rows and the line's pixels on columns, so that columns are always contiguous.

Bytes per input element of size s, for a window of k x k at stride d (output share r = 1 / d^2): forward s + r s, and r
more for a winner; backward s + r s + r, and s more where the gradient depends on the input.
"""

from typing import Final

from fusedpool._triton import tl, triton
from fusedpool.kinds import combine, exponential, finish, finish_aux, gradient, identity, lift
from fusedpool.layout import dense_offset, extent, strided_offset
from fusedpool.prologue import activate, activate_derivative, load_affine

# A new image size must not compile anything: only channels, types and windows are compiled in, and what W and OW are
# multiples of.
_SIZES: Final = ["ROWS", "H", "W", "OH", "OW", "x_n", "x_c", "x_h", "x_w", "g_n", "g_c", "g_h", "g_w"]


@triton.jit
def _start(o, starts, mask, TABLE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr):
    """The first row (or column) of output o's window; may lie in the padding."""
    if TABLE:
        return tl.load(starts + o, mask, 0)
    return o * STRIDE - PADDING


@triton.jit
def _count(start, end, KERNEL: tl.constexpr, DILATION: tl.constexpr):
    """How many of a window's rows (or columns) start, start + dilation... lie in [0, end)."""
    first = (tl.maximum(-start, 0) + DILATION - 1) // DILATION
    last = tl.minimum((tl.maximum(end - start, 0) + DILATION - 1) // DILATION, KERNEL)
    return tl.maximum(last - first, 0)


@triton.jit
def _divisor(
    top, left, H, W, KIND: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What the sum over a window is divided by: ATen's avg_pool2d for avg and mixed, else the cells inside the map."""
    if (DIVISOR != 0) & ((KIND == "avg") | (KIND == "mixed")):
        return (top * 0 + left * 0 + DIVISOR).to(ACC)
    if INCLUDE_PAD & ((KIND == "avg") | (KIND == "mixed")):
        rows = tl.minimum((H + PH - top + DH - 1) // DH, KH)
        columns = tl.minimum((W + PW - left + DW - 1) // DW, KW)
        return (rows * columns).to(ACC)
    return (_count(top, H, KH, DH) * _count(left, W, KW, DW)).to(ACC)


@triton.jit
def _tile(ROWS, C, OH, OW, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """(n, c, h, w) of this program's tile, each [BR, 1] or [1, BC]; their place in a dense map; which exist."""
    columns = C if CHANNELS_LAST else OW
    blocks = tl.cdiv(columns, BC)
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    row = (program // blocks) * BR + tl.arange(0, BR)[:, None]
    column = (program % blocks) * BC + tl.arange(0, BC)[None, :]
    if CHANNELS_LAST:
        n, c, h, w = row // OW // OH, column, row // OW % OH, row % OW
    else:
        n, c, h, w = row // OH // C, row // OH % C, row % OH, column
    return n, c, h, w, row * columns + column, (row < ROWS) & (column < columns)


@triton.jit(do_not_specialize=_SIZES)
def forward(
    x, scale, shift, param, seed, top_table, left_table,
    y, winner, aux, index,
    ROWS, C, H, W, OH, OW, x_n, x_c, x_h, x_w, x_inner, p,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_PARAM: tl.constexpr, TABLE: tl.constexpr, SAVE_WINNER: tl.constexpr, SAVE_AUX: tl.constexpr,
    SAVE_INDEX: tl.constexpr, SENTINEL: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr, W_ALIGN: tl.constexpr,
    OW_ALIGN: tl.constexpr, ACC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """x [N, C, H, W] of any strides (those of rows given / ALIGN) -> y, winner, aux, index, dense [N, C, OH, OW].

    y = finish(combine of lift(activation(scale x + shift)) over the window); see kinds.py. winner is the window's tap
    i * KW + j in row-major order; index is that tap's place in the map, as in torch.nn.functional.max_pool2d.
    W and OW are given / W_ALIGN and OW_ALIGN.
    """
    W, OW = extent(W, W_ALIGN, WIDE), extent(OW, OW_ALIGN, WIDE)
    n, c, oh, ow, out, inside = _tile(ROWS, C, OH, OW, CHANNELS_LAST, WIDE, BR, BC)
    top = _start(oh, top_table, oh < OH, TABLE, SH, PH)
    left = _start(ow, left_table, ow < OW, TABLE, SW, PW)
    s, t = load_affine(scale, shift, c, c < C, HAS_SCALE, HAS_SHIFT, ACC)
    if HAS_PARAM:
        p = tl.load(param)
    p = tl.cast(p, ACC)
    like = tl.zeros((BR, BC), ACC)
    a, b, k, i = identity(like, KIND)
    counter = dense_offset(n.to(tl.int64), c, oh, ow, C, OH, OW, False)
    base = (n * x_n if CHANNELS_LAST else n * x_n + c * x_c) * ALIGN
    if UNROLL:
        for tap in tl.static_range(KH * KW):
            a, b, k, i = _take(
                a, b, k, i, tap, top + (tap // KW) * DH, left + (tap % KW) * DW, base, x, c, s, t, inside, counter,
                seed, p, H, W, x_h, x_w, x_inner, KIND, ACTIVATION, CHANNELS_LAST, ALIGN, ACC,
            )  # fmt: skip
    else:
        for tap in range(KH * KW):
            a, b, k, i = _take(
                a, b, k, i, tap, top + (tap // KW) * DH, left + (tap % KW) * DW, base, x, c, s, t, inside, counter,
                seed, p, H, W, x_h, x_w, x_inner, KIND, ACTIVATION, CHANNELS_LAST, ALIGN, ACC,
            )  # fmt: skip
    divisor = _divisor(top, left, H, W, KIND, KH, KW, PH, PW, DH, DW, INCLUDE_PAD, DIVISOR, ACC)
    value = finish(a, b, k, divisor, p, KIND)
    tl.store(y + out, value.to(y.dtype.element_ty), inside)
    if SAVE_WINNER:
        kept = i
        if (ACTIVATION == "relu") & (KIND != "mixed"):  # operators.masked
            kept = tl.where(value <= 0, -1, i)
        tl.store(winner + out, tl.where(kept < 0, SENTINEL, kept).to(winner.dtype.element_ty), inside)
    if SAVE_AUX:
        tl.store(aux + out, finish_aux(a, b, k, divisor, p, value, KIND), inside)
    if SAVE_INDEX:
        place = (top + (i // KW) * DH).to(tl.int64) * W + left + (i % KW) * DW
        tl.store(index + out, tl.where(i < 0, -1, place), inside)


@triton.jit
def _take(
    a, b, k, i, tap, h, w, base, x, c, s, t, inside, counter, seed, p, H, W, x_h, x_w, x_inner,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The state with the tap at (h, w) of every window combined into it."""
    valid = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    inner = w * x_w * ALIGN + c * x_inner if CHANNELS_LAST else w * x_inner
    offset = base + h * x_h * ALIGN + inner
    v = activate(tl.load(x + offset, valid, 0.0).to(ACC) * s + t, ACTIVATION)
    position = tl.where(valid, tap, -1)
    e = v
    if KIND == "stochastic":
        e = exponential(tl.load(seed), counter >> 32, counter & 0xFFFFFFFF, tl.zeros_like(counter) + tap).to(ACC)
    a2, b2, k2 = lift(v, valid, p, e, KIND)
    return combine(a, b, k, i, a2, b2, k2, position, KIND, True)


@triton.jit(do_not_specialize=_SIZES)
def backward(
    g, x, y, winner, aux, scale, shift, param, top_table, left_table, first_h, first_w, dx, partials,
    mean, offset, slope,
    ROWS, C, H, W, OH, OW, x_n, x_c, x_h, x_w, x_inner, g_n, g_c, g_h, g_w, g_inner, p,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_PARAM: tl.constexpr, TABLE: tl.constexpr, HAS_X: tl.constexpr, HAS_Y: tl.constexpr, HAS_WINNER: tl.constexpr,
    HAS_AUX: tl.constexpr, AFFINE_GRADIENT: tl.constexpr, NORM: tl.constexpr, SENTINEL: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr, G_ALIGN: tl.constexpr,
    W_ALIGN: tl.constexpr, ACC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
):  # fmt: skip
    """g [N, C, OH, OW] of any strides, saved tensors dense -> dx dense [N, C, H, W], a gather: no atomics.

    Each input element sums gradient() over the at most TH * TW windows that it lies in. With AFFINE_GRADIENT, each tile
    leaves its sums of the gradients by scale and by shift in partials: [2, row blocks, C] for channels_last, else
    [2, ROWS, column blocks]. NORM: see window_launch.Norm. W is given / W_ALIGN.
    """
    W = extent(W, W_ALIGN, WIDE)
    n, c, h, w, place, inside = _tile(ROWS, C, H, W, CHANNELS_LAST, WIDE, BR, BC)
    s, t = load_affine(scale, shift, c, c < C, HAS_SCALE, HAS_SHIFT, ACC)
    if HAS_PARAM:
        p = tl.load(param)
    p = tl.cast(p, ACC)
    raw = tl.zeros((BR, BC), ACC)
    if HAS_X:
        here = strided_offset(n, c, h, w, x_n, x_c, x_h, x_w, x_inner, CHANNELS_LAST, ALIGN)
        raw = tl.load(x + here, inside, 0.0).to(ACC)
    u = raw * s + t
    v = activate(u, ACTIVATION)
    if NORM != "":
        raw -= tl.load(mean + c, c < C, 0.0)
    if TABLE:
        oh0, ow0 = tl.load(first_h + h, h < H, 0), tl.load(first_w + w, w < W, 0)
    else:
        oh0 = (tl.maximum(h + PH - (KH - 1) * DH, 0) + SH - 1) // SH
        ow0 = (tl.maximum(w + PW - (KW - 1) * DW, 0) + SW - 1) // SW
    dv = tl.zeros((BR, BC), ACC)
    for step in range(TH * TW):
        oh, ow = oh0 + step // TW, ow0 + step % TW
        top = _start(oh, top_table, oh < OH, TABLE, SH, PH)
        left = _start(ow, left_table, ow < OW, TABLE, SW, PW)
        i, j = (h - top) // DH, (w - left) // DW
        rows = (h >= top) & (i < KH) & (i * DH == h - top) & (oh < OH)
        covered = inside & rows & (w >= left) & (j < KW) & (j * DW == w - left) & (ow < OW)
        saved = dense_offset(n, c, oh, ow, C, OH, OW, CHANNELS_LAST)
        incoming = strided_offset(n, c, oh, ow, g_n, g_c, g_h, g_w, g_inner, CHANNELS_LAST, G_ALIGN)
        gy = tl.load(g + incoming, covered, 0.0).to(ACC)
        won = covered
        if HAS_WINNER:
            kept = tl.load(winner + saved, covered, SENTINEL).to(tl.int32)
            won = covered & (kept == i * KW + j)
        value, extra = gy, gy
        if HAS_Y:
            value = tl.load(y + saved, covered, 1.0).to(ACC)
        if HAS_AUX:
            extra = tl.load(aux + saved, covered, 1.0).to(ACC)
        divisor = _divisor(top, left, H, W, KIND, KH, KW, PH, PW, DH, DW, INCLUDE_PAD, DIVISOR, ACC)
        dv += tl.where(covered, gradient(gy, v, value, extra, won, tl.where(covered, divisor, 1.0), p, KIND), 0.0)
    du = dv
    if HAS_X:
        du = dv * activate_derivative(u, ACTIVATION)
    if NORM != "sums":
        result = du * s
        if NORM == "dx":
            result -= tl.load(offset + c, c < C, 0.0) + tl.load(slope + c, c < C, 0.0) * raw
        tl.store(dx + place, result.to(dx.dtype.element_ty), inside)
    if AFFINE_GRADIENT:
        _store_affine(
            partials, tl.where(inside, du * raw, 0.0), tl.where(inside, du, 0.0), ROWS, C, W, CHANNELS_LAST, BR, BC
        )


@triton.jit
def _store_affine(
    partials, by_scale, by_shift, ROWS, C, W, CHANNELS_LAST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A tile's share of the gradients by scale and shift, where no other program writes."""
    blocks = tl.cdiv(C if CHANNELS_LAST else W, BC)
    line = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    if CHANNELS_LAST:
        column = block * BC + tl.arange(0, BC)
        place, inside, second = line * C + column, column < C, tl.cdiv(ROWS, BR).to(tl.int64) * C
        tl.store(partials + place, tl.sum(by_scale, 0), inside)
        tl.store(partials + second + place, tl.sum(by_shift, 0), inside)
    else:
        row = line * BR + tl.arange(0, BR)
        place, inside, second = row * blocks + block, row < ROWS, tl.cast(ROWS, tl.int64) * blocks
        tl.store(partials + place, tl.sum(by_scale, 1), inside)
        tl.store(partials + second + place, tl.sum(by_shift, 1), inside)
