"""Contracts of the model's parts: router, rotary embedding, balance, experts, attention (paper 2.1, 2.4).

    from minglm.testing.model import check_attention, check_router
    check_attention(my_attention)
    check_router(lambda scores_TE, bias_E, config: my_router(scores_TE, bias_E, config.num_experts_per_tok))

Each `check_*` takes a callable with the signature of ours, draws its own shapes and values, and raises AssertionError
with the smallest counterexample that hypothesis finds. The expected values are written out from the equations, in
plain Python or float64, or come from PyTorch's own operations; none of them is computed by the code under test.
"""

import dataclasses

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from minglm.config import ModelConfig
from minglm.model.glm import GLM
from minglm.model.moe import Dispatcher, Experts
from minglm.testing.strategies import holds, numbers, seeds

# Longer than a chunk of `flash_attention`, shorter, and exactly one or two; a few of each are enough.
lengths = st.sampled_from([1, 2, 5, 63, 64, 65, 130])


def normal(seed, *shape, scale=1.0):
    """A float32 tensor of normal numbers that depends on the seed alone."""
    return scale * torch.randn(shape, generator=numbers(seed))


def drawn_documents(seed, B, S):
    """Packed rows: ids 0, 1, 2, ... int32 (B, S) that change at random places, then perhaps padding, id -1."""
    starts_BS = torch.rand(B, S, generator=numbers(seed)) < 4 / (S + 4)
    documents_BS = starts_BS.cumsum(1).int()
    padding_B1 = (torch.rand(B, 1, generator=numbers(seed + 1)) * 1.5 * S).int()
    return documents_BS.masked_fill(torch.arange(S)[None] >= padding_B1.clamp(min=1), -1)


def tiny_model(seed, **changes):
    """A GLM of one dense and two MoE layers, width 16 and 24 tokens, with changes to its config.

    Every value is drawn, biases, norm weights and selection biases too, and large enough that attention is sharp and
    the router decided: with values as small as at the start of training most mistakes change nothing visible.
    """
    config = ModelConfig(
        **{
            **{
                "vocab_size": 24,
                "hidden_size": 16,
                "num_hidden_layers": 3,
                "first_k_dense_replace": 1,
            },
            **{
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "rope_theta": 1e4,
            },
            **{
                "intermediate_size": 20,
                "moe_intermediate_size": 8,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
            },
            **{"max_position_embeddings": 256, **changes},
        }
    )
    model = GLM(config)
    with torch.no_grad():
        for i, (name, tensor) in enumerate([*model.named_parameters(), *model.named_buffers()]):
            tensor.copy_(normal(seed + i, *tensor.shape, scale=0.3) + ("norm" in name))
    return model


def plain_choice(scores_E, bias_E, config):
    """The chosen experts of one token from the definition, best first, in plain Python numbers."""
    biased = [s + b for s, b in zip(scores_E, bias_E)]
    size = len(biased) // config.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
    strength = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in groups]
    best = sorted(range(config.n_group), key=lambda g: (-strength[g], g))[: config.topk_group]
    allowed = [e for g in best for e in groups[g]]
    return sorted(allowed, key=lambda e: (-biased[e], e))[: config.num_experts_per_tok]


