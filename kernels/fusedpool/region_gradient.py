"""Pooling over regions of any size: the backward kernel. One read and one write, gradients of all kinds summed.

Bytes per input element of size s: s to write, and s to read where the gradient depends on the input.
"""

from fusedpool._triton import tl, triton
from fusedpool.kinds import gradient
from fusedpool.layout import extent, strided_offset
from fusedpool.prologue import activate, activate_derivative, load_affine
from fusedpool.region_kernels import SIZES, image_size, output_place, parameter_of, tile


@triton.jit
def _segment_of_pixel(q, bounds, N, DOUBLINGS):
    """The n with bounds[n] <= q < bounds[n + 1]."""
    low = q * 0
    high = low + N
    for _ in range(DOUBLINGS):
        middle = (low + high) // 2
        before = tl.load(bounds + middle) <= q
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _term(
    k, sample, cell, c, n, q, v, mask, p, g, y, winner, aux, N, C, CELLS, g_k, g_n, g_c, g_o,
    KIND: tl.constexpr, NEEDS: tl.constexpr, CHANNELS_LAST: tl.constexpr, G_ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient that comes to values v, at places q, from one output of kind number k."""
    if CHANNELS_LAST:
        offset = (k * g_k + sample * g_n + cell * g_o) * G_ALIGN + c * g_c
    else:
        offset = (k * g_k + sample * g_n + c * g_c) * G_ALIGN + cell * g_o
    incoming = tl.load(g + offset, mask, 0.0).to(ACC)
    place = output_place(k, sample, cell, c, N, C, CELLS, CHANNELS_LAST)
    won = mask
    if tl.constexpr(NEEDS[0]):
        won = mask & (tl.load(winner + place, mask, -1) == q)
    value, extra = incoming, incoming
    if tl.constexpr(NEEDS[1]):
        value = tl.load(y + place, mask, 1.0).to(ACC)
    if tl.constexpr(NEEDS[2]):
        extra = tl.load(aux + place, mask, 1.0).to(ACC)
    return gradient(incoming, v, value, extra, won, n.to(ACC), p, KIND)


@triton.jit
def _overlap(SIZE, CELLS):
    """How many of an axis' cells a pixel can lie in, at most."""
    cells = SIZE * 0 + CELLS
    return tl.where(cells % SIZE == 0, cells // SIZE, tl.where(SIZE % cells == 0, 1, cells // SIZE + 2))


@triton.jit
def _cells(
    k, sample, h, w, c, q, v, inside, p, g, y, winner, aux, N, C, H, W, CELLS, g_k, g_n, g_c, g_o,
    OH: tl.constexpr, OW: tl.constexpr, FIRST: tl.constexpr, KIND: tl.constexpr, NEEDS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, G_ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sum of `_term` over one level's cells with floor(i H / OH) <= h < ceil((i + 1) H / OH), columns alike."""
    dv = tl.zeros_like(v)
    row, column = h * OH // H, w * OW // W
    last_row, last_column = ((h + 1) * OH + H - 1) // H - 1, ((w + 1) * OW + W - 1) // W - 1
    for i in range(_overlap(H, OH)):
        oh = row + i
        height = ((oh + 1) * H + OH - 1) // OH - oh * H // OH
        for j in range(_overlap(W, OW)):
            ow = column + j
            width = ((ow + 1) * W + OW - 1) // OW - ow * W // OW
            held = inside & (oh <= last_row) & (ow <= last_column)
            dv += tl.where(held, _term(
                k, sample, FIRST + oh * OW + ow, c, height * width, q, v, held, p, g, y, winner, aux,
                N, C, CELLS, g_k, g_n, g_c, g_o, KIND, NEEDS, CHANNELS_LAST, G_ALIGN, ACC,
            ), 0.0)  # fmt: skip
    return dv


@triton.jit(do_not_specialize=[*SIZES, "DOUBLINGS"])
def backward(
    g, x, y, winner, aux, scale, shift, param, bounds, dx, sums,
    N, C, H, W, CELLS, CHUNKS, STEPS, PARTS, DOUBLINGS, x_n, x_c, x_h, x_w, x_inner, g_k, g_n, g_c, g_o, ps,
    MODE: tl.constexpr, KINDS: tl.constexpr, NEEDS: tl.constexpr, LEVELS: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_PARAM: tl.constexpr, HAS_X: tl.constexpr,
    AFFINE_GRADIENT: tl.constexpr, CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr, ALIGN: tl.constexpr, G_ALIGN: tl.constexpr, ACC: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """g [kinds, N, C, CELLS] of any strides, saved tensors dense -> dx dense [images, C, H, W], a gather: no atomics.

    LEVELS: (OH, OW, first cell) of each; NEEDS: (winner, y, aux) of each kind. Outer strides of g are given / G_ALIGN.
    With AFFINE_GRADIENT, each part leaves its sums of the gradients by scale and by shift in sums [2, PARTS, C]. H, W
    and FLAT: as in region_kernels.partials.
    """
    blocks = tl.cdiv(C, BC)
    part = tl.program_id(0) // blocks
    lane = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    H, W = extent(H, 1, WIDE), extent(W, UNIT, WIDE)
    if WIDE:
        part, lane = part.to(tl.int64), lane.to(tl.int64)
    image, first = part // CHUNKS, part % CHUNKS * (STEPS * BP)
    PIXELS: tl.constexpr = 0 if CHANNELS_LAST else 1
    pixel, c = tile(lane, BP, CHANNELS_LAST)
    like = (pixel * 0 + c * 0).to(ACC)
    s, t = load_affine(scale, shift, c, c < C, HAS_SCALE, HAS_SHIFT, ACC)
    height, width = image_size(image, bounds, H, W, MODE)
    by_scale, by_shift = like, like
    for step in range(tl.minimum(tl.cdiv(H * W - first, BP), STEPS)):
        q = first + step * BP + pixel
        stored = (q < H * W) & (c < C)
        h, w = q * 0, q
        if not FLAT:
            h, w = q // W, q % W
        sample, n, inside = image, (height * width).to(tl.int64), stored
        mask = c < C
        if MODE == "sized":
            inside = stored & (h < height) & (w < width)
        elif MODE == "packed":
            sample = _segment_of_pixel(tl.where(q < W, q, 0), bounds, N, DOUBLINGS)
            start, end = tl.load(bounds + sample), tl.load(bounds + sample + 1)
            inside = stored & (q >= start) & (q < end)
            mask, n = inside, tl.maximum(end - start, 1)
        raw = like
        if HAS_X:
            here = strided_offset(image, c, h, w, x_n, x_c, x_h, x_w, x_inner, CHANNELS_LAST, ALIGN)
            raw = tl.load(x + here, inside, 0.0).to(ACC)
        u = raw * s + t
        v = activate(u, ACTIVATION)
        dv = like
        for k in tl.static_range(len(KINDS)):
            p = parameter_of(param, ps, k, HAS_PARAM, ACC)
            if MODE == "grid":
                for level in tl.static_range(len(LEVELS)):
                    dv += _cells(
                        k, sample, h, w, c, q, v, inside, p, g, y, winner, aux, N, C, H, W, CELLS, g_k, g_n, g_c, g_o,
                        tl.constexpr(LEVELS[level][0]), tl.constexpr(LEVELS[level][1]), tl.constexpr(LEVELS[level][2]),
                        tl.constexpr(KINDS[k]), tl.constexpr(NEEDS[k]), CHANNELS_LAST, G_ALIGN, ACC,
                    )  # fmt: skip
            else:
                dv += _term(
                    k, sample, 0, c, n, q, v, mask, p, g, y, winner, aux, N, C, CELLS, g_k, g_n, g_c, g_o,
                    tl.constexpr(KINDS[k]), tl.constexpr(NEEDS[k]), CHANNELS_LAST, G_ALIGN, ACC,
                )  # fmt: skip
        du = tl.where(inside, dv, 0.0)
        if HAS_X:
            du = tl.where(inside, dv * activate_derivative(u, ACTIVATION), 0.0)
        place = (image * (H * W) + q) * C + c if CHANNELS_LAST else (image * C + c) * (H * W) + q
        tl.store(dx + place, (du * s).to(dx.dtype.element_ty), stored)
        if AFFINE_GRADIENT:
            by_scale += tl.where(inside, du * raw, 0.0)
            by_shift += du
    if AFFINE_GRADIENT:
        here = sums + part.to(tl.int64) * C + lane
        tl.store(here, tl.sum(by_scale, PIXELS), lane < C)
        tl.store(here + tl.cast(PARTS, tl.int64) * C, tl.sum(by_shift, PIXELS), lane < C)
