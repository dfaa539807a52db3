"""Residual addition and RMSNorm as Triton kernels, forward and backward (paper 2.1). Eager form: `norm/eager.py`.

    r = x + change;   scale = 1 / sqrt(mean(r^2) + eps);   n = r scale;   out = weight n
    dn = dout weight;   dr = scale (dn - n mean(dn n)) + dlater;   dweight = sum over rows of dout n

dlater is the gradient of r from later layers.

A program takes one row at a time and holds all of it in registers, so each number is read once. Programs of the
backward pass walk over rows, each with its own float32 sum of dweight, written once at the end; how many there are
depends on the shape alone, so the sums have the same order on every run.

A row of the backward pass is a step by itself: loads, a sum over the whole row, stores. So that memory never waits for
the sum, the next rows are copied to shared memory at the same time (STAGES), and two programs share a multiprocessor.
For that they must be small: one tile for 5120 columns would have 8192, with three threads of eight idle, so a row is
taken as a power of two and the rest, two tiles of 4096 and 1024 (MAIN and TAIL).
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

from minglm.kernels.toolchain.spec import Spec

PROGRAMS = 264  # of the backward pass: two for each multiprocessor of an H100, as many as its registers hold
STAGES = 3  # rows in flight in the backward pass: one is computed while the others are copied
PARTS = 256  # parts of a tile of the last sum
COLUMNS = 16  # columns of a tile of the last sum


@triton.jit
def _forward(
    x_ptr,
    change_ptr,
    weight_ptr,
    out_ptr,
    r_ptr,
    scale_ptr,
    width,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute one row: r = x + change, out = weight * round(r * scale)."""
    row = tl.program_id(0).to(tl.int64)  # rows times width passes 2^31 at 420,000 tokens
    d = tl.arange(0, BLOCK)
    inside = d < width
    at = row * width + d
    r = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
    if ADD:
        dtype = r_ptr.dtype.element_ty
        change = tl.load(change_ptr + at, inside, other=0.0).to(tl.float32)
        r = (r + change).to(dtype).to(tl.float32)  # rounded as it is stored
        tl.store(r_ptr + at, r.to(dtype), inside)
    scale = 1 / tl.sqrt_rn(tl.sum(r * r, 0) / width + eps)
    weight = tl.load(weight_ptr + d, inside, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    n = (r * scale).to(dtype).to(tl.float32)
    tl.store(out_ptr + at, (n * weight.to(dtype).to(tl.float32)).to(dtype), inside)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _products(dout_ptr, r_ptr, at, inside, weight, scale):
    """Compute n, dn = dout * weight, and dout * n of a piece of a row."""
    n = tl.load(r_ptr + at, inside, other=0.0).to(tl.float32) * scale
    dout = tl.load(dout_ptr + at, inside, other=0.0).to(tl.float32)
    return n, dout * weight, dout * n


@triton.jit
def _store(dlater_ptr, dr_ptr, at, inside, dr, LATER: tl.constexpr):
    """Store dr of a piece of a row, with the gradient from later layers if LATER."""
    if LATER:
        dr += tl.load(dlater_ptr + at, inside, other=0.0).to(tl.float32)
    tl.store(dr_ptr + at, dr.to(dr_ptr.dtype.element_ty), inside)


@triton.jit
def _backward(
    dout_ptr,
    dlater_ptr,
    r_ptr,
    weight_ptr,
    scale_ptr,
    dr_ptr,
    dweight_ptr,
    rows,
    width,
    LATER: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute dr of rows program, program + programs, ..., and this program's part of dweight."""
    program = tl.program_id(0)
    wide = tl.full((), 1, tl.int64) * width  # so that offsets are 64-bit
    dtype = dr_ptr.dtype.element_ty
    # The first MAIN columns of a row are d, the rest is e.
    d = tl.arange(0, MAIN)
    whole = tl.full((MAIN,), True, tl.int1)
    dweight = tl.zeros((MAIN,), tl.float32)
    weight = tl.load(weight_ptr + d).to(dtype).to(tl.float32)
    if TAIL:
        e = MAIN + tl.arange(0, TAIL)
        dweight_e = tl.zeros((TAIL,), tl.float32)
        inside = e < width
        weight_e = tl.load(weight_ptr + e, inside, other=0.0).to(dtype).to(tl.float32)
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=STAGES):
        scale = tl.load(scale_ptr + row)
        n, dn, product = _products(dout_ptr, r_ptr, row * wide + d, whole, weight, scale)
        mean = tl.sum(dn * n, 0) / width  # mean(dn n)
        dweight += product
        if TAIL:
            n_e, dn_e, product_e = _products(
                dout_ptr, r_ptr, row * wide + e, inside, weight_e, scale
            )
            mean += tl.sum(dn_e * n_e, 0) / width
            dweight_e += product_e
            _store(dlater_ptr, dr_ptr, row * wide + e, inside, scale * (dn_e - n_e * mean), LATER)
        _store(dlater_ptr, dr_ptr, row * wide + d, whole, scale * (dn - n * mean), LATER)
    tl.store(dweight_ptr + program * wide + d, dweight)
    if TAIL:
        tl.store(dweight_ptr + program * wide + e, dweight_e, inside)


@triton.jit
def _add(parts_ptr, sums_ptr, parts, width, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum COLUMNS columns of one group of parts, PARTS parts at a time. Grid: (tile of columns, group)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, PARTS)
    group = tl.program_id(1)
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    for start in range(0, parts, PARTS):
        at = (group * parts + start + part)[:, None] * width + column[None, :]
        inside = (start + part < parts)[:, None] & (column < width)[None, :]
        total += tl.load(parts_ptr + at, inside, other=0.0)
    tl.store(sums_ptr + group * width + column, tl.sum(total, 0), column < width)


def add_parts(parts_GPD: Tensor) -> Tensor:
    """Sum the parts of each group: float32 (G, P, D) to (G, D), in an order that depends on the shape alone."""
    G, P, D = parts_GPD.shape
    sums_GD = parts_GPD.new_empty(G, D)
    _add[(triton.cdiv(D, COLUMNS), G)](
        parts_GPD, sums_GD, P, D, PARTS=PARTS, COLUMNS=COLUMNS, num_warps=8
    )
    return sums_GD


def _warps(block: int) -> int:
    """Return the warps of a program: sixteen numbers a thread in the usual widths, and at least one warp."""
    return min(16, max(1, block // 512))


def _pieces(width: int) -> dict[str, int]:
    """Cut a row into a power of two of columns, with all of them inside, and the rest: 5120 is 4096 and 1024.

    Rows of more than 8192 numbers are not copied ahead: in float32 two of each kind would not fit in shared memory.
    """
    main = triton.next_power_of_2(width + 1) // 2
    tail = triton.next_power_of_2(width - main) if width > main else 0
    return {"MAIN": main, "TAIL": tail, "STAGES": STAGES if width <= 8192 else 1}


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float, change_TD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        x_TD = x_TD.contiguous()
        D = x_TD.shape[-1]
        rows = x_TD.numel() // max(D, 1)
        out_TD = torch.empty_like(x_TD)
        scale_T = x_TD.new_empty(rows, dtype=torch.float32)
        r_TD = x_TD
        if change_TD is not None:
            r_TD = torch.empty_like(x_TD)
            change_TD = change_TD.contiguous()
        if rows:
            block = triton.next_power_of_2(D)
            _forward[(rows,)](
                x_TD,
                change_TD,
                weight_D,
                out_TD,
                r_TD,
                scale_T,
                D,
                eps,
                ADD=change_TD is not None,
                BLOCK=block,
                num_warps=_warps(block),
            )
        ctx.added = change_TD is not None
        ctx.save_for_backward(r_TD, weight_D, scale_T)
        return out_TD, r_TD

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, dout_TD: Tensor | None, dlater_TD: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        r_TD, weight_D, scale_T = ctx.saved_tensors
        if dout_TD is None:  # only the stream r was used
            return dlater_TD, None, None, dlater_TD if ctx.added else None
        D = r_TD.shape[-1]
        rows = len(scale_T)
        sizes = _pieces(D)
        programs = min(PROGRAMS, rows)
        dr_TD = torch.empty_like(r_TD)
        parts_1PD = r_TD.new_empty(1, programs, D, dtype=torch.float32)
        if rows:
            dlater_TD = None if dlater_TD is None else dlater_TD.contiguous()
            _backward[(programs,)](
                dout_TD.contiguous(),
                dlater_TD,
                r_TD,
                weight_D,
                scale_T,
                dr_TD,
                parts_1PD,
                rows,
                D,
                LATER=dlater_TD is not None,
                **sizes,
                num_warps=_warps(sizes["MAIN"]),
            )
        dweight_D = add_parts(parts_1PD)[0].to(weight_D.dtype)
        return dr_TD, dweight_D, None, dr_TD if ctx.added else None


def add_norm_triton(
    x_TD: Tensor, weight_D: Tensor, eps: float, change_TD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add change to x and normalize: return (out, r), both with x's shape and dtype, with any leading axes.

    Without a change r is x itself. Eager form: `minglm.kernels.norm.eager.norm`.
    """
    out_TD, r_TD = _AddNorm.apply(x_TD, weight_D, eps, change_TD)
    return out_TD, x_TD if change_TD is None else r_TD


def _norm_spec(width: int, add: bool) -> Spec:
    """Return the Spec of the forward pass; add: with the residual addition."""
    block = triton.next_power_of_2(width)
    signature = {
        **dict.fromkeys(("x_ptr", "out_ptr", "r_ptr"), "*bf16"),
        "weight_ptr": "*fp32",
        "scale_ptr": "*fp32",
        "width": "i32",
        "eps": "fp32",
    }
    constants = {"ADD": add, "BLOCK": block}
    if add:
        signature["change_ptr"] = "*bf16"
    else:
        constants["change_ptr"] = None
    return Spec(
        name=f"{'add ' if add else ''}norm {width}",
        kernel=_forward,
        signature=signature,
        constants=constants,
        warps=_warps(block),
        aligned=("width",),
    )


def _backward_spec(width: int, later: bool) -> Spec:
    """Return the Spec of the backward pass; later: with a gradient of r from later layers."""
    sizes = _pieces(width)
    signature = {
        **dict.fromkeys(("dout_ptr", "r_ptr", "dr_ptr"), "*bf16"),
        **dict.fromkeys(("weight_ptr", "scale_ptr", "dweight_ptr"), "*fp32"),
        "rows": "i32",
        "width": "i32",
    }
    constants = {"LATER": later, **sizes}
    if later:
        signature["dlater_ptr"] = "*bf16"
    else:
        constants["dlater_ptr"] = None
    return Spec(
        name=f"{'add ' if later else ''}norm {width} backward",
        kernel=_backward,
        signature=signature,
        constants=constants,
        warps=_warps(sizes["MAIN"]),
        aligned=("width",),
        opcodes=("LDGSTS",),
    )


def _specs() -> Iterator[Spec]:
    """Yield the Specs for the widths of GLM-4.5 and of GLM-4.5-Air in bfloat16, with the addition and without it."""
    for width in (5120, 4096):
        for add in (True, False):
            yield _norm_spec(width, add)
            yield _backward_spec(width, later=add)
    yield Spec(
        name="add parts",
        kernel=_add,
        signature={"parts_ptr": "*fp32", "sums_ptr": "*fp32", "parts": "i32", "width": "i32"},
        constants={"PARTS": PARTS, "COLUMNS": COLUMNS},
        warps=8,
        aligned=("width",),
    )


SPECS = list(_specs())
