"""QK-norm and rotary embedding as Triton kernels (paper 2.1). Eager form: `qk_norm_rope/eager.py`.

    scale = 1 / sqrt(mean(x^2) + eps);   a, b = x scale weight, as pairs;   a' = a cos - b sin,   b' = b cos + a sin
    da = da' cos + db' sin;   db = db' cos - da' sin;   then back through the norm;   dweight = sum of da (x scale)

A row is one head of one token. A program takes ROWS rows of the queries, or of the keys: one launch serves both. A row
is read as pairs, two tiles of the same shape: the two numbers of a pair rotate into each other, so every number is
loaded once and no thread needs another's. The dimensions that do not rotate are halved into pairs as well, of angle 0.
With 128 dimensions a thread has eight neighbouring numbers of each tile, one load of 16 bytes, and eight threads share
a row.

The gradient of a weight is summed by a fixed number of programs, each over its own rows, and the parts are added
afterwards: no atomic additions, bitwise repeatable. Within a program every thread keeps its own sums to the end, so
that a tile costs no exchange but the two sums over each row. The backward pass keeps only queries and keys and computes
their norms again.
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

from minglm.kernels.norm.triton_kernel import add_parts
from minglm.kernels.toolchain.spec import Spec

ROWS = 16  # rows of a tile, by 128 threads: one row for eight of them, few enough registers for many tiles at once
# Programs of the backward pass for queries, and again for keys: five for each multiprocessor of an H100, as many as its
# registers hold. With that many, copying the next tile ahead (num_stages) gained nothing.
PROGRAMS = 660


@triton.jit
def _pairs(A: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Return the pairs, the dimensions of their first and second numbers, and masks of those that exist.

    Pair i < HALF, which rotates, is dimensions i and HALF + i; the other dimensions are halved in the same way.
    """
    pair = tl.arange(0, BLOCK)
    pairs = (A + 1) // 2
    first = tl.where(pair < HALF, pair, pair + HALF)
    second = tl.where(pair < HALF, pair + HALF, pair + pairs)
    return pair, first, second, pair < pairs, second < A


