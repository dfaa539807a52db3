"""Output head and cross-entropy together, never holding the logits of the whole batch (no section in the paper).

    loss = sum_t weight_t * ( logsumexp_v(h_t . W_v) - h_t . W_target(t) )

The weight of each token is known beforehand (a mask over a denominator), so the gradients can be computed in the same
walk over chunks of tokens as the loss, 6 T D V operations, and the logits of a chunk are dropped at once: their
gradient takes their place. The plain form is the two lines of `cross_entropy`. Tokens of weight zero cost nothing: they
are left out before the product.

In bfloat16 the logits are rounded between the product and the softmax, as in the plain form. `token_log_probabilities`,
for losses whose gradient is not known beforehand, does not round them on a GPU, and computes them twice.
"""

import math

import torch
import torch.nn.functional as F

from minglm.kernels.dispatch import backend

CHUNK = 256  # tokens; a chunk of the toy's logits then stays in a CPU's cache
GPU_CHUNK_BYTES = 5 * 2**27  # of logits: 2,048 tokens of GLM-4.5, whose products fill a GPU


def cross_entropy(hidden_TD, head_VD, targets_T, weights_T):
    """Plain form. hidden (T, D); head (V, D); targets int64 (T,); weights float32 (T,). Returns a float32 scalar."""
    losses_T = F.cross_entropy(
        (hidden_TD @ head_VD.to(hidden_TD.dtype).T).float(), targets_T, reduction="none"
    )
    return (losses_T * weights_T).sum()


def gradients_in_place(logits_CV, targets_C, weights_C, wide_CV):
    """A chunk's summed loss, float32; in the logits' place remain the loss's gradients.

    wide_CV: room for float32 (the logits themselves, where they are float32), of which Triton needs none.
    """
    if backend(logits_CV) == "triton":
        from minglm.kernels.cross_entropy.triton_kernel import softmax_gradient_triton

        return softmax_gradient_triton(logits_CV, targets_C, weights_C).sum()
    p, target, weight = wide_CV.copy_(logits_CV), targets_C[:, None], weights_C[:, None]
    largest, chosen = p.amax(1, keepdim=True), p.gather(1, target)
    total = p.sub_(largest).exp_().sum(1, keepdim=True)
    logits_CV.copy_(p.mul_(weight / total).scatter_add_(1, target, -weight))
    return ((largest + total.log() - chosen) * weight).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, head_VD, targets_T, weights_T):
        on_gpu, T, head = (
            backend(hidden_TD) == "triton",
            len(hidden_TD),
            head_VD.to(hidden_TD.dtype),
        )
        chunk = CHUNK
        if on_gpu and T:  # even chunks, so that the last is not a small one
            chunk = math.ceil(T / math.ceil(T * len(head) * head.itemsize / GPU_CHUNK_BYTES))
        # Products in low precision are summed over the chunks in float32, except where that would be 3 GB (GLM-4.5's
        # head) and the chunks are few.
        sums = head_VD.dtype if on_gpu else torch.float32
        dhidden_TD, dhead_VD = torch.empty_like(hidden_TD), None
        loss = hidden_TD.new_zeros((), dtype=torch.float32)
        room = head.new_empty(
            min(chunk, T), len(head)
        )  # the same for every chunk: it stays in cache
        wide = room if on_gpu else room.float()
        for start in range(0, T, chunk):
            rows = slice(start, start + chunk)
            hidden = hidden_TD[rows]
            d = torch.mm(hidden, head.T, out=room[: len(hidden)])
            p = d if wide is room else wide[: len(hidden)]
            loss += gradients_in_place(d, targets_T[rows], weights_T[rows], p)
            torch.mm(d, head, out=dhidden_TD[rows])
            if dhead_VD is None:
                dhead_VD = (d.T @ hidden).to(sums)
            elif dhead_VD.dtype == d.dtype:
                dhead_VD.addmm_(d.T, hidden)
            else:
                dhead_VD += d.T @ hidden
        dhead_VD = torch.zeros_like(head_VD) if dhead_VD is None else dhead_VD.to(head_VD.dtype)
        ctx.save_for_backward(dhidden_TD, dhead_VD)
        return loss

    @staticmethod
    def backward(ctx, grad):
        # In place: a second copy of the head's gradient would be the largest tensor of the step. And only where it
        # changes something, which is worth waiting for: to multiply the head's gradient takes a GPU a millisecond.
        dhidden_TD, dhead_VD = ctx.saved_tensors
        if grad != 1:
            dhidden_TD *= grad.to(dhidden_TD.dtype)
            dhead_VD *= grad.to(dhead_VD.dtype)
        return dhidden_TD, dhead_VD, None, None


def linear_cross_entropy(hidden_TD, head_VD, targets_T, weights_T):
    """The same as `cross_entropy`, chunked. All weights zero gives exactly 0 with zero gradients, never NaN.

    Its backward pass can run once (a second one may get autograd's error of a tensor modified in place).
    """
    (kept,) = weights_T.nonzero(as_tuple=True)
    if len(kept) < len(weights_T):
        hidden_TD, targets_T, weights_T = hidden_TD[kept], targets_T[kept], weights_T[kept]
    wanted = torch.is_grad_enabled() and (hidden_TD.requires_grad or head_VD.requires_grad)
    if not wanted and len(kept) and backend(hidden_TD) == "triton":
        logp_T, _ = token_log_probabilities(hidden_TD, head_VD, targets_T)
        return -(logp_T * weights_T.float()).sum()
    return _LinearCrossEntropy.apply(hidden_TD, head_VD, targets_T, weights_T.float())


def token_log_probabilities(hidden_TD, head_VD, targets_T, temperature=1.0):
    """Log-probability of each target and entropy of each distribution, (T,) and (T,) float32, at a temperature.

    Differentiable by autograd; used by reinforcement learning, whose loss is not linear in the log-probability.
    The entropy carries no gradient.
    """
    if len(hidden_TD) and backend(hidden_TD) == "triton":
        from minglm.kernels.cross_entropy.triton_kernel import log_probabilities_triton

        return log_probabilities_triton(hidden_TD, head_VD, targets_T, temperature)
    logits = (hidden_TD @ head_VD.to(hidden_TD.dtype).T).float() / temperature
    log_p = logits.log_softmax(-1)
    with torch.no_grad():
        entropy_T = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(1, targets_T[:, None]).squeeze(1), entropy_T
