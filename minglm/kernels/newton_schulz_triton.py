"""Symmetric products as a Triton kernel: half the tiles, both halves written (paper 2.4). See `newton_schulz.py`.

    out = factor x y' + z_factor z + diagonal I     where that is known to be symmetric

A program computes one tile on or below the diagonal and stores it twice, as it is and turned; of a tile on the diagonal
the lower half counts, or else two stores of different bits would race. So the result is symmetric to the last bit. The
terms in z and I are added to the float32 sum before it is rounded. The last product of an iteration, P X, is not
symmetric and is PyTorch's.
"""

import triton
import triton.language as tl

from minglm.kernels.backend import Spec
from minglm.kernels.grouped_gemm_triton import load_tile
from minglm.kernels.tiles import Tiles, bulk_readable, described, read, tiles_for

# Square tiles; 64 for sides that 128 would not divide into enough of them to fill an H100. They have not been timed.
SYMMETRIC = {1024: Tiles(64, 64, 64, 4, 5), 2**31: Tiles(128, 128, 64, 8, 4)}


@triton.jit
def symmetric_kernel(
    x, y, z, out, rows, depth, factor, z_factor, diagonal,
    SIDE: tl.constexpr, STEP: tl.constexpr, BULK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Tile number program_id(0) of the lower triangle, row by row, of matrix program_id(1); stored twice."""
    tile, matrix = tl.program_id(0), tl.program_id(1)
    i = ((tl.sqrt(8.0 * tile + 1) - 1) / 2).to(tl.int32)
    i += ((i + 1) * (i + 2) // 2 <= tile).to(tl.int32)  # the root may be rounded down across a whole number
    row, column = i * SIDE, (tile - i * (i + 1) // 2) * SIDE
    total = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    for k in range(0, depth, STEP):
        left = load_tile(x, matrix, row, k, rows, depth, SIDE, STEP, BULK)
        right = load_tile(y, matrix, column, k, rows, depth, SIDE, STEP, BULK)
        total = tl.dot(left, right.T, total, input_precision="ieee")
    total *= factor
    if ADD:
        total += z_factor * load_tile(z, matrix, row, column, rows, rows, SIDE, SIDE, BULK).to(tl.float32)
    r, c = row + tl.arange(0, SIDE), column + tl.arange(0, SIDE)
    total = tl.where(r[:, None] == c[None, :], total + diagonal, total)
    if row == column:
        total = tl.where(r[:, None] >= c[None, :], total, total.T)
    if BULK:
        rounded = total.to(out.dtype)
        out.store([matrix, row, column], rounded.reshape(1, SIDE, SIDE))
        out.store([matrix, column, row], rounded.T.reshape(1, SIDE, SIDE))
    else:
        rounded = total.to(out.dtype.element_ty)
        start = out + tl.cast(matrix, tl.int64) * rows * rows
        mask = (r < rows)[:, None] & (c < rows)[None, :]
        tl.store(start + r.to(tl.int64)[:, None] * rows + c[None, :], rounded, mask=mask)
        tl.store(start + c.to(tl.int64)[None, :] * rows + r[:, None], rounded, mask=mask)


def symmetric_product_triton(x, y, factor=1.0, z=None, z_factor=0.0, diagonal=0.0):
    """The same as `minglm.kernels.newton_schulz.symmetric_product`."""
    x, y = x.contiguous(), y.contiguous()
    matrices, rows, depth = x.shape
    out = x.new_empty(matrices, rows, rows)
    if not out.numel():
        return out
    terms = [x, y, out] if z is None else [x, y, out, z.contiguous()]
    tiles, bulk = tiles_for(SYMMETRIC, x, rows), bulk_readable(*terms)
    side, step = tiles.rows, tiles.step
    x, y = read(x, side, step, bulk), read(y, side, step, bulk)
    target, *z = (read(term, side, side, bulk) for term in terms[2:])
    count = triton.cdiv(rows, side)
    symmetric_kernel[(count * (count + 1) // 2, matrices)](
        x, y, *(z or [None]), target, rows, depth, factor, z_factor, float(diagonal), SIDE=side, STEP=step, BULK=bulk,
        ADD=bool(z), num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


def _specs():
    """X X', and the two terms of a polynomial, in bfloat16; and the latter in float16, as in the Gram form."""
    numbers = {"rows": "i32", "depth": "i32", "factor": "fp32", "z_factor": "fp32", "diagonal": "fp32"}
    products = (("gram", "bf16", False), ("polynomial", "bf16", True), ("polynomial float16", "fp16", True))
    for tiles in SYMMETRIC.values():
        side, step = tiles.rows, tiles.step
        for name, kind, add in products:
            square, constants = described(side, side, kind), {"SIDE": side, "STEP": step, "BULK": True, "ADD": add}
            signature = dict.fromkeys("xy", described(side, step, kind)) | {"out": square} | numbers
            signature |= {"z": square} if add else {}
            constants |= {} if add else {"z": None}
            yield Spec(f"{name} {side}", symmetric_kernel, signature, constants, tiles.warps, tiles.stages,
                       ("rows", "depth"), "HGMMA", ("UTMALDG", "UTMASTG"))  # fmt: skip


SPECS = list(_specs())
