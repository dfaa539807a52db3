"""Cases of the expert layer of GLM-4.5 (width 5120, expert width 1536, 8 of 160 or of a node's 20): training, prefill, decoding.

Baselines: the same layer over torch's grouped product, the loop over experts, transformers' experts in both
of its forms, and Liger's fused layer. All get the router's choice; sorting by expert is part of the layer.
Loads are even but for chance, or fall off as 1 / rank (Zipf), or all tokens choose the same eight experts.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from minglm.bench.case import Case, Form
from minglm.bench.cases import have, normal, with_gradients, without_gradients
from minglm.kernels.experts import grouped_experts
from minglm.kernels.experts.eager import experts_loop
from minglm.kernels.experts.grouped import experts_grouped

D, F, K = 5120, 1536, 8
TRAIN = [(E, T, "even") for E in (20, 160) for T in (4096, 16384, 65536)]
TRAIN += [(160, 16384, "zipf"), (160, 16384, "crowd")]
DECODE = (1, 8, 32, 128)  # tokens

Widths = tuple[int, int, int]
"""D, F, K."""
Layer = Callable[..., Tensor]
"""The expert layer, of x (T, D), experts and weights (T, K), and the matrices."""


def choice(device: torch.device, T: int, E: int, K: int, loads: str) -> tuple[Tensor, Tensor]:
    """Draw experts int64 (T, K) and weights float32 (T, K); loads: even, zipf or crowd."""
    noise_TE = torch.rand(T, E, generator=torch.Generator(device).manual_seed(0), device=device)
    rank_E = torch.arange(1, E + 1, device=device)
    wanted_E = {"even": 0.0 * rank_E, "zipf": -rank_E.log(), "crowd": -2.0 * rank_E}[loads]
    if loads == "zipf":  # Gumbel's trick: a draw without replacement, in proportion to exp(wanted)
        noise_TE = -(-noise_TE.log()).log()
    experts_TK = (wanted_E + noise_TE).topk(K).indices
    weights_TK = torch.rand(T, K, generator=torch.Generator(device).manual_seed(1), device=device)
    return experts_TK, weights_TK / weights_TK.sum(1, keepdim=True)


def transformers_experts(kind: str, E: int, widths: Widths) -> Layer:
    """Return transformers' experts as a function of (x, experts, weights, gate and up in one, down)."""
    D, F, K = widths
    sizes = {
        "hidden_size": D,
        "moe_intermediate_size": F,
        "n_routed_experts": E,
        "num_experts_per_tok": K,
    }

    @cache
    def layer() -> torch.nn.Module:
        from transformers.models.glm4_moe import Glm4MoeConfig, modeling_glm4_moe

        config: Any = Glm4MoeConfig(**sizes, num_local_experts=E)  # pyright: ignore[reportCallIssue]  any field
        config._experts_implementation = kind
        with torch.device("meta"):
            return modeling_glm4_moe.Glm4MoeExperts(config)

    def run(
        x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, both_EFD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        matrices = {"gate_up_proj": both_EFD, "down_proj": down_EDF}
        return torch.func.functional_call(
            layer(), matrices, (x_TD, experts_TK, weights_TK.to(x_TD.dtype))
        )

    return run


def liger(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, both_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Compute the layer by Liger's fused function."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(x_TD, both_EFD, down_EDF, experts_TK.int(), weights_TK)


def halves(function: Layer) -> Layer:
    """Turn a layer with gate and up in one matrix into a function of both, with separate gradients."""

    def run(
        x_TD: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        gate_EFD: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor,
    ) -> Tensor:
        return function(x_TD, experts_TK, weights_TK, _Joined.apply(gate_EFD, up_EFD), down_EDF)

    return run


class _Joined(torch.autograd.Function):
    """Join gate and up, which are views of one tensor; it costs nothing in either direction."""

    @staticmethod
    def forward(ctx: Any, gate_EFD: Tensor, up_EFD: Tensor) -> Tensor:
        E, F, D = gate_EFD.shape
        return gate_EFD.as_strided((E, 2 * F, D), (2 * F * D, D, 1))

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, grad_EFD: Tensor
    ) -> tuple[Tensor, ...]:
        return grad_EFD.chunk(2, 1)


def layer_forms(
    device: torch.device,
    T: int,
    E: int,
    loads: str,
    widths: Widths,
    gradients: bool,
    loops: bool,
) -> dict[str, Form]:
    """Return {form: the layer}; loops: with loops over the experts, which wait for the GPU and take long."""
    D, F, K = widths
    experts_TK, weights_TK = choice(device, T, E, K, loads)
    x_TD, upstream_TD = normal(device, T, D), normal(device, T, D, seed=1)
    both_EFD = normal(device, E, 2 * F, D, seed=2, scale=D**-0.5)
    down_EDF = normal(device, E, D, F, seed=3, scale=F**-0.5)
    apart = [both_EFD[:, :F].contiguous(), both_EFD[:, F:].contiguous(), down_EDF]
    functions: dict[str, tuple[Layer, list[Tensor]]] = {
        "minglm": (grouped_experts, apart),
        "torch grouped_mm": (experts_grouped, apart),
    }
    joined = [both_EFD[:, :F], both_EFD[:, F:], down_EDF]
    kinds = ["grouped_mm"]
    if loops:
        functions["loop over experts"] = (experts_loop, apart)
        kinds.append("eager")
    for kind in kinds:
        functions[f"transformers {kind}"] = (halves(transformers_experts(kind, E, widths)), joined)
    if have("liger_kernel", device):
        functions["liger"] = (halves(liger), joined)
    forms = {}
    for name, (function, matrices) in functions.items():
        if gradients:
            inputs = (x_TD, experts_TK, weights_TK, *matrices)
            inputs = [v.detach().requires_grad_(v.is_floating_point()) for v in inputs]
            forms[name] = with_gradients(function, inputs, upstream_TD)
        else:
            forms[name] = without_gradients(function, x_TD, experts_TK, weights_TK, *matrices)
    return forms


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield forward, forward and backward, and decoding.

    Bytes: the matrices of chosen experts, x, y and the rows of activations and results, each once.
    """
    widths = (32, 24, 2) if smoke else (D, F, K)
    d, f, k = widths
    train = [(4, 40, "even"), (4, 40, "zipf")] if smoke else TRAIN
    experts = train[-1][0]
    decode = [(experts, T, "even") for T in ((3,) if smoke else DECODE)]
    kinds = [("forward", 1, train), ("forward and backward", 3, train), ("decoding", 1, decode)]
    for kind, factor, sizes in kinds:
        for E, T, loads in sizes:
            decoding = kind == "decoding"
            chosen_experts = k if loads == "crowd" else E * (1 - (1 - k / E) ** T)
            numbers_moved = 3 * chosen_experts * d * f + 2 * T * d + T * k * (3 * f + 2 * d)
            forms = partial(
                layer_forms,
                device,
                T,
                E,
                loads,
                widths,
                gradients=factor == 3,
                loops=T <= 4096 and not decoding,
            )
            yield Case(
                f"expert layer {kind}, {T} tokens, {k} of {E} experts, {loads} loads",
                factor * 6 * T * k * d * f,
                factor * 2 * numbers_moved,  # bytes, in bfloat16
                forms,
                graph=decoding,
            )