def check_router(route):
    """`route(scores_TE, bias_E, config) -> (experts_TK, weights_TK)` from sigmoid scores, like `select_experts` and `combine_weights`.

    It chooses by score plus bias within the best groups, equal values by lower index; its weights come from the scores
    alone and sum to the scaling factor; renaming experts commutes; with two experts or more the scores get a gradient.
    """

    @holds(
        seed=seeds,
        T=st.integers(1, 6),
        groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 3)]),
        size=st.integers(2, 5),
        K=st.integers(1, 4),
        coarse=st.booleans(),
    )
    def choice_and_weights(seed, T, groups, size, K, coarse):
        """Against the definition; coarse values make most experts equal, so that the order of equals is seen."""
        E = groups[0] * size
        config = dataclasses.replace(
            ModelConfig(),
            n_routed_experts=E,
            num_experts_per_tok=min(K, groups[1] * size),
            n_group=groups[0],
            topk_group=groups[1],
            norm_topk_prob=seed % 3 > 0,
            routed_scaling_factor=[1.0, 2.5][seed % 2],
        )
        scores_TE = torch.rand(T, E, generator=numbers(seed))
        # A bias that is negative everywhere changes no choice, but shows masks that are not minus infinity.
        bias_E = normal(seed + 1, E, scale=0.5) - 2.0 * (seed % 5 < 2)
        if coarse:  # eighths and quarters add without rounding, so plain Python finds the same ties
            scores_TE, bias_E = (scores_TE * 3 + 0.5).round() / 8, (bias_E * 2).round() / 4
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
    def renaming_commutes(seed, T, E):
        """Scores and bias in another order of the experts: the same experts under their new names, same weights."""
        config = dataclasses.replace(ModelConfig(), n_routed_experts=E, num_experts_per_tok=2)
        scores_TE, bias_E = torch.rand(T, E, generator=numbers(seed)), normal(seed + 1, E)
        order_E = torch.randperm(E, generator=numbers(seed + 2))
        experts_TK, weights_TK = route(scores_TE, bias_E, config)
        renamed_TK, same_TK = route(scores_TE[:, order_E], bias_E[order_E], config)
        assert torch.equal(order_E[renamed_TK], experts_TK), (
            "renaming the experts changes who is chosen"
        )
        torch.testing.assert_close(same_TK, weights_TK)

    @holds(seed=seeds, T=st.integers(1, 6), E=st.integers(3, 12), K=st.integers(2, 3))
    def learns(seed, T, E, K):
        """The weights' gradient reaches the scores of the chosen experts of every token, and no other score."""
        config = dataclasses.replace(ModelConfig(), n_routed_experts=E, num_experts_per_tok=K)
        scores_TE = (0.1 + 0.8 * torch.rand(T, E, generator=numbers(seed))).requires_grad_()
        experts_TK, weights_TK = route(scores_TE, normal(seed + 1, E), config)
        importance_TK = torch.arange(1.0, K + 1).expand(
            T, K
        )  # how much the loss wants of each choice: not all alike
        (gradient_TE,) = torch.autograd.grad((weights_TK * importance_TK).sum(), scores_TE)
        chosen_TE = torch.zeros(T, E, dtype=torch.bool).scatter_(1, experts_TK, True)
        assert gradient_TE[chosen_TE].view(T, K).abs().amax(1).min() > 0, (
            "a token's router gets no gradient"
        )
        assert not gradient_TE[~chosen_TE].any(), (
            "an expert that was not chosen gets a gradient through the weights"
        )


