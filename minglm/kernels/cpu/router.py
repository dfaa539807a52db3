"""The router's choice in C: no scores are sorted (paper 2.1).

Scores, weights and gradients are those of the reference, `minglm.kernels.router.eager`, to the bit.
"""

from typing import Any

import torch

from minglm.kernels.cpu.build import address, loaded_library
from minglm.kernels.router.eager import Routes, combine_weights


def choose_c(scores_TE: torch.Tensor, bias_E: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return the experts of each token, int64 (T, K), best first, ties to the lower index; scores and bias float32."""
    T, E = scores_TE.shape
    scores_TE = scores_TE.detach().contiguous()
    experts_TK = torch.empty(T, top_k, dtype=torch.int64)
    tensors = (scores_TE, bias_E, experts_TK)
    loaded_library().choose(*map(address, tensors), T, E, top_k)
    return experts_TK


# The compiler cannot trace addresses of tensors.
_choose: Any = torch.compiler.disable(choose_c)


def route_c(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor,
    top_k: int,
    normalize: bool = True,
    scale: float = 1.0,
) -> Routes:
    """Compute `route` of `router/eager.py` for experts that all compete: logits (T, E) and bias (E,) float32."""
    scores_TE = logits_TE.sigmoid()
    experts_TK = _choose(scores_TE, bias_E, top_k)
    return Routes(experts_TK, combine_weights(scores_TE, experts_TK, normalize, scale), scores_TE)
