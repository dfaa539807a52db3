"""Output head and cross-entropy together, never holding the logits of the whole batch (no section in the paper).

    loss = sum_t weight_t * ( logsumexp_v(h_t . W_v) - h_t . W_target(t) )

The weight of each token is known beforehand (a mask over a denominator), so the gradients can be computed in the same
walk over chunks as the loss, and the logits of a chunk are dropped at once. The plain form is the two lines of
`cross_entropy`. Tokens of weight zero cost nothing: they are left out before the product.

The Triton form holds the logits of no token at all; it computes log-probabilities, and the loss is their weighted sum.
"""

import torch
import torch.nn.functional as F

from minglm.kernels.backend import backend

CHUNK = 256  # tokens; a chunk of the toy's logits then stays in a CPU's cache


def cross_entropy(hidden_TD, head_VD, targets_T, weights_T):
    """Plain form. hidden (T, D); head (V, D); targets int64 (T,); weights float32 (T,). Returns a float32 scalar."""
    losses_T = F.cross_entropy((hidden_TD @ head_VD.to(hidden_TD.dtype).T).float(), targets_T, reduction="none")
    return (losses_T * weights_T).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, head_VD, targets_T, weights_T):
        dhidden_TD = torch.empty_like(hidden_TD)
        dhead_VD = torch.zeros_like(head_VD, dtype=torch.float32)
        head = head_VD.to(hidden_TD.dtype)
        loss = hidden_TD.new_zeros((), dtype=torch.float32)
        room = head.new_empty(min(CHUNK, len(hidden_TD)), len(head))  # the same for every chunk: it stays in cache
        wide = room.float()
        for start in range(0, len(hidden_TD), CHUNK):
            rows = slice(start, start + CHUNK)
            hidden, target, weight = hidden_TD[rows], targets_T[rows, None], weights_T[rows, None]
            logits = torch.mm(hidden, head.T, out=room[: len(hidden)])
            p = logits if wide is room else wide[: len(hidden)].copy_(logits)
            largest, chosen = p.amax(1, keepdim=True), p.gather(1, target)
            total = p.sub_(largest).exp_().sum(1, keepdim=True)
            loss += ((largest + total.log() - chosen) * weight).sum()
            dlogits = logits.copy_(p.mul_(weight / total).scatter_add_(1, target, -weight))
            torch.mm(dlogits, head, out=dhidden_TD[rows])
            if head.dtype == torch.float32:
                dhead_VD.addmm_(dlogits.T, hidden)
            else:  # products in low precision, their sum in float32
                dhead_VD += dlogits.T @ hidden
        ctx.save_for_backward(dhidden_TD, dhead_VD.to(head_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad):
        dhidden_TD, dhead_VD = ctx.saved_tensors
        return dhidden_TD * grad.to(dhidden_TD.dtype), dhead_VD * grad.to(dhead_VD.dtype), None, None


def linear_cross_entropy(hidden_TD, head_VD, targets_T, weights_T):
    """The same as `cross_entropy`, chunked. All weights zero gives exactly 0 with zero gradients, never NaN."""
    (kept,) = weights_T.nonzero(as_tuple=True)
    if len(kept) and backend(hidden_TD) == "triton":
        logp_T, _ = token_log_probabilities(hidden_TD[kept], head_VD, targets_T[kept])
        return -(logp_T * weights_T[kept].float().detach()).sum()
    return _LinearCrossEntropy.apply(hidden_TD[kept], head_VD, targets_T[kept], weights_T[kept].float())


def token_log_probabilities(hidden_TD, head_VD, targets_T, temperature=1.0):
    """Log-probability of each target and entropy of each distribution, (T,) and (T,) float32, at a temperature.

    Differentiable by autograd; used by reinforcement learning, whose loss is not linear in the log-probability.
    The entropy carries no gradient.
    """
    if len(hidden_TD) and backend(hidden_TD) == "triton":
        from minglm.kernels.linear_cross_entropy_triton import log_probabilities_triton

        return log_probabilities_triton(hidden_TD, head_VD, targets_T, temperature)
    logits = (hidden_TD @ head_VD.to(hidden_TD.dtype).T).float() / temperature
    log_p = logits.log_softmax(-1)
    with torch.no_grad():
        entropy_T = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(1, targets_T[:, None]).squeeze(1), entropy_T
