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
`polar_express` gives coefficients that differ from step to step and do settle at one.

Gram form: a step multiplies X from the left by P = a + b R + c R^2, R = X X', which makes R into P R P. So R can be
iterated alone, on the short side, with the product Q of all P, and X is read once more at the end: X <- Q X. For a
1536 x 5120 matrix that is 0.71 of the operations. Rounding makes small eigenvalues of R negative, which the
iteration then blows up; R is formed anew from Q X after `RESTART` steps, before that can matter.

Choices:
- X X' is formed on the short side, so a tall matrix is worked on transposed; the iteration commutes with transposition.
- R, P and Q are polynomials in X X': symmetric, and their products too (`symmetric_product`). The Triton form computes
  one half of them. `baddbmm` adds the terms inside the product, so a step is three products and no other pass.
- On matrices as small as a toy's, a library of products runs at two thirds of its speed. In float32 on a CPU the whole
  iteration is therefore in C (`cpu.c`) where a matrix stays in cache (`SMALL`), one after the other, and of symmetric
  products one half is computed. PyTorch's form runs for larger ones, and without a compiler.
- On a GPU the Gram form runs where a matrix is long (`LONG`), in two thirds of the standard form's time on an H100.
- A long stack goes through in waves: on a CPU so small that they stay in cache, on a GPU so large that they fill it.
- float32 on a CPU, bfloat16 on a GPU, where it is enough (the result is meant to be near one, not equal to it); for
  the Gram form float16, whose three more bits it needs and whose range is enough for numbers up to one.
  On CPUs with bfloat16 products (AVX512-BF16, AMX) `dtype=torch.bfloat16` takes about half the time.
"""

import functools

import torch

from minglm.kernels.cpu.build import newton_schulz_cpu
from minglm.kernels.dispatch import backend

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST = 0.002
BAND = (0.68, 1.21)
RESTART = 2
LONG = 2  # a square matrix takes as many operations in either form
SMALL = 1 << 16  # numbers of a matrix: 256 KiB
_WAVE_BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}


@functools.cache
def polar_express(steps=5, smallest=1e-3, steepest=0.024, margin=1.01):
    """(a, b, c) of each step that bring singular values from [smallest, 1] as near to one as so many steps can.

    Each polynomial has the least largest distance from one on the interval that the step before it has left (Amsel and
    others, arXiv 2505.16932). Two precautions for low precision, as there: no polynomial serves an interval that
    begins below `steepest` of its end, so that no large value is pressed to almost nothing on the way, and each expects
    values `margin` times larger than computed. Returns a tuple of `steps` tuples.
    """
    low, high, found = smallest, 1.0, []
    for _ in range(steps):
        a, b, c = _nearest_to_one(max(low, steepest * high), high)
        at_low = a * low + b * low**3 + c * low**5
        scale = 2 / (
            at_low + a * high + b * high**3 + c * high**5
        )  # what is reached shall lie evenly around one
        low = scale * at_low
        high = 2 - low
        found.append((scale * a / margin, scale * b / margin**3, scale * c / margin**5))
    return tuple(found)


def _nearest_to_one(low, high):
    """(a, b, c) with the least largest |a s + b s^3 + c s^5 - 1| for s in [low, high]: Remez's exchange algorithm."""
    if low > high - 1e-4:  # in the limit: value 1, first and second derivative 0
        middle = (low + high) / 2
        return 1.875 / middle, -1.25 / middle**3, 0.375 / middle**5
    inner = low + (high - low) * torch.tensor([0.25, 0.75], dtype=torch.float64)
    signs = torch.tensor(
        [1.0, -1.0, 1.0, -1.0], dtype=torch.float64
    )  # the error alternates at its four extremes
    for _ in range(30):
        points = torch.cat([torch.tensor([low]), inner, torch.tensor([high])])
        system = torch.stack([points, points**3, points**5, signs], 1)
        a, b, c, _ = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        root = (9 * b * b - 20 * a * c) ** 0.5  # where the derivative a + 3 b s^2 + 5 c s^4 is zero
        inner = torch.tensor(
            [(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)], dtype=torch.float64
        ).sqrt()
    return a, b, c


