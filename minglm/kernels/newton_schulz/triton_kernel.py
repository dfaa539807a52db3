"""Symmetric products as a Triton kernel: half the tiles, both halves written (paper 2.4). See `newton_schulz.py`.

    out = factor x y' + z_factor z + diagonal I     where that is known to be symmetric

A program computes two squares, side by side: one alone makes too few products of every number that it loads. It stores
a square below the diagonal twice, as it is and turned; of one on the diagonal the lower half counts; one above it is
left out. So the result is symmetric to the last bit, and no element is stored by two programs. The float32 sum begins
with the term in z, and that in I is added before it is rounded. The last product of an iteration, P X, is not symmetric
and is PyTorch's.
"""

import torch
import triton
import triton.language as tl

from minglm.kernels.experts.triton_kernels import load_tile
from minglm.kernels.toolchain.spec import Spec
from minglm.kernels.toolchain.tiles import Tiles, bulk_readable, described, read, tiles_for

# Rows x columns of a program, two squares; smaller ones for sides that would not make enough large ones to fill a GPU.
SYMMETRIC = {1024: Tiles(64, 128, 64, 4, 4), 2**31: Tiles(128, 256, 64, 8, 4)}
SIZE = 4096  # numbers that a program scales


@triton.jit
def _store_tile(tile, out, matrix, row, column, rows, SIDE: tl.constexpr, BULK: tl.constexpr):
    """Store a square at (row, column) of a matrix of the result."""
    if BULK:
        out.store([matrix, row, column], tile.reshape(1, SIDE, SIDE))
    else:
        r, c = row + tl.arange(0, SIDE), column + tl.arange(0, SIDE)
        at = (
            out
            + tl.cast(matrix, tl.int64) * rows * rows
            + r.to(tl.int64)[:, None] * rows
            + c[None, :]
        )
        tl.store(at, tile, mask=(r < rows)[:, None] & (c < rows)[None, :])


@triton.jit
def _store_square(
    total,
    out,
    matrix,
    row,
    column,
    rows,
    diagonal,
    KIND: tl.constexpr,
    SIDE: tl.constexpr,
    BULK: tl.constexpr,
):
    """Store a square of the result as it is and turned; nothing, if it lies above the diagonal."""
    if column < row:
        rounded = total.to(KIND)
        _store_tile(rounded, out, matrix, row, column, rows, SIDE, BULK)
        _store_tile(rounded.T, out, matrix, column, row, rows, SIDE, BULK)
    if column == row:  # the upper half of such a square is the lower one turned
        i = tl.arange(0, SIDE)
        rounded = tl.where(i[:, None] == i[None, :], total + diagonal, total).to(KIND)
        rounded = tl.where(i[:, None] >= i[None, :], rounded, rounded.T)
        _store_tile(rounded, out, matrix, row, column, rows, SIDE, BULK)


@triton.jit
def symmetric_kernel(
    x,
    y,
    z,
    out,
    rows,
    depth,
    factor,
    z_factor,
    diagonal,
    SIDE: tl.constexpr,
    STEP: tl.constexpr,
    BULK: tl.constexpr,
    ADD: tl.constexpr,
):
    """Tile number program_id(0), row by row, of matrix program_id(1): two squares, side by side."""
    tile, matrix, across = tl.program_id(0), tl.program_id(1), tl.cdiv(rows, 2 * SIDE)
    row, column = tile // across * SIDE, tile % across * 2 * SIDE
    if column > row:
        return
    total = tl.zeros((SIDE, 2 * SIDE), dtype=tl.float32)
    if ADD:
        z_tile = load_tile(z, matrix, row, column, rows, rows, SIDE, 2 * SIDE, BULK)
        total = z_tile.to(tl.float32) * (z_factor / factor)
    for k in range(0, depth, STEP):
        left = load_tile(x, matrix, row, k, rows, depth, SIDE, STEP, BULK)
        right = load_tile(y, matrix, column, k, rows, depth, 2 * SIDE, STEP, BULK)
        total = tl.dot(left, right.T, total, input_precision="ieee")
    first, second = (factor * total).reshape(SIDE, 2, SIDE).permute(0, 2, 1).split()
    KIND: tl.constexpr = out.dtype if BULK else out.dtype.element_ty
    _store_square(first, out, matrix, row, column, rows, diagonal, KIND, SIDE, BULK)
    _store_square(second, out, matrix, row, column + SIDE, rows, diagonal, KIND, SIDE, BULK)


