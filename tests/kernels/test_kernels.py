"""The fast forms of the kernels against their plain forms: output head with loss, and the grouped products.

(The attention kernels are in test_attention.py, the expert layer in test_moe.py, Newton-Schulz in test_muon.py.)
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minglm.kernels.attention import chunked as chunked_attention
from minglm.kernels.attention import flash_attention
from minglm.kernels.cross_entropy import chunked as chunked_loss
from minglm.kernels.cross_entropy import linear_cross_entropy, token_log_probabilities
from minglm.kernels.cross_entropy.eager import cross_entropy, log_probabilities
from minglm.kernels.experts import grouped_mm, grouped_outer
from minglm.kernels.norm.eager import norm
from minglm.kernels.norm.fused import add_norm_fused
from minglm.kernels.qk_norm_rope.eager import qk_norm_rope
from minglm.kernels.qk_norm_rope.fused import qk_norm_rope_fused
from minglm.lesson import peak_bytes
from minglm.model.rope import angles
from minglm.testing.model import normal
from minglm.testing.strategies import numbers, seeds

# Tokens, width, vocabulary.
sizes = st.tuples(st.integers(1, 20), st.integers(1, 6), st.integers(1, 9))


def problem(seed, shape):
    """Draw hidden states, an output head, targets, and weights of which a third is zero."""
    T, D, V = shape
    targets_T = torch.randint(0, V, (T,), generator=numbers(seed + 2))
    weights_T = (torch.rand(T, generator=numbers(seed + 3)) - 0.3).clamp(min=0)
    return normal(seed, T, D, scale=2), normal(seed + 1, V, D, scale=2), targets_T, weights_T


def with_gradients(function, hidden_TD, head_VD, targets_T, weights_T, factor=1.0):
    """Return a loss and the gradients of hidden states and head."""
    inputs = [x.clone().requires_grad_() for x in (hidden_TD, head_VD)]
    loss = function(*inputs, targets_T, weights_T)
    return loss.detach(), *torch.autograd.grad(factor * loss, inputs)


@given(
    seed=seeds,
    shape=sizes,
    chunk=st.sampled_from([1, 3, 7, 2048]),
    factor=st.sampled_from([1.0, -0.3]),
)
def test_linear_cross_entropy_equals_the_plain_form(seed, shape, chunk, factor):
    """Loss and gradients are those of PyTorch's cross_entropy, however the tokens are cut into chunks."""
    values = problem(seed, shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_loss, "CHUNK", chunk)
        found = with_gradients(linear_cross_entropy, *values, factor=factor)
    hidden_TD, head_VD, targets_T, weights_T = values
    exact = with_gradients(
        cross_entropy, hidden_TD.double(), head_VD.double(), targets_T, weights_T.double(), factor
    )
    for ours, plain in zip(found, exact):
        # float32; logits up to 60, so a loss is exact to 60 * 2^-24, twenty of them summed
        torch.testing.assert_close(ours, plain.float(), atol=2e-4, rtol=1e-4)


def written_out(hidden_TD, head_VD, targets_T, weights_T):
    """Compute the equation of the module's docstring."""
    logits_TV = hidden_TD @ head_VD.T
    chosen_T = torch.stack([logits_TV[t, v] for t, v in enumerate(targets_T.tolist())])
    return (weights_T * (torch.logsumexp(logits_TV, 1) - chosen_T)).sum()


@given(seed=seeds, shape=sizes)
def test_plain_form_is_its_equation(seed, shape):
    """The oracle above is itself logsumexp minus the target's logit, weighted; so is the sum of its log-probabilities."""
    values = problem(seed, shape)
    hidden_TD, head_VD, targets_T, weights_T = values
    logp_T, _ = log_probabilities(hidden_TD, head_VD, targets_T)
    for loss in (cross_entropy(*values), -(weights_T * logp_T).sum()):
        # float32.
        torch.testing.assert_close(loss, written_out(*values), atol=1e-4, rtol=1e-4)