def orthogonalize(matrices, steps=5, dtype=None, coefficients=None, gram=None):
    """Orthogonalise each matrix of a stack (equation above).

    matrices: (..., rows, columns), any real dtype; leading axes are independent matrices, for example experts.
    steps: iterations N. dtype: precision of the products; None is what the module's docstring says.
    coefficients: (a, b, c) of each step, `steps` of them, such as `polar_express(steps)`; None is COEFFICIENTS in all.
    gram: iterate on the small Gram matrix; None is on a GPU, where one side is at least `LONG` times the other.
    Returns a new tensor of the input's shape and dtype. A matrix of zeros gives zeros. Raises ValueError for fewer
    than two axes, and for coefficients of another number of steps. Source: paper 2.4 and the Muon post it cites.
    """
    if matrices.ndim < 2:
        raise ValueError(
            f"orthogonalize needs matrices, got a tensor of shape {tuple(matrices.shape)}"
        )
    coefficients = [COEFFICIENTS] * steps if coefficients is None else coefficients
    if len(coefficients) != steps:
        raise ValueError(
            f"orthogonalize: {steps} steps need as many coefficients (a, b, c), got {len(coefficients)}"
        )
    if gram is None:
        gram = matrices.is_cuda and max(matrices.shape[-2:]) >= LONG * min(matrices.shape[-2:])
    if dtype is None and matrices.device.type == "cpu":
        dtype = torch.float32
    dtype = dtype or (torch.float16 if gram else torch.bfloat16)
    stack, small = (
        matrices.reshape(-1, *matrices.shape[-2:]),
        0 < matrices.shape[-2:].numel() <= SMALL,
    )
    if small and dtype is torch.float32 and not gram and backend(matrices, gradients=False) == "c":
        return newton_schulz_cpu(stack, coefficients).view(matrices.shape)
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices
    stack = wide.reshape(-1, *wide.shape[-2:])
    result = torch.empty(wide.shape, dtype=matrices.dtype, device=matrices.device)
    bytes_each = max(1, stack[0].numel() * dtype.itemsize) if len(stack) else 1
    wave = max(1, _WAVE_BYTES.get(matrices.device.type, 1 << 20) // bytes_each)
    iterate = _iterate_gram if gram else _iterate
    for source, target in zip(stack.split(wave), result.view_as(stack).split(wave)):
        target.copy_(iterate(_normalize(source, dtype), coefficients))
    return result.mT if tall else result


def _normalize(stack, dtype):
    wide = torch.promote_types(
        stack.dtype, torch.float32
    )  # a norm over many small numbers needs float32
    norm = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True, dtype=wide).clamp(min=1e-7)
    if backend(stack) == "triton":
        from minglm.kernels.newton_schulz.triton_kernel import scaled_triton

        return scaled_triton(stack, norm, dtype)
    return torch.div(stack, norm, out=torch.empty_like(stack, dtype=dtype))


def _iterate(stack, coefficients):
    for a, b, c in coefficients:
        gram = symmetric_product(stack, stack)
        polynomial = symmetric_product(gram, gram, c, gram, b)
        stack = torch.baddbmm(stack, polynomial, stack, beta=a)
    return stack


def _iterate_gram(stack, coefficients):
    for part in filter(None, (coefficients[:RESTART], coefficients[RESTART:])):
        r, q = symmetric_product(stack, stack), None
        for i, (a, b, c) in enumerate(part):
            p = symmetric_product(r, r, c, r, b, diagonal=a)
            q = p if q is None else symmetric_product(p, q)
            if i + 1 < len(part):
                r = symmetric_product(symmetric_product(p, r), p)
        stack = q @ stack
    return stack


def symmetric_product(x, y, factor=1.0, z=None, z_factor=0.0, diagonal=0.0):
    """factor x y' + z_factor z + diagonal I of each matrix, which the caller knows to be symmetric.

    x, y: (matrices, rows, columns); z: (matrices, rows, rows) or None. Returns (matrices, rows, rows) in x's dtype.
    """
    if backend(x) == "triton":
        from minglm.kernels.newton_schulz.triton_kernel import symmetric_product_triton

        return symmetric_product_triton(x, y, factor, z, z_factor, diagonal)
    out = x @ y.mT if z is None else torch.baddbmm(z, x, y.mT, beta=z_factor, alpha=factor)
    if diagonal:
        out.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return out
