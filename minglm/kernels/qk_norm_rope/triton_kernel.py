"""QK-norm and rotary embedding as Triton kernels. Equations and plain form: `qk_norm_rope.py`.

A row is one head of one token. A program takes ROWS rows of the queries, or of the keys: one launch serves both. A row
is read as pairs, two tiles of the same shape: the numbers of a pair turn into each other, so every number is loaded
once and no thread needs another's. The dimensions that do not turn are halved into pairs as well, of angle 0. With 128
dimensions a thread has eight neighbouring numbers of each tile, one load of 16 bytes, and eight threads share a row.

The gradient of a weight is summed by a fixed number of programs, each over its own rows, and the parts are added
afterwards: no atomic additions, bitwise repeatable. Within a program every thread keeps its own sums to the end, so
that a tile costs no exchange but the two sums over each row. The backward pass keeps only queries and keys and computes
their norms again.
"""

import torch
import triton
import triton.language as tl

from minglm.kernels.norm.triton_kernel import add_parts
from minglm.kernels.toolchain.spec import Spec

ROWS = 16  # of a tile, by 128 threads: one row for eight of them, and few enough registers for many tiles at once
# Backward: programs for queries, and again for keys, five for each multiprocessor of an H100, which is as many as its
# registers hold. So many that copying the next tile ahead (num_stages) gained nothing there.
PROGRAMS = 660


