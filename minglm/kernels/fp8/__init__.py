"""Eight-bit floats in blocks, each with a scale of its own (paper 3.5: rollouts in FP8; released FP8 checkpoints).

float8_e4m3fn has four bits of exponent and three of mantissa: its largest number is 448, and a normal number is off by
at most 1/16 of itself. One large entry costs only its own block the precision. Weights have blocks of 128 x 128,
activations of 1 x 128, along the axis that a product sums over, so that a GPU can add up 128 products in one go and
multiply by the two scales once.

`scaled_product` multiplies the rows of each expert by its matrix; one matrix is one expert. `eager.py` has the equation
and the references. `minglm.kernels.dispatch` chooses the form.
"""

import torch

from minglm.kernels.dispatch import Operation, select
from minglm.kernels.fp8.eager import ACTIVATION_BLOCK, WEIGHT_BLOCK, Block, Quantized, dequantize

__all__ = [
    "ACTIVATION_BLOCK",
    "WEIGHT_BLOCK",
    "Block",
    "Quantized",
    "dequantize",
    "quantize",
    "scaled_product",
]


def quantize(x: torch.Tensor, block: Block = WEIGHT_BLOCK) -> Quantized:
    """Quantize a matrix or a stack of matrices (..., rows, columns) of any float dtype.

    Returns q float8_e4m3fn of x's shape and scale float32 (..., blocks of rows, blocks of columns), by which q is
    multiplied. A block of zeros has the scale 1. Raises ValueError for fewer than two axes, and where an entry is not
    finite, because no scale would fit its block (on a GPU no check is made, to avoid a host sync; such an entry becomes
    NaN).
    """
    if x.ndim < 2:
        raise ValueError(f"quantize needs matrices, got a tensor of shape {tuple(x.shape)}")
    return Quantized(*select(Operation.FP8_QUANTIZE, x, fp8_block=block)(x, block))


def scaled_product(
    x_TD: torch.Tensor,
    x_scale: torch.Tensor,
    w_EFD: torch.Tensor,
    w_scale: torch.Tensor,
    ends_E: torch.Tensor,
    order: torch.Tensor | None = None,
    choices: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Multiply rows ends[e - 1] to ends[e] by w[e]', both as `quantize` returns them; return (rows, F) in `dtype`.

    x (T, D) with ACTIVATION_BLOCK, w (E, F, D) with WEIGHT_BLOCK. ends int32 (E,), of which the last is the number of
    rows. order int64 (rows,): row i is row order[i] // choices of x, as `minglm.kernels.router.sort_by_expert` gives
    it; None takes x as it is.
    """
    rows = len(x_TD) if order is None else len(order)
    compute = select(Operation.FP8_PRODUCT, x_TD, empty=rows == 0)
    return compute(x_TD, x_scale, w_EFD, w_scale, ends_E, order, choices, dtype)
