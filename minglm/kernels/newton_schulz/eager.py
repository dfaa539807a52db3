"""Newton-Schulz in plain PyTorch, in its standard form and in its Gram form: the reference (paper 2.4).

    X <- X / |X|                                     (Frobenius norm: no singular value above one)
    N times:  X <- a X + b (X X') X + c (X X')^2 X
    so that   s <- a s + b s^3 + c s^5

Gram form: a step multiplies X from the left by P = a + b R + c R^2, R = X X', which makes R into P R P. So R can be
iterated alone, on the short side, with the product Q of all P, and X is read once more at the end: X <- Q X. For a
1536 x 5120 matrix that is 0.71 of the operations. Rounding makes small eigenvalues of R negative, which the
iteration then blows up; R is formed anew from Q X after `RESTART` steps, before that can matter.

Choices:
- X X' is formed on the short side, so a tall matrix is worked on transposed; the iteration commutes with transposition.
- R, P and Q are polynomials in X X': symmetric, and their products too (`symmetric_product`). The Triton form computes
  one half of them. `baddbmm` adds the terms inside the product, so a step is three products and no other pass.
- A long stack goes through in waves: on a CPU so small that they stay in cache, on a GPU so large that they fill it.
"""

from collections.abc import Sequence

import torch

from minglm.kernels.dispatch import Operation, select
from minglm.kernels.newton_schulz.polynomials import Coefficients

RESTART = 2
"""Steps of the Gram form after which R is formed anew."""

WAVE_BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}
"""Bytes of the matrices that go through together."""


def newton_schulz(
    matrices: torch.Tensor,
    coefficients: Sequence[Coefficients],
    dtype: torch.dtype = torch.float32,
    gram: bool = False,
) -> torch.Tensor:
    """Orthogonalize each of the matrices (matrices, rows, columns) in products of `dtype`; same shape and dtype.

    gram: iterate on the small Gram matrix.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices
    result = torch.empty(wide.shape, dtype=matrices.dtype, device=matrices.device)

    matrix_bytes = max(1, wide[0].numel() * dtype.itemsize) if len(wide) else 1
    wave_bytes = WAVE_BYTES.get(matrices.device.type, 1 << 20)
    wave = max(1, wave_bytes // matrix_bytes)
    iterate = iterate_gram if gram else iterate_standard
    for source, target in zip(wide.split(wave), result.split(wave), strict=True):
        target.copy_(iterate(normalized(source, dtype), coefficients))
    return result.mT if tall else result


def normalized(stack: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Divide each matrix by its Frobenius norm; return (matrices, rows, columns) in `dtype`."""
    wide = torch.promote_types(stack.dtype, torch.float32)  # a sum of many squares needs float32
    norm = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True, dtype=wide).clamp(min=1e-7)
    return select(Operation.SCALE_MATRICES, stack)(stack, norm, dtype)


def scaled_eager(stack: torch.Tensor, norm: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Divide matrices by their norms (matrices, 1, 1); return them in `dtype`."""
    return torch.div(stack, norm, out=torch.empty_like(stack, dtype=dtype))


def iterate_standard(stack: torch.Tensor, coefficients: Sequence[Coefficients]) -> torch.Tensor:
    """Iterate X (matrices, rows, columns), rows <= columns, each of norm one."""
    for a, b, c in coefficients:
        gram = symmetric_product(stack, stack)  # X X'
        polynomial = symmetric_product(gram, gram, c, gram, b)  # b X X' + c (X X')^2
        stack = torch.baddbmm(stack, polynomial, stack, beta=a)
    return stack


def iterate_gram(stack: torch.Tensor, coefficients: Sequence[Coefficients]) -> torch.Tensor:
    """Compute `iterate_standard` on the Gram matrices; same shapes."""
    for steps in (coefficients[:RESTART], coefficients[RESTART:]):
        if not steps:
            continue
        r = symmetric_product(stack, stack)  # R = X X'
        a, b, c = steps[0]
        p = symmetric_product(r, r, c, r, b, diagonal=a)  # P = a + b R + c R^2
        q = p
        for a, b, c in steps[1:]:
            r = symmetric_product(symmetric_product(p, r), p)  # R <- P R P
            p = symmetric_product(r, r, c, r, b, diagonal=a)
            q = symmetric_product(p, q)  # Q <- P Q
        stack = q @ stack  # X <- Q X
    return stack


def symmetric_product(
    x: torch.Tensor,
    y: torch.Tensor,
    factor: float = 1.0,
    z: torch.Tensor | None = None,
    z_factor: float = 0.0,
    diagonal: float = 0.0,
) -> torch.Tensor:
    """Return factor x y' + z_factor z + diagonal I of each matrix, which the caller knows to be symmetric.

    x, y: (matrices, rows, columns); z: (matrices, rows, rows) or None. Returns (matrices, rows, rows) in x's dtype.
    """
    return select(Operation.SYMMETRIC_PRODUCT, x)(x, y, factor, z, z_factor, diagonal)


def symmetric_product_eager(
    x: torch.Tensor,
    y: torch.Tensor,
    factor: float = 1.0,
    z: torch.Tensor | None = None,
    z_factor: float = 0.0,
    diagonal: float = 0.0,
) -> torch.Tensor:
    """Compute `symmetric_product` in PyTorch, both halves of it; same shapes and dtypes."""
    if z is None:
        out = x @ y.mT
        if factor != 1:
            out *= factor
    else:
        out = torch.baddbmm(z, x, y.mT, beta=z_factor, alpha=factor)
    if diagonal:
        out.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return out
