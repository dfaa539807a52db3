"""Contracts of the model's parts: router, rotary embedding, balance, experts, dispatcher, attention (paper 2.1, 2.4).

    from minglm.testing.model import check_attention, check_router
    check_attention(my_attention)
    check_router(lambda scores_TE, bias_E, config: my_router(scores_TE, bias_E, config.num_experts_per_tok))

Each `check_*` takes a callable with the signature of ours, draws its own shapes and values, and raises
AssertionError with the smallest counterexample that hypothesis finds. The expected values are written out
from the equations, in plain Python or float64, or come from PyTorch's own operations; none of them is
computed by the code under test.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from hypothesis import strategies as st
from torch import Tensor

from minglm.config import ModelConfig
from minglm.model.attention import Attend
from minglm.model.glm import GLM
from minglm.model.moe import Dispatcher, Experts, ExpertsOperation
from minglm.testing.strategies import holds, numbers, seeds

Route = Callable[[Tensor, Tensor, ModelConfig], tuple[Tensor, Tensor]]
"""(scores_TE, bias_E, config) to (experts_TK, weights_TK)."""
Rotate = Callable[[Tensor, Tensor, int, float], Tensor]
"""(x_BSNA, positions_BS, rotary_dim, theta) to x's shape."""
UpdateBias = Callable[[Tensor, Tensor, float], Any]
"""(bias_E, tokens_per_expert_E, rate), in place."""

