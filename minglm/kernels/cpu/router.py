"""The router's choice in C, with its backward pass (paper 2.1).

The gradient: `minglm.kernels.router`. Reference: `minglm.kernels.router.eager`.
"""

from typing import Any

import torch

from minglm.kernels.cpu.build import address, loaded_library
from minglm.kernels.router.eager import Routes


class _Route(torch.autograd.Function):
    """The choice. It keeps the experts and the scores."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: torch.Tensor,
        bias_E: torch.Tensor,
        top_k: int,
        normalize: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        T, E = logits_TE.shape
        experts_TK = torch.empty(T, top_k, dtype=torch.int64)
        weights_TK = logits_TE.new_empty(T, top_k)
        scores_TE = torch.empty_like(logits_TE)
        ctx.sizes = (T, E, top_k, normalize, scale)
        ctx.save_for_backward(experts_TK, scores_TE)
        ctx.mark_non_differentiable(experts_TK)
        ctx.set_materialize_grads(False)
        tensors = (logits_TE, bias_E, experts_TK, weights_TK, scores_TE)
        loaded_library().route_forward(*map(address, tensors), *ctx.sizes)
        return experts_TK, weights_TK, scores_TE

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any,
        _: None,
        dweights_TK: torch.Tensor | None,
        dscores_TE: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        experts_TK, scores_TE = ctx.saved_tensors
        if dweights_TK is None:
            dweights_TK = torch.zeros(experts_TK.shape)
        if dscores_TE is not None:
            dscores_TE = dscores_TE.contiguous()
        dlogits_TE = torch.empty_like(scores_TE)
        tensors = (experts_TK, scores_TE, dweights_TK.contiguous(), dscores_TE, dlogits_TE)
        loaded_library().route_backward(*map(address, tensors), *ctx.sizes)
        return dlogits_TE, None, None, None, None


# The compiler cannot trace addresses of tensors.
_route: Any = torch.compiler.disable(_Route.apply)


def route_c(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor,
    top_k: int,
    normalize: bool = True,
    scale: float = 1.0,
) -> Routes:
    """Compute `route` of `router/eager.py` for experts that all compete: logits (T, E) and bias (E,) float32."""
    return Routes(*_route(logits_TE.contiguous(), bias_E, top_k, normalize, scale))
