"""The Triton kernels of the expert layer: they walk along the experts' rows without moving them (paper 2.1).

    up_kernel               g, u = x_t gate_e', x_t up_e';   h = silu(g) * u * w_te
    product_kernel          y_te = h down_e'                 backward: dh = dy_t down_e;   dx_te = dg gate_e + du up_e
    swiglu_backward_kernel  dg, du from dh, g, u;            dw_te = sum of dh * silu(g) * u;   h again
    outer_kernel            dgate_e = dg' x,  dup_e = du' x,  ddown_e = dy' h
    sum_kernel              y_t = sum over e of y_te;        dx_t = sum over e of dx_te

`minglm.kernels.experts.triton_layer` composes the layer from them. Capitals in the signatures are constants: CHOICES is
K, EXPERTS the number of experts rounded up to a power of two, ROWS x COLUMNS the tile of the result, STEP the step along
the sum. BULK: matrices are read through descriptors. EVEN: the inner size is a multiple of the step, no mask is needed.

Choices, each with its reason:
- A (token, expert) pair is a row; `order` lists the pairs expert by expert, and a kernel picks the rows of x (or dy) by
  it while loading. There is no copy of x in the order of the experts, neither in memory nor saved for the backward
  pass, which keeps x, g, u and the indices; h is computed again from g and u, whose rounding it therefore shares.
- Results go to the row of the pair, so the K results of a token are adjacent, and one more kernel adds them up, always
  in the same order. Nothing is added atomically: the same input gives the same bits.
- A kernel is persistent: as many programs as the GPU has multiprocessors share the tiles of all experts. Each program
  finds the expert of a tile from `ends` (`group_by_expert`), so the host never waits for the router's choice. An
  expert's last tile may be part empty; nothing is padded. An expert without rows has no tiles, and a weight gradient of
  zeros.
- Neighbouring programs get tiles of the same expert, in bands of rows, so its matrices and rows stay in the L2 cache.
- Matrices are read through descriptors of the whole stack (the bulk copy engine) where rows are multiples of 16 bytes,
  else through pointers, whose offsets are 64-bit: GLM-4.5's experts together pass 2^31 elements.
- With few rows an expert (decoding) the product is transposed (SWAP), matrix times rows, because the tensor cores take
  at least 64 rows on the left but only 8 columns on the right.
"""

# Triton has no types for a kernel's tensors, constexpr arguments, loops and launch options:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

from collections.abc import Iterator

import triton
import triton.language as tl

from minglm.kernels.toolchain.spec import Spec
from minglm.kernels.toolchain.tiles import Tiles, described

# Tiles by the largest mean number of rows of an expert, which the host knows without asking the GPU. They are the
# fastest of those timed on an H100, at 1 to 128 tokens, 4,096, 16,384 and 65,536. The L2 cache limits the large ones:
# narrower tiles leave less of an expert's last tile empty, but ask the cache for more than it can serve.
UP = {32: Tiles(16, 64, 128, 4, 4, swap=True), 2**31: Tiles(128, 128, 64, 8, 4, band=16)}
DOWN = {
    32: Tiles(16, 64, 128, 4, 4, swap=True, per_multiprocessor=2),
    2**31: Tiles(128, 256, 64, 8, 3),
}
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
    """Load ROWS x COLUMNS of one matrix of a stack (matrices, rows, columns) from (row, column) on; zeros outside it."""
    if BULK:
        return w.load([matrix, row, column]).reshape(ROWS, COLUMNS)
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        start = w + tl.cast(matrix, tl.int64) * rows * columns
        pointers = start + r.to(tl.int64)[:, None] * columns + c[None, :]
        return tl.load(pointers, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)


@triton.jit
def last_tiles_of(ends, experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr, column_tiles):
    """Count the tiles of all experts up to and including each one, (EXPERTS,)."""
    e = tl.arange(0, EXPERTS)
    end = tl.load(ends + e, mask=e < experts, other=0)
    begin = tl.load(ends + e - 1, mask=(e > 0) & (e < experts), other=0)
    return tl.cumsum(tl.cdiv(end - begin, ROWS) * column_tiles)


@triton.jit
def locate(tile, last_tiles, ends, ROWS: tl.constexpr, column_tiles, BAND: tl.constexpr):
    """Find what a tile is: (expert, first row, end of the expert's rows, column tile).

    Inside an expert the tiles go through bands of BAND row tiles, and inside a band column by column.
    """
    before = last_tiles <= tile  # the experts whose tiles all come before this one
    expert = tl.sum(before.to(tl.int32))
    inside = tile - tl.max(tl.where(before, last_tiles, 0))  # number of the tile inside its expert
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    band = inside // (BAND * column_tiles)
    inside = inside % (BAND * column_tiles)
    height = tl.minimum(tl.cdiv(end - begin, ROWS) - band * BAND, BAND)
    return expert, begin + (band * BAND + inside % height) * ROWS, end, inside // height


