"""Output head with log-probabilities and entropies in C, with their backward pass (no section in the paper).

References: `minglm.kernels.cross_entropy.eager`.
"""

from typing import Any

import torch

from minglm.kernels.cpu.build import address, loaded_library
from minglm.kernels.cross_entropy.chunked import LinearCrossEntropy, LossAndGradients


class _LogProbabilities(torch.autograd.Function):
    """Log-probabilities and entropies. It keeps its arguments and the log-sum of each token."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        head_VD: torch.Tensor,
        targets_T: torch.Tensor,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        T, D = hidden_TD.shape
        logprobs_T = hidden_TD.new_empty(T)
        entropies_T = hidden_TD.new_empty(T)
        sums_T = hidden_TD.new_empty(T)
        ctx.sizes = (T, D, len(head_VD), 1 / temperature)
        ctx.save_for_backward(hidden_TD, head_VD, targets_T, sums_T)
        ctx.mark_non_differentiable(entropies_T)
        tensors = (hidden_TD, head_VD, targets_T, logprobs_T, entropies_T, sums_T)
        loaded_library().head_forward(*map(address, tensors), *ctx.sizes)
        return logprobs_T, entropies_T

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, grad_T: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        dhidden_TD = torch.zeros_like(saved[0])
        dhead_VD = torch.zeros_like(saved[1])
        tensors = (*saved, grad_T.contiguous(), dhidden_TD, dhead_VD)
        loaded_library().head_backward(*map(address, tensors), *ctx.sizes)
        return dhidden_TD, dhead_VD, None, None


# The compiler cannot trace addresses of tensors.
_log_probabilities: Any = torch.compiler.disable(_LogProbabilities.apply)


def log_probabilities_c(
    hidden_TD: torch.Tensor,
    head_VD: torch.Tensor,
    targets_T: torch.Tensor,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `log_probabilities` of `cross_entropy/eager.py`: hidden (T, D), head (V, D), targets (T,), all float32."""
    head_VD = head_VD.to(hidden_TD.dtype).contiguous()
    return _log_probabilities(hidden_TD.contiguous(), head_VD, targets_T.contiguous(), temperature)


def loss_and_gradients(
    hidden_TD: torch.Tensor, head_VD: torch.Tensor, targets_T: torch.Tensor, weights_T: torch.Tensor
) -> LossAndGradients:
    """Compute the weighted loss with both gradients in one walk over the tokens."""
    T, D = hidden_TD.shape
    hidden_TD = hidden_TD.contiguous()
    head_VD = head_VD.contiguous()
    loss = hidden_TD.new_empty(())
    dhidden_TD = torch.empty_like(hidden_TD)
    dhead_VD = torch.zeros_like(head_VD)
    arguments = (hidden_TD, head_VD, targets_T.contiguous(), weights_T.contiguous())
    results = (loss, dhidden_TD, dhead_VD)
    loaded_library().head_loss(*map(address, arguments + results), T, D, len(head_VD))
    return LossAndGradients(loss, dhidden_TD, dhead_VD)


_cross_entropy: Any = torch.compiler.disable(LinearCrossEntropy.apply)


def cross_entropy_c(
    hidden_TD: torch.Tensor, head_VD: torch.Tensor, targets_T: torch.Tensor, weights_T: torch.Tensor
) -> torch.Tensor:
    """Compute `cross_entropy` of `cross_entropy/eager.py`: hidden (T, D), head (V, D), targets and weights (T,) to a scalar."""
    head_VD = head_VD.to(hidden_TD.dtype)
    return _cross_entropy(hidden_TD, head_VD, targets_T, weights_T, loss_and_gradients)