# Longer than a chunk of `flash_attention`, shorter, and exactly one or two; a few of each are enough.
lengths = st.sampled_from([1, 2, 5, 63, 64, 65, 130])


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Return a float32 tensor of normal numbers that depends on the seed alone."""
    return scale * torch.randn(shape, generator=numbers(seed))


def drawn_documents(seed: int, B: int, S: int) -> Tensor:
    """Return packed rows: ids 0, 1, 2, ... int32 (B, S) that change at random positions, then perhaps padding, id -1."""
    starts_BS = torch.rand(B, S, generator=numbers(seed)) < 4 / (S + 4)
    documents_BS = starts_BS.cumsum(1).int()
    padding_B1 = (torch.rand(B, 1, generator=numbers(seed + 1)) * 1.5 * S).int()
    return documents_BS.masked_fill(torch.arange(S)[None] >= padding_B1.clamp(min=1), -1)


def tiny_model(seed: int, **changes: Any) -> GLM:
    """Return a GLM of one dense and two MoE layers, width 16 and 24 tokens, with changes to its config.

    Every value is drawn, biases, norm weights and selection biases too, and large enough that attention is
    sharp and the router decided: with values as small as at the start of training most mistakes have no
    visible effect.
    """
    settings: dict[str, Any] = {
        "vocab_size": 24,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_theta": 1e4,
        "intermediate_size": 20,
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
    }
    model = GLM(ModelConfig(**(settings | changes)))
    with torch.no_grad():
        for i, (name, tensor) in enumerate([*model.named_parameters(), *model.named_buffers()]):
            tensor.copy_(normal(seed + i, *tensor.shape, scale=0.3) + ("norm" in name))
    return model


def plain_choice(
    scores_E: Sequence[float], bias_E: Sequence[float], config: ModelConfig
) -> list[int]:
    """Choose the experts of one token by the definition, best first, in plain Python numbers."""
    biased = [score + bias for score, bias in zip(scores_E, bias_E, strict=True)]
    size = len(biased) // config.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
    # A group is as good as its two best experts together.
    strength = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in groups]
    best_groups = sorted(range(config.n_group), key=lambda g: (-strength[g], g))
    allowed = [e for g in best_groups[: config.topk_group] for e in groups[g]]
    best = sorted(allowed, key=lambda e: (-biased[e], e))
    return best[: config.num_experts_per_tok]


def check_router(route: Route) -> None:
    """Hold a router to its contract: `route(scores_TE, bias_E, config) -> (experts_TK, weights_TK)`.

    scores: after the sigmoid. It selects by score plus bias within the best groups, equal values by lower
    index; its weights come from the scores alone and sum to the scaling factor; renaming experts commutes;
    with two experts or more the scores get a gradient. Ours is `select_experts` and `combine_weights`.
    """

    @holds(
        seed=seeds,
        T=st.integers(1, 6),
        groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 3)]),
        size=st.integers(2, 5),
        K=st.integers(1, 4),
        coarse=st.booleans(),
    )
    def choice_and_weights(
        seed: int, T: int, groups: tuple[int, int], size: int, K: int, coarse: bool
    ) -> None:
        """Compare with the definition; coarse values make most experts equal, so that the order of equals matters."""
        n_group, topk_group = groups
        E = n_group * size
        config = dataclasses.replace(
            ModelConfig(),
            n_routed_experts=E,
            num_experts_per_tok=min(K, topk_group * size),
            n_group=n_group,
            topk_group=topk_group,
            norm_topk_prob=seed % 3 > 0,
            routed_scaling_factor=[1.0, 2.5][seed % 2],
        )
        scores_TE = torch.rand(T, E, generator=numbers(seed))
        # A bias that is negative everywhere changes no choice, but shows masks that are not minus infinity.
        bias_E = normal(seed + 1, E, scale=0.5) - 2.0 * (seed % 5 < 2)
        if coarse:  # eighths and quarters add without rounding, so plain Python finds the same ties
            scores_TE = (scores_TE * 3 + 0.5).round() / 8
            bias_E = (bias_E * 2).round() / 4
        experts_TK, weights_TK = route(scores_TE, bias_E, config)
        for t in range(T):
            expected = plain_choice(scores_TE[t].tolist(), bias_E.tolist(), config)
            assert experts_TK[t].tolist() == expected, (
                f"experts {experts_TK[t].tolist()}, by definition {expected}"
            )
            chosen = [scores_TE[t, e].item() for e in expected]
            total = sum(chosen) if config.norm_topk_prob else 1.0
            expected_K = torch.tensor([config.routed_scaling_factor * s / total for s in chosen])
            # float32: one sum, one quotient, one product
            torch.testing.assert_close(weights_TK[t], expected_K, atol=1e-6, rtol=1e-5)

    @holds(seed=seeds, T=st.integers(1, 6), E=st.integers(2, 12))
    def renaming_commutes(seed: int, T: int, E: int) -> None:
        """Scores and bias in another order of the experts give the same experts and weights under the new names."""
        config = dataclasses.replace(ModelConfig(), n_routed_experts=E, num_experts_per_tok=2)
        scores_TE = torch.rand(T, E, generator=numbers(seed))
        bias_E = normal(seed + 1, E)
        order_E = torch.randperm(E, generator=numbers(seed + 2))
        experts_TK, weights_TK = route(scores_TE, bias_E, config)
        renamed_TK, same_TK = route(scores_TE[:, order_E], bias_E[order_E], config)
        assert torch.equal(order_E[renamed_TK], experts_TK), (
            "renaming the experts changes which are selected"
        )
        torch.testing.assert_close(same_TK, weights_TK)

    @holds(seed=seeds, T=st.integers(1, 6), E=st.integers(3, 12), K=st.integers(2, 3))
    def learns(seed: int, T: int, E: int, K: int) -> None:
        """The weights' gradient reaches the scores of the selected experts of every token, and no other score."""
        config = dataclasses.replace(ModelConfig(), n_routed_experts=E, num_experts_per_tok=K)
        scores_TE = (0.1 + 0.8 * torch.rand(T, E, generator=numbers(seed))).requires_grad_()
        experts_TK, weights_TK = route(scores_TE, normal(seed + 1, E), config)
        # A different factor for each of the K choices: with equal ones the gradient would be zero.
        importance_TK = repeat(torch.arange(1.0, K + 1), "k -> t k", t=T)
        (gradient_TE,) = torch.autograd.grad((weights_TK * importance_TK).sum(), scores_TE)
        chosen_TE = torch.zeros(T, E, dtype=torch.bool).scatter_(1, experts_TK, True)
        assert gradient_TE[chosen_TE].view(T, K).abs().amax(1).min() > 0, (
            "a token's router gets no gradient"
        )
        assert not gradient_TE[~chosen_TE].any(), (
            "an expert that was not selected gets a gradient through the weights"
        )