@given(shape=sizes, seed=seeds, junk=st.sampled_from([float("nan"), float("inf"), 1e30]))
def test_all_masked_is_exactly_zero(shape, seed, junk):
    """Without any target the loss is 0 and so are the gradients, even where the hidden states are not finite."""
    hidden_TD, head_VD, targets_T, weights_T = problem(seed, shape)
    found = with_gradients(
        linear_cross_entropy,
        torch.full_like(hidden_TD, junk),
        head_VD,
        targets_T,
        torch.zeros_like(weights_T),
    )
    assert all(not x.any() for x in found)


@given(seed=seeds, shape=sizes)
def test_masked_tokens_are_never_read(seed, shape):
    """Junk in the hidden state of a token of weight zero changes nothing and gets no gradient."""
    hidden_TD, head_VD, targets_T, weights_T = problem(seed, shape)
    before = with_gradients(linear_cross_entropy, hidden_TD, head_VD, targets_T, weights_T)
    hidden_TD[weights_T == 0] = float("nan")
    after = with_gradients(linear_cross_entropy, hidden_TD, head_VD, targets_T, weights_T)
    assert all(torch.equal(a, b) for a, b in zip(before, after))


@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
def test_extreme_logits_stay_finite(size):
    """Logits far beyond what exp can hold give the loss of float64."""
    values = problem(3, (12, 4, 8))
    hidden_TD, head_VD, targets_T, weights_T = size * values[0], *values[1:]
    found = with_gradients(linear_cross_entropy, hidden_TD, head_VD, targets_T, weights_T)
    exact = with_gradients(
        cross_entropy, hidden_TD.double(), head_VD.double(), targets_T, weights_T.double()
    )
    for ours, plain in zip(found, exact):
        # float32, relative to the size.
        torch.testing.assert_close(ours, plain.float(), atol=1e-4, rtol=1e-4)


@given(seed=seeds, shape=sizes)
def test_bfloat16_is_summed_in_float32(seed, shape):
    """Hidden states in bfloat16 give a float32 loss, as near to the exact one as their products allow."""
    hidden_TD, head_VD, targets_T, weights_T = problem(seed, shape)
    rounded = hidden_TD.bfloat16(), head_VD.bfloat16()
    loss, dhidden_TD, dhead_VD = with_gradients(
        linear_cross_entropy, *rounded, targets_T, weights_T
    )
    exact = cross_entropy(*(x.double() for x in rounded), targets_T, weights_T.double())
    assert loss.dtype == torch.float32 and dhidden_TD.dtype == dhead_VD.dtype == torch.bfloat16
    # a logit of up to 60 in bfloat16 is off by up to 2^-3, and each loss is a difference of two
    assert abs(loss.item() - exact.item()) < 0.25 * max(1.0, weights_T.sum().item())


@given(tokens=st.integers(1, 200_000))
def test_chunks_of_a_gpu_are_even(tokens):
    """As few chunks as the bound on their bytes allows, and the last is shorter by less than a token a chunk."""
    head_VD = torch.empty(151_552, 5120, dtype=torch.bfloat16, device="meta")
    chunk = chunked_loss._gpu_chunk(tokens, head_VD)
    chunks = math.ceil(tokens / chunk)
    assert chunks == math.ceil(tokens * 2 * 151_552 / chunked_loss.GPU_CHUNK_BYTES)
    assert 0 <= chunks * chunk - tokens < chunks


def test_a_chunk_of_a_gpu_is_2048_tokens():
    """With GLM-4.5's head in bfloat16."""
    head_VD = torch.empty(151_552, 5120, dtype=torch.bfloat16, device="meta")
    assert chunked_loss._gpu_chunk(2**14, head_VD) == 2048


