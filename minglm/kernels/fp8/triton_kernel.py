"""Float8 in blocks as Triton kernels: quantisation, and the grouped product that rescales every 128 terms (paper 3.5).

    y_if = sum over blocks b of  x_scale_ib w_scale_fb * ( sum over d in b of  xq_id wq_fd )

The inner sum is one product of the float8 tensor cores (QGMMA), which add up in less than float32; the outer one, with
the two scales, is float32 in registers. That is why a scale has 128 terms along the sum, and why a tile of the result
is one block of w wide: its scale is one number. Equations and plain forms: `fp8_block.py`.

Choices: persistent programs over the tiles of all experts, as in `grouped_gemm_triton`; with few rows an expert
(decoding) the product is turned round. An entry that is not finite makes itself or its block not a number, which shows
in the result: to refuse it, as the plain form does, the host would have to wait.
"""

import torch
import triton
import triton.language as tl

from minglm.kernels.experts.triton_kernels import last_tiles_of, load_tile, locate
from minglm.kernels.toolchain.spec import Spec
from minglm.kernels.toolchain.tiles import (
    Tiles,
    bulk_readable,
    described,
    power_of_2,
    programs,
    read,
    tiles_for,
)

SIDE = 128  # of a block
PRODUCT = {
    32: Tiles(16, SIDE, SIDE, 4, 4, True, 2),
    2**31: Tiles(128, SIDE, SIDE, 8, 4),
}  # not timed
ROWS = 32  # of activations, of one program


