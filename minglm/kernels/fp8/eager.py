"""Eight-bit floats in blocks, each with a scale of its own (paper 3.5: rollouts in FP8; released FP8 checkpoints).

    scale_b = max |x| over block b / 448;   q = float8(x / scale_b);   x ~ q * scale_b

float8_e4m3fn has four bits of exponent and three of mantissa: its largest number is 448, and a normal number is off by
at most 1/16 of itself. One large entry costs only its own block the precision. Weights have blocks of 128 x 128,
activations of 1 x 128, along the axis that a product sums over, so that a GPU can add up 128 products in one go and
multiply by the two scales once. A row or column of blocks that the shape leaves over is smaller.

`scaled_product` multiplies the rows of each expert by its matrix; one matrix is one expert. The plain forms here store
what a GPU computes with, and compute in float32; the Triton forms multiply in float8.
"""

import torch

from minglm.kernels.dispatch import backend

LARGEST = 448.0
WEIGHT_BLOCK, ACTIVATION_BLOCK = (128, 128), (1, 128)


def _spread(scale, block, shape):
    """The scale of every entry: (..., blocks, blocks) to (..., *shape)."""
    scale = scale.repeat_interleave(block[0], -2)[..., : shape[0], :]
    return scale.repeat_interleave(block[1], -1)[..., : shape[1]]


def quantize(x, block=WEIGHT_BLOCK):
    """(q, scale) of a matrix or a stack of matrices.

    x: (..., rows, columns), any float dtype. Returns q float8_e4m3fn of x's shape and scale float32 (..., blocks of
    rows, blocks of columns), by which q is multiplied. A block of zeros has the scale 1. Raises ValueError for fewer
    than two axes, and where an entry is not finite, because no scale would fit its block (the Triton form, where the
    host must not wait for the GPU, lets it show as not a number).
    """
    if x.ndim < 2:
        raise ValueError(f"quantize needs matrices, got a tensor of shape {tuple(x.shape)}")
    if block in (WEIGHT_BLOCK, ACTIVATION_BLOCK) and backend(x) == "triton":
        from minglm.kernels.fp8.triton_kernel import quantize_triton

        return quantize_triton(x, block)
    return quantize_plain(x, block)


def quantize_plain(x, block=WEIGHT_BLOCK):
    """The plain form of `quantize`."""
    rows, columns = x.shape[-2:]
    x = x.float()
    padded = torch.nn.functional.pad(x, (0, -columns % block[1], 0, -rows % block[0]))
    blocks = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    largest = blocks.abs().amax((-3, -1))
    if not largest.isfinite().all():
        raise ValueError("quantize: an entry is infinite or not a number")
    scale = torch.where(largest > 0, largest / LARGEST, 1.0).clamp(
        min=torch.finfo(torch.float32).tiny
    )
    q = (x / _spread(scale, block, (rows, columns))).clamp(
        -LARGEST, LARGEST
    )  # a quotient may round above 448
    return q.to(torch.float8_e4m3fn), scale


def dequantize(q, scale, dtype=torch.float32, block=WEIGHT_BLOCK):
    """The inverse of `quantize`, up to its rounding: (..., rows, columns) in `dtype`."""
    return (q.float() * _spread(scale.float(), block, q.shape[-2:])).to(dtype)


def scaled_product(
    x_TD, x_scale, w_EFD, w_scale, ends_E, order=None, choices=1, dtype=torch.bfloat16
):
    """Rows ends[e - 1] to ends[e] times w[e]', both as `quantize` returns them. Returns (rows, F) in `dtype`.

    x (T, D) with ACTIVATION_BLOCK, w (E, F, D) with WEIGHT_BLOCK. ends int32 (E,), of which the last is the number of
    rows. order int64 (rows,): row i is row order[i] // choices of x, as `minglm.kernels.router.eager.group_by_expert`
    gives it; None takes x as it is.
    """
    rows = len(x_TD) if order is None else len(order)
    if rows and backend(x_TD) == "triton":
        from minglm.kernels.fp8.triton_kernel import scaled_product_triton

        return scaled_product_triton(x_TD, x_scale, w_EFD, w_scale, ends_E, order, choices, dtype)
    x, w_EFD = dequantize(x_TD, x_scale, block=ACTIVATION_BLOCK), dequantize(w_EFD, w_scale)
    x = x if order is None else x[order // choices]
    counts = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).tolist()
    return torch.cat([part @ w.T for part, w in zip(x.split(counts), w_EFD, strict=True)]).to(dtype)
