"""Newton-Schulz: replace a matrix by (nearly) its polar factor, the orthogonal matrix nearest to it. Paper 2.4.

If X = U S V' is the singular value decomposition, the polar factor is U V': same directions, all singular values one.
Muon wants it of every update, and a decomposition per step would be slow, so an odd polynomial is iterated instead,
which acts on the singular values alone and needs only matrix products:

    X <- X / |X|                                     (Frobenius norm: no singular value above one)
    N times:  X <- a X + b (X X') X + c (X X')^2 X,  (a, b, c) = (3.4445, -4.7750, 2.0315)
    so that   s <- a s + b s^3 + c s^5

The coefficients are Keller Jordan's. They trade exactness for speed: the slope a at zero is as large as it can be while
large values stay bounded, so the iteration never settles at one. After the paper's N = 5 steps every singular value
that was at least `SMALLEST` of the Frobenius norm lies inside `BAND`; a smaller one has been multiplied by up to
a^5 = 485. (BAND comes from evaluating the scalar map on a fine grid; tests/test_muon.py repeats that.)

Choices:
- X X' is formed on the short side, so a tall matrix is worked on transposed; the iteration commutes with transposition.
- `baddbmm` adds b and c terms (and then a X) inside the product, so one step is three products and no other pass.
- A long stack goes through in waves that fit in cache: two products out of three read what the last one wrote.
- float32 on a CPU, bfloat16 on a GPU, where it is enough (the result is meant to be near one, not equal to it).
  On CPUs with bfloat16 products (AVX512-BF16, AMX) `dtype=torch.bfloat16` takes about half the time.
"""

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST = 0.002
BAND = (0.68, 1.21)
_WAVE_BYTES = {"cpu": 1 << 20, "cuda": 32 << 20}


def orthogonalize(matrices, steps=5, dtype=None):
    """Orthogonalise each matrix of a stack (equation above).

    matrices: (..., rows, columns), any real dtype; leading axes are independent matrices, for example experts.
    steps: iterations N. dtype: precision of the products; None is float32 on a CPU and bfloat16 elsewhere.
    Returns a new tensor of the input's shape and dtype. A matrix of zeros gives zeros. Raises ValueError for fewer
    than two axes. Source: paper 2.4 and the Muon post it cites.
    """
    if matrices.ndim < 2:
        raise ValueError(f"orthogonalize needs matrices, got a tensor of shape {tuple(matrices.shape)}")
    if dtype is None:
        dtype = torch.float32 if matrices.device.type == "cpu" else torch.bfloat16
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices
    stack = wide.reshape(-1, *wide.shape[-2:])
    result = torch.empty(wide.shape, dtype=matrices.dtype, device=matrices.device)
    bytes_each = max(1, stack[0].numel() * dtype.itemsize) if len(stack) else 1
    wave = max(1, _WAVE_BYTES.get(matrices.device.type, 1 << 20) // bytes_each)
    for source, target in zip(stack.split(wave), result.view_as(stack).split(wave)):
        target.copy_(_iterate(source, steps, dtype))
    return result.mT if tall else result


def _iterate(stack, steps, dtype):
    a, b, c = COEFFICIENTS
    stack = stack.to(torch.promote_types(dtype, torch.float32))  # a norm over many small numbers needs float32
    stack = (stack / torch.linalg.matrix_norm(stack, keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(steps):
        gram = stack @ stack.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        stack = torch.baddbmm(stack, polynomial, stack, beta=a)
    return stack