def check_rope(rotate: Rotate) -> None:
    """Hold a rotary embedding to its contract: `rotate(x_BSNA, positions_BS, rotary_dim, theta)`, to x's shape.

    The first `rotary_dim` of A dimensions rotate, in the half-split layout: dimension i pairs with dimension
    i + rotary_dim / 2, by the angle position * theta^(-2 i / rotary_dim). Lengths stay, position 0 changes
    nothing, and dot products depend only on the distance of the positions.
    """
    shapes = st.tuples(
        st.integers(1, 3), st.integers(1, 8), st.integers(1, 3), st.sampled_from([4, 8, 16])
    )

    @holds(
        seed=seeds,
        shape=shapes,
        rotating=st.sampled_from([0, 0.5, 1]),
        theta=st.sampled_from([10_000.0, 1e6]),
    )
    def formula(seed: int, shape: tuple[int, int, int, int], rotating: float, theta: float) -> None:
        """Compare every rotated dimension with the equation in float64."""
        B, S, _, A = shape
        R = round(A * rotating)
        x_BSNA = normal(seed, *shape)
        positions_BS = torch.randint(0, 5000, (B, S), generator=numbers(seed + 1))
        positions_BS[:, 0] = 0
        y_BSNA = rotate(x_BSNA, positions_BS, R, theta)
        assert y_BSNA.shape == x_BSNA.shape and y_BSNA.dtype == x_BSNA.dtype
        assert torch.equal(y_BSNA[:, 0], x_BSNA[:, 0]), "position 0 must change nothing"
        assert torch.equal(y_BSNA[..., R:], x_BSNA[..., R:]), (
            "dimensions beyond rotary_dim must pass through"
        )
        for i in range(R // 2):
            angle_BS1 = positions_BS.double()[..., None] * theta ** (-2 * i / R)
            a = x_BSNA[..., i].double()
            b = x_BSNA[..., i + R // 2].double()
            first = a * angle_BS1.cos() - b * angle_BS1.sin()
            second = b * angle_BS1.cos() + a * angle_BS1.sin()
            # a float32 cosine is exact to 2^-25, and so is each product; they have a size of up to 5
            torch.testing.assert_close(y_BSNA[..., i].double(), first, atol=2e-6, rtol=0)
            torch.testing.assert_close(y_BSNA[..., i + R // 2].double(), second, atol=2e-6, rtol=0)

    @holds(seed=seeds, A=st.sampled_from([4, 8, 16]), move=st.integers(0, 200_000))
    def distance(seed: int, A: int, move: int) -> None:
        """Moving all positions by the same amount leaves every dot product of a query and a key unchanged."""
        q_BSNA = normal(seed, 1, 6, 1, A)
        k_BSNA = normal(seed + 1, 1, 6, 1, A)
        positions_BS = torch.randint(0, 50, (1, 6), generator=numbers(seed + 2))
        dots = []
        for shift in (0, move):
            q_SA = rotate(q_BSNA, positions_BS + shift, A // 2, 1e4)[0, :, 0]
            k_SA = rotate(k_BSNA, positions_BS + shift, A // 2, 1e4)[0, :, 0]
            dots.append(q_SA @ k_SA.T)
        # sixteen float32 products, in sum of size up to 50
        torch.testing.assert_close(dots[0], dots[1], atol=5e-5, rtol=0)


def check_balance(update_expert_bias: UpdateBias) -> None:
    """Hold an update of the selection bias to its contract: `update_expert_bias(bias_E, tokens_per_expert_E, rate)`.

    It works in place. Compared with each other, experts below the mean load rise and those above it fall, by
    exactly the rate; only the proportions of the load matter. A step from which its mean is subtracted passes
    too: no choice depends on that.
    """

    @holds(
        loads=st.lists(st.integers(0, 9), min_size=2, max_size=12),
        rate=st.sampled_from([0.0, 0.001, 0.1]),
        seed=seeds,
        tokens=st.sampled_from([1, 1000, 1 / 7]),
    )
    def sign(loads: list[int], rate: float, seed: int, tokens: float) -> None:
        """The difference of any two experts changes by the rate times the difference of their signs."""
        before_E = normal(seed, len(loads), scale=0.01)
        bias_E = before_E.clone()
        update_expert_bias(bias_E, torch.tensor(loads) * float(tokens), rate)
        change_E = bias_E - before_E
        mean = sum(loads) / len(loads)
        signs = [float(mean > load) - float(mean < load) for load in loads]
        expected_E = rate * torch.tensor(signs)
        if abs(mean - round(mean)) <= 1e-6 and tokens == 1 / 7:
            return  # sevenths may miss an exactly balanced mean by rounding
        error_E = (change_E - change_E.mean()) - (expected_E - expected_E.mean())
        # float32 numbers of size 0.1 at most
        assert error_E.abs().max() < 1e-7, f"loads {loads} change the bias by {change_E.tolist()}"


def plain_experts(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
) -> Tensor:
    """Compute the expert layer one token and one choice at a time, in float64: (T, D)."""
    rows = []
    for t in range(len(x_TD)):
        x_D = x_TD[t].double()
        row_D = torch.zeros(x_TD.shape[1], dtype=torch.float64)
        for k, e in enumerate(experts_TK[t].tolist()):
            inner_F = F.silu(gate_EFD[e].double() @ x_D) * (up_EFD[e].double() @ x_D)
            row_D = row_D + weights_TK[t, k].double() * (down_EDF[e].double() @ inner_F)
        rows.append(row_D)
    return torch.stack(rows) if rows else 0 * x_TD.double()


def _drawn_layer(seed: int, T: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Draw rows (T, 4), two of five experts for each, their weights, and the experts' matrices of inner width 3."""
    x_TD = normal(seed, T, 4)
    experts_TK = torch.rand(T, 5, generator=numbers(seed + 1)).topk(2).indices
    weights_TK = torch.rand(T, 2, generator=numbers(seed + 2))
    matrices = [
        normal(seed + 3, 5, 3, 4),
        normal(seed + 4, 5, 3, 4),
        normal(seed + 5, 5, 4, 3),
    ]
    return x_TD, experts_TK, weights_TK, matrices


def check_experts(operation: ExpertsOperation) -> None:
    """Hold an expert layer to its contract.

    `operation(x_TD, experts_TK, weights_TK, gate_EFD, up_EFD, down_EDF) -> y_TD` computes every token's
    weighted sum over its experts, with all five gradients, however unevenly the tokens fall: experts without
    tokens, all tokens with one expert, one token, none. Ours is `grouped_experts`.
    """

    @holds(
        seed=seeds,
        T=st.integers(0, 12),
        E=st.integers(1, 6),
        K=st.integers(1, 3),
        widths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
        crowd=st.booleans(),
    )
    def sum_over_choices(
        seed: int, T: int, E: int, K: int, widths: tuple[int, int], crowd: bool
    ) -> None:
        """Compare with the loop in float64; a crowd sends every token to the first K experts."""
        K = min(K, E)
        D, width = widths
        scores_TE = torch.rand(T, E, generator=numbers(seed))
        if crowd:
            scores_TE = scores_TE - 2.0 * torch.arange(E)
        experts_TK = scores_TE.topk(K).indices
        values = [
            normal(seed + 1, T, D),
            torch.rand(T, K, generator=numbers(seed + 2)),
            normal(seed + 3, E, width, D),
            normal(seed + 4, E, width, D),
            normal(seed + 5, E, D, width),
        ]
        gradient_TD = normal(seed + 6, T, D)
        results = []
        for function in (operation, plain_experts):
            inputs = [value.clone().requires_grad_() for value in values]
            x_TD, weights_TK, gate_EFD, up_EFD, down_EDF = inputs
            y_TD = function(x_TD, experts_TK, weights_TK, gate_EFD, up_EFD, down_EDF)
            gradients = torch.autograd.grad(
                y_TD, inputs, gradient_TD.to(y_TD.dtype), allow_unused=True
            )
            # An expert without tokens may have a gradient of zero, or none.
            filled = [
                torch.zeros_like(value) if gradient is None else gradient
                for gradient, value in zip(gradients, inputs, strict=True)
            ]
            results.append([y_TD.float(), *filled])
        names = ("output", "gradient of x", "of the weights", "of gate", "of up", "of down")
        for name, ours, theirs in zip(names, *results, strict=True):
            # float32 sums of up to 12 * 6 * 6 products of four normal numbers
            torch.testing.assert_close(
                ours, theirs, atol=3e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
            )

    @holds(seed=seeds, T=st.integers(1, 9))
    def dtype_of_rows(seed: int, T: int) -> None:
        """Rows in bfloat16 give a result in bfloat16; float32 matrices act as if they were rounded to it."""
        x_TD, experts_TK, weights_TK, matrices = _drawn_layer(seed, T)
        rounded = [matrix.bfloat16() for matrix in matrices]
        y_TD = operation(x_TD.bfloat16(), experts_TK, weights_TK, *matrices)
        rounded_TD = operation(x_TD.bfloat16(), experts_TK, weights_TK, *rounded)
        torch.testing.assert_close(y_TD, rounded_TD, atol=0, rtol=0)

    @holds(seed=seeds, T=st.integers(1, 9))
    def order_of_tokens(seed: int, T: int) -> None:
        """Tokens in another order give the same rows in that order."""
        x_TD, experts_TK, weights_TK, matrices = _drawn_layer(seed, T)
        order_T = torch.randperm(T, generator=numbers(seed + 9))
        y_TD = operation(x_TD, experts_TK, weights_TK, *matrices)
        moved_TD = operation(x_TD[order_T], experts_TK[order_T], weights_TK[order_T], *matrices)
        torch.testing.assert_close(moved_TD, y_TD[order_T], atol=1e-5, rtol=1e-5)  # float32


def experts_of(gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor) -> Experts:
    """Return an `Experts` module over these tensors; gradients flow to the tensors themselves."""
    E, F_, D = gate_EFD.shape
    config = dataclasses.replace(
        ModelConfig(), n_routed_experts=E, hidden_size=D, moe_intermediate_size=F_
    )
    experts = Experts(config)
    for name, tensor in (("gate_EFD", gate_EFD), ("up_EFD", up_EFD), ("down_EDF", down_EDF)):
        delattr(experts, name)
        setattr(experts, name, tensor)
    return experts


def sorted_dispatch(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, experts: Experts, /
) -> Tensor:
    """Sort the rows by expert, call `Experts.forward`, bring the rows back, weight and sum: a plain dispatcher."""
    K = experts_TK.shape[1]
    # Row r of the sorted rows is pair (token, slot) number pair_R[r].
    pair_R = experts_TK.flatten().argsort(stable=True)
    token_R = pair_R // K
    y_RD = experts(x_TD[token_R], experts_TK.flatten()[pair_R])
    weighted_RD = y_RD.float() * weights_TK.flatten()[pair_R, None]
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32).index_add(0, token_R, weighted_RD)
    return y_TD.to(x_TD.dtype)


def check_dispatcher(dispatcher: Dispatcher) -> None:
    """Hold a dispatcher to its contract: `dispatcher(x_TD, experts_TK, weights_TK, experts) -> y_TD`.

    Wherever the rows are computed, the result and all five gradients are those of the expert layer of `check_experts`.
    """

    def layer(
        x_TD: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        gate_EFD: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor,
        /,
    ) -> Tensor:
        return dispatcher(x_TD, experts_TK, weights_TK, experts_of(gate_EFD, up_EFD, down_EDF))

    check_experts(layer)


def torch_attention(
    q_BSNA: Tensor, k_BSMA: Tensor, v_BSMA: Tensor, documents_BS: Tensor | None = None
) -> Tensor:
    """Compute PyTorch's own attention with a written-out mask; key/value heads repeat for their query heads."""
    S = q_BSNA.shape[1]
    queries_per_key = q_BSNA.shape[2] // k_BSMA.shape[2]
    allowed_BSS = torch.ones(S, S, dtype=torch.bool).tril()[None]
    if documents_BS is not None:
        same_document_BSS = documents_BS[:, :, None] == documents_BS[:, None, :]
        allowed_BSS = allowed_BSS & same_document_BSS
    q = q_BSNA.transpose(1, 2)
    k = repeat(k_BSMA, "b s m a -> b (m repeat) s a", repeat=queries_per_key)
    v = repeat(v_BSMA, "b s m a -> b (m repeat) s a", repeat=queries_per_key)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed_BSS[:, None])
    return out.transpose(1, 2)


def check_attention(attend: Attend) -> None:
    """Hold causal grouped-query attention to its contract: `attend(q_BSNA, k_BSMA, v_BSMA, documents_BS) -> out_BSNA`.

    Equals PyTorch's scaled_dot_product_attention, gradients included, for any number of query heads per
    key/value head, any length, and rows packed with documents and padding; nothing a position must not see
    can change it.
    """
    heads_of = st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3)])

    @holds(
        seed=seeds,
        B=st.integers(1, 3),
        S=lengths,
        heads=heads_of,
        A=st.sampled_from([2, 8]),
        packed=st.booleans(),
    )
    def reference(seed: int, B: int, S: int, heads: tuple[int, int], A: int, packed: bool) -> None:
        """Compare the output and the gradients of q, k and v."""
        N, M = heads
        documents_BS = drawn_documents(seed, B, S) if packed else None
        # scores of size up to 30 * A^-1/2: sharp enough that a wrong scale or neighbour shows
        values = [
            normal(seed + 2, B, S, N, A, scale=2),
            normal(seed + 3, B, S, M, A, scale=2),
            normal(seed + 4, B, S, M, A),
        ]
        gradient = normal(seed + 5, B, S, N, A)
        results = []
        for function, dtype in ((attend, torch.float32), (torch_attention, torch.float64)):
            q, k, v = (value.to(dtype).requires_grad_() for value in values)
            out = function(q, k, v, documents_BS)
            gradients = torch.autograd.grad(out, (q, k, v), gradient.to(dtype))
            results.append([x.float() for x in (out, *gradients)])
        names = ("output", "gradient of q", "of k", "of v")
        for name, ours, theirs in zip(names, *results, strict=True):
            # float32 sums of up to 130 positions and 6 heads
            torch.testing.assert_close(
                ours, theirs, atol=2e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
            )

    @holds(seed=seeds, S=lengths, packed=st.booleans())
    def nothing_leaks(seed: int, S: int, packed: bool) -> None:
        """New keys and values at one position change that position and later ones of its document, no other."""
        documents_BS = drawn_documents(seed, 1, S) if packed else None
        q = normal(seed, 1, S, 2, 4)
        k = normal(seed + 1, 1, S, 1, 4)
        v = normal(seed + 2, 1, S, 1, 4)
        position = seed % S
        before = attend(q, k, v, documents_BS)
        k[:, position] = normal(seed + 3, 1, 1, 4)
        v[:, position] = 9.0
        after = attend(q, k, v, documents_BS)
        changed_S = (after != before).any(-1).any(-1)[0]
        sees_S = torch.arange(S) >= position
        if documents_BS is not None:
            sees_S &= documents_BS[0] == documents_BS[0, position]
        assert not (changed_S & ~sees_S).any(), (
            "a position changed that must not see the one that was changed"
        )
        assert changed_S[position], "a position must see itself"
