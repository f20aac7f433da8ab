"""Pooling over regions of any size: the forward kernels. x is read once, whatever the number of kinds.

A plane is cut into parts: rectangles that no output splits, and chunks of those that are large. `partials` reads the
parts, a tile of pixels and channels at a time, into one state per part, kind and channel; `merge` combines the parts of
each output, in a fixed order. Where every output is one part, `partials` finishes them itself.

What the parts are, by MODE:

    whole   one rectangle, the map
    sized   one rectangle per image: its top-left `bounds[n]` = (height, width)
    grid    the rectangles between the edges of all cells of all levels, in `table`: row edges, column edges, and for
            each output cell its first row of rectangles, how many rows, its first column, how many columns
    packed  the segments `bounds[n]` to `bounds[n + 1]` of one row of pixels

A chunk is STEPS tiles of BP pixels, counted from where its rectangle or segment begins, whatever is beside it.

Bytes per input element of size s: s; the states are 4 to 16 bytes per part, kind and channel.
"""

from typing import Final

from fusedpool._triton import tl, triton
from fusedpool.kinds import combine, exponential, finish, finish_aux, identity, lift, reduce
from fusedpool.layout import extent
from fusedpool.prologue import activate, load_affine

# A new image size must not compile anything: only channels, types and levels are compiled in.
SIZES: Final = [
    *("N", "H", "W", "PARTS", "CELLS", "RECTANGLES", "COLUMNS", "CHUNKS", "STEPS"),
    *("x_n", "x_c", "x_h", "x_w", "g_k", "g_n"),
]


@triton.jit
def _segment_of_part(part, bounds, N, CHUNK):
    """The n of a packed part. Segment n has those from bounds[n] // CHUNK + n on: as many as chunks, or one more."""
    low = part * 0
    high = low + N
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(bounds + middle) // CHUNK + middle <= part
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def image_size(image, bounds, H, W, MODE: tl.constexpr):
    """(height, width) of an image inside its map."""
    height, width = H, W
    if MODE == "sized":
        height = tl.minimum(tl.maximum(tl.load(bounds + 2 * image), 0), H).to(H.dtype)
        width = tl.minimum(tl.maximum(tl.load(bounds + 2 * image + 1), 0), W).to(W.dtype)
    return height, width


