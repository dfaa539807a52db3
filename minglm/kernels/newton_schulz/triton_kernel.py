"""Symmetric products as a Triton kernel: compute half the tiles, write both halves (paper 2.4).

    out = factor x y' + z_factor z + diagonal I     where that is known to be symmetric

A program computes two squares, side by side: one alone makes too few products of every number that it loads. It stores
a square below the diagonal twice, once transposed; of a square on the diagonal the lower half counts; one above it is
not computed. The result is therefore symmetric to the last bit, and no element is stored by two programs. The float32
sum begins with the term in z, and the term in I is added before the result is rounded. The last product of an
iteration, P X, is not symmetric and is PyTorch's. Eager form: `newton_schulz/eager.py`.
"""

# Triton has no types for a kernel's tensors, constexpr arguments, loops and launch options:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from minglm.kernels.experts.triton_kernels import load_tile
from minglm.kernels.toolchain.spec import Spec
from minglm.kernels.toolchain.tiles import Tiles, bulk_readable, described, read, tiles_for

# Tiles by the largest side of the result. A tile is two squares; they are smaller for results that have too few large
# squares to fill a GPU.
SYMMETRIC = {1024: Tiles(64, 128, 64, 4, 4), 2**31: Tiles(128, 256, 64, 8, 4)}
SIZE = 4096  # numbers that a program of `scale_kernel` takes


@triton.jit
def _store_tile(tile, out, matrix, row, column, rows, SIDE: tl.constexpr, BULK: tl.constexpr):
    """Store a square at (row, column) of a matrix of the result."""
    if BULK:
        out.store([matrix, row, column], tile.reshape(1, SIDE, SIDE))
    else:
        r = row + tl.arange(0, SIDE)
        c = column + tl.arange(0, SIDE)
        start = out + tl.cast(matrix, tl.int64) * rows * rows
        pointers = start + r.to(tl.int64)[:, None] * rows + c[None, :]
        tl.store(pointers, tile, mask=(r < rows)[:, None] & (c < rows)[None, :])


@triton.jit
def _store_square(
    total,
    out,
    matrix,
    row,
    column,
    rows,
    diagonal,
    DTYPE: tl.constexpr,
    SIDE: tl.constexpr,
    BULK: tl.constexpr,
):
    """Store a square of the result and its transpose; nothing if it lies above the diagonal."""
    if column < row:
        rounded = total.to(DTYPE)
        _store_tile(rounded, out, matrix, row, column, rows, SIDE, BULK)
        _store_tile(rounded.T, out, matrix, column, row, rows, SIDE, BULK)
    if column == row:  # the upper half of a square on the diagonal is its lower half, transposed
        i = tl.arange(0, SIDE)
        rounded = tl.where(i[:, None] == i[None, :], total + diagonal, total).to(DTYPE)
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
    """Compute one tile of one matrix: two squares, side by side. Grid: (tile, row by row; matrix)."""
    tile = tl.program_id(0)
    matrix = tl.program_id(1)
    across = tl.cdiv(rows, 2 * SIDE)
    row = tile // across * SIDE
    column = tile % across * 2 * SIDE
    if column > row:
        return
    total = tl.zeros((SIDE, 2 * SIDE), dtype=tl.float32)
    if ADD:
        z_tile = load_tile(z, matrix, row, column, rows, rows, SIDE, 2 * SIDE, BULK)
        total = z_tile.to(tl.float32) * (z_factor / factor)  # all is multiplied by factor below
    for k in range(0, depth, STEP):
        left = load_tile(x, matrix, row, k, rows, depth, SIDE, STEP, BULK)
        right = load_tile(y, matrix, column, k, rows, depth, 2 * SIDE, STEP, BULK)
        total = tl.dot(left, right.T, total, input_precision="ieee")
    first, second = (factor * total).reshape(SIDE, 2, SIDE).permute(0, 2, 1).split()
    DTYPE: tl.constexpr = out.dtype if BULK else out.dtype.element_ty
    _store_square(first, out, matrix, row, column, rows, diagonal, DTYPE, SIDE, BULK)
    _store_square(second, out, matrix, row, column + SIDE, rows, diagonal, DTYPE, SIDE, BULK)