@triton.jit
def _load_picked(rows, k, width, STEP: tl.constexpr, EVEN: tl.constexpr):
    """Load STEP columns from k on of the rows at these pointers; zeros from `width` on."""
    if EVEN:
        return tl.load(rows + k)
    else:
        return tl.load(rows + k, mask=(k + tl.arange(0, STEP) < width)[None, :], other=0)


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
    SWAP: tl.constexpr,
    BULK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Compute h = silu(g) * u * w_te with g, u = x gate', x up' for the rows that `order` picks; store g, u if SAVE."""
    column_tiles = tl.cdiv(F, COLUMNS)
    last_tiles = last_tiles_of(ends, experts, EXPERTS, ROWS, column_tiles)
    for tile in tl.range(tl.program_id(0), tl.max(last_tiles), tl.num_programs(0)):
        expert, row, end, column_tile = locate(tile, last_tiles, ends, ROWS, column_tiles, BAND)
        column = column_tile * COLUMNS
        rows = row + tl.arange(0, ROWS)
        pair = tl.load(order + rows, mask=rows < end, other=0)
        picked = x + (pair // CHOICES).to(tl.int64)[:, None] * D + tl.arange(0, STEP)[None, :]
        a = tl.zeros((COLUMNS, ROWS) if SWAP else (ROWS, COLUMNS), dtype=tl.float32)
        b = tl.zeros((COLUMNS, ROWS) if SWAP else (ROWS, COLUMNS), dtype=tl.float32)
        for k in range(0, D, STEP):
            xs = _load_picked(picked, k, D, STEP, EVEN)
            wg = load_tile(gate, expert, column, k, F, D, COLUMNS, STEP, BULK)
            wu = load_tile(up, expert, column, k, F, D, COLUMNS, STEP, BULK)
            if SWAP:
                a = tl.dot(wg, xs.T, a, input_precision="ieee")
                b = tl.dot(wu, xs.T, b, input_precision="ieee")
            else:
                a = tl.dot(xs, wg.T, a, input_precision="ieee")
                b = tl.dot(xs, wu.T, b, input_precision="ieee")
        if SWAP:
            a = a.T
            b = b.T
        # g and u are rounded before they are used, so that the backward pass finds the same h; it also halves the
        # registers.
        a = a.to(h.dtype.element_ty)
        b = b.to(h.dtype.element_ty)
        columns = column + tl.arange(0, COLUMNS)
        out = rows.to(tl.int64)[:, None] * F + columns[None, :]
        mask = (rows < end)[:, None] & (columns < F)[None, :]
        if SAVE:
            tl.store(g + out, a, mask=mask)
            tl.store(u + out, b, mask=mask)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        weight = tl.load(weights + pair)
        hidden = a * tl.sigmoid(a) * b * weight[:, None]  # silu(g) * u * w_te
        tl.store(h + out, hidden.to(h.dtype.element_ty), mask=mask)


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
    SWAP: tl.constexpr,
    BULK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Add rows of a times w[expert] to total; rows are picked by token if PICK.

    w[expert] is (depth, width), stored as (width, depth) if TRANSPOSED.
    """
    if PICK:
        picked = a + token.to(tl.int64)[:, None] * depth + tl.arange(0, STEP)[None, :]
    for k in range(0, depth, STEP):
        if PICK:
            left = _load_picked(picked, k, depth, STEP, EVEN)
        else:
            left = load_tile(a, 0, row, k, pairs, depth, ROWS, STEP, BULK)
        if TRANSPOSED:
            right = load_tile(w, expert, column, k, width, depth, COLUMNS, STEP, BULK)
            if SWAP:
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
    SWAP: tl.constexpr,
    BULK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Compute the other products with the experts' matrices: a w_e for each row, plus b v_e if TWO.

    PICK: row i of y is from the row of a of its token (dh, from dy). Else row i of a goes to the row of y of its pair
    (y, from h; dx, from dg and du).
    """
    column_tiles = tl.cdiv(width, COLUMNS)
    last_tiles = last_tiles_of(ends, experts, EXPERTS, ROWS, column_tiles)
    for tile in tl.range(tl.program_id(0), tl.max(last_tiles), tl.num_programs(0)):
        expert, row, end, column_tile = locate(tile, last_tiles, ends, ROWS, column_tiles, BAND)
        column = column_tile * COLUMNS
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        pair = tl.load(order + rows, mask=rows < end, other=0)
        total = tl.zeros((COLUMNS, ROWS) if SWAP else (ROWS, COLUMNS), dtype=tl.float32)
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
            SWAP,
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
                SWAP,
                BULK,
                EVEN,
            )
        if SWAP:
            total = total.T
        out = (rows if PICK else pair).to(tl.int64)[:, None] * width + columns[None, :]
        mask = (rows < end)[:, None] & (columns < width)[None, :]
        tl.store(y + out, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(dh, g, u, order, weights, h, dg, dweight, width, WIDTH: tl.constexpr):
    """Compute h again, dg, and dweight of the pair, for one row; du overwrites dh."""
    row = tl.program_id(0)
    pair = tl.load(order + row)
    weight = tl.load(weights + pair)
    columns = tl.arange(0, WIDTH)
    at = row.to(tl.int64) * width + columns
    mask = columns < width
    a = tl.load(g + at, mask=mask, other=0).to(tl.float32)
    b = tl.load(u + at, mask=mask, other=0).to(tl.float32)
    d = tl.load(dh + at, mask=mask, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(a)
    silu = a * sigmoid
    tl.store(dweight + pair, tl.sum(d * silu * b))
    tl.store(h + at, (silu * b * weight).to(h.dtype.element_ty), mask=mask)
    d *= weight
    tl.store(dh + at, (d * silu).to(dh.dtype.element_ty), mask=mask)  # du
    # silu'(g) = sigmoid + silu (1 - sigmoid)
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
    SWAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    BAND: tl.constexpr,
    BULK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Compute out[e] = a' b (height, width), or b' a if SWAP, over the rows of expert e; rows of a are picked by token.

    The picked rows, of a, are zeros beyond the expert's last row. Therefore b may have any rows there, those of the next
    expert, and comes without a mask through a descriptor. The picked side is the shorter one of a tile either way.
    """
    row_tiles = tl.cdiv(height, ROWS)
    column_tiles = tl.cdiv(width, COLUMNS)
    for tile in tl.range(tl.program_id(0), experts * row_tiles * column_tiles, tl.num_programs(0)):
        expert = tile // (row_tiles * column_tiles)
        inside = tile % (row_tiles * column_tiles)
        band = inside // (BAND * column_tiles)
        inside = inside % (BAND * column_tiles)
        tall = tl.minimum(row_tiles - band * BAND, BAND)
        row = (band * BAND + inside % tall) * ROWS
        column = (inside // tall) * COLUMNS
        rows = row + tl.arange(0, ROWS)
        begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ends + expert)
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in range(begin, end, STEP):
            i = k + tl.arange(0, STEP)
            token = tl.load(order + i, mask=i < end, other=0) // CHOICES
            inside_expert = (i < end)[:, None]
            picked = a + token.to(tl.int64)[:, None] * height + rows[None, :]
            mask = inside_expert if EVEN else inside_expert & (rows < height)[None, :]
            left = tl.load(picked, mask=mask, other=0)
            right = load_tile(b, 0, k, column, pairs, width, STEP, COLUMNS, BULK)
            total = tl.dot(left.T, right, total, input_precision="ieee")
        if BULK and SWAP:
            # Through shared memory: the neighbouring numbers of a thread are not neighbours in the result.
            out.store([expert, column, row], total.to(out.dtype).T.reshape(1, COLUMNS, ROWS))
        else:
            columns = column + tl.arange(0, COLUMNS)
            pointers = out + tl.cast(expert, tl.int64) * height * width
            pointers += (
                columns[None, :] * height + rows[:, None]
                if SWAP
                else rows[:, None] * width + columns[None, :]
            )
            mask = (rows < height)[:, None] & (columns < width)[None, :]
            tl.store(pointers, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def sum_kernel(parts, out, width, CHOICES: tl.constexpr, WIDTH: tl.constexpr):
    """Compute out[t] = the sum of rows t * CHOICES to (t + 1) * CHOICES of parts, in float32 and in this order."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for k in tl.static_range(CHOICES):
        at = parts + (row * CHOICES + k) * width + columns
        total += tl.load(at, mask=columns < width, other=0).to(tl.float32)
    tl.store(out + row * width + columns, total.to(out.dtype.element_ty), mask=columns < width)


PAIR_LISTS = {"order": "*i64", "ends": "*i32", "experts": "i32"}


def _up_specs() -> Iterator[Spec]:
    """Yield the Specs of `up_kernel`, for few and for many rows an expert."""
    pointers = dict.fromkeys(("x", "g", "u", "h"), "*bf16")
    for tiles in UP.values():
        matrices = dict.fromkeys(("gate", "up"), described(tiles.columns, tiles.step))
        sizes = {"D": "i32", "F": "i32", "weights": "*fp32"}
        yield Spec(
            name=f"up {tiles.rows}x{tiles.columns}",
            kernel=up_kernel,
            signature=pointers | PAIR_LISTS | sizes | matrices,
            constants={
                "CHOICES": 8,
                "EXPERTS": 256,
                "BULK": True,
                "EVEN": True,
                "SAVE": True,
                "SWAP": tiles.swap,
                **tiles.constants(),
            },
            warps=tiles.warps,
            stages=tiles.stages,
            aligned=("D", "F"),
            unit="HGMMA",
            opcodes=("UTMALDG", "LDGSTS"),
        )


def _product_spec(name: str, tiles: Tiles, pick: bool, two: bool, transposed: bool) -> Spec:
    """Return the Spec of one launch of `product_kernel`."""
    a = "*bf16" if pick else described(tiles.rows, tiles.step)
    if transposed:
        w = described(tiles.columns, tiles.step)
    else:
        w = described(tiles.step, tiles.columns)
    signature = PAIR_LISTS | {"a": a, "w": w, "y": "*bf16"}
    signature |= dict.fromkeys(("pairs", "depth", "width"), "i32")
    constants = {
        "CHOICES": 8,
        "EXPERTS": 256,
        "BULK": True,
        "EVEN": True,
        "PICK": pick,
        "TWO": two,
        "TRANSPOSED": transposed,
        "SWAP": tiles.swap,
        **tiles.constants(),
    }
    if two:
        signature |= {"b": a, "v": w}
    else:
        constants |= {"b": None, "v": None}
    return Spec(
        name=f"{name} {tiles.rows}x{tiles.columns}",
        kernel=product_kernel,
        signature=signature,
        constants=constants,
        warps=tiles.warps,
        stages=tiles.stages,
        aligned=("depth", "width"),
        unit="HGMMA",
        opcodes=("UTMALDG",),
    )


def _outer_spec(name: str, tiles: Tiles, swap: bool, out: str, store: str) -> Spec:
    """Return the Spec of one launch of `outer_kernel`; store: the instruction that must write the result."""
    signature = PAIR_LISTS | dict.fromkeys(("pairs", "height", "width"), "i32")
    signature |= {"a": "*bf16", "b": described(tiles.step, tiles.columns), "out": out}
    return Spec(
        name=f"{name} {tiles.rows}x{tiles.columns}",
        kernel=outer_kernel,
        signature=signature,
        constants={
            "CHOICES": 8,
            "BULK": True,
            "EVEN": True,
            "SWAP": swap,
            **tiles.constants(),
        },
        warps=tiles.warps,
        stages=tiles.stages,
        aligned=("height", "width"),
        unit="HGMMA",
        opcodes=("UTMALDG", "LDGSTS", store),
    )


def _specs() -> Iterator[Spec]:
    """Yield the Specs of the layer in GLM-4.5's dtype, bfloat16, with 8 of up to 256 experts."""
    yield from _up_specs()
    for tiles in DOWN.values():
        yield _product_spec("down", tiles, pick=False, two=False, transposed=True)
    for tiles in PRODUCT.values():
        yield _product_spec("dh", tiles, pick=True, two=False, transposed=False)
        yield _product_spec("dx", tiles, pick=False, two=True, transposed=False)
    for tiles in OUTER.values():
        yield _outer_spec("ddown", tiles, swap=False, out="*bf16", store="STG")
        descriptor = described(tiles.columns, tiles.rows)
        yield _outer_spec("dgate", tiles, swap=True, out=descriptor, store="UTMASTG")
    yield Spec(
        name="swiglu backward",
        kernel=swiglu_backward_kernel,
        signature={
            **dict.fromkeys(("dh", "g", "u", "h", "dg"), "*bf16"),
            "order": "*i64",
            "weights": "*fp32",
            "dweight": "*fp32",
            "width": "i32",
        },
        constants={"WIDTH": 2048},
        aligned=("width",),
    )
    yield Spec(
        name="sum",
        kernel=sum_kernel,
        signature={"parts": "*bf16", "out": "*bf16", "width": "i32"},
        constants={"CHOICES": 8, "WIDTH": 1024},
        aligned=("width",),
    )


SPECS = list(_specs())
