"""Embedding and output head: tokens to vectors, and states to logits, losses or log-probabilities (paper 2.1).

    x_t = E[token_t];     logits_t = W h_t;     W = E where the config ties them

Everything that uses one of these two matrices is a method of its module, so that whatever wraps the module
(FSDP2, tensor parallelism, quantisation) sees each use. The losses never hold the logits of a whole batch:
see `minglm.kernels.cross_entropy`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minglm.kernels.cross_entropy import linear_cross_entropy, token_log_probabilities


class Embedding(nn.Module):
    """The token embedding: one row of `weight` (V, D) for each id."""

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ids (...) int64 to rows (..., D), in the dtype of the weight."""
        return F.embedding(tokens, self.weight)


class LMHead(nn.Module):
    """The output head: a linear map from states to the logits of the vocabulary, `weight` (V, D)."""

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map states (..., D) to logits (..., V), in the dtype of the states."""
        return F.linear(hidden, self.weight.to(hidden.dtype))

    def cross_entropy(
        self, hidden_TD: Tensor, targets_T: Tensor, weights_T: Tensor, frozen: bool = False
    ) -> Tensor:
        """Compute sum_t weight_t * CE(logits_t, target_t): a float32 scalar, without holding all logits.

        hidden (T, D); targets int64 (T,); weights float32 (T,), for example a mask over a count of targets.
        If all weights are zero, the loss is exactly 0 and so are its gradients. frozen: the head itself gets
        no gradient.
        """
        weight_VD = self.weight.detach() if frozen else self.weight
        return linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T)

    def token_log_probabilities(
        self, hidden_TD: Tensor, targets_T: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Compute the log-probability of each target, and the entropy of each distribution.

        hidden (T, D); targets int64 (T,); the logits are divided by `temperature`. Returns two float32
        tensors (T,); the entropy carries no gradient.
        """
        weight_VD = self.weight.to(hidden_TD.dtype)
        return token_log_probabilities(hidden_TD, weight_VD, targets_T, temperature)