@triton.jit
def _angles(cos_ptr, sin_ptr, row, heads, period, pair, inside, HALF: tl.constexpr):
    """Load cos and sin of each pair of each row: 1 and 0 where nothing rotates."""
    at = (row // heads % period)[:, None] * HALF + pair[None, :]
    inside = inside[:, None] & (pair < HALF)[None, :]
    return tl.load(cos_ptr + at, inside, other=1.0), tl.load(sin_ptr + at, inside, other=0.0)


@triton.jit
def _load(pointer, at, inside):
    """Load numbers as float32, and 0 outside."""
    return tl.load(pointer + at, inside, other=0.0).to(tl.float32)


# A number of heads that is 1 stays a number, of the same type as the other.
@triton.jit(do_not_specialize=["N", "M"])
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
    """Compute one tile of ROWS heads: of the queries in the first programs, of the keys in the last."""
    q_tiles = tl.cdiv(tokens * N, ROWS)
    tile = tl.program_id(0)
    heads = N
    x_ptr = q_ptr
    weight_ptr = q_weight_ptr
    out_ptr = q_out_ptr
    if tile >= q_tiles:
        tile = tile - q_tiles
        heads = M
        x_ptr = k_ptr
        weight_ptr = k_weight_ptr
        out_ptr = k_out_ptr
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < tokens * heads
    pair, first, second, has_first, has_second = _pairs(A, HALF, BLOCK)
    base = row.to(tl.int64)[:, None] * A  # 96 heads of 128 pass 2^31 at 175,000 tokens
    at_a = base + first[None, :]
    in_a = inside[:, None] & has_first[None, :]
    at_b = base + second[None, :]
    in_b = inside[:, None] & has_second[None, :]
    a = _load(x_ptr, at_a, in_a)
    b = _load(x_ptr, at_b, in_b)
    cos, sin = _angles(cos_ptr, sin_ptr, row, heads, period, pair, inside, HALF)
    if NORM:
        scale = 1 / tl.sqrt_rn(tl.sum(a * a + b * b, 1) / A + eps)[:, None]
        a *= scale * _load(weight_ptr, first, has_first)[None, :]
        b *= scale * _load(weight_ptr, second, has_second)[None, :]
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + at_a, (a * cos - b * sin).to(dtype), in_a)
    tl.store(out_ptr + at_b, (b * cos + a * sin).to(dtype), in_b)


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
    """Compute dx of tiles program, program + programs, ..., and this program's part of dweight.

    Axis 1 of the grid is 0 for the queries and 1 for the keys.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    heads = N
    x_ptr = q_ptr
    weight_ptr = q_weight_ptr
    grad_ptr = q_grad_ptr
    dx_ptr = dq_ptr
    if tl.program_id(1) == 1:
        heads = M
        x_ptr = k_ptr
        weight_ptr = k_weight_ptr
        grad_ptr = k_grad_ptr
        dx_ptr = dk_ptr
    pair, first, second, has_first, has_second = _pairs(A, HALF, BLOCK)
    dtype = dx_ptr.dtype.element_ty
    rows = tokens * heads
    if NORM:
        weight_a = _load(weight_ptr, first, has_first)[None, :]
        weight_b = _load(weight_ptr, second, has_second)[None, :]
        dweight_a = tl.zeros((ROWS, BLOCK), tl.float32)
        dweight_b = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        base = row.to(tl.int64)[:, None] * A
        at_a = base + first[None, :]
        in_a = inside[:, None] & has_first[None, :]
        at_b = base + second[None, :]
        in_b = inside[:, None] & has_second[None, :]
        grad_a = _load(grad_ptr, at_a, in_a)
        grad_b = _load(grad_ptr, at_b, in_b)
        cos, sin = _angles(cos_ptr, sin_ptr, row, heads, period, pair, inside, HALF)
        da = grad_a * cos + grad_b * sin
        db = grad_b * cos - grad_a * sin
        if NORM:
            a = _load(x_ptr, at_a, in_a)
            b = _load(x_ptr, at_b, in_b)
            scale = 1 / tl.sqrt_rn(tl.sum(a * a + b * b, 1) / A + eps)[:, None]
            mean = scale * (tl.sum(da * weight_a * a + db * weight_b * b, 1) / A)[:, None]
            a = a * scale
            b = b * scale
            dweight_a += da * a
            dweight_b += db * b
            da = scale * (da * weight_a - a * mean)
            db = scale * (db * weight_b - b * mean)
        tl.store(dx_ptr + at_a, da.to(dtype), in_a)
        tl.store(dx_ptr + at_b, db.to(dtype), in_b)
    if NORM:
        part_ptr = parts_ptr + (tl.program_id(1) * programs + program) * A
        tl.store(part_ptr + first, tl.sum(dweight_a, 0), has_first)
        tl.store(part_ptr + second, tl.sum(dweight_b, 0), has_second)


def _pair_block(A: int) -> int:
    """Return the pairs of a tile, a power of two, for heads of A dimensions."""
    return triton.next_power_of_2((A + 1) // 2)


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BSNA: Tensor,
        k_BSMA: Tensor,
        q_weight_A: Tensor | None,
        k_weight_A: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        q_BSNA = q_BSNA.contiguous()
        k_BSMA = k_BSMA.contiguous()
        cos = cos.contiguous()
        sin = sin.contiguous()
        B, S, N, A = q_BSNA.shape
        M = k_BSMA.shape[2]
        tokens = B * S
        period = cos[..., 0].numel()  # positions that have angles: S, or B * S where rows differ
        ctx.numbers = (tokens, N, M, period, eps)
        ctx.sizes = {
            "NORM": q_weight_A is not None,
            "A": A,
            "HALF": cos.shape[-1],
            "BLOCK": _pair_block(A),
            "ROWS": ROWS,
        }
        q_out = torch.empty_like(q_BSNA)
        k_out = torch.empty_like(k_BSMA)
        if tokens:
            tiles = triton.cdiv(tokens * N, ROWS) + triton.cdiv(tokens * M, ROWS)
            _forward[(tiles,)](
                q_BSNA,
                k_BSMA,
                q_weight_A,
                k_weight_A,
                cos,
                sin,
                q_out,
                k_out,
                *ctx.numbers,
                **ctx.sizes,
            )
        ctx.save_for_backward(q_BSNA, k_BSMA, q_weight_A, k_weight_A, cos, sin)
        return q_out, k_out

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, dq_out: Tensor, dk_out: Tensor
    ) -> tuple[Tensor | None, ...]:
        q_BSNA, k_BSMA, q_weight_A, k_weight_A, cos, sin = ctx.saved_tensors
        tokens, N = ctx.numbers[:2]
        dq_BSNA = torch.empty_like(q_BSNA)
        dk_BSMA = torch.empty_like(k_BSMA)
        programs = min(PROGRAMS, triton.cdiv(tokens * N, ROWS))
        parts = None
        if q_weight_A is not None:
            parts = q_BSNA.new_empty(2, programs, q_BSNA.shape[-1], dtype=torch.float32)
        if tokens:
            _backward[(programs, 2)](
                q_BSNA,
                k_BSMA,
                q_weight_A,
                k_weight_A,
                cos,
                sin,
                dq_out.contiguous(),
                dk_out.contiguous(),
                dq_BSNA,
                dk_BSMA,
                parts,
                *ctx.numbers,
                **ctx.sizes,
            )
        if parts is None or q_weight_A is None:
            return dq_BSNA, dk_BSMA, None, None, None, None, None
        dq_weight_A, dk_weight_A = add_parts(parts)
        return (
            dq_BSNA,
            dk_BSMA,
            dq_weight_A.to(q_weight_A.dtype),
            dk_weight_A.to(k_weight_A.dtype),
            None,
            None,
            None,
        )


def qk_norm_rope_triton(
    q_BSNA: Tensor,
    k_BSMA: Tensor,
    q_weight_A: Tensor | None,
    k_weight_A: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Normalize and rotate queries (B, S, N, A) and keys (B, S, M, A); both keep their shapes and dtypes.

    The weights are None without QK-norm. cos, sin: float32 (1 or B, S, 1, pairs). The result is rounded once, not after
    each step as in the eager form, `minglm.kernels.qk_norm_rope.eager.qk_norm_rope`.
    """
    return _NormRope.apply(q_BSNA, k_BSMA, q_weight_A, k_weight_A, cos, sin, eps)


