"""Kernels that break their budgets, one each, for tests/test_compile_gate.py. They compile, but for the last."""

import triton
import triton.language as tl

from minglm.kernels.toolchain.spec import Spec


@triton.jit
def product(
    a_ptr,
    b_ptr,
    out_ptr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    inner: tl.constexpr,
    steps: tl.constexpr,
):
    """Compute out = a b, block by block; the tile decides which instructions there are and what they need."""
    i, j, k = tl.arange(0, rows), tl.arange(0, columns), tl.arange(0, inner)
    total = tl.zeros((rows, columns), tl.float32)
    for step in range(0, steps):
        a = tl.load(a_ptr + i[:, None] * (inner * steps) + step * inner + k[None, :])
        b = tl.load(b_ptr + (step * inner + k[:, None]) * columns + j[None, :])
        total = tl.dot(a, b, total)
    tl.store(out_ptr + i[:, None] * columns + j[None, :], total)


@triton.jit
def sums(x, out, width: tl.constexpr):
    """Add up two tiles, by descriptor."""
    tl.store(out + tl.arange(0, width), x.load([0]) + x.load([width]))


def _spec(name, rows, columns, inner, warps, stages):
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32"}
    tile = {"rows": rows, "columns": columns, "inner": inner, "steps": 8}
    return Spec(name, product, signature, tile, warps, stages, unit="HGMMA")


SPECS = [
    _spec("good", 64, 64, 64, 4, 3),
    _spec("narrow", 16, 64, 64, 4, 3),
    _spec("spilling", 128, 256, 32, 4, 2),
    _spec("deep", 128, 256, 64, 8, 6),
    Spec("odd", sums, {"x": "tensordesc<fp32[16]>", "out": "*fp32"}, {"width": 16}),
    Spec("unnamed", product, {"a_ptr": "*bf16"}, {}),
]
