"""Residual addition and RMSNorm as Triton kernels, forward and backward. Equations and plain form: `norm.py`.

A program takes one row at a time and holds all of it in registers, so each number is read once. Programs of the
backward pass walk over rows, each with its own float32 sum of dweight, written once at the end; how many there are
depends on the shape alone, so the sums have the same order on every run.

A row of the backward pass is a step of its own: loads, a sum over the whole row, stores. So that memory never waits
for the sum, the next rows are copied to shared memory meanwhile (STAGES), and two programs share a multiprocessor. For
that they must be small: a tile of 5120 columns would be one of 8192, with three threads of eight at work on nothing,
so a row is taken as a power of two and the rest, two tiles of 4096 and 1024.
"""

import torch
import triton
import triton.language as tl

from minglm.kernels.toolchain.spec import Spec

# Backward: two programs for each multiprocessor of an H100, as many as its registers hold; and the stages of the loop,
# of which one is at work and the others are on their way.
PROGRAMS, STAGES = 264, 3
PARTS, COLUMNS = 256, 16  # of a tile of the last sum


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
    """One row: r = x + change, out = weight * round(r * scale)."""
    row = tl.program_id(0).to(tl.int64)  # rows times width passes 2^31 at 420,000 tokens
    d = tl.arange(0, BLOCK)
    inside = d < width
    at = row * width + d
    r = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
    if ADD:
        kind = r_ptr.dtype.element_ty
        r = (r + tl.load(change_ptr + at, inside, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
        tl.store(r_ptr + at, r.to(kind), inside)
    scale = 1 / tl.sqrt_rn(tl.sum(r * r, 0) / width + eps)
    weight = tl.load(weight_ptr + d, inside, other=0.0).to(tl.float32)
    kind = out_ptr.dtype.element_ty
    n = (r * scale).to(kind).to(tl.float32)
    tl.store(out_ptr + at, (n * weight.to(kind).to(tl.float32)).to(kind), inside)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _products(dout_ptr, r_ptr, at, inside, weight, scale):
    """Of a piece of a row: n, dout * weight, and dout * n."""
    n = tl.load(r_ptr + at, inside, other=0.0).to(tl.float32) * scale
    dout = tl.load(dout_ptr + at, inside, other=0.0).to(tl.float32)
    return n, dout * weight, dout * n


@triton.jit
def _store(dlater_ptr, dr_ptr, at, inside, dr, LATER: tl.constexpr):
    """dr of a piece of a row, with the gradient from later layers."""
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
    """Rows program, program + programs, ...: dr of each, and this program's part of dweight."""
    program = tl.program_id(0)
    wide = tl.full((), 1, tl.int64) * width  # so that offsets are 64-bit
    kind = dr_ptr.dtype.element_ty
    d, whole, dweight = (
        tl.arange(0, MAIN),
        tl.full((MAIN,), True, tl.int1),
        tl.zeros((MAIN,), tl.float32),
    )
    weight = tl.load(weight_ptr + d).to(kind).to(tl.float32)
    if TAIL:
        e, dweight_e = MAIN + tl.arange(0, TAIL), tl.zeros((TAIL,), tl.float32)
        inside = e < width
        weight_e = tl.load(weight_ptr + e, inside, other=0.0).to(kind).to(tl.float32)
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=STAGES):
        scale = tl.load(scale_ptr + row)
        n, dn, product = _products(dout_ptr, r_ptr, row * wide + d, whole, weight, scale)
        mean = tl.sum(dn * n, 0) / width
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
    """COLUMNS sums of one group of parts, PARTS at a time."""
    column, part = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, PARTS)
    group, total = tl.program_id(1), tl.zeros((PARTS, COLUMNS), tl.float32)
    for start in range(0, parts, PARTS):
        at = (group * parts + start + part)[:, None] * width + column[None, :]
        total += tl.load(
            parts_ptr + at, (start + part < parts)[:, None] & (column < width)[None, :], other=0.0
        )
    tl.store(sums_ptr + group * width + column, tl.sum(total, 0), column < width)


def add_parts(parts_GPD):
    """Sums (G, D) over the parts of each group, in an order that depends on the shape alone."""
    G, P, D = parts_GPD.shape
    sums_GD = parts_GPD.new_empty(G, D)
    _add[(triton.cdiv(D, COLUMNS), G)](
        parts_GPD, sums_GD, P, D, PARTS=PARTS, COLUMNS=COLUMNS, num_warps=8
    )
    return sums_GD