@triton.jit
def quantize_kernel(
    x,
    q,
    scales,
    rows,
    columns,
    TINY: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """ROWS x SIDE numbers of matrix program_id(2): one scale for all of them if WHOLE, else one for each row."""
    block, down, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    r, c = down * ROWS + tl.arange(0, ROWS), block * SIDE + tl.arange(0, SIDE)
    at = matrix * rows * columns + r.to(tl.int64)[:, None] * columns + c[None, :]
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    values = tl.load(x + at, mask=mask, other=0).to(tl.float32)
    largest = tl.max(tl.abs(values), 1)
    if WHOLE:
        largest = tl.zeros_like(largest) + tl.max(largest, 0)
    scale = tl.maximum(tl.where(largest > 0, tl.div_rn(largest, 448.0), 1.0), TINY)
    values = tl.div_rn(values, tl.broadcast_to(scale[:, None], (ROWS, SIDE)))
    values = tl.where(
        values > 448, 448.0, tl.where(values < -448, -448.0, values)
    )  # a quotient may round above 448
    tl.store(q + at, values.to(tl.float8e4nv), mask=mask)
    if WHOLE:
        row, first = matrix * tl.cdiv(rows, ROWS) + down + tl.zeros_like(r), r == down * ROWS
    else:
        row, first = matrix * rows + r, r < rows
    tl.store(scales + row * tl.cdiv(columns, SIDE) + block, scale, mask=first)


@triton.jit
def scaled_product_kernel(
    x,
    x_scales,
    w,
    w_scales,
    order,
    ends,
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
    TURN: tl.constexpr,
    BULK: tl.constexpr,
):
    """y: rows of x times w[expert]', scaled block by block; a row is token(i) of x if PICK. STEP is a block's side."""
    column_tiles, blocks = tl.cdiv(width, COLUMNS), tl.cdiv(depth, STEP)
    last_tiles = last_tiles_of(ends, experts, EXPERTS, ROWS, column_tiles)
    for tile in tl.range(tl.program_id(0), tl.max(last_tiles), tl.num_programs(0)):
        expert, row, end, column_tile = locate(tile, last_tiles, ends, ROWS, column_tiles, BAND)
        rows, columns = row + tl.arange(0, ROWS), column_tile * COLUMNS + tl.arange(0, COLUMNS)
        source = rows.to(tl.int64)
        if PICK:
            source = tl.load(order + rows, mask=rows < end, other=0) // CHOICES
        row_scales = x_scales + source * blocks
        block_scales = w_scales + (tl.cast(expert, tl.int64) * column_tiles + column_tile) * blocks
        total = tl.zeros((COLUMNS, ROWS) if TURN else (ROWS, COLUMNS), dtype=tl.float32)
        for k in range(0, blocks):
            if PICK:
                d = k * STEP + tl.arange(0, STEP)
                inside = (rows < end)[:, None] & (d < depth)[None, :]
                left = tl.load(x + source[:, None] * depth + d[None, :], mask=inside, other=0.0)
            else:
                left = load_tile(x, 0, row, k * STEP, pairs, depth, ROWS, STEP, BULK)
            right = load_tile(
                w, expert, column_tile * COLUMNS, k * STEP, width, depth, COLUMNS, STEP, BULK
            )
            scale = tl.load(row_scales + k, mask=rows < end, other=0) * tl.load(block_scales + k)
            if TURN:
                total += tl.dot(right, left.T) * scale[None, :]
            else:
                total += tl.dot(left, right.T) * scale[:, None]
        if TURN:
            total = total.T
        at = y + rows.to(tl.int64)[:, None] * width + columns[None, :]
        tl.store(
            at,
            total.to(y.dtype.element_ty),
            mask=(rows < end)[:, None] & (columns < width)[None, :],
        )


def quantize_triton(x, block):
    """The same as `minglm.kernels.fp8.eager.quantize` for blocks of 128 x 128 and 1 x 128, without its refusal."""
    x, (rows, columns), whole = x.contiguous(), x.shape[-2:], block[0] == SIDE
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    down, across = triton.cdiv(rows, block[0]), triton.cdiv(columns, SIDE)
    scales = x.new_empty(*x.shape[:-2], down, across, dtype=torch.float32)
    if x.numel():
        tall, matrices = (SIDE if whole else ROWS), x.numel() // (rows * columns)
        quantize_kernel[(across, triton.cdiv(rows, tall), matrices)](
            x, q, scales, rows, columns, ROWS=tall, num_warps=8 if whole else 4, **_sizes(whole)
        )
    return q, scales


def _sizes(whole):
    return {"TINY": torch.finfo(torch.float32).tiny, "SIDE": SIDE, "WHOLE": whole}


def scaled_product_triton(x_TD, x_scale, w_EFD, w_scale, ends_E, order, choices, dtype):
    """The same as `minglm.kernels.fp8.eager.scaled_product`, for at least one row."""
    x_TD, w_EFD = x_TD.contiguous(), w_EFD.contiguous()
    (E, F, D), rows, pick = (
        w_EFD.shape,
        len(x_TD) if order is None else len(order),
        order is not None,
    )
    tiles = tiles_for(PRODUCT, x_TD, rows / E)
    bulk = bulk_readable(w_EFD) and (pick or bulk_readable(x_TD))
    y = x_TD.new_empty(rows, F, dtype=dtype)
    x = x_TD if pick else read(x_TD[None], tiles.rows, tiles.step, bulk)
    w = read(w_EFD, tiles.columns, tiles.step, bulk)
    scaled_product_kernel[(programs(x_TD, tiles.each),)](
        x,
        x_scale.contiguous(),
        w,
        w_scale.contiguous(),
        order,
        ends_E,
        y,
        E,
        rows,
        D,
        F,
        CHOICES=choices,
        EXPERTS=power_of_2(E),
        PICK=pick,
        TURN=tiles.turn,
        BULK=bulk,
        **tiles.constants(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return y


def _specs():
    """Both kinds of blocks, and the product for few and many rows of up to 256 experts."""
    arguments = {"x": "*bf16", "q": "*fp8e4nv", "scales": "*fp32", "rows": "i32", "columns": "i32"}
    for name, rows, whole, warps in (("activations", ROWS, False, 4), ("weights", SIDE, True, 8)):
        yield Spec(
            f"quantize {name}",
            quantize_kernel,
            arguments,
            {"ROWS": rows} | _sizes(whole),
            warps,
            aligned=("columns",),
        )
    for t in PRODUCT.values():
        for name, pick in (("picked", True), ("sorted", False)):
            x = "*fp8e4nv" if pick else described(t.rows, t.step, "fp8e4nv")
            arguments = {
                "x": x,
                "w": described(t.columns, t.step, "fp8e4nv"),
                "x_scales": "*fp32",
                "w_scales": "*fp32",
            }
            arguments |= dict.fromkeys(("experts", "pairs", "depth", "width"), "i32") | {
                "ends": "*i32",
                "y": "*bf16",
            }
            switches = {
                "CHOICES": 8 if pick else 1,
                "EXPERTS": 256,
                "PICK": pick,
                "TURN": t.turn,
                "BULK": True,
            }
            arguments |= {"order": "*i64"} if pick else {}
            switches |= {} if pick else {"order": None}
            constants = switches | t.constants()
            yield Spec(
                f"product {name} {t.rows}x{t.columns}",
                scaled_product_kernel,
                arguments,
                constants,
                t.warps,
                t.stages,
                ("depth", "width"),
                "QGMMA",
                ("UTMALDG",),
            )


SPECS = list(_specs())