@triton.jit
def _pairs(A: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """The pairs, the dimensions of their first and second numbers, and which of these there are."""
    pair, pairs = tl.arange(0, BLOCK), (A + 1) // 2
    first = tl.where(pair < HALF, pair, pair + HALF)
    second = tl.where(pair < HALF, pair + HALF, pair + pairs)
    return pair, first, second, pair < pairs, second < A


@triton.jit
def _angles(cos_ptr, sin_ptr, row, heads, period, pair, inside, HALF: tl.constexpr):
    """cos and sin of each pair of each row: 1 and 0 where nothing turns."""
    at = (row // heads % period)[:, None] * HALF + pair[None, :]
    inside = inside[:, None] & (pair < HALF)[None, :]
    return tl.load(cos_ptr + at, inside, other=1.0), tl.load(sin_ptr + at, inside, other=0.0)


@triton.jit
def _load(pointer, at, inside):
    """In float32, and 0 outside."""
    return tl.load(pointer + at, inside, other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=["N", "M"]
)  # a number of heads that is 1 stays a number, of the same type as the other
def _forward(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    tokens,
    N,
    M,
    period,
    eps,
    NORM: tl.constexpr,
    A: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One tile of ROWS heads: of the queries in the first programs, of the keys in the last."""
    q_tiles = tl.cdiv(tokens * N, ROWS)
    tile, heads, x_ptr, weight_ptr, out_ptr = tl.program_id(0), N, q_ptr, q_weight_ptr, q_out_ptr
    if tile >= q_tiles:
        tile, heads, x_ptr, weight_ptr, out_ptr = tile - q_tiles, M, k_ptr, k_weight_ptr, k_out_ptr
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < tokens * heads
    pair, first, second, has_first, has_second = _pairs(A, HALF, BLOCK)
    base = row.to(tl.int64)[:, None] * A  # 96 heads of 128 pass 2^31 at 175,000 tokens
    at_a, in_a = base + first[None, :], inside[:, None] & has_first[None, :]
    at_b, in_b = base + second[None, :], inside[:, None] & has_second[None, :]
    a, b = _load(x_ptr, at_a, in_a), _load(x_ptr, at_b, in_b)
    cos, sin = _angles(cos_ptr, sin_ptr, row, heads, period, pair, inside, HALF)
    if NORM:
        scale = 1 / tl.sqrt_rn(tl.sum(a * a + b * b, 1) / A + eps)[:, None]
        a *= scale * _load(weight_ptr, first, has_first)[None, :]
        b *= scale * _load(weight_ptr, second, has_second)[None, :]
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + at_a, (a * cos - b * sin).to(kind), in_a)
    tl.store(out_ptr + at_b, (b * cos + a * sin).to(kind), in_b)


@triton.jit(do_not_specialize=["N", "M"])
def _backward(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_grad_ptr,
    k_grad_ptr,
    dq_ptr,
    dk_ptr,
    parts_ptr,
    tokens,
    N,
    M,
    period,
    eps,
    NORM: tl.constexpr,
    A: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Tiles program, program + programs, ... of the queries (axis 1 is 0) or keys: dx, and a part of dweight."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    heads, x_ptr, weight_ptr, grad_ptr, dx_ptr = N, q_ptr, q_weight_ptr, q_grad_ptr, dq_ptr
    if tl.program_id(1) == 1:
        heads, x_ptr, weight_ptr, grad_ptr, dx_ptr = M, k_ptr, k_weight_ptr, k_grad_ptr, dk_ptr
    pair, first, second, has_first, has_second = _pairs(A, HALF, BLOCK)
    kind = dx_ptr.dtype.element_ty
    rows = tokens * heads
    if NORM:
        weight_a = _load(weight_ptr, first, has_first)[None, :]
        weight_b = _load(weight_ptr, second, has_second)[None, :]
        dweight_a, dweight_b = (
            tl.zeros((ROWS, BLOCK), tl.float32),
            tl.zeros((ROWS, BLOCK), tl.float32),
        )
    for tile in tl.range(program, tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        base = row.to(tl.int64)[:, None] * A
        at_a, in_a = base + first[None, :], inside[:, None] & has_first[None, :]
        at_b, in_b = base + second[None, :], inside[:, None] & has_second[None, :]
        grad_a, grad_b = _load(grad_ptr, at_a, in_a), _load(grad_ptr, at_b, in_b)
        cos, sin = _angles(cos_ptr, sin_ptr, row, heads, period, pair, inside, HALF)
        da, db = grad_a * cos + grad_b * sin, grad_b * cos - grad_a * sin
        if NORM:
            a, b = _load(x_ptr, at_a, in_a), _load(x_ptr, at_b, in_b)
            scale = 1 / tl.sqrt_rn(tl.sum(a * a + b * b, 1) / A + eps)[:, None]
            mean = scale * (tl.sum(da * weight_a * a + db * weight_b * b, 1) / A)[:, None]
            a, b = a * scale, b * scale
            dweight_a += da * a
            dweight_b += db * b
            da, db = scale * (da * weight_a - a * mean), scale * (db * weight_b - b * mean)
        tl.store(dx_ptr + at_a, da.to(kind), in_a)
        tl.store(dx_ptr + at_b, db.to(kind), in_b)
    if NORM:
        part_ptr = parts_ptr + (tl.program_id(1) * programs + program) * A
        tl.store(part_ptr + first, tl.sum(dweight_a, 0), has_first)
        tl.store(part_ptr + second, tl.sum(dweight_b, 0), has_second)


def _block(A):
    """Pairs of a tile, a power of two."""
    return triton.next_power_of_2((A + 1) // 2)


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, eps):
        q, k, cos, sin = (t.contiguous() for t in (q, k, cos, sin))
        (B, S, N, A), M = q.shape, k.shape[2]
        sizes = {
            "NORM": q_weight is not None,
            "A": A,
            "HALF": cos.shape[-1],
            "BLOCK": _block(A),
            "ROWS": ROWS,
        }
        ctx.numbers, ctx.sizes = (B * S, N, M, cos[..., 0].numel(), eps), sizes
        out = torch.empty_like(q), torch.empty_like(k)
        if B * S:
            tiles = triton.cdiv(B * S * N, ROWS) + triton.cdiv(B * S * M, ROWS)
            _forward[(tiles,)](q, k, q_weight, k_weight, cos, sin, *out, *ctx.numbers, **sizes)
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        return out

    @staticmethod
    def backward(ctx, dq_out, dk_out):
        q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        tokens, N = ctx.numbers[:2]
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        programs = min(PROGRAMS, triton.cdiv(tokens * N, ROWS))
        parts = (
            None if q_weight is None else q.new_empty(2, programs, q.shape[-1], dtype=torch.float32)
        )
        if tokens:
            _backward[(programs, 2)](
                q,
                k,
                q_weight,
                k_weight,
                cos,
                sin,
                dq_out.contiguous(),
                dk_out.contiguous(),
                dq,
                dk,
                parts,
                *ctx.numbers,
                **ctx.sizes,
            )
        if parts is None:
            return dq, dk, None, None, None, None, None
        dq_weight, dk_weight = add_parts(parts)
        return dq, dk, dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype), None, None, None


def qk_norm_rope_triton(q_BSNA, k_BSMA, q_weight_A, k_weight_A, cos, sin, eps):
    """The same as `minglm.kernels.qk_norm_rope.qk_norm_rope`, rounded once and not after each step."""
    return _NormRope.apply(q_BSNA, k_BSMA, q_weight_A, k_weight_A, cos, sin, eps)


def _specs():
    """GLM-4.5's heads in bfloat16, with QK-norm, and without it as in GLM-4.5-Air."""
    angles = {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    data = {name: "*bf16" for name in ("q_ptr", "k_ptr")}
    numbers = {"tokens": "i32", "N": "i32", "M": "i32", "period": "i32", "eps": "fp32"}
    sizes = {"A": 128, "HALF": 32, "BLOCK": _block(128), "ROWS": ROWS}
    for normed in (True, False):
        weights = {name: "*fp32" for name in ("q_weight_ptr", "k_weight_ptr")}
        given, constants = (weights, {}) if normed else ({}, dict.fromkeys(weights))
        constants |= sizes | {"NORM": normed}
        name, common = f"{'norm and ' if normed else ''}rope", data | given | angles | numbers
        out = {"q_out_ptr": "*bf16", "k_out_ptr": "*bf16"}
        yield Spec(name, _forward, common | out, constants)
        out = {n: "*bf16" for n in ("q_grad_ptr", "k_grad_ptr", "dq_ptr", "dk_ptr")}
        out, constants = (
            (out | {"parts_ptr": "*fp32"}, constants)
            if normed
            else (out, constants | {"parts_ptr": None})
        )
        yield Spec(name + " backward", _backward, common | out, constants)


SPECS = list(_specs())
