"""Cases of the router's choice of 8 of 160 experts from its logits, and the sort of the choices by expert.

Baselines: the eager form, as written and compiled by torch. The router's own product is not measured.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minglm.bench.case import Case, Form
from minglm.bench.cases import compiled, normal, with_gradients, without_gradients
from minglm.kernels.router import eager, route, sort_by_expert

E, K = 160, 8


def ours(logits_TE: Tensor, bias_E: Tensor) -> tuple[Tensor, ...]:
    """Choose experts by the form that this machine runs."""
    return route(logits_TE, bias_E, K, True, 2.5)


def plain(logits_TE: Tensor, bias_E: Tensor) -> tuple[Tensor, ...]:
    """Choose experts by the eager form."""
    return eager.route(logits_TE, bias_E, K, True, 2.5)


def weights_of(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """Return a function of only the weights, which have gradients."""
    return lambda *inputs: function(*inputs)[1]


def choosing(device: torch.device, T: int, gradients: bool) -> dict[str, Form]:
    """Return {form: experts, weights, scores}, or {form: weights and the gradient of the logits}."""
    logits_TE = normal(device, T, E, dtype=torch.float32)
    bias_E = normal(device, E, scale=0.1, dtype=torch.float32)
    functions = {"minglm": ours, "torch": plain}
    functions |= {} if gradients else compiled(plain, device, T)
    if not gradients:
        return {
            name: without_gradients(function, logits_TE, bias_E)
            for name, function in functions.items()
        }
    upstream_TK = normal(device, T, K, seed=1, dtype=torch.float32)
    inputs = (logits_TE.requires_grad_(), bias_E)
    return {
        name: with_gradients(weights_of(function), inputs, upstream_TK)
        for name, function in functions.items()
    }


def sorting(device: torch.device, T: int) -> dict[str, Form]:
    """Return {form: order, its inverse, ends}."""
    experts_TK = normal(device, T, E, dtype=torch.float32).topk(K).indices
    return {
        "minglm": lambda: sort_by_expert(experts_TK, E),
        "torch": lambda: eager.group_by_expert(experts_TK, E),
    }


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield the choice, the choice with its gradient, and the sort."""
    for T in (30,) if smoke else (4096, 16384, 65536):
        moved = T * (8 * E + 12 * K)
        yield Case(
            f"router, {T} tokens", 0, moved, lambda T=T: choosing(device, T, False), graph=True
        )
        yield Case(
            f"router with gradient, {T} tokens",
            0,
            moved + T * (12 * E + 16 * K),
            lambda T=T: choosing(device, T, True),
            graph=True,
        )
        yield Case(
            f"sort by expert, {T} tokens", 0, 32 * T * K, lambda T=T: sorting(device, T), graph=True
        )