@triton.jit
def scale_kernel(x, norm, out, numbers, SIZE: tl.constexpr):
    """Divide SIZE numbers of a matrix by its norm, and round them. Grid: (tile, matrix)."""
    matrix = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + matrix * numbers + i, mask=i < numbers, other=0).to(tl.float32)
    value = value / tl.load(norm + matrix)
    tl.store(out + matrix * numbers + i, value.to(out.dtype.element_ty), mask=i < numbers)


def scaled_triton(stack: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide each matrix of a stack by its norm, float32 (matrices, 1, 1), and round to `dtype`, in one pass."""
    stack = stack.contiguous()
    numbers = stack.shape[1:].numel()
    out = torch.empty_like(stack, dtype=dtype)
    if out.numel():
        scale_kernel[(triton.cdiv(numbers, SIZE), len(stack))](stack, norm, out, numbers, SIZE=SIZE)
    return out


def symmetric_product_triton(
    x: Tensor,
    y: Tensor,
    factor: float = 1.0,
    z: Tensor | None = None,
    z_factor: float = 0.0,
    diagonal: float = 0.0,
) -> Tensor:
    """Compute factor x y' + z_factor z + diagonal I for stacks x, y (matrices, rows, depth), z (matrices, rows, rows).

    The result must be symmetric; it is (matrices, rows, rows) in x's dtype. Eager form:
    `minglm.kernels.newton_schulz.eager.symmetric_product`.
    """
    x = x.contiguous()
    y = y.contiguous()
    z = None if z is None else z.contiguous()
    matrices, rows, depth = x.shape
    out = x.new_empty(matrices, rows, rows)
    if not out.numel():
        return out
    tiles = tiles_for(SYMMETRIC, x, rows)
    bulk = bulk_readable(x, y, out) and (z is None or bulk_readable(z))
    side = tiles.rows
    step = tiles.step
    grid = (triton.cdiv(rows, side) * triton.cdiv(rows, 2 * side), matrices)
    symmetric_kernel[grid](
        read(x, side, step, bulk),
        read(y, 2 * side, step, bulk),
        None if z is None else read(z, side, 2 * side, bulk),
        read(out, side, side, bulk),
        rows,
        depth,
        factor,
        z_factor,
        float(diagonal),
        SIDE=side,
        STEP=step,
        BULK=bulk,
        ADD=z is not None,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


def _symmetric_spec(name: str, tiles: Tiles, dtype: str, add: bool) -> Spec:
    """Return the Spec of `symmetric_kernel`; add: with the term in z."""
    signature = {
        "x": described(tiles.rows, tiles.step, dtype),
        "y": described(tiles.columns, tiles.step, dtype),
        "out": described(tiles.rows, tiles.rows, dtype),
        "rows": "i32",
        "depth": "i32",
        "factor": "fp32",
        "z_factor": "fp32",
        "diagonal": "fp32",
    }
    constants = {"SIDE": tiles.rows, "STEP": tiles.step, "BULK": True, "ADD": add}
    if add:
        signature["z"] = described(tiles.rows, tiles.columns, dtype)
    else:
        constants["z"] = None
    return Spec(
        name=f"{name} {tiles.rows}x{tiles.columns}",
        kernel=symmetric_kernel,
        signature=signature,
        constants=constants,
        warps=tiles.warps,
        stages=tiles.stages,
        aligned=("rows", "depth"),
        unit="HGMMA",
        opcodes=("UTMALDG", "UTMASTG"),
    )


def _specs() -> Iterator[Spec]:
    """Yield the Specs of X X', of the two terms of a polynomial in bfloat16, and of the latter in float16 (Gram form)."""
    for tiles in SYMMETRIC.values():
        yield _symmetric_spec("gram", tiles, "bf16", add=False)
        yield _symmetric_spec("polynomial", tiles, "bf16", add=True)
        yield _symmetric_spec("polynomial float16", tiles, "fp16", add=True)
    yield Spec(
        name="scale",
        kernel=scale_kernel,
        signature={"x": "*fp32", "norm": "*fp32", "out": "*fp16", "numbers": "i32"},
        constants={"SIZE": SIZE},
        aligned=("numbers",),
    )


SPECS = list(_specs())