def _spec(name: str, kernel: Any, outputs: tuple[str, ...], normed: bool) -> Spec:
    """Return the Spec of one of the kernels for GLM-4.5's heads."""
    signature = {
        **dict.fromkeys(("q_ptr", "k_ptr", *outputs), "*bf16"),
        **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
        **dict.fromkeys(("tokens", "N", "M", "period"), "i32"),
        "eps": "fp32",
    }
    constants: dict[str, Any] = {
        "NORM": normed,
        "A": 128,
        "HALF": 32,
        "BLOCK": _pair_block(128),
        "ROWS": ROWS,
    }
    of_norm = [
        name for name in ("q_weight_ptr", "k_weight_ptr", "parts_ptr") if name in kernel.arg_names
    ]
    if normed:
        signature |= dict.fromkeys(of_norm, "*fp32")
    else:
        constants |= dict.fromkeys(of_norm)
    return Spec(name, kernel, signature, constants)


def _specs() -> Iterator[Spec]:
    """Yield the Specs for GLM-4.5's heads in bfloat16, with QK-norm, and without it as in GLM-4.5-Air."""
    for normed in (True, False):
        name = "norm and rope" if normed else "rope"
        yield _spec(name, _forward, ("q_out_ptr", "k_out_ptr"), normed)
        gradients = ("q_grad_ptr", "k_grad_ptr", "dq_ptr", "dk_ptr")
        yield _spec(f"{name} backward", _backward, gradients, normed)


SPECS = list(_specs())
