"""Output head with cross-entropy, and with log-probabilities, in plain PyTorch: the references (no section in the paper).

loss = sum_t weight_t * ( logsumexp_v(h_t . W_v) - h_t . W_target(t) )
"""

import torch
import torch.nn.functional as F


def cross_entropy(
    hidden_TD: torch.Tensor, head_VD: torch.Tensor, targets_T: torch.Tensor, weights_T: torch.Tensor
) -> torch.Tensor:
    """Return the weighted loss, a float32 scalar, of hidden (T, D), head (V, D), targets int64 and weights float32 (T,).

    The logits are in the dtype of hidden, the softmax is float32.
    """
    logits_TV = hidden_TD @ head_VD.to(hidden_TD.dtype).T
    losses_T = F.cross_entropy(logits_TV.float(), targets_T, reduction="none")
    return (losses_T * weights_T).sum()


def log_probabilities(
    hidden_TD: torch.Tensor,
    head_VD: torch.Tensor,
    targets_T: torch.Tensor,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of each target and the entropy of each distribution, (T,) and (T,) float32.

    hidden (T, D), head (V, D), targets int64 (T,). The logits are divided by the temperature. The entropy carries no
    gradient.
    """
    logits_TV = (hidden_TD @ head_VD.to(hidden_TD.dtype).T).float() / temperature
    logp_TV = logits_TV.log_softmax(-1)
    with torch.no_grad():
        entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
    return logp_TV.gather(1, targets_T[:, None]).squeeze(1), entropy_T
