"""Pooling over groups of neighbouring channels: the kernels.

A program's tile of inputs is [BR, BG * BK]. channels_last: pixels x (groups, BK of a group's members), so that loads
run along the channels, and the members are reduced at the end; NCHW: (image, group, line) x the line's pixels, BK = 1.
The remaining members are taken in a loop. channels_last loads are 16 bytes wide where K is a power of two or a multiple
of 8: groups of 3 channels, say, begin at places that are multiples of 3 alone.

Bytes per input element of size s, for groups of k: forward s + s / k, and 1 / k more for a winner; backward
s + s / k + 1 / k, and s more where the gradient depends on the input.
"""

from typing import Final

from fusedpool._triton import tl, triton
from fusedpool.kinds import combine, exponential, finish, finish_aux, gradient, identity, lift, reduce
from fusedpool.layout import dense_offset, extent, strided_offset
from fusedpool.prologue import activate, activate_derivative, load_affine

# A new image size must not compile anything: only channels and types are compiled in, and what W is a multiple of.
_SIZES: Final = ["ROWS", "H", "W", "x_n", "x_c", "x_h", "x_w", "g_n", "g_c", "g_h", "g_w"]


@triton.jit
def _tile(
    ROWS, C, H, W, K: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """What this program's [BR, BC] inputs belong to: (n, group, h, w), each [BR, 1] or [1, BC], and the output's place
    in a dense map; the first of the BK members of the group, and its channel; which exist."""
    columns = C // K * BK if CHANNELS_LAST else W
    blocks = tl.cdiv(columns, BC)
    line, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if WIDE:
        line, block = line.to(tl.int64), block.to(tl.int64)
    row = line * BR + tl.arange(0, BR)[:, None]
    column = block * BC + tl.arange(0, BC)[None, :]
    member = (column % BK).to(tl.int32)
    if CHANNELS_LAST:
        n, group, h, w = row // W // H, column // BK, row // W % H, row % W
        channel, out, inside = group * K + member, row * (C // K) + group, (row < ROWS) & (column < columns)
        if K == BK:  # the same, in a form that shows that channels are contiguous
            channel, inside = column, (row < ROWS) & (column < C)
    else:
        n, group, h, w = row // H // (C // K), row // H % (C // K), row % H, column
        channel, out, inside = group * K, row * W + column, (row < ROWS) & (column < W)
    return n, group, h, w, out, member, channel, inside


@triton.jit
def _outputs(
    ROWS, C, H, W, K: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BR: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """The groups of this program's [BR, BG] outputs, their place in a dense map, and which exist."""
    columns = C // K if CHANNELS_LAST else W
    blocks = tl.cdiv(columns, BG)
    line, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if WIDE:
        line, block = line.to(tl.int64), block.to(tl.int64)
    row = line * BR + tl.arange(0, BR)[:, None]
    column = block * BG + tl.arange(0, BG)[None, :]
    group = column if CHANNELS_LAST else row // H % (C // K)
    return group, row * columns + column, (row < ROWS) & (column < columns)


@triton.jit(do_not_specialize=_SIZES)
def forward(
    x, scale, shift, param, seed, y, winner, aux, index,
    ROWS, C, H, W, x_n, x_c, x_h, x_w, x_inner, p,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_PARAM: tl.constexpr, SAVE_WINNER: tl.constexpr, SAVE_AUX: tl.constexpr, SAVE_INDEX: tl.constexpr,
    SENTINEL: tl.constexpr, K: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
    W_ALIGN: tl.constexpr, ACC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x [N, C, H, W] of any strides (those of rows given / ALIGN) -> y, winner, aux, index, dense [N, C / K, H, W].

    y = finish(combine of lift(activation(scale x + shift)) over the K channels of a group); see kinds.py. winner is
    the place of a channel in its group, index the channel. W is given / W_ALIGN.
    """
    W = extent(W, W_ALIGN, WIDE)
    n, group, h, w, out, lane, first, inside = _tile(ROWS, C, H, W, K, CHANNELS_LAST, WIDE, BR, BC, BK)
    if HAS_PARAM:
        p = tl.load(param)
    p = tl.cast(p, ACC)
    a, b, k, i = identity(tl.zeros((BR, BC), ACC), KIND)
    counter = dense_offset(n.to(tl.int64), group, h, w, C // K, H, W, False)
    for start in range(0, K, BK):
        member, channel = lane + start, first
        if K != BK:
            channel = first + start
        valid = inside
        if K % BK != 0:
            valid = inside & (member < K)
        s, t = load_affine(scale, shift, channel, channel < C, HAS_SCALE, HAS_SHIFT, ACC)
        offset = strided_offset(n, channel, h, w, x_n, x_c, x_h, x_w, x_inner, CHANNELS_LAST, ALIGN)
        v = activate(tl.load(x + offset, valid, 0.0).to(ACC) * s + t, ACTIVATION)
        position = tl.where(valid, member, -1)
        e = v
        if KIND == "stochastic":
            e = exponential(tl.load(seed), counter >> 32, counter & 0xFFFFFFFF, tl.zeros_like(counter) + member).to(ACC)
        a2, b2, k2 = lift(v, valid, p, e, KIND)
        a, b, k, i = combine(a, b, k, i, a2, b2, k2, position, KIND, True)
    if BK > 1:
        BG: tl.constexpr = BC // BK
        a, b, k = tl.reshape(a, (BR, BG, BK)), tl.reshape(b, (BR, BG, BK)), tl.reshape(k, (BR, BG, BK))
        a, b, k, i = reduce(a, b, k, tl.reshape(i, (BR, BG, BK)), KIND, 2)
        group, out, inside = _outputs(ROWS, C, H, W, K, CHANNELS_LAST, WIDE, BR, BG)
    divisor = tl.full((1, 1), K, ACC)
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
        tl.store(index + out, group.to(tl.int64) * K + i, inside)


@triton.jit(do_not_specialize=_SIZES)
def backward(
    g, x, y, winner, aux, scale, shift, param, dx, partials,
    ROWS, C, H, W, x_n, x_c, x_h, x_w, x_inner, g_n, g_c, g_h, g_w, g_inner, p,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_PARAM: tl.constexpr, HAS_X: tl.constexpr, HAS_Y: tl.constexpr, HAS_WINNER: tl.constexpr,
    HAS_AUX: tl.constexpr, AFFINE_GRADIENT: tl.constexpr, SENTINEL: tl.constexpr, K: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr, G_ALIGN: tl.constexpr,
    W_ALIGN: tl.constexpr, ACC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """g [N, C / K, H, W] of any strides, saved tensors dense -> dx dense [N, C, H, W], each element written once.

    With AFFINE_GRADIENT, each tile leaves its sums of the gradients by scale and by shift in partials:
    [2, row blocks, C] for channels_last, else [2, N * C * H, column blocks].
    """
    W = extent(W, W_ALIGN, WIDE)
    n, group, h, w, saved, lane, first, inside = _tile(ROWS, C, H, W, K, CHANNELS_LAST, WIDE, BR, BC, BK)
    if HAS_PARAM:
        p = tl.load(param)
    p = tl.cast(p, ACC)
    incoming = strided_offset(n, group, h, w, g_n, g_c, g_h, g_w, g_inner, CHANNELS_LAST, G_ALIGN)
    gy = tl.load(g + incoming, inside, 0.0).to(ACC)
    value, extra = gy, gy
    if HAS_Y:
        value = tl.load(y + saved, inside, 1.0).to(ACC)
    if HAS_AUX:
        extra = tl.load(aux + saved, inside, 1.0).to(ACC)
    kept = tl.zeros((BR, BC), tl.int32) - 1
    if HAS_WINNER:
        kept = tl.load(winner + saved, inside, SENTINEL).to(tl.int32)
        kept = tl.where(kept == SENTINEL, -1, kept)
    divisor = tl.full((1, 1), K, ACC)
    for start in range(0, K, BK):
        member, channel = lane + start, first
        if K != BK:
            channel = first + start
        valid = inside
        if K % BK != 0:
            valid = inside & (member < K)
        s, t = load_affine(scale, shift, channel, channel < C, HAS_SCALE, HAS_SHIFT, ACC)
        raw = tl.zeros((BR, BC), ACC)
        if HAS_X:
            offset = strided_offset(n, channel, h, w, x_n, x_c, x_h, x_w, x_inner, CHANNELS_LAST, ALIGN)
            raw = tl.load(x + offset, valid, 0.0).to(ACC)
        u = raw * s + t
        du = gradient(gy, activate(u, ACTIVATION), value, extra, kept == member, divisor, p, KIND)
        if HAS_X:
            du = du * activate_derivative(u, ACTIVATION)
        tl.store(dx + dense_offset(n, channel, h, w, C, H, W, CHANNELS_LAST), (du * s).to(dx.dtype.element_ty), valid)
        if AFFINE_GRADIENT:
            by_scale, by_shift = tl.where(valid, du * raw, 0.0), tl.where(valid, du, 0.0)
            blocks = tl.cdiv(C // K * BK if CHANNELS_LAST else W, BC)
            line, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
            if CHANNELS_LAST:
                spot, second = line * C + channel, tl.cdiv(ROWS, BR).to(tl.int64) * C
                real = (channel < C) & (member < K)
                by_scale, by_shift = tl.sum(by_scale, 0)[None, :], tl.sum(by_shift, 0)[None, :]
            else:
                spot, second = (
                    ((n * C + channel) * H + h).to(tl.int64) * blocks + block,
                    tl.cast(ROWS, tl.int64) * K * blocks,
                )
                real = line * BR + tl.arange(0, BR)[:, None] < ROWS
                by_scale, by_shift = tl.sum(by_scale, 1)[:, None], tl.sum(by_shift, 1)[:, None]
            tl.store(partials + spot, by_scale, real)
            tl.store(partials + second + spot, by_shift, real)