def test_logits_are_in_memory_a_chunk_at_a_time(monkeypatch):
    """Beyond inputs and gradients the loss holds the logits of one chunk; the plain form, those of all tokens."""
    monkeypatch.setattr(chunked_loss, "CHUNK", 8)
    T, D, V = 64, 4, 8192
    values = problem(0, (T, D, V))
    # `with_gradients` copies the inputs; each gradient is multiplied once, and the head's summed over the chunks.
    allowed = 4 * 4 * (T * D + V * D) + 2 * 4 * 8 * V
    ours = peak_bytes(lambda: with_gradients(linear_cross_entropy, *values))
    assert ours < allowed < 4 * T * V < peak_bytes(lambda: with_gradients(cross_entropy, *values))


@given(seed=seeds, shape=sizes, temperature=st.floats(0.3, 3))
def test_token_log_probabilities(seed, shape, temperature):
    """Log-probabilities are log_softmax of the divided logits; the entropy is theirs and carries no gradient."""
    hidden_TD, head_VD, targets_T, _ = problem(seed, shape)
    hidden_TD.requires_grad_()
    logp_T, entropy_T = token_log_probabilities(hidden_TD, head_VD, targets_T, temperature)
    full_TV = F.log_softmax(hidden_TD @ head_VD.T / temperature, -1)
    torch.testing.assert_close(logp_T, full_TV[torch.arange(len(targets_T)), targets_T])
    torch.testing.assert_close(
        entropy_T, torch.distributions.Categorical(logits=full_TV).entropy().detach()
    )
    assert logp_T.requires_grad and not entropy_T.requires_grad


