"""Eight-bit floats in blocks, in plain PyTorch: the reference (paper 3.5: rollouts in FP8; released FP8 checkpoints).

    scale_b = max |x| over block b / 448;   q = float8(x / scale_b);   x ~ q * scale_b

A row or column of blocks that the shape leaves over is smaller. The forms here store what a GPU computes with, and
compute in float32; the Triton forms multiply in float8.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange

FP8_MAX = 448.0
"""The largest number of float8_e4m3fn."""

Block = tuple[int, int]
"""(rows, columns) of numbers that share a scale."""

WEIGHT_BLOCK: Block = (128, 128)
ACTIVATION_BLOCK: Block = (1, 128)


class Quantized(NamedTuple):
    """Matrices in float8 with the scales of their blocks."""

    q: torch.Tensor
    """float8_e4m3fn (..., rows, columns)"""
    scale: torch.Tensor
    """float32 (..., blocks of rows, blocks of columns), by which q is multiplied"""


def _scale_of_entries(scale: torch.Tensor, block: Block, shape: tuple[int, int]) -> torch.Tensor:
    """Repeat the scales (..., blocks, blocks) for every entry of matrices of this (rows, columns)."""
    scale = scale.repeat_interleave(block[0], -2)[..., : shape[0], :]
    return scale.repeat_interleave(block[1], -1)[..., : shape[1]]


def quantize(x: torch.Tensor, block: Block = WEIGHT_BLOCK) -> Quantized:
    """Quantize a matrix or a stack of matrices (..., rows, columns) of any float dtype. A block of zeros has scale 1.

    Raises ValueError where an entry is not finite, because no scale would fit its block.
    """
    rows, columns = x.shape[-2:]
    x = x.float()
    padded = F.pad(x, (0, -columns % block[1], 0, -rows % block[0]))
    blocks = rearrange(padded, "... (R r) (C c) -> ... R r C c", r=block[0], c=block[1])
    largest = blocks.abs().amax((-3, -1))
    if not largest.isfinite().all():
        raise ValueError("quantize: an entry is infinite or not a number")
    scale = torch.where(largest > 0, largest / FP8_MAX, 1.0)
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    scaled = x / _scale_of_entries(scale, block, (rows, columns))
    q = scaled.clamp(-FP8_MAX, FP8_MAX)  # a quotient may round above 448
    return Quantized(q.to(torch.float8_e4m3fn), scale)


def dequantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    block: Block = WEIGHT_BLOCK,
) -> torch.Tensor:
    """Undo `quantize`, up to its rounding: return (..., rows, columns) in `dtype`."""
    rows, columns = q.shape[-2:]
    return (q.float() * _scale_of_entries(scale.float(), block, (rows, columns))).to(dtype)


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
    rows. order int64 (rows,): row i is row order[i] // choices of x; None takes x as it is.
    """
    x = dequantize(x_TD, x_scale, block=ACTIVATION_BLOCK)
    w_EFD = dequantize(w_EFD, w_scale)
    if order is not None:
        x = x[order // choices]
    counts = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).tolist()
    products = [rows @ w.T for rows, w in zip(x.split(counts), w_EFD, strict=True)]
    return torch.cat(products).to(dtype)
