"""The kernels of a 1x1 convolution under global pooling: matrix products over tiles of [pixels, channels].

The pre-activations of a tile live in registers only. Where all input channels fit one block (BK >= CIN), a tile of x
and one of weight are read once for everything that a program does with them; else again, from a cache, block by block.
Sums that programs share are left as partial ones, then added in a fixed order: no atomics, the same bits every time.
"""

from typing import Final

from fusedpool._triton import tl, triton
from fusedpool.kinds import combine, finish, finish_aux, gradient, identity, lift, reduce
from fusedpool.prologue import activate, activate_derivative

# A new image size must not compile anything: only channels, types and layouts are compiled in.
_SIZES: Final = ["N", "PIXELS", "W", "SPLITS", "PER", "x_n", "x_c", "x_h", "x_w"]


@triton.jit
def _rows(
    x, n, pixel, W, x_n, x_c, x_h, x_w, x_inner,
    CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Pointers to channel 0 of the pixels of image n, and the step to the next channel."""
    if WIDE:
        n, pixel, x_c = tl.cast(n, tl.int64), pixel.to(tl.int64), tl.cast(x_c, tl.int64)
    h, w = pixel // W, pixel % W
    if FLAT:
        h, w = pixel * 0, pixel
    if CHANNELS_LAST:
        return x + (n * x_n + h * x_h + w * x_w) * ALIGN, x_inner
    return x + (n * x_n + h * x_h) * ALIGN + w * x_inner, x_c * ALIGN


@triton.jit
def _load_pixels(rows, step, c, inside, CIN: tl.constexpr, OPERAND: tl.constexpr):
    """x [pixels, c], zero outside."""
    return tl.load(rows + c[None, :] * step, inside & (c[None, :] < CIN), 0.0).to(OPERAND)


@triton.jit
def _load_weight(weight, w_o, w_i, c, o, CIN: tl.constexpr, COUT: tl.constexpr, OPERAND: tl.constexpr):
    """weight, transposed: [c, o], zero outside."""
    inside = (c[:, None] < CIN) & (o[None, :] < COUT)
    return tl.load(weight + o[None, :] * w_o + c[:, None] * w_i, inside, 0.0).to(OPERAND)


@triton.jit
def _dot(a, b, total):
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def _load_bias(bias, o, COUT: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr):
    """[BP, o] of the bias, or zeros: what the convolution's sums start from."""
    if HAS_BIAS:
        return tl.zeros((BP, 1), ACC) + tl.load(bias + o, o < COUT, 0.0).to(ACC)[None, :]
    return tl.zeros((BP, o.shape[0]), ACC)


@triton.jit
def _convolve(
    u, rows, step, inside, weight, w_o, w_i, o,
    CIN: tl.constexpr, COUT: tl.constexpr, OPERAND: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """u [pixels, o] + the sum over all input channels of x times weight."""
    for start in range(0, CIN, BK):
        c = start + tl.arange(0, BK)
        pixels = _load_pixels(rows, step, c, inside, CIN, OPERAND)
        u = _dot(pixels, _load_weight(weight, w_o, w_i, c, o, CIN, COUT, OPERAND), u)
    return u


@triton.jit(do_not_specialize=_SIZES)
def forward(
    x, weight, bias, param, part_a, part_b, part_c, part_i,
    PIXELS, W, SPLITS, PER, x_n, x_c, x_h, x_w, x_inner, w_o, w_i, p,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PARAM: tl.constexpr, WHOLE: tl.constexpr,
    CIN: tl.constexpr, COUT: tl.constexpr, CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr, P_ALIGN: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """x [N, Cin, PIXELS * P_ALIGN], weight [Cout, Cin] -> the state of each image, split and output channel.

    part_a... [N, SPLITS, Cout]; all but part_a only with WHOLE. A split is PER tiles of BP pixels; the grid is (image,
    split, block of BC outputs), the last fastest, so that programs which read the same pixels run side by side.
    """
    pixels = PIXELS * P_ALIGN
    blocks: tl.constexpr = (COUT + BC - 1) // BC
    split = tl.program_id(0) // blocks
    n = split // SPLITS
    o = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    c = tl.arange(0, BK)
    if HAS_PARAM:
        p = tl.load(param)
    p = tl.cast(p, ACC)
    start = _load_bias(bias, o, COUT, HAS_BIAS, ACC, BP)
    if BK >= CIN:
        kernel = _load_weight(weight, w_o, w_i, c, o, CIN, COUT, OPERAND)
    a, b, k, i = identity(tl.zeros((BC,), ACC), KIND)
    first = (split % SPLITS) * PER
    for tile in range(first, tl.minimum(first + PER, tl.cdiv(pixels, BP))):
        pixel = tile * BP + tl.arange(0, BP)[:, None]
        inside = pixel < pixels
        rows, step = _rows(x, n, pixel, W, x_n, x_c, x_h, x_w, x_inner, CHANNELS_LAST, FLAT, WIDE, ALIGN)
        if BK >= CIN:
            u = _dot(_load_pixels(rows, step, c, inside, CIN, OPERAND), kernel, start)
        else:
            u = _convolve(start, rows, step, inside, weight, w_o, w_i, o, CIN, COUT, OPERAND, BK)
        v = activate(u, ACTIVATION)
        a2, b2, k2 = lift(v, inside, p, v, KIND)
        position = tl.where(inside, pixel, -1) + tl.zeros((BP, BC), tl.int32)
        a2, b2, k2, i2 = reduce(a2, b2, k2, position, KIND, 0)
        a, b, k, i = combine(a, b, k, i, a2, b2, k2, i2, KIND, True)
    place = split.to(tl.int64) * COUT + o
    tl.store(part_a + place, a, o < COUT)
    if WHOLE:
        tl.store(part_b + place, b, o < COUT)
        tl.store(part_c + place, k, o < COUT)
        tl.store(part_i + place, i, o < COUT)


@triton.jit(do_not_specialize=_SIZES)
def merge(
    part_a, part_b, part_c, part_i, param, y, winner, saved, N, PIXELS, SPLITS, p,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, HAS_PARAM: tl.constexpr, WHOLE: tl.constexpr,
    SAVE_WINNER: tl.constexpr, SAVE: tl.constexpr, COUT: tl.constexpr, ACC: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """States [N, SPLITS, Cout], in order -> y, winner [N, Cout]; saved [2, N, Cout]: y unrounded, and finish_aux."""
    place = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = place < tl.cast(N, tl.int64) * COUT
    if HAS_PARAM:
        p = tl.load(param)
    p = tl.cast(p, ACC)
    a, b, k, i = identity(tl.zeros((B,), ACC), KIND)
    for split in range(SPLITS):
        part = (place // COUT * SPLITS + split) * COUT + place % COUT
        a2 = tl.load(part_a + part, inside, 0.0)
        b2, k2, i2 = b, k, i
        if WHOLE:
            b2 = tl.load(part_b + part, inside, 0.0)
            k2 = tl.load(part_c + part, inside, 0.0)
            i2 = tl.load(part_i + part, inside, -1)
        a, b, k, i = combine(a, b, k, i, a2, b2, k2, i2, KIND, True)
    n = tl.cast(PIXELS, ACC)
    value = finish(a, b, k, n, p, KIND)
    tl.store(y + place, value.to(y.dtype.element_ty), inside)
    if SAVE_WINNER:
        if (ACTIVATION == "relu") & (KIND != "mixed"):
            i = tl.where(value <= 0, -1, i)
        tl.store(winner + place, i, inside)
    if SAVE:
        tl.store(saved + place, value, inside)
        tl.store(saved + tl.cast(N, tl.int64) * COUT + place, finish_aux(a, b, k, n, p, value, KIND), inside)


@triton.jit
def _pre_gradient(
    u, g, winner, saved, N, n, o, pixel, inside, pixels, p,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, HAS_WINNER: tl.constexpr, HAS_SAVED: tl.constexpr,
    COUT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient by the pre-activations u [pixels, o] of image n, zero outside."""
    there = o < COUT
    image = tl.cast(n, tl.int64) * COUT
    gy = tl.load(g + image + o, there, 0.0).to(ACC)[None, :] + tl.zeros_like(u)
    won = inside
    if HAS_WINNER:
        won = tl.load(winner + image + o, there, -1)[None, :] == pixel
    value, aux = gy, gy
    if HAS_SAVED:
        value = tl.load(saved + image + o, there, 1.0)[None, :]
        aux = tl.load(saved + tl.cast(N, tl.int64) * COUT + image + o, there, 1.0)[None, :]
    du = gradient(gy, activate(u, ACTIVATION), value, aux, won, tl.cast(pixels, ACC), p, KIND)
    return tl.where(inside & there[None, :], du * activate_derivative(u, ACTIVATION), 0.0)


@triton.jit(do_not_specialize=_SIZES)
def backward_input(
    g, x, weight, bias, param, winner, saved, dx,
    N, PIXELS, W, x_n, x_c, x_h, x_w, x_inner, w_o, w_i, p,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PARAM: tl.constexpr,
    HAS_WINNER: tl.constexpr, HAS_SAVED: tl.constexpr, RECOMPUTE: tl.constexpr, AVERAGE: tl.constexpr,
    CIN: tl.constexpr, COUT: tl.constexpr, CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr, P_ALIGN: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """g [N, Cout] -> weight^T du, dense [N, Cin, PIXELS * P_ALIGN]; the grid is (image, BP pixels, BI channels)."""
    pixels = PIXELS * P_ALIGN
    blocks: tl.constexpr = (CIN + BI - 1) // BI
    tile = tl.program_id(0) // blocks
    n = tile // tl.cdiv(pixels, BP)
    pixel = (tile % tl.cdiv(pixels, BP)) * BP + tl.arange(0, BP)[:, None]
    inside = pixel < pixels
    c = tl.arange(0, BK)
    channel = (tl.program_id(0) % blocks) * BI + tl.arange(0, BI)
    if HAS_PARAM:
        p = tl.load(param)
    p = tl.cast(p, ACC)
    rows, step = _rows(x, n, pixel, W, x_n, x_c, x_h, x_w, x_inner, CHANNELS_LAST, FLAT, WIDE, ALIGN)
    if RECOMPUTE and BK >= CIN:
        held = _load_pixels(rows, step, c, inside, CIN, OPERAND)
    total = tl.zeros((BP, BI), ACC)
    for block in range(0, COUT, BC):
        o = block + tl.arange(0, BC)
        kernel = _load_weight(weight, w_o, w_i, channel, o, CIN, COUT, OPERAND)
        u = _load_bias(bias, o, COUT, HAS_BIAS, ACC, BP)
        if RECOMPUTE:
            if BK >= CIN:
                u = _dot(held, kernel, u)
            else:
                u = _convolve(u, rows, step, inside, weight, w_o, w_i, o, CIN, COUT, OPERAND, BK)
        du = _pre_gradient(
            u, g, winner, saved, N, n, o, pixel, inside, pixels, p,
            KIND, ACTIVATION, HAS_WINNER, HAS_SAVED, COUT, ACC,
        )  # fmt: skip
        total = _dot(du.to(OPERAND), tl.trans(kernel), total)
    if AVERAGE:
        total = total / tl.cast(pixels, ACC)
    image = tl.cast(n, tl.int64) * CIN * pixels
    if WIDE:
        pixel = pixel.to(tl.int64)
        channel = channel.to(tl.int64)
    place = pixel * CIN + channel[None, :] if CHANNELS_LAST else channel[None, :] * pixels + pixel
    tl.store(dx + image + place, total.to(dx.dtype.element_ty), inside & (channel[None, :] < CIN))


@triton.jit(do_not_specialize=_SIZES)
def backward_weight(
    g, x, weight, bias, param, winner, saved, by_weight, by_bias,
    N, PIXELS, W, PER, x_n, x_c, x_h, x_w, x_inner, w_o, w_i, p,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PARAM: tl.constexpr,
    HAS_WINNER: tl.constexpr, HAS_SAVED: tl.constexpr, RECOMPUTE: tl.constexpr, AVERAGE: tl.constexpr,
    CIN: tl.constexpr, COUT: tl.constexpr, CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr, P_ALIGN: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """g [N, Cout] -> by_weight [splits, Cout, Cin], by_bias [splits, Cout]: sums over pixels of du x^T and of du.

    The grid is (PER tiles of any images, block of BI channels, block of BC outputs), the last fastest.
    """
    pixels = PIXELS * P_ALIGN
    tiles = tl.cdiv(pixels, BP)
    outs: tl.constexpr = (COUT + BC - 1) // BC
    ins: tl.constexpr = (CIN + BI - 1) // BI
    split = tl.program_id(0) // (outs * ins)
    o = (tl.program_id(0) % outs) * BC + tl.arange(0, BC)
    c = tl.arange(0, BK)
    channel = (tl.program_id(0) // outs % ins) * BI + tl.arange(0, BI)
    if HAS_PARAM:
        p = tl.load(param)
    p = tl.cast(p, ACC)
    start = _load_bias(bias, o, COUT, HAS_BIAS, ACC, BP)
    if RECOMPUTE and BK >= CIN:
        kernel = _load_weight(weight, w_o, w_i, c, o, CIN, COUT, OPERAND)
    total = tl.zeros((BC, BI), ACC)
    shift = tl.zeros((BC,), ACC)
    for tile in range(split * PER, tl.minimum((split + 1) * PER, N * tiles)):
        n = tile // tiles
        pixel = (tile % tiles) * BP + tl.arange(0, BP)[:, None]
        inside = pixel < pixels
        rows, step = _rows(x, n, pixel, W, x_n, x_c, x_h, x_w, x_inner, CHANNELS_LAST, FLAT, WIDE, ALIGN)
        read = _load_pixels(rows, step, channel, inside, CIN, OPERAND)
        u = start
        if RECOMPUTE:
            if BK >= CIN:
                u = _dot(read, kernel, u)
            else:
                u = _convolve(u, rows, step, inside, weight, w_o, w_i, o, CIN, COUT, OPERAND, BK)
        du = _pre_gradient(
            u, g, winner, saved, N, n, o, pixel, inside, pixels, p,
            KIND, ACTIVATION, HAS_WINNER, HAS_SAVED, COUT, ACC,
        )  # fmt: skip
        total = _dot(tl.trans(du.to(OPERAND)), read, total)
        shift += tl.sum(du, 0)
    if AVERAGE:
        total, shift = total / tl.cast(pixels, ACC), shift / tl.cast(pixels, ACC)
    line = split.to(tl.int64) * COUT + o
    inside = (o[:, None] < COUT) & (channel[None, :] < CIN)
    tl.store(by_weight + line[:, None] * CIN + channel[None, :], total, inside)
    if tl.program_id(0) // outs % ins == 0:
        tl.store(by_bias + line, shift, o < COUT)