def check_rope(rotate):
    """`rotate(x_BSNA, positions_BS, rotary_dim, theta)`: x with the first `rotary_dim` of A dimensions rotated.

    Half-split layout: dimension i turns with dimension i + rotary_dim / 2 by position * theta^(-2 i / rotary_dim).
    Lengths stay, position 0 changes nothing, and dot products depend only on the distance of the positions.
    """
    shapes = st.tuples(
        st.integers(1, 3), st.integers(1, 8), st.integers(1, 3), st.sampled_from([4, 8, 16])
    )

    @holds(
        seed=seeds,
        shape=shapes,
        part=st.sampled_from([0, 0.5, 1]),
        theta=st.sampled_from([10_000.0, 1e6]),
    )
    def formula(seed, shape, part, theta):
        """Every rotated dimension against the equation in float64."""
        B, S, N, A = shape
        x_BSNA, R = normal(seed, *shape), round(A * part)
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
            a, b = x_BSNA[..., i].double(), x_BSNA[..., i + R // 2].double()
            first, second = (
                a * angle_BS1.cos() - b * angle_BS1.sin(),
                b * angle_BS1.cos() + a * angle_BS1.sin(),
            )
            # a float32 angle of up to 5000 is exact to 5000 * 2^-24 = 3e-4, times numbers of size up to 5
            torch.testing.assert_close(y_BSNA[..., i].double(), first, atol=4e-3, rtol=0)
            torch.testing.assert_close(y_BSNA[..., i + R // 2].double(), second, atol=4e-3, rtol=0)

    @holds(seed=seeds, A=st.sampled_from([4, 8, 16]), move=st.integers(0, 2000))
    def distance(seed, A, move):
        """Moving all positions by the same amount leaves every dot product of a query and a key as it was."""
        q_BSNA, k_BSNA = normal(seed, 1, 6, 1, A), normal(seed + 1, 1, 6, 1, A)
        positions_BS = torch.randint(0, 50, (1, 6), generator=numbers(seed + 2))
        dots = []
        for shift in (0, move):
            q, k = (rotate(x, positions_BS + shift, A // 2, 1e4)[0, :, 0] for x in (q_BSNA, k_BSNA))
            dots.append(q @ k.T)
        # the float32 angles at 2000 are exact to 1e-4; dot products here are of size up to 30
        torch.testing.assert_close(dots[0], dots[1], atol=1e-2, rtol=0)


def check_balance(update_expert_bias):
    """`update_expert_bias(bias_E, load_E, rate)`, in place: one step of the selection bias from how often each was chosen.

    Compared with each other, experts below the mean load rise and those above it fall, by exactly the rate; only the
    proportions of the load matter. A step from which its mean is subtracted passes too: no choice depends on that.
    """

    @holds(
        loads=st.lists(st.integers(0, 9), min_size=2, max_size=12),
        rate=st.sampled_from([0.0, 0.001, 0.1]),
        seed=seeds,
        tokens=st.sampled_from([1, 1000, 1 / 7]),
    )
    def sign(loads, rate, seed, tokens):
        """The difference of any two experts changes by the rate times the difference of their signs."""
        before_E = normal(seed, len(loads), scale=0.01)
        bias_E = before_E.clone()
        update_expert_bias(bias_E, torch.tensor(loads) * float(tokens), rate)
        change_E, mean = bias_E - before_E, sum(loads) / len(loads)
        expected_E = rate * torch.tensor(
            [float(mean > load) - float(mean < load) for load in loads]
        )
        if (
            abs(mean - round(mean)) > 1e-6 or tokens != 1 / 7
        ):  # sevenths may miss an exactly balanced mean by rounding
            message = f"loads {loads} change the bias by {change_E.tolist()}"
            error_E = (change_E - change_E.mean()) - (expected_E - expected_E.mean())
            assert error_E.abs().max() < 1e-7, message  # float32 numbers of size 0.1 at most


def plain_experts(x_TD, experts_TK, weights_TK, gate_EFD, up_EFD, down_EDF):
    """The expert layer, one token and one choice at a time, in float64."""
    rows = []
    for t in range(len(x_TD)):
        row_D = torch.zeros(x_TD.shape[1], dtype=torch.float64)
        for k, e in enumerate(experts_TK[t].tolist()):
            inner_F = F.silu(gate_EFD[e].double() @ x_TD[t].double()) * (
                up_EFD[e].double() @ x_TD[t].double()
            )
            row_D = row_D + weights_TK[t, k].double() * (down_EDF[e].double() @ inner_F)
        rows.append(row_D)
    return torch.stack(rows) if rows else 0 * x_TD.double()


def check_experts(dispatch):
    """`dispatch(x_TD, experts_TK, weights_TK, gate_EFD, up_EFD, down_EDF) -> y_TD` like `grouped_experts`.

    It computes every token's weighted sum over its experts, with all five gradients, however unevenly the tokens fall:
    experts without tokens, all tokens with one expert, one token, none.
    """

    @holds(
        seed=seeds,
        T=st.integers(0, 12),
        E=st.integers(1, 6),
        K=st.integers(1, 3),
        widths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
        crowd=st.booleans(),
    )
    def sum_over_choices(seed, T, E, K, widths, crowd):
        """Against the loop in float64; a crowd sends every token to the first K experts."""
        K, (D, width) = min(K, E), widths
        scores_TE = torch.rand(T, E, generator=numbers(seed))
        experts_TK = (
            (-torch.arange(E) * 2.0 if crowd else torch.zeros(E)).add(scores_TE).topk(K).indices
        )
        values = [
            normal(seed + 1, T, D),
            torch.rand(T, K, generator=numbers(seed + 2)),
            normal(seed + 3, E, width, D),
            normal(seed + 4, E, width, D),
            normal(seed + 5, E, D, width),
        ]
        gradient_TD = normal(seed + 6, T, D)
        results = []
        for function in (dispatch, plain_experts):
            x, weights, *matrices = (v.clone().requires_grad_() for v in values)
            y_TD = function(x, experts_TK, weights, *matrices)
            wanted = [x, weights, *matrices]
            found = torch.autograd.grad(y_TD, wanted, gradient_TD.to(y_TD.dtype), allow_unused=True)
            zeros = [torch.zeros_like(v) if g is None else g for g, v in zip(found, wanted)]
            results.append([y_TD.float(), *zeros])
        names = ("output", "gradient of x", "of the weights", "of gate", "of up", "of down")
        for name, ours, theirs in zip(names, *results):
            # float32 sums of up to 12 * 6 * 6 products of four normal numbers
            torch.testing.assert_close(
                ours, theirs, atol=3e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
            )

    @holds(seed=seeds, T=st.integers(1, 9))
    def dtype_of_rows(seed, T):
        """Matrices kept in float32 serve rows in bfloat16, in which the result is: as matrices rounded to it."""
        x_TD, experts_TK = (
            normal(seed, T, 4).bfloat16(),
            torch.rand(T, 5, generator=numbers(seed + 1)).topk(2).indices,
        )
        weights_TK = torch.rand(T, 2, generator=numbers(seed + 2))
        matrices = [
            normal(seed + 3 + i, 5, *shape) for i, shape in enumerate([(3, 4), (3, 4), (4, 3)])
        ]
        y_TD = dispatch(x_TD, experts_TK, weights_TK, *matrices)
        rounded_TD = dispatch(x_TD, experts_TK, weights_TK, *(w.bfloat16() for w in matrices))
        torch.testing.assert_close(y_TD, rounded_TD, atol=0, rtol=0)

    @holds(seed=seeds, T=st.integers(1, 9))
    def order_of_tokens(seed, T):
        """Tokens in another order give the same rows in that order."""
        x_TD, experts_TK = (
            normal(seed, T, 4),
            torch.rand(T, 5, generator=numbers(seed + 1)).topk(2).indices,
        )
        weights_TK = torch.rand(T, 2, generator=numbers(seed + 2))
        matrices = [
            normal(seed + 3 + i, 5, *shape) for i, shape in enumerate([(3, 4), (3, 4), (4, 3)])
        ]
        order_T = torch.randperm(T, generator=numbers(seed + 9))
        y_TD = dispatch(x_TD, experts_TK, weights_TK, *matrices)
        moved_TD = dispatch(x_TD[order_T], experts_TK[order_T], weights_TK[order_T], *matrices)
        torch.testing.assert_close(moved_TD, y_TD[order_T], atol=1e-5, rtol=1e-5)  # float32


def experts_of(gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor) -> Experts:
    """Return an `Experts` module over these tensors, which keep their place in the graph of gradients."""
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
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, experts: Experts
) -> Tensor:
    """The plain form of a dispatcher: sort the rows by expert, call `Experts.forward`, bring back, weight and sum."""
    K = experts_TK.shape[1]
    # Row r of the sorted rows is pair (token, slot) number pair_R[r].
    pair_R = experts_TK.flatten().argsort(stable=True)
    token_R = pair_R // K
    rows_per_expert_E = torch.bincount(experts_TK.flatten(), minlength=len(experts.gate_EFD))
    y_RD = experts(x_TD[token_R], rows_per_expert_E)
    weighted_RD = y_RD.float() * weights_TK.flatten()[pair_R, None]
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32).index_add(0, token_R, weighted_RD)
    return y_TD.to(x_TD.dtype)


def check_dispatcher(dispatcher: Dispatcher) -> None:
    """Hold a dispatcher to its contract: `dispatcher(x_TD, experts_TK, weights_TK, experts) -> y_TD`.

    Wherever the tokens are computed, the result and all five gradients are those of the expert layer of `check_experts`.
    """

    def layer(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, *matrices: Tensor) -> Tensor:
        return dispatcher(x_TD, experts_TK, weights_TK, experts_of(*matrices))

    check_experts(layer)


def torch_attention(q_BSNA, k_BSMA, v_BSMA, documents_BS=None):
    """PyTorch's own attention with a written-out mask; key/value heads repeated for their query heads."""
    S, repeat = q_BSNA.shape[1], q_BSNA.shape[2] // k_BSMA.shape[2]
    allowed = torch.ones(S, S, dtype=torch.bool).tril()[None]
    if documents_BS is not None:
        allowed = allowed & (documents_BS[:, :, None] == documents_BS[:, None, :])
    k, v = (x.repeat_interleave(repeat, dim=2).transpose(1, 2) for x in (k_BSMA, v_BSMA))
    out = F.scaled_dot_product_attention(q_BSNA.transpose(1, 2), k, v, attn_mask=allowed[:, None])
    return out.transpose(1, 2)


def check_attention(attend):
    """`attend(q_BSNA, k_BSMA, v_BSMA, documents_BS=None) -> out_BSNA`: causal grouped-query attention.

    Equals PyTorch's scaled_dot_product_attention, gradients included, for any number of query heads per key/value
    head, any length, and rows packed with documents and padding; nothing a position must not see can change it.
    """
    heads = st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3)])

    @holds(
        seed=seeds,
        B=st.integers(1, 3),
        S=lengths,
        heads=heads,
        A=st.sampled_from([2, 8]),
        packed=st.booleans(),
    )
    def reference(seed, B, S, heads, A, packed):
        """Output and the gradients of q, k and v."""
        (N, M), documents_BS = heads, drawn_documents(seed, B, S) if packed else None
        # scores of size up to 30 * A^-1/2: sharp enough that a wrong scale or neighbour shows
        values = [
            normal(seed + 2, B, S, N, A, scale=2),
            normal(seed + 3, B, S, M, A, scale=2),
            normal(seed + 4, B, S, M, A),
        ]
        gradient = normal(seed + 5, B, S, N, A)
        results = []
        for function, dtype in ((attend, torch.float32), (torch_attention, torch.float64)):
            inputs = [v.to(dtype).requires_grad_() for v in values]
            out = function(*inputs, documents_BS)
            results.append(
                [x.float() for x in (out, *torch.autograd.grad(out, inputs, gradient.to(dtype)))]
            )
        for name, ours, theirs in zip(("output", "gradient of q", "of k", "of v"), *results):
            # float32 sums of up to 130 positions and 6 heads
            torch.testing.assert_close(
                ours, theirs, atol=2e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
            )

    @holds(seed=seeds, S=lengths, packed=st.booleans())
    def nothing_leaks(seed, S, packed):
        """New keys and values at one position change that position and later ones of its document, no other."""
        documents_BS = drawn_documents(seed, 1, S) if packed else None
        q, k, v = (
            normal(seed, 1, S, 2, 4),
            normal(seed + 1, 1, S, 1, 4),
            normal(seed + 2, 1, S, 1, 4),
        )
        at = seed % S
        before = attend(q, k, v, documents_BS)
        k[:, at], v[:, at] = normal(seed + 3, 1, 1, 4), 9.0
        changed_S = (attend(q, k, v, documents_BS) != before).any(-1).any(-1)[0]
        sees_S = torch.arange(S) >= at
        if packed:
            sees_S &= documents_BS[0] == documents_BS[0, at]
        assert not (changed_S & ~sees_S).any(), (
            "a position changed that must not see the one that was changed"
        )
        assert changed_S[at], "a position must see itself"
