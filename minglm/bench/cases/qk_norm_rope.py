"""Cases of QK-norm and rotary embedding of GLM-4.5's 96 query and 8 key heads: alone, and with gradients.

Baselines: the eager form, as written and compiled by torch.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from minglm.bench.case import Case, Form
from minglm.bench.cases import compiled, normal, without_gradients
from minglm.kernels.qk_norm_rope import eager, qk_norm_rope

EPS = 1e-5


def forms(
    device: torch.device, S: int, heads: tuple[int, int, int], gradients: bool
) -> dict[str, Form]:
    """Return {form: queries and keys}, or {form: the gradients of both and of their weights}."""
    N, M, A = heads
    q, k, dq, dk = (normal(device, 1, S, h, A, seed=seed) for seed, h in enumerate((N, M, N, M)))
    weights = [1 + normal(device, A, seed=seed, scale=0.1, dtype=torch.float32) for seed in (4, 5)]
    turn = torch.arange(S, device=device)[:, None] * 10_000 ** -torch.linspace(
        0, 1, A // 4, device=device
    )
    inputs = [q, k, *weights, turn.cos()[None, :, None], turn.sin()[None, :, None], EPS]
    functions = {"minglm": qk_norm_rope, "torch": eager.qk_norm_rope}
    functions |= {} if gradients else compiled(eager.qk_norm_rope, device, S)
    if not gradients:
        return {name: without_gradients(function, *inputs) for name, function in functions.items()}
    needed = [x.requires_grad_() for x in inputs[:4]]

    def run(function: Callable[..., Any]) -> Form:
        return lambda: torch.autograd.grad(function(*inputs), needed, (dq, dk))

    return {name: run(function) for name, function in functions.items()}


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield forward, and forward with backward."""
    heads = (4, 2, 16) if smoke else (96, 8, 128)
    for S in (20,) if smoke else (4096, 16384, 65536):
        moved = 4 * S * (heads[0] + heads[1]) * heads[2]
        name = f"{S} tokens, {heads[0]}/{heads[1]} heads of {heads[2]}"
        for extra, factor in (("", 1), (" with gradients", 2.5)):
            yield Case(
                f"QK-norm and rotation{extra}, {name}",
                0,
                factor * moved,
                lambda S=S, extra=extra: forms(device, S, heads, bool(extra)),
                graph=True,
            )