def _warps(block):
    """Sixteen numbers a thread in the usual widths, and never fewer than one warp."""
    return min(16, max(1, block // 512))


def _pieces(width):
    """A row as a power of two of columns, with all of them inside, and the rest: 5120 is 4096 and 1024.

    Rows of more than 8192 numbers are not copied ahead: in float32 two of each kind would not fit in shared memory.
    """
    main = triton.next_power_of_2(width + 1) // 2
    tail = triton.next_power_of_2(width - main) if width > main else 0
    return {"MAIN": main, "TAIL": tail, "STAGES": STAGES if width <= 8192 else 1}


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_D, eps, change_TD):
        ctx.set_materialize_grads(False)
        x_TD, D = x_TD.contiguous(), x_TD.shape[-1]
        rows, block = x_TD.numel() // max(D, 1), triton.next_power_of_2(D)
        out_TD, scale_T = torch.empty_like(x_TD), x_TD.new_empty(rows, dtype=torch.float32)
        r_TD = x_TD if change_TD is None else torch.empty_like(x_TD)
        if change_TD is not None:
            change_TD = change_TD.contiguous()
        if rows:
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
    def backward(ctx, dout_TD, dlater_TD):
        r_TD, weight_D, scale_T = ctx.saved_tensors
        D = r_TD.shape[-1]
        if dout_TD is None:  # only the stream was used
            return dlater_TD, None, None, dlater_TD if ctx.added else None
        dout_TD = dout_TD.contiguous()
        rows, sizes = len(scale_T), _pieces(D)
        programs = min(PROGRAMS, rows)
        dr_TD = torch.empty_like(r_TD)
        parts = r_TD.new_empty(1, programs, D, dtype=torch.float32)
        if rows:
            later = None if dlater_TD is None else dlater_TD.contiguous()
            _backward[(programs,)](
                dout_TD,
                later,
                r_TD,
                weight_D,
                scale_T,
                dr_TD,
                parts,
                rows,
                D,
                LATER=later is not None,
                **sizes,
                num_warps=_warps(sizes["MAIN"]),
            )
        return dr_TD, add_parts(parts)[0].to(weight_D.dtype), None, dr_TD if ctx.added else None


def add_norm_triton(x_TD, weight_D, eps, change_TD=None):
    """The same as `minglm.kernels.norm.norm`, with any leading axes. Without a change r is x itself."""
    out_TD, r_TD = _AddNorm.apply(x_TD, weight_D, eps, change_TD)
    return out_TD, x_TD if change_TD is None else r_TD


def _specs():
    """GLM-4.5's width in bfloat16 with the addition, and without it."""
    forward = {
        "x_ptr": "*bf16",
        "weight_ptr": "*fp32",
        "out_ptr": "*bf16",
        "r_ptr": "*bf16",
        "scale_ptr": "*fp32",
    }
    backward = {"dout_ptr": "*bf16", "r_ptr": "*bf16", "weight_ptr": "*fp32", "scale_ptr": "*fp32"}
    backward |= {"dr_ptr": "*bf16", "dweight_ptr": "*fp32", "rows": "i32", "width": "i32"}
    for width in (5120, 4096):
        block = triton.next_power_of_2(width)
        common = {"warps": _warps(block), "aligned": ("width",)}
        for add in (True, False):
            name = f"{'add ' if add else ''}norm {width}"
            pointer, nothing = ({"change_ptr": "*bf16"}, {}) if add else ({}, {"change_ptr": None})
            signature = forward | pointer | {"width": "i32", "eps": "fp32"}
            yield Spec(name, _forward, signature, {"ADD": add, "BLOCK": block} | nothing, **common)
            pointer, nothing = ({"dlater_ptr": "*bf16"}, {}) if add else ({}, {"dlater_ptr": None})
            yield Spec(
                name + " backward",
                _backward,
                backward | pointer,
                {"LATER": add} | _pieces(width) | nothing,
                warps=_warps(_pieces(width)["MAIN"]),
                aligned=("width",),
                opcodes=("LDGSTS",),
            )
    signature = {"parts_ptr": "*fp32", "sums_ptr": "*fp32", "parts": "i32", "width": "i32"}
    yield Spec(
        "add parts",
        _add,
        signature,
        {"PARTS": PARTS, "COLUMNS": COLUMNS},
        warps=8,
        aligned=("width",),
    )


SPECS = list(_specs())
