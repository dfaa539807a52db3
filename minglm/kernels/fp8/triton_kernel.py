"""Float8 in blocks as Triton kernels: quantization, and the grouped product that rescales every 128 terms (paper 3.5).

    scale = max |x| / 448 of a block;   xq = x / scale                             `quantize_kernel`
    y_if  = sum over blocks b of  x_scale_ib w_scale_fb * ( sum over d in b of  xq_id wq_fd )
                                                                                   `scaled_product_kernel`

The inner sum is one product of the float8 tensor cores (QGMMA), which add up in less than float32; the outer sum, with
the two scales, is float32 in registers. That is why a scale has 128 terms along the sum, and why a tile of the result
is one block of w wide: its scale is one number. Eager form: `fp8/eager.py`.

Choices: persistent programs over the tiles of all experts, as in `minglm.kernels.experts.triton_kernels`; with few rows
an expert (decoding) the product is transposed (SWAP). An entry that is not finite turns itself or its block into NaN,
which shows in the result: to refuse it, as the eager form does, the host would have to wait for the GPU.
"""

# Triton has no types for a kernel's tensors, constexpr arguments, loops and launch options:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

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

SIDE = 128  # numbers along one side of a block of weights; a block of activations is 1 x 128
# Tiles by the largest mean number of rows of an expert; not timed.
PRODUCT = {
    32: Tiles(16, SIDE, SIDE, 4, 4, swap=True, per_multiprocessor=2),
    2**31: Tiles(128, SIDE, SIDE, 8, 4),
}
ROWS = 32  # rows of activations that a program quantizes


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
    """Quantize ROWS x SIDE numbers: one scale for all of them if WHOLE, else one for each row.

    Grid: (column block, tile of rows, matrix).
    """
    block = tl.program_id(0)
    down = tl.program_id(1)
    matrix = tl.program_id(2).to(tl.int64)
    r = down * ROWS + tl.arange(0, ROWS)
    c = block * SIDE + tl.arange(0, SIDE)
    at = matrix * rows * columns + r.to(tl.int64)[:, None] * columns + c[None, :]
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    values = tl.load(x + at, mask=mask, other=0).to(tl.float32)
    largest = tl.max(tl.abs(values), 1)
    if WHOLE:
        largest = tl.zeros_like(largest) + tl.max(largest, 0)
    # A block of zeros has scale 1, and no scale is subnormal.
    scale = tl.maximum(tl.where(largest > 0, tl.div_rn(largest, 448.0), 1.0), TINY)
    values = tl.div_rn(values, tl.broadcast_to(scale[:, None], (ROWS, SIDE)))
    # A quotient may round above 448.
    values = tl.where(values > 448, 448.0, tl.where(values < -448, -448.0, values))
    tl.store(q + at, values.to(tl.float8e4nv), mask=mask)
    if WHOLE:
        row = matrix * tl.cdiv(rows, ROWS) + down + tl.zeros_like(r)
        stored = r == down * ROWS  # the first row stores the one scale
    else:
        row = matrix * rows + r
        stored = r < rows
    tl.store(scales + row * tl.cdiv(columns, SIDE) + block, scale, mask=stored)


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
    SWAP: tl.constexpr,
    BULK: tl.constexpr,
):
    """Compute y: rows of x times w[expert]', scaled block by block; rows are picked by token if PICK.

    STEP and COLUMNS are the side of a block.
    """
    column_tiles = tl.cdiv(width, COLUMNS)
    blocks = tl.cdiv(depth, STEP)
    last_tiles = last_tiles_of(ends, experts, EXPERTS, ROWS, column_tiles)
    for tile in tl.range(tl.program_id(0), tl.max(last_tiles), tl.num_programs(0)):
        expert, row, end, column_tile = locate(tile, last_tiles, ends, ROWS, column_tiles, BAND)
        rows = row + tl.arange(0, ROWS)
        columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        source = rows.to(tl.int64)
        if PICK:
            source = tl.load(order + rows, mask=rows < end, other=0) // CHOICES
        row_scales = x_scales + source * blocks
        block_scales = w_scales + (tl.cast(expert, tl.int64) * column_tiles + column_tile) * blocks
        total = tl.zeros((COLUMNS, ROWS) if SWAP else (ROWS, COLUMNS), dtype=tl.float32)
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
            # x_scale_ib w_scale_fb
            scale = tl.load(row_scales + k, mask=rows < end, other=0) * tl.load(block_scales + k)
            if SWAP:
                total += tl.dot(right, left.T) * scale[None, :]
            else:
                total += tl.dot(left, right.T) * scale[:, None]
        if SWAP:
            total = total.T
        pointers = y + rows.to(tl.int64)[:, None] * width + columns[None, :]
        mask = (rows < end)[:, None] & (columns < width)[None, :]
        tl.store(pointers, total.to(y.dtype.element_ty), mask=mask)


