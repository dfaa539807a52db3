"""Rotary position embedding on part of each head (paper 2.1; half-split layout of the released checkpoints).

    angle_i(s) = s * theta^(-2i / R)  for i < R / 2;   the pair (x_i, x_{i+R/2}) is rotated by angle_i(s)

The first R = head_dim * partial_rotary_factor dimensions rotate and the rest pass through, so half of every
head compares content without regard to distance. Dimension i pairs with dimension i + R/2 (half-split), not
with its neighbour. GLM-4.7-Flash rotates neighbours (x_{2i}, x_{2i+1}) instead: the same rotation on
dimensions in another order (`rotate_pairs`). The wrong layout gives a model whose text is almost, but not
quite, that of the released one. Angles are float64 until their cosine is taken: at position 200,000 a float32
angle is off by 0.01 radians, and a bfloat16 angle by hundreds. What depends on distances only would then
depend on where in the context it stands.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from minglm.kernels.qk_norm_rope.eager import rotate

__all__ = ["Rotation", "angles", "rotate", "rotate_pairs"]


class Rotation(NamedTuple):
    """Cosine and sine of the angle of each position and rotating pair, each (B or 1, S, 1, R/2) float32."""

    cos: Tensor
    sin: Tensor


def angles(positions_BS: Tensor, rotary_dim: int, theta: float) -> Rotation:
    """Compute the rotation for integer positions (B, S), an even number R of rotating dimensions, and a base."""
    dimensions = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=positions_BS.device)
    # theta^(-2i / R)
    frequencies = theta ** -(dimensions / rotary_dim)
    phase = rearrange(positions_BS, "b s -> b s 1 1").double() * frequencies
    return Rotation(phase.cos().float(), phase.sin().float())


def rotate_pairs(x_BSNR: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of all dimensions (interleaved): x (B, S, N, R), cos and sin (B, S, 1, R/2).

    Returns the shape and dtype of x.
    """
    a, b = rearrange(x_BSNR, "b s n (half pair) -> pair b s n half", pair=2)
    cos = cos.to(x_BSNR.dtype)
    sin = sin.to(x_BSNR.dtype)
    rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], -1)
    return rearrange(rotated, "b s n half pair -> b s n (half pair)")