@triton.jit
def _part(part, bounds, table, N, H, W, RECTANGLES, COLUMNS, CHUNKS, CHUNK, MODE: tl.constexpr):
    """(sample, top, left, width, first, end, origin) of a part: pixels first to end of a rectangle, in row-major order.

    origin: the pixel from which the sample's own are counted.
    """
    if MODE == "packed":
        sample = _segment_of_part(part, bounds, N, CHUNK)
        origin = tl.load(bounds + sample)
        first = (origin + (part - sample - origin // CHUNK) * CHUNK).to(W.dtype)
        end = tl.minimum(tl.load(bounds + sample + 1), W).to(W.dtype)
        origin = origin.to(W.dtype)
        top, left, width = first * 0, first * 0, W
    else:
        rectangle = part // CHUNKS
        sample = rectangle // RECTANGLES
        first = (part % CHUNKS) * CHUNK
        origin = first * 0
        if MODE == "grid":
            row, column = rectangle % RECTANGLES // COLUMNS, rectangle % COLUMNS
            columns = table + RECTANGLES // COLUMNS + 1
            top, left = tl.load(table + row).to(W.dtype), tl.load(columns + column).to(W.dtype)
            height = tl.load(table + row + 1).to(W.dtype) - top
            width = tl.load(columns + column + 1).to(W.dtype) - left
        else:
            top, left = origin, origin
            height, width = image_size(sample, bounds, H, W, MODE)
        end = height * width
    return sample, top, left, width, first, end, origin


@triton.jit
def parameter_of(param, ps, K: tl.constexpr, HAS_PARAM: tl.constexpr, ACC: tl.constexpr):
    """The parameter of the kind of that number."""
    if HAS_PARAM:
        return tl.load(param + K).to(ACC)
    return tl.cast(ps[K], ACC)


@triton.jit
def _identities(like, KINDS: tl.constexpr, WIDE: tl.constexpr):
    """(a, b, c, i) of each kind, one after another."""
    states = ()
    for k in tl.static_range(len(KINDS)):
        a, b, c, i = identity(like, tl.constexpr(KINDS[k]))
        if WIDE:
            i = i.to(tl.int64)
        states = states + (a, b, c, i)  # type: ignore[assignment]  # noqa: RUF005
    return states


@triton.jit
def _take(
    states, v, valid, q, own, plane, seed, param, ps,
    KINDS: tl.constexpr, HAS_PARAM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The states with a tile of values combined into them; q: their places, own: what their samples are drawn by."""
    taken = ()
    for k in tl.static_range(len(KINDS)):
        e = v
        if tl.constexpr(KINDS[k]) == "stochastic":
            e = exponential(tl.load(seed), (own >> 32) + plane * 0, plane + own * 0, own + plane * 0).to(ACC)
        a2, b2, c2 = lift(v, valid, parameter_of(param, ps, k, HAS_PARAM, ACC), e, tl.constexpr(KINDS[k]))
        a, b, c, i = combine(
            states[4 * k], states[4 * k + 1], states[4 * k + 2], states[4 * k + 3],
            a2, b2, c2, tl.where(valid, q, -1), tl.constexpr(KINDS[k]), True,
        )  # fmt: skip
        taken = taken + (a, b, c, i)  # type: ignore[assignment]  # noqa: RUF005
    return taken


@triton.jit
def tile(lane, BP: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(pixel, c) of a tile's elements: along its rows are pixels, or channels where those are innermost in memory."""
    pixel = tl.arange(0, BP)
    if CHANNELS_LAST:
        pixel, c = pixel[:, None], lane[None, :]
    else:
        pixel, c = pixel[None, :], lane[:, None]
    return pixel, c


@triton.jit
def output_place(k, sample, cell, c, N, C, CELLS, CHANNELS_LAST: tl.constexpr):
    """Where an output lies in a dense [kinds, N, C, CELLS], channels innermost or not."""
    images = k * N + sample
    if CHANNELS_LAST:
        return (images * CELLS + cell) * C + c
    return (images * C + c) * CELLS + cell


@triton.jit
def _finish(
    a, b, d, i, n, p, place, inside, y, winner, aux, index,
    KIND: tl.constexpr, MASKED: tl.constexpr, SAVE_WINNER: tl.constexpr, SAVE_AUX: tl.constexpr,
    SAVE_INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Store the outputs of finished states over n pixels each; of none: 0."""
    divisor = tl.where(n > 0, n, 1).to(ACC)
    value = tl.where(n > 0, finish(a, b, d, divisor, p, KIND), 0.0)
    tl.store(y + place, value.to(y.dtype.element_ty), inside)
    if SAVE_WINNER:
        kept = i
        if MASKED:
            kept = tl.where(value <= 0, -1, i)
        tl.store(winner + place, kept.to(winner.dtype.element_ty), inside)
    if SAVE_AUX:
        tl.store(aux + place, tl.where(n > 0, finish_aux(a, b, d, divisor, p, value, KIND), 0.0), inside)
    if SAVE_INDEX:
        tl.store(index + place, i.to(tl.int64), inside)


@triton.jit(do_not_specialize=SIZES)
def partials(
    x, scale, shift, param, seed, bounds, table,
    states, places, y, winner, aux, index,
    N, C, H, W, RECTANGLES, COLUMNS, CHUNKS, STEPS, PARTS, x_n, x_c, x_h, x_w, x_inner, ps,
    MODE: tl.constexpr, KINDS: tl.constexpr, STATES: tl.constexpr, MASKED: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_PARAM: tl.constexpr, FINISH: tl.constexpr,
    SAVE_WINNER: tl.constexpr, SAVE_AUX: tl.constexpr, SAVE_INDEX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
    ACC: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """x [N, C, H, W] of any strides (outer ones given / ALIGN; W given / UNIT) -> states, or outputs where FINISH.

    states [kinds, 3, PARTS, C]: a, b, c of kinds.py; places [kinds, PARTS, C]: its i, h * W + w. STATES: for each kind,
    which of b, c and i it has. Outputs: see `merge`.
    FLAT: rows follow each other without a gap, and H is 1. The samples of a stochastic kind are drawn by
    (n * C + c, the pixel's place in its map, image or segment).
    """
    blocks = tl.cdiv(C, BC)
    part = tl.program_id(0) // blocks
    lane = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    H, W = extent(H, 1, WIDE), extent(W, UNIT, WIDE)
    if WIDE:
        part, lane = part.to(tl.int64), lane.to(tl.int64)
    sample, top, left, width, first, end, origin = _part(
        part, bounds, table, N, H, W, RECTANGLES, COLUMNS, CHUNKS, STEPS * BP, MODE
    )
    PIXELS: tl.constexpr = 0 if CHANNELS_LAST else 1
    pixel, c = tile(lane, BP, CHANNELS_LAST)
    s, t = load_affine(scale, shift, c, c < C, HAS_SCALE, HAS_SHIFT, ACC)
    image = sample * 0 if MODE == "packed" else sample
    base = x + (image * x_n) * ALIGN
    plane = sample.to(tl.int64) * C + c
    kept = _identities((pixel * 0 + c * 0).to(ACC), KINDS, WIDE)
    for step in range(tl.minimum(tl.cdiv(tl.maximum(end - first, 0), BP), STEPS)):
        q = first + step * BP + pixel
        valid = (q < end) & (c < C)
        if FLAT:
            h, w, place = top, q, q
        else:
            h, w = top + q // width, left + q % width
            place = h * W + w
        if CHANNELS_LAST:
            offset = (h * x_h + w * x_w) * ALIGN + c * x_inner
        else:
            offset = (c * x_c + h * x_h) * ALIGN + w * x_inner
        v = activate(tl.load(base + offset, valid, 0.0).to(ACC) * s + t, ACTIVATION)
        own = (place if MODE == "grid" else q - origin).to(tl.int64)
        kept = _take(kept, v, valid, place, own, plane, seed, param, ps, KINDS, HAS_PARAM, ACC)
    for k in tl.static_range(len(KINDS)):
        a, b, d, i = reduce(
            kept[4 * k], kept[4 * k + 1], kept[4 * k + 2], kept[4 * k + 3], tl.constexpr(KINDS[k]), PIXELS
        )
        if FINISH:
            cell = part % RECTANGLES
            p = parameter_of(param, ps, k, HAS_PARAM, ACC)
            _finish(
                a, b, d, i, end, p, output_place(k, sample, cell, lane, N, C, RECTANGLES, CHANNELS_LAST), lane < C,
                y, winner, aux, index, tl.constexpr(KINDS[k]), tl.constexpr(MASKED[k]), SAVE_WINNER, SAVE_AUX,
                SAVE_INDEX, ACC,
            )  # fmt: skip
        else:
            plain = tl.cast(PARTS, tl.int64) * C
            here = states + 3 * k * plain + part.to(tl.int64) * C + lane
            tl.store(here, a, lane < C)
            if tl.constexpr(STATES[k][0]):
                tl.store(here + plain, b, lane < C)
            if tl.constexpr(STATES[k][1]):
                tl.store(here + 2 * plain, d, lane < C)
            if tl.constexpr(STATES[k][2]):
                tl.store(places + k * plain + part.to(tl.int64) * C + lane, i, lane < C)


@triton.jit(do_not_specialize=SIZES)
def merge(
    states, places, param, bounds, table, y, winner, aux, index,
    N, C, H, W, CELLS, RECTANGLES, COLUMNS, CHUNKS, STEPS, PARTS, ps,
    MODE: tl.constexpr, KINDS: tl.constexpr, STATES: tl.constexpr, MASKED: tl.constexpr, HAS_PARAM: tl.constexpr,
    SAVE_WINNER: tl.constexpr, SAVE_AUX: tl.constexpr, SAVE_INDEX: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The states of `partials` -> y, winner (h * W + w, -1: none), aux, index, dense [kinds, N, C, CELLS]."""
    blocks = tl.cdiv(C, BC)
    lane = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    output = (tl.program_id(0) // blocks).to(tl.int64)
    sample, cell = output // CELLS, output % CELLS
    H, W = tl.cast(H, tl.int64), tl.cast(W, tl.int64)
    top, left, rows, columns = cell * 0, cell * 0, cell * 0 + 1, cell * 0 + 1
    if MODE == "packed":
        start, chunk = tl.load(bounds + sample), STEPS * BP
        n = tl.load(bounds + sample + 1) - start
        first, count = start // chunk + sample, tl.cdiv(n, chunk)
    elif MODE == "grid":
        # Of the rectangles, the row's and the column's numbers; their edges say how many pixels the cell has.
        row_edges = RECTANGLES // COLUMNS + 1
        entry = table + row_edges + COLUMNS + 1 + 4 * cell
        top, rows, left, columns = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
        height = tl.load(table + top + rows) - tl.load(table + top)
        width = tl.load(table + row_edges + left + columns) - tl.load(table + row_edges + left)
        first, count, n = sample * RECTANGLES, rows * columns * CHUNKS, height.to(tl.int64) * width
    else:
        height, width = image_size(sample, bounds, H, W, MODE)
        first, count, n = sample, cell * 0 + CHUNKS, height * width
    c = lane[None, :]
    like = tl.zeros((BM, BC), ACC)
    kept = _identities(like, KINDS, WIDE)
    plain = tl.cast(PARTS, tl.int64) * C
    for step in range(tl.cdiv(count, BM)):
        m = step * BM + tl.arange(0, BM)[:, None]
        if MODE == "packed":
            part = first + m
        else:
            rectangle = m // CHUNKS
            part = (first + (top + rectangle // columns) * COLUMNS + left + rectangle % columns) * CHUNKS + m % CHUNKS
        here, inside = part.to(tl.int64) * C + c, (m < count) & (c < C)
        merged = ()
        for k in tl.static_range(len(KINDS)):
            a, b, d, i = identity(like, tl.constexpr(KINDS[k]))
            a = tl.load(states + 3 * k * plain + here, inside, a)
            if tl.constexpr(STATES[k][0]):
                b = tl.load(states + (3 * k + 1) * plain + here, inside, b)
            if tl.constexpr(STATES[k][1]):
                d = tl.load(states + (3 * k + 2) * plain + here, inside, d)
            if tl.constexpr(STATES[k][2]):
                i = tl.load(places + k * plain + here, inside, -1)
            if WIDE:
                i = i.to(tl.int64)
            a, b, d, i = combine(
                kept[4 * k], kept[4 * k + 1], kept[4 * k + 2], kept[4 * k + 3],
                a, b, d, i, tl.constexpr(KINDS[k]), False,
            )  # fmt: skip
            merged = merged + (a, b, d, i)  # type: ignore[assignment]  # noqa: RUF005
        kept = merged
    for k in tl.static_range(len(KINDS)):
        a, b, d, i = reduce(kept[4 * k], kept[4 * k + 1], kept[4 * k + 2], kept[4 * k + 3], tl.constexpr(KINDS[k]), 0)
        _finish(
            a, b, d, i, n, parameter_of(param, ps, k, HAS_PARAM, ACC),
            output_place(k, sample, cell, lane, N, C, CELLS, CHANNELS_LAST), lane < C,
            y, winner, aux, index, tl.constexpr(KINDS[k]), tl.constexpr(MASKED[k]), SAVE_WINNER, SAVE_AUX,
            SAVE_INDEX, ACC,
        )  # fmt: skip
