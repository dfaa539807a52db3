"""The expert layer's kernels: they walk the experts' rows without moving them (paper 2.1).

    up_kernel               g, u = x_t gate_e', x_t up_e';   h = silu(g) * u * w_te
    product_kernel          y_te = h down_e'                 backward: dh = dy_t down_e;   dx_te = dg gate_e + du up_e
    swiglu_backward_kernel  dg, du from dh, g, u;            dw_te = sum of dh * silu(g) * u;   h again
    outer_kernel            dgate_e = dg' x,  dup_e = du' x,  ddown_e = dy' h
    sum_kernel              y_t = sum over e of y_te;        dx_t = sum over e of dx_te

`minglm.kernels.experts.triton_layer` puts them together.

Choices, each with its reason:
- A (token, expert) pair is a row; `order` lists the pairs expert by expert, and a kernel picks the rows of x (or dy) by
  it while loading. There is no copy of x in the order of the experts, neither in memory nor saved for the backward
  pass, which keeps x, g, u and the indices; h is computed again from g and u, whose rounding it therefore shares.
- Results go to the row of the pair, so the K results of a token lie together and one more kernel adds them up, always
  in the same order. Nothing is added atomically: the same input gives the same bits.
- A kernel is persistent: as many programs as the GPU has multiprocessors share the tiles of all experts. Which expert a
  tile belongs to is counted from `ends` (`router_topk`) by each program, so the host never waits for the router's
  choice. An expert's last tile may be part empty; nothing is padded. An expert without rows has no tiles, and a weight
  gradient of zeros.
- Neighbouring programs get tiles of the same expert, in bands of rows, so its matrices and rows stay in the L2 cache.
- Matrices are read through descriptors of the whole stack (the bulk copy engine), where rows are multiples of 16 bytes;
  else through pointers, whose offsets are 64-bit: GLM-4.5's experts together pass 2^31 elements.
- With few rows an expert (decoding) the product is turned round, matrix times rows, because the tensor cores take
  at least 64 rows on the left but only 8 columns on the right.
"""

import triton
import triton.language as tl

from minglm.kernels.toolchain.spec import Spec
from minglm.kernels.toolchain.tiles import Tiles, described

# Tiles by the mean number of rows of an expert, which the host knows without asking the GPU: the first entry that is
# not exceeded. The fastest of those that were timed on an H100, at 1 to 128 tokens, 4,096, 16,384 and 65,536. The L2
# cache is what limits the large: narrower tiles leave less of an expert's last one empty, but ask it for more than it
# can serve.
UP = {32: Tiles(16, 64, 128, 4, 4, True), 2**31: Tiles(128, 128, 64, 8, 4, band=16)}
DOWN = {32: Tiles(16, 64, 128, 4, 4, True, 2), 2**31: Tiles(128, 256, 64, 8, 3)}
PRODUCT = {2**31: Tiles(128, 256, 64, 8, 3, band=16)}  # of the backward pass
OUTER = {2**31: Tiles(128, 256, 64, 8, 5)}


@triton.jit
def load_tile(
    w,
    matrix,
    row,
    column,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BULK: tl.constexpr,
):
    """ROWS x COLUMNS of one matrix of a stack (matrices, rows, columns) from (row, column) on; zeros outside of it."""
    if BULK:
        return w.load([matrix, row, column]).reshape(ROWS, COLUMNS)
    else:
        r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        start = w + tl.cast(matrix, tl.int64) * rows * columns
        at = start + r.to(tl.int64)[:, None] * columns + c[None, :]
        return tl.load(at, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)


@triton.jit
def last_tiles_of(ends, experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr, column_tiles):
    """How many tiles the experts have up to and including each, (EXPERTS,)."""
    e = tl.arange(0, EXPERTS)
    end = tl.load(ends + e, mask=e < experts, other=0)
    begin = tl.load(ends + e - 1, mask=(e > 0) & (e < experts), other=0)
    return tl.cumsum(tl.cdiv(end - begin, ROWS) * column_tiles)


@triton.jit
def locate(tile, last_tiles, ends, ROWS: tl.constexpr, column_tiles, BAND: tl.constexpr):
    """(expert, first row, end of the expert's rows, column tile); columns inside bands of BAND row tiles."""
    done = last_tiles <= tile
    expert = tl.sum(done.to(tl.int32))
    inside = tile - tl.max(tl.where(done, last_tiles, 0))
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    band = inside // (BAND * column_tiles)
    inside = inside % (BAND * column_tiles)
    height = tl.minimum(tl.cdiv(end - begin, ROWS) - band * BAND, BAND)
    return expert, begin + (band * BAND + inside % height) * ROWS, end, inside // height