def quantize_triton(x: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Quantize x (..., rows, columns) in blocks of 128 x 128 or 1 x 128.

    Returns (float8_e4m3fn of x's shape, float32 scales (..., row blocks, column blocks)). Eager form:
    `minglm.kernels.fp8.eager.quantize`, which also refuses numbers that are not finite.
    """
    x = x.contiguous()
    rows, columns = x.shape[-2:]
    whole = block[0] == SIDE
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    row_blocks = triton.cdiv(rows, block[0])
    column_blocks = triton.cdiv(columns, SIDE)
    scales = x.new_empty(*x.shape[:-2], row_blocks, column_blocks, dtype=torch.float32)
    if x.numel():
        tile_rows = SIDE if whole else ROWS
        matrices = x.numel() // (rows * columns)
        quantize_kernel[(column_blocks, triton.cdiv(rows, tile_rows), matrices)](
            x,
            q,
            scales,
            rows,
            columns,
            ROWS=tile_rows,
            num_warps=8 if whole else 4,
            **_constants(whole),
        )
    return q, scales


def _constants(whole: bool) -> dict[str, Any]:
    """Return the constants of `quantize_kernel` but for ROWS; whole: one scale for 128 x 128 numbers."""
    return {"TINY": torch.finfo(torch.float32).tiny, "SIDE": SIDE, "WHOLE": whole}


def scaled_product_triton(
    x_TD: Tensor,
    x_scale: Tensor,
    w_EFD: Tensor,
    w_scale: Tensor,
    ends_E: Tensor,
    order: Tensor | None,
    choices: int,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply rows of x with their expert's matrix, both float8 with scales, for at least one row; returns (rows, F).

    x_scale: float32 (T, D / 128); w_scale: float32 (E, F / 128, D / 128). order: int64 (T * choices), the pairs (token,
    choice) expert by expert, which pick the rows of x; None: x is in the order of the experts. ends: int32 (E). Eager
    form: `minglm.kernels.fp8.eager.scaled_product`.
    """
    x_TD = x_TD.contiguous()
    w_EFD = w_EFD.contiguous()
    E, F, D = w_EFD.shape
    pick = order is not None
    rows = len(x_TD) if order is None else len(order)
    tiles = tiles_for(PRODUCT, x_TD, rows / E)
    bulk = bulk_readable(w_EFD) and (pick or bulk_readable(x_TD))
    y = x_TD.new_empty(rows, F, dtype=dtype)
    scaled_product_kernel[(programs(x_TD, tiles.per_multiprocessor),)](
        x_TD if pick else read(x_TD[None], tiles.rows, tiles.step, bulk),
        x_scale.contiguous(),
        read(w_EFD, tiles.columns, tiles.step, bulk),
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
        SWAP=tiles.swap,
        BULK=bulk,
        **tiles.constants(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return y


def _quantize_spec(name: str, rows: int, whole: bool, warps: int) -> Spec:
    """Return the Spec of `quantize_kernel` for one kind of block."""
    return Spec(
        name=f"quantize {name}",
        kernel=quantize_kernel,
        signature={
            "x": "*bf16",
            "q": "*fp8e4nv",
            "scales": "*fp32",
            "rows": "i32",
            "columns": "i32",
        },
        constants={"ROWS": rows, **_constants(whole)},
        warps=warps,
        aligned=("columns",),
    )


def _product_spec(name: str, tiles: Tiles, pick: bool) -> Spec:
    """Return the Spec of `scaled_product_kernel`, for up to 256 experts."""
    signature = {
        "x": "*fp8e4nv" if pick else described(tiles.rows, tiles.step, "fp8e4nv"),
        "w": described(tiles.columns, tiles.step, "fp8e4nv"),
        "x_scales": "*fp32",
        "w_scales": "*fp32",
        **dict.fromkeys(("experts", "pairs", "depth", "width"), "i32"),
        "ends": "*i32",
        "y": "*bf16",
    }
    constants = {
        "CHOICES": 8 if pick else 1,
        "EXPERTS": 256,
        "PICK": pick,
        "SWAP": tiles.swap,
        "BULK": True,
        **tiles.constants(),
    }
    if pick:
        signature["order"] = "*i64"
    else:
        constants["order"] = None
    return Spec(
        name=f"product {name} {tiles.rows}x{tiles.columns}",
        kernel=scaled_product_kernel,
        signature=signature,
        constants=constants,
        warps=tiles.warps,
        stages=tiles.stages,
        aligned=("depth", "width"),
        unit="QGMMA",
        opcodes=("UTMALDG",),
    )


def _specs() -> Iterator[Spec]:
    """Yield the Specs of both kinds of blocks, and of the product for few and many rows an expert."""
    yield _quantize_spec("activations", ROWS, whole=False, warps=4)
    yield _quantize_spec("weights", SIDE, whole=True, warps=8)
    for tiles in PRODUCT.values():
        yield _product_spec("picked", tiles, pick=True)
        yield _product_spec("sorted", tiles, pick=False)


SPECS = list(_specs())
