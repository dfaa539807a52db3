"""Symmetric products as a Triton kernel: half the tiles, both halves written (paper 2.4). See `newton_schulz.py`.

    out = factor x y' + z_factor z + diagonal I     where that is known to be symmetric

A program computes two squares, side by side: one alone makes too few products of every number that it loads. It stores
a square below the diagonal twice, as it is and turned; of one on the diagonal the lower half counts; one above it is
left out. So the result is symmetric to the last bit, and no element is stored by two programs. The terms in z and I are
added to the float32 sum before it is rounded. The last product of an iteration, P X, is not symmetric and is PyTorch's.
"""

import triton
import triton.language as tl

from minglm.kernels.backend import Spec
from minglm.kernels.grouped_gemm_triton import load_tile
from minglm.kernels.tiles import Tiles, bulk_readable, described, read, tiles_for

# Smaller ones for sides that would not make enough of the large to fill an H100.
SYMMETRIC = {1024: Tiles(64, 128, 64, 4, 4), 2**31: Tiles(128, 256, 64, 8, 4)}


@triton.jit
def _store_square(
    total, z, out, matrix, row, column, rows, z_factor, diagonal,
    SIDE: tl.constexpr, BULK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Finish a square of the result and store it as it is and turned; nothing, if it lies above the diagonal."""
    if column <= row:
        if ADD:
            total += z_factor * load_tile(z, matrix, row, column, rows, rows, SIDE, SIDE, BULK).to(tl.float32)
        r, c = (row + tl.arange(0, SIDE))[:, None], (column + tl.arange(0, SIDE))[None, :]
        rounded = tl.where(r == c, total + diagonal, total).to(out.dtype.element_ty)
        start, inside = out + tl.cast(matrix, tl.int64) * rows * rows, (r < rows) & (c < rows)
        if column == row:  # its upper half is the lower one turned
            tl.store(start + r.to(tl.int64) * rows + c, tl.where(r >= c, rounded, rounded.T), mask=inside)
        else:
            tl.store(start + r.to(tl.int64) * rows + c, rounded, mask=inside)
            tl.store(start + c.to(tl.int64) * rows + r, rounded, mask=inside)


@triton.jit
def symmetric_kernel(
    x, y, z, out, rows, depth, factor, z_factor, diagonal,
    SIDE: tl.constexpr, STEP: tl.constexpr, BULK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Tile number program_id(0), row by row, of matrix program_id(1): two squares, side by side."""
    tile, matrix, across = tl.program_id(0), tl.program_id(1), tl.cdiv(rows, 2 * SIDE)
    row, column = tile // across * SIDE, tile % across * 2 * SIDE
    if column > row:
        return
    total = tl.zeros((SIDE, 2 * SIDE), dtype=tl.float32)
    for k in range(0, depth, STEP):
        left = load_tile(x, matrix, row, k, rows, depth, SIDE, STEP, BULK)
        right = load_tile(y, matrix, column, k, rows, depth, 2 * SIDE, STEP, BULK)
        total = tl.dot(left, right.T, total, input_precision="ieee")
    first, second = (factor * total).reshape(SIDE, 2, SIDE).permute(0, 2, 1).split()
    _store_square(first, z, out, matrix, row, column, rows, z_factor, diagonal, SIDE, BULK, ADD)
    _store_square(second, z, out, matrix, row, column + SIDE, rows, z_factor, diagonal, SIDE, BULK, ADD)


def symmetric_product_triton(x, y, factor=1.0, z=None, z_factor=0.0, diagonal=0.0):
    """The same as `minglm.kernels.newton_schulz.symmetric_product`."""
    x, y = x.contiguous(), y.contiguous()
    matrices, rows, depth = x.shape
    out = x.new_empty(matrices, rows, rows)
    if not out.numel():
        return out
    terms = [x, y] if z is None else [x, y, z.contiguous()]
    tiles, bulk = tiles_for(SYMMETRIC, x, rows), bulk_readable(*terms)
    side, step = tiles.rows, tiles.step
    boxes = ((side, step), (2 * side, step), (side, side))
    x, y, *z = (read(term, *box, bulk) for term, box in zip(terms, boxes))
    symmetric_kernel[(triton.cdiv(rows, side) * triton.cdiv(rows, 2 * side), matrices)](
        x, y, *(z or [None]), out, rows, depth, factor, z_factor, float(diagonal), SIDE=side, STEP=step, BULK=bulk,
        ADD=bool(z), num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


def _specs():
    """X X', and the two terms of a polynomial, in bfloat16; and the latter in float16, as in the Gram form."""
    numbers = {"rows": "i32", "depth": "i32", "factor": "fp32", "z_factor": "fp32", "diagonal": "fp32"}
    products = (("gram", "bf16", False), ("polynomial", "bf16", True), ("polynomial float16", "fp16", True))
    for t in SYMMETRIC.values():
        for name, kind, add in products:
            constants = {"SIDE": t.rows, "STEP": t.step, "BULK": True, "ADD": add}
            signature = {"x": described(t.rows, t.step, kind), "y": described(t.columns, t.step, kind)}
            signature |= {"out": f"*{kind}"} | numbers
            signature |= {"z": described(t.rows, t.rows, kind)} if add else {}
            constants |= {} if add else {"z": None}
            yield Spec(f"{name} {t.rows}x{t.columns}", symmetric_kernel, signature, constants, t.warps, t.stages,
                       ("rows", "depth"), "HGMMA", ("UTMALDG",))  # fmt: skip


SPECS = list(_specs())
