"""Rotary position embedding on part of each head (paper 2.1; half-split layout of the released checkpoints).

    angle_i(s) = s * theta^(-2i / R)  for i < R / 2;   (x_i, x_{i+R/2}) is turned by angle_i(s)

The first R = head_dim * partial_rotary_factor dimensions rotate, the rest pass through, so half of every head compares
content without regard to distance. A dimension pairs with the one R/2 further (half-split), not with its neighbour.
GLM-4.7-Flash turns neighbours (x_{2i}, x_{2i+1}) instead: the same rotation on dimensions in another order
(`rotate_pairs`), and the wrong one gives a model that talks almost, but not quite, like the released one.
Angles are float32: at position 100,000 a bfloat16 angle would be off by hundreds of radians.
"""

import torch


def angles(positions_BS, rotary_dim, theta):
    """cos and sin, each (B, S, 1, R/2) float32, for integer positions (B, S) and an even number R of dimensions."""
    exponents = (
        torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions_BS.device) / rotary_dim
    )
    phase = positions_BS[..., None, None].float() * theta**-exponents
    return phase.cos(), phase.sin()


def rotate(x_BSNA, cos, sin):
    """Turn the first dimensions of every head: x (B, S, N, A), cos and sin (B, S, 1, R/2), to x's shape and dtype."""
    half = cos.shape[-1]
    a, b, rest = x_BSNA.split([half, half, x_BSNA.shape[-1] - 2 * half], -1)
    cos, sin = cos.to(x_BSNA.dtype), sin.to(x_BSNA.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def rotate_pairs(x_BSNR, cos, sin):
    """Turn neighbouring pairs of all dimensions (interleaved layout): x (B, S, N, R), cos and sin (B, S, 1, R/2)."""
    a, b = x_BSNR.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.to(x_BSNR.dtype), sin.to(x_BSNR.dtype)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
