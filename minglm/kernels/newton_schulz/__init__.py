"""Newton-Schulz: replace a matrix by (nearly) its polar factor, the orthogonal matrix nearest to it (paper 2.4).

If X = U S V' is the singular value decomposition, the polar factor is U V': same directions, all singular values one.
Muon wants it of every update, and a decomposition in each step would be slow, so an odd polynomial is iterated instead,
which acts on the singular values alone and needs only matrix products. `eager.py` has the equations and the reference,
`polynomials.py` the coefficients.

Choices:
- On matrices as small as a toy's, a library of products runs at two thirds of its speed. In float32 on a CPU the whole
  iteration is therefore in C (`minglm.kernels.cpu`) where a matrix stays in cache, one after the other, and of symmetric
  products one half is computed. PyTorch's form runs for larger ones, and without a compiler.
- On a GPU the Gram form runs where a matrix is long (`GRAM_ASPECT`), in two thirds of the standard form's time on an
  H100.
- float32 on a CPU, bfloat16 on a GPU, where it is enough (the result is meant to be near one, not equal to it); for
  the Gram form float16, whose three more bits it needs and whose range is enough for numbers up to one.
  On CPUs with bfloat16 products (AVX512-BF16, AMX) `dtype=torch.bfloat16` takes about half the time.
"""

from collections.abc import Sequence

import torch

from minglm.kernels.dispatch import Operation, select
from minglm.kernels.newton_schulz.polynomials import COEFFICIENTS, Coefficients, polar_express

__all__ = ["COEFFICIENTS", "Coefficients", "orthogonalize", "polar_express"]

GRAM_ASPECT = 2
"""On a GPU use the Gram form from this ratio of the sides on. A square matrix takes as many operations in either form."""


def orthogonalize(
    matrices: torch.Tensor,
    steps: int = 5,
    dtype: torch.dtype | None = None,
    coefficients: Sequence[Coefficients] | None = None,
    gram: bool | None = None,
) -> torch.Tensor:
    """Orthogonalize each matrix of a stack; return a new tensor of the same shape and dtype.

    matrices: (..., rows, columns), any real dtype; leading axes are independent matrices, for example experts. A matrix
    of zeros gives zeros.
    steps: iterations N. dtype: precision of the products; None is what the module's docstring says.
    coefficients: (a, b, c) of each step, `steps` of them, such as `polar_express(steps)`; None is COEFFICIENTS in all.
    gram: iterate on the small Gram matrix; None is on a GPU, where one side is at least `GRAM_ASPECT` times the other.
    Raises ValueError for fewer than two axes, and for coefficients of another number of steps. Source: paper 2.4 and
    the Muon post it cites.
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
    sides = matrices.shape[-2:]
    if gram is None:
        gram = matrices.is_cuda and max(sides) >= GRAM_ASPECT * min(sides)
    if dtype is None and matrices.device.type == "cpu":
        dtype = torch.float32
    if dtype is None:
        dtype = torch.float16 if gram else torch.bfloat16

    stack = matrices.reshape(-1, *sides)
    iterate = select(
        Operation.NEWTON_SCHULZ,
        matrices,
        matrix_size=sides.numel(),
        product_dtype=dtype,
        gram=gram,
    )
    return iterate(stack, coefficients, dtype, gram).view(matrices.shape)
