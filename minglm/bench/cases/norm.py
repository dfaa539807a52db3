"""Cases of RMSNorm after an addition to the residual stream, at GLM-4.5's width: alone, and with its gradients.

Baselines: the eager form, as written and compiled by torch, and Liger's fused kernel.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from minglm.bench.case import Case, Form
from minglm.bench.cases import compiled, have, normal, with_gradients, without_gradients
from minglm.kernels.norm import add_norm
from minglm.kernels.norm.eager import norm

EPS = 1e-5


def liger(
    x_TD: Tensor, weight_D: Tensor, eps: float, change_TD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute (out, r) by Liger's kernel, both (T, D) in x's dtype."""
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return liger_fused_add_rms_norm(x_TD, change_TD, weight_D, eps, in_place=False)


def forms(device: torch.device, T: int, D: int, gradients: bool) -> dict[str, Form]:
    """Return {form: the norm and the stream}, or {form: the norm and its gradients}."""
    x_TD, change_TD, upstream_TD = (normal(device, T, D, seed=seed) for seed in range(3))
    weight_D = 1 + normal(device, D, seed=3, scale=0.1, dtype=torch.float32)
    functions: dict[str, Callable[..., Any]] = {"minglm": add_norm, "torch": norm}
    functions |= {} if gradients else compiled(norm, device, T)
    if have("liger_kernel", device):
        functions["liger"] = liger
    inputs = [x_TD, weight_D, EPS, change_TD]
    if not gradients:
        return {name: without_gradients(function, *inputs) for name, function in functions.items()}
    inputs = [v.requires_grad_() if isinstance(v, torch.Tensor) else v for v in inputs]

    def run(function: Callable[..., Any]) -> Form:
        return with_gradients(
            lambda x, weight, change: function(x, weight, EPS, change),
            inputs[:2] + inputs[3:],
            upstream_TD,
        )

    return {name: run(function) for name, function in functions.items()}


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield forward, and forward with backward."""
    D = 32 if smoke else 5120
    for T in (20,) if smoke else (4096, 16384, 65536):
        yield Case(
            f"add and norm, {T} x {D}",
            0,
            8 * T * D,
            lambda T=T: forms(device, T, D, False),
            graph=True,
        )
        yield Case(
            f"add and norm with gradients, {T} x {D}",
            0,
            14 * T * D,
            lambda T=T: forms(device, T, D, True),
            graph=True,
        )