@given(seed=seeds, loads=st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_grouped_products_are_loops(seed, loads):
    """Every expert multiplies its own rows, and an expert without rows has an outer product of zero."""
    T, E = sum(loads), len(loads)
    x_TD = normal(seed, T, 3)
    y_TF = normal(seed + 1, T, 2)
    w_EDF = normal(seed + 2, E, 3, 2)
    ends_E = torch.tensor(loads).cumsum(0).int()
    products, outers = grouped_mm(x_TD, w_EDF, ends_E), grouped_outer(x_TD, y_TF, ends_E)
    assert products.shape == (T, 2) and outers.shape == (E, 3, 2)
    start = 0
    for e, count in enumerate(loads):
        rows = slice(start, start + count)
        # Three products.
        torch.testing.assert_close(products[rows], x_TD[rows] @ w_EDF[e], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(outers[e], x_TD[rows].T @ y_TF[rows], atol=1e-6, rtol=1e-5)
        start += count


def identical(mine, other, inputs, upstreams):
    """Tell whether two functions of the same inputs give the same outputs and gradients, bit for bit."""
    results = []
    for function in (mine, other):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*(leaf * 1 for leaf in leaves))
        results.append([*out, *torch.autograd.grad(out, leaves, upstreams[: len(out)])])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def error_by_hand(by_hand, plain, inputs, weights, upstreams, dtype):
    """Return the largest error of results and gradients, beside the plain form in float64, as a share of what they are made of.

    A norm divides by the length of its rows, and so does the size of its gradient and of every error in it.
    """
    results = []
    for function, kind in ((by_hand, dtype), (plain, torch.float64)):
        leaves = [x.to(dtype).to(kind).requires_grad_() for x in inputs]
        leaves += [w.to(torch.promote_types(kind, torch.float32)).requires_grad_() for w in weights]
        out = function(*leaves)
        upstream = [g.to(dtype).to(kind) for g in upstreams[: len(out)]]
        results.append([*out, *torch.autograd.grad(out, leaves, upstream)])

    # The sum of the inputs is normed too, where they can be added.
    normed = list(inputs)
    if len({x.shape for x in inputs}) == 1:
        normed.append(sum(inputs))
    largest_inverse = max(float((x.square().mean(-1) + 1e-5).rsqrt().max()) for x in normed)
    largest = max(float(x.abs().max()) for x in (*inputs, *weights, *upstreams))
    size = (1 + largest_inverse) * (1 + largest) ** 3
    errors = [float((a - b).abs().max()) for a, b in zip(*results)]
    return max(errors) / size


# one rounding of the result in bfloat16, and of the sum that is normed; sums over up to 18 rows
NEAR = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


def share_rounded_otherwise(form, seed):
    """Return for how many numbers a norm in bfloat16 is not the exact one, rounded before and after the weight."""
    x_TD = normal(seed, 32, 64).bfloat16()
    weight_D = normal(seed + 1, 64).bfloat16().float()
    out_TD, _ = form(x_TD, weight_D, 1e-5)
    assert out_TD.dtype == torch.bfloat16
    exact_TD = x_TD.double()
    exact_TD = exact_TD / (exact_TD.square().mean(1, keepdim=True) + 1e-5).sqrt()
    twice_TD = (exact_TD.bfloat16().float() * weight_D).bfloat16()
    return (out_TD != twice_TD).float().mean()


@given(seed=seeds)
def test_the_plain_norm_of_bfloat16_is_rounded_before_the_weight(seed):
    """As in the released model: the norm of x is rounded to bfloat16, and then its product with the weight."""
    # The float32 norm, off by 2^-22, lies beyond a middle of two bfloat16 numbers once in some 10,000.
    assert share_rounded_otherwise(norm, seed) < 0.01


def test_a_norm_that_is_rounded_once_is_found():
    """Broken: the hand-written form, which rounds only the product."""
    assert share_rounded_otherwise(add_norm_fused, 0) > 0.1


@given(
    seed=seeds,
    rows=st.integers(1, 9),
    width=st.integers(1, 40),
    added=st.booleans(),
    dtype=st.sampled_from([*NEAR]),
)
def test_norm_by_hand_is_that_of_autograd(seed, rows, width, added, dtype):
    """The written-out backward gives the gradients of the plain form, the stream's later gradient included."""
    inputs = [normal(seed, 2, rows, width)] + ([normal(seed + 2, 2, rows, width)] if added else [])
    upstreams = normal(seed + 3, 2, rows, width), normal(seed + 4, 2, rows, width)

    def form(f):
        return lambda x, *rest: f(x, rest[-1], 1e-5, *rest[:-1])

    error = error_by_hand(
        form(add_norm_fused), form(norm), inputs, [normal(seed + 1, width)], upstreams, dtype
    )
    assert error < NEAR[dtype]


@given(
    seed=seeds,
    length=st.integers(1, 9),
    heads=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    half=st.integers(1, 4),
    rest=st.integers(0, 5),
    dtype=st.sampled_from([*NEAR]),
)
def test_norm_and_rotation_by_hand_are_those_of_autograd(
    seed, length, heads, kv_heads, half, rest, dtype
):
    """So do QK-norm and rotation as one operation, with any part of the head rotating."""
    A = 2 * half + rest
    inputs = [normal(seed, 2, length, heads, A), normal(seed + 1, 2, length, kv_heads, A)]
    cos_sin = angles(torch.arange(length)[None], 2 * half, 1e4)
    forms = [
        lambda *leaves, f=f: f(*leaves, *cos_sin, 1e-5) for f in (qk_norm_rope_fused, qk_norm_rope)
    ]
    weights = [normal(seed + 2, A), normal(seed + 3, A)]
    upstreams = [normal(seed + 4, *x.shape) for x in inputs]
    assert error_by_hand(*forms, inputs, weights, upstreams, dtype) < NEAR[dtype]


@given(seed=seeds, length=st.integers(2, 150), packed=st.booleans())
def test_attention_that_keeps_its_weights_is_the_same(seed, length, packed):
    """Weights kept for the backward pass are the bits that would be computed again."""
    q, k, v = (normal(seed + i, 2, length, 4 if i == 0 else 2, 6) for i in range(3))
    documents_BS = (torch.arange(length) // 37).expand(2, -1) if packed else None
    forms = []
    for keep in (0, 1000):

        def form(*inputs, keep=keep):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(chunked_attention, "SAVE_SCORES_BYTES", keep)
                return [flash_attention(*inputs, documents_BS)]

        forms.append(form)
    assert identical(*forms, [q, k, v], [normal(seed + 3, 2, length, 4, 6)])
