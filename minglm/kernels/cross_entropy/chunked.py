"""Output head and cross-entropy in chunks of tokens, with the gradients in the same walk (no section in the paper).

    loss = sum_t weight_t * ( logsumexp_v(h_t . W_v) - h_t . W_target(t) )
    dlogit_tv = weight_t * (softmax_v - [v = target(t)]);   dh = dlogit W;   dW = dlogit' h

The weight of each token is known beforehand (a mask over a denominator), so the gradients can be computed in the same
walk over chunks of tokens as the loss, 6 T D V operations, and the logits of a chunk are dropped at once: their
gradient takes their place. In bfloat16 the logits are rounded between the product and the softmax, as in the reference.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

CHUNK = 256
"""Tokens of a chunk on a CPU: a chunk of the toy's logits then stays in its cache."""

GPU_CHUNK_BYTES = 5 * 2**27
"""Bytes of a chunk's logits on a GPU: 2,048 tokens of GLM-4.5, whose products fill it."""


def gradients_in_place(
    logits_CV: torch.Tensor,
    targets_C: torch.Tensor,
    weights_C: torch.Tensor,
    wide_CV: torch.Tensor,
) -> torch.Tensor:
    """Return the summed loss of a chunk, a float32 scalar, and replace its logits (C, V) by the loss's gradients.

    wide_CV: room for float32 (C, V); the logits themselves where they are float32.
    """
    p = wide_CV.copy_(logits_CV)
    target = targets_C[:, None]
    weight = weights_C[:, None]
    largest = p.amax(1, keepdim=True)
    chosen = p.gather(1, target)
    total = p.sub_(largest).exp_().sum(1, keepdim=True)
    logits_CV.copy_(p.mul_(weight / total).scatter_add_(1, target, -weight))
    return ((largest + total.log() - chosen) * weight).sum()


def _gradients_in_place_triton(
    logits_CV: torch.Tensor,
    targets_C: torch.Tensor,
    weights_C: torch.Tensor,
    wide_CV: torch.Tensor,
) -> torch.Tensor:
    """Compute `gradients_in_place` with Triton, which needs no room."""
    from minglm.kernels.cross_entropy.triton_kernel import softmax_gradient_triton

    return softmax_gradient_triton(logits_CV, targets_C, weights_C).sum()


def _gpu_chunk(T: int, head_VD: torch.Tensor) -> int:
    """Return the tokens of a chunk on a GPU; chunks are even, so that the last is not a small one."""
    chunks = math.ceil(T * len(head_VD) * head_VD.itemsize / GPU_CHUNK_BYTES)
    return math.ceil(T / chunks)


class LossAndGradients(NamedTuple):
    """The summed loss, a float32 scalar, and its gradients."""

    loss: torch.Tensor
    dhidden_TD: torch.Tensor
    dhead_VD: torch.Tensor


Walk = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], LossAndGradients]
"""What computes loss and gradients of hidden (T, D), head (V, D), targets (T,) and weights (T,)."""


class LinearCrossEntropy(torch.autograd.Function):
    """The loss, with both gradients computed in the forward pass by a walk over the tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        head_VD: torch.Tensor,
        targets_T: torch.Tensor,
        weights_T: torch.Tensor,
        walk: Walk,
    ) -> torch.Tensor:
        loss, dhidden_TD, dhead_VD = walk(hidden_TD, head_VD, targets_T, weights_T)
        ctx.save_for_backward(dhidden_TD, dhead_VD)
        return loss

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        dhidden_TD, dhead_VD = ctx.saved_tensors
        # In place: a second copy of the head's gradient would be the largest tensor of the step. And only where it
        # changes something, which is worth waiting for: to multiply the head's gradient takes a GPU a millisecond.
        if grad != 1:
            dhidden_TD *= grad.to(dhidden_TD.dtype)
            dhead_VD *= grad.to(dhead_VD.dtype)
        return dhidden_TD, dhead_VD, None, None, None


def walk_in_chunks(
    hidden_TD: torch.Tensor,
    head_VD: torch.Tensor,
    targets_T: torch.Tensor,
    weights_T: torch.Tensor,
    with_triton: bool = False,
) -> LossAndGradients:
    """Compute loss and gradients chunk by chunk, the softmax in PyTorch or in Triton."""
    T = len(hidden_TD)
    head = head_VD.to(hidden_TD.dtype)
    chunk = _gpu_chunk(T, head) if with_triton and T else CHUNK
    softmax_gradient = _gradients_in_place_triton if with_triton else gradients_in_place
    # Products in low precision are summed over the chunks in float32, except where that would be 3 GB (GLM-4.5's
    # head) and the chunks are few.
    sum_dtype = head_VD.dtype if with_triton else torch.float32
    dhidden_TD = torch.empty_like(hidden_TD)
    dhead_VD: torch.Tensor | None = None
    loss = hidden_TD.new_zeros((), dtype=torch.float32)
    # Room for the logits: the same for every chunk, so that it stays in cache.
    room = head.new_empty(min(chunk, T), len(head))
    wide_room = room if with_triton else room.float()

    for start in range(0, T, chunk):
        rows = slice(start, start + chunk)
        hidden = hidden_TD[rows]
        # The logits; after the next two lines their gradient.
        d = torch.mm(hidden, head.T, out=room[: len(hidden)])
        wide = d if wide_room is room else wide_room[: len(hidden)]
        loss += softmax_gradient(d, targets_T[rows], weights_T[rows], wide)
        torch.mm(d, head, out=dhidden_TD[rows])  # dh = dlogit W
        # dW = dlogit' h, summed over the chunks
        if dhead_VD is None:
            dhead_VD = (d.T @ hidden).to(sum_dtype)
        elif dhead_VD.dtype == d.dtype:
            dhead_VD.addmm_(d.T, hidden)
        else:
            dhead_VD += d.T @ hidden

    dhead_VD = torch.zeros_like(head_VD) if dhead_VD is None else dhead_VD.to(head_VD.dtype)
    return LossAndGradients(loss, dhidden_TD, dhead_VD)


def cross_entropy_chunked(
    hidden_TD: torch.Tensor, head_VD: torch.Tensor, targets_T: torch.Tensor, weights_T: torch.Tensor
) -> torch.Tensor:
    """Compute `cross_entropy` of `eager.py`: hidden (T, D), head (V, D), targets (T,), weights float32 (T,) to a scalar."""
    return LinearCrossEntropy.apply(hidden_TD, head_VD, targets_T, weights_T, walk_in_chunks)


def cross_entropy_gpu(
    hidden_TD: torch.Tensor, head_VD: torch.Tensor, targets_T: torch.Tensor, weights_T: torch.Tensor
) -> torch.Tensor:
    """Compute `cross_entropy` of `eager.py` with Triton's softmax; without gradients the logits are never stored."""
    wants_gradient = hidden_TD.requires_grad or head_VD.requires_grad
    if len(hidden_TD) and not (torch.is_grad_enabled() and wants_gradient):
        from minglm.kernels.cross_entropy.triton_kernel import log_probabilities_triton

        logp_T, _ = log_probabilities_triton(hidden_TD, head_VD, targets_T)
        return -(logp_T * weights_T).sum()
    walk = partial(walk_in_chunks, with_triton=True)
    return LinearCrossEntropy.apply(hidden_TD, head_VD, targets_T, weights_T, walk)