@triton.jit
def scale_kernel(x, norm, out, numbers, SIZE: tl.constexpr):
    """SIZE numbers of matrix program_id(1), divided by its norm and rounded."""
    matrix, i = tl.program_id(1).to(tl.int64), tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + matrix * numbers + i, mask=i < numbers, other=0).to(tl.float32) / tl.load(
        norm + matrix
    )
    tl.store(out + matrix * numbers + i, value.to(out.dtype.element_ty), mask=i < numbers)


def scaled_triton(stack, norm, dtype):
    """Each matrix of a stack divided by its norm, float32 (matrices, 1, 1), in another dtype: one pass over them."""
    stack, numbers = stack.contiguous(), stack.shape[1:].numel()
    out = torch.empty_like(stack, dtype=dtype)
    if out.numel():
        scale_kernel[(triton.cdiv(numbers, SIZE), len(stack))](stack, norm, out, numbers, SIZE=SIZE)
    return out


def symmetric_product_triton(x, y, factor=1.0, z=None, z_factor=0.0, diagonal=0.0):
    """The same as `minglm.kernels.newton_schulz.eager.symmetric_product`."""
    x, y = x.contiguous(), y.contiguous()
    matrices, rows, depth = x.shape
    out = x.new_empty(matrices, rows, rows)
    if not out.numel():
        return out
    terms = [x, y, out] if z is None else [x, y, out, z.contiguous()]
    tiles, bulk = tiles_for(SYMMETRIC, x, rows), bulk_readable(*terms)
    side, step = tiles.rows, tiles.step
    boxes = ((side, step), (2 * side, step), (side, side), (side, 2 * side))
    x, y, target, *z = (read(term, *box, bulk) for term, box in zip(terms, boxes))
    symmetric_kernel[(triton.cdiv(rows, side) * triton.cdiv(rows, 2 * side), matrices)](
        x,
        y,
        *(z or [None]),
        target,
        rows,
        depth,
        factor,
        z_factor,
        float(diagonal),
        SIDE=side,
        STEP=step,
        BULK=bulk,
        ADD=bool(z),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


def _specs():
    """X X', and the two terms of a polynomial, in bfloat16; and the latter in float16, as in the Gram form."""
    numbers = {
        "rows": "i32",
        "depth": "i32",
        "factor": "fp32",
        "z_factor": "fp32",
        "diagonal": "fp32",
    }
    products = (
        ("gram", "bf16", False),
        ("polynomial", "bf16", True),
        ("polynomial float16", "fp16", True),
    )
    for t in SYMMETRIC.values():
        for name, kind, add in products:
            constants = {"SIDE": t.rows, "STEP": t.step, "BULK": True, "ADD": add}
            signature = {
                "x": described(t.rows, t.step, kind),
                "y": described(t.columns, t.step, kind),
            }
            signature |= {"out": described(t.rows, t.rows, kind)} | numbers
            signature |= {"z": described(t.rows, t.columns, kind)} if add else {}
            constants |= {} if add else {"z": None}
            yield Spec(
                f"{name} {t.rows}x{t.columns}",
                symmetric_kernel,
                signature,
                constants,
                t.warps,
                t.stages,
                ("rows", "depth"),
                "HGMMA",
                ("UTMALDG", "UTMASTG"),
            )
    arguments = {"x": "*fp32", "norm": "*fp32", "out": "*fp16", "numbers": "i32"}
    yield Spec("scale", scale_kernel, arguments, {"SIZE": SIZE}, aligned=("numbers",))


SPECS = list(_specs())