@triton.jit
def _picked(at, k, width, STEP: tl.constexpr, EVEN: tl.constexpr):
    """STEP columns from k on of the rows that start at `at`; zeros from `width` on."""
    if EVEN:
        return tl.load(at + k)
    else:
        return tl.load(at + k, mask=(k + tl.arange(0, STEP) < width)[None, :], other=0)


@triton.jit
def up_kernel(
    x,
    order,
    weights,
    ends,
    gate,
    up,
    g,
    u,
    h,
    experts,
    D,
    F,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    BAND: tl.constexpr,
    SAVE: tl.constexpr,
    TURN: tl.constexpr,
    BULK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """h = silu(g) * u * weight with g, u = x gate', x up' for the rows that `order` picks; g and u kept if SAVE."""
    column_tiles = tl.cdiv(F, COLUMNS)
    last_tiles = last_tiles_of(ends, experts, EXPERTS, ROWS, column_tiles)
    for tile in tl.range(tl.program_id(0), tl.max(last_tiles), tl.num_programs(0)):
        expert, row, end, column_tile = locate(tile, last_tiles, ends, ROWS, column_tiles, BAND)
        column = column_tile * COLUMNS
        rows = row + tl.arange(0, ROWS)
        pair = tl.load(order + rows, mask=rows < end, other=0)
        at = x + (pair // CHOICES).to(tl.int64)[:, None] * D + tl.arange(0, STEP)[None, :]
        a = tl.zeros((COLUMNS, ROWS) if TURN else (ROWS, COLUMNS), dtype=tl.float32)
        b = tl.zeros((COLUMNS, ROWS) if TURN else (ROWS, COLUMNS), dtype=tl.float32)
        for k in range(0, D, STEP):
            xs = _picked(at, k, D, STEP, EVEN)
            wg = load_tile(gate, expert, column, k, F, D, COLUMNS, STEP, BULK)
            wu = load_tile(up, expert, column, k, F, D, COLUMNS, STEP, BULK)
            if TURN:
                a = tl.dot(wg, xs.T, a, input_precision="ieee")
                b = tl.dot(wu, xs.T, b, input_precision="ieee")
            else:
                a = tl.dot(xs, wg.T, a, input_precision="ieee")
                b = tl.dot(xs, wu.T, b, input_precision="ieee")
        if TURN:
            a, b = a.T, b.T
        # rounded before they are used, so that the backward pass finds the same h; it also halves the registers
        a, b = a.to(h.dtype.element_ty), b.to(h.dtype.element_ty)
        columns = column + tl.arange(0, COLUMNS)
        out = rows.to(tl.int64)[:, None] * F + columns[None, :]
        mask = (rows < end)[:, None] & (columns < F)[None, :]
        if SAVE:
            tl.store(g + out, a, mask=mask)
            tl.store(u + out, b, mask=mask)
        a, b = a.to(tl.float32), b.to(tl.float32)
        weight = tl.load(weights + pair)
        tl.store(
            h + out, (a * tl.sigmoid(a) * b * weight[:, None]).to(h.dtype.element_ty), mask=mask
        )


@triton.jit
def _add_product(
    total,
    a,
    token,
    row,
    w,
    expert,
    column,
    pairs,
    depth,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PICK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TURN: tl.constexpr,
    BULK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """total + rows of a times w[expert] (depth, width), stored (width, depth) if TRANSPOSED; rows by token if PICK."""
    if PICK:
        at = a + token.to(tl.int64)[:, None] * depth + tl.arange(0, STEP)[None, :]
    for k in range(0, depth, STEP):
        if PICK:
            left = _picked(at, k, depth, STEP, EVEN)
        else:
            left = load_tile(a, 0, row, k, pairs, depth, ROWS, STEP, BULK)
        if TRANSPOSED:
            right = load_tile(w, expert, column, k, width, depth, COLUMNS, STEP, BULK)
            if TURN:
                total = tl.dot(right, left.T, total, input_precision="ieee")
            else:
                total = tl.dot(left, right.T, total, input_precision="ieee")
        else:
            right = load_tile(w, expert, k, column, depth, width, STEP, COLUMNS, BULK)
            total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def product_kernel(
    a,
    b,
    order,
    ends,
    w,
    v,
    y,
    experts,
    pairs,
    depth,
    width,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    BAND: tl.constexpr,
    PICK: tl.constexpr,
    TWO: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TURN: tl.constexpr,
    BULK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The other products with the experts' matrices: a w_e for each row, plus b v_e if TWO.

    PICK: row i of y is token(i) of a (dh of dy). Else row i of a goes to its pair's row of y (y of h; dx of dg and du).
    """
    column_tiles = tl.cdiv(width, COLUMNS)
    last_tiles = last_tiles_of(ends, experts, EXPERTS, ROWS, column_tiles)
    for tile in tl.range(tl.program_id(0), tl.max(last_tiles), tl.num_programs(0)):
        expert, row, end, column_tile = locate(tile, last_tiles, ends, ROWS, column_tiles, BAND)
        column = column_tile * COLUMNS
        rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        pair = tl.load(order + rows, mask=rows < end, other=0)
        total = tl.zeros((COLUMNS, ROWS) if TURN else (ROWS, COLUMNS), dtype=tl.float32)
        total = _add_product(
            total,
            a,
            pair // CHOICES,
            row,
            w,
            expert,
            column,
            pairs,
            depth,
            width,
            ROWS,
            COLUMNS,
            STEP,
            PICK,
            TRANSPOSED,
            TURN,
            BULK,
            EVEN,
        )
        if TWO:
            total = _add_product(
                total,
                b,
                pair // CHOICES,
                row,
                v,
                expert,
                column,
                pairs,
                depth,
                width,
                ROWS,
                COLUMNS,
                STEP,
                PICK,
                TRANSPOSED,
                TURN,
                BULK,
                EVEN,
            )
        if TURN:
            total = total.T
        out = (rows if PICK else pair).to(tl.int64)[:, None] * width + columns[None, :]
        mask = (rows < end)[:, None] & (columns < width)[None, :]
        tl.store(y + out, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(dh, g, u, order, weights, h, dg, dweight, width, WIDTH: tl.constexpr):
    """Row by row: h once more, dg, dweight of the pair, and du in the place of dh."""
    row = tl.program_id(0)
    pair = tl.load(order + row)
    weight = tl.load(weights + pair)
    columns = tl.arange(0, WIDTH)
    at, mask = row.to(tl.int64) * width + columns, columns < width
    a = tl.load(g + at, mask=mask, other=0).to(tl.float32)
    b = tl.load(u + at, mask=mask, other=0).to(tl.float32)
    d = tl.load(dh + at, mask=mask, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(a)
    silu = a * sigmoid
    tl.store(dweight + pair, tl.sum(d * silu * b))
    tl.store(h + at, (silu * b * weight).to(h.dtype.element_ty), mask=mask)
    d *= weight
    tl.store(dh + at, (d * silu).to(dh.dtype.element_ty), mask=mask)
    tl.store(dg + at, (d * b * (sigmoid + silu * (1 - sigmoid))).to(dg.dtype.element_ty), mask=mask)


@triton.jit
def outer_kernel(
    a,
    b,
    order,
    ends,
    out,
    experts,
    pairs,
    height,
    width,
    CHOICES: tl.constexpr,
    TURN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    BAND: tl.constexpr,
    BULK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """out[e] = a' b (height, width), or if TURN b' a, over the rows of expert e; those of a are their tokens'.

    What is picked, a, is zeros beyond the expert's last row. So b may be anything there, and comes without a mask,
    through a descriptor: it is the next expert's. The picked side is the shorter one of a tile, whichever is wanted.
    """
    row_tiles, column_tiles = tl.cdiv(height, ROWS), tl.cdiv(width, COLUMNS)
    for tile in tl.range(tl.program_id(0), experts * row_tiles * column_tiles, tl.num_programs(0)):
        expert = tile // (row_tiles * column_tiles)
        inside = tile % (row_tiles * column_tiles)
        band = inside // (BAND * column_tiles)
        inside = inside % (BAND * column_tiles)
        tall = tl.minimum(row_tiles - band * BAND, BAND)
        row, column = (band * BAND + inside % tall) * ROWS, (inside // tall) * COLUMNS
        rows = row + tl.arange(0, ROWS)
        begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ends + expert)
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in range(begin, end, STEP):
            i = k + tl.arange(0, STEP)
            token = tl.load(order + i, mask=i < end, other=0) // CHOICES
            there = (i < end)[:, None]
            at = a + token.to(tl.int64)[:, None] * height + rows[None, :]
            left = tl.load(at, mask=there if EVEN else there & (rows < height)[None, :], other=0)
            right = load_tile(b, 0, k, column, pairs, width, STEP, COLUMNS, BULK)
            total = tl.dot(left.T, right, total, input_precision="ieee")
        if (
            BULK and TURN
        ):  # through shared memory, since what a thread has side by side is not so in the result
            out.store([expert, column, row], total.to(out.dtype).T.reshape(1, COLUMNS, ROWS))
        else:
            columns = column + tl.arange(0, COLUMNS)
            at = out + tl.cast(expert, tl.int64) * height * width
            at += (
                columns[None, :] * height + rows[:, None]
                if TURN
                else rows[:, None] * width + columns[None, :]
            )
            mask = (rows < height)[:, None] & (columns < width)[None, :]
            tl.store(at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def sum_kernel(parts, out, width, CHOICES: tl.constexpr, WIDTH: tl.constexpr):
    """out[t] = the sum of the rows t * CHOICES to (t + 1) * CHOICES of parts, in float32 and in this order."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for k in tl.static_range(CHOICES):
        at = parts + (row * CHOICES + k) * width + columns
        total += tl.load(at, mask=columns < width, other=0).to(tl.float32)
    tl.store(out + row * width + columns, total.to(out.dtype.element_ty), mask=columns < width)


def _specs():
    """The layer in GLM-4.5's dtype, bfloat16, with 8 of up to 256 experts, for few, some and many rows an expert."""
    common = {"CHOICES": 8, "EXPERTS": 256, "BULK": True, "EVEN": True}
    lists, sizes = {"order": "*i64", "ends": "*i32", "experts": "i32"}, {"D": "i32", "F": "i32"}
    rows = {name: "*bf16" for name in ("x", "g", "u", "h")}
    for t in UP.values():
        matrices = dict.fromkeys(("gate", "up"), described(t.columns, t.step))
        signature, switches = (
            rows | lists | sizes | {"weights": "*fp32"} | matrices,
            {"SAVE": True, "TURN": t.turn},
        )
        yield Spec(
            f"up {t.rows}x{t.columns}",
            up_kernel,
            signature,
            common | t.constants() | switches,
            t.warps,
            t.stages,
            ("D", "F"),
            "HGMMA",
            ("UTMALDG", "LDGSTS"),
        )
    launches = [("down", t, False, False, True) for t in DOWN.values()]
    launches += [
        (name, t, pick, not pick, False)
        for t in PRODUCT.values()
        for name, pick in (("dh", True), ("dx", False))
    ]
    for name, t, pick, two, transposed in launches:
        a = "*bf16" if pick else described(t.rows, t.step)
        w = described(t.columns, t.step) if transposed else described(t.step, t.columns)
        signature = lists | {
            "a": a,
            "w": w,
            "y": "*bf16",
            "pairs": "i32",
            "depth": "i32",
            "width": "i32",
        }
        switches = {"PICK": pick, "TWO": two, "TRANSPOSED": transposed, "TURN": t.turn}
        signature, switches = (
            (signature | {"b": a, "v": w}, switches)
            if two
            else (signature, switches | {"b": None, "v": None})
        )
        yield Spec(
            f"{name} {t.rows}x{t.columns}",
            product_kernel,
            signature,
            common | t.constants() | switches,
            t.warps,
            t.stages,
            ("depth", "width"),
            "HGMMA",
            ("UTMALDG",),
        )
    common = {"CHOICES": 8, "BULK": True, "EVEN": True}
    signature = lists | {"a": "*bf16"} | dict.fromkeys(("pairs", "height", "width"), "i32")
    for t in OUTER.values():
        for name, turn, out, store in (
            ("ddown", False, "*bf16", "STG"),
            ("dgate", True, described(t.columns, t.rows), "UTMASTG"),
        ):
            yield Spec(
                f"{name} {t.rows}x{t.columns}",
                outer_kernel,
                signature | {"b": described(t.step, t.columns), "out": out},
                common | t.constants() | {"TURN": turn},
                t.warps,
                t.stages,
                ("height", "width"),
                "HGMMA",
                ("UTMALDG", "LDGSTS", store),
            )
    rows = {name: "*bf16" for name in ("dh", "g", "u", "h", "dg")}
    signature = rows | {"order": "*i64", "weights": "*fp32", "dweight": "*fp32", "width": "i32"}
    yield Spec(
        "swiglu backward", swiglu_backward_kernel, signature, {"WIDTH": 2048}, aligned=("width",)
    )
    yield Spec(
        "sum",
        sum_kernel,
        {"parts": "*bf16", "out": "*bf16", "width": "i32"},
        {"CHOICES": 8, "WIDTH": 1024},
        aligned=("width",),
    )


SPECS = list(_specs())
