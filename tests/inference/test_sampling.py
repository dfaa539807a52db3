"""Sampling: enumerated distributions, the nucleus, and random numbers that belong to the request."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.inference.request import Request
from minglm.inference.sampling import (
    SamplerSettings,
    cut,
    draw,
    prompt_scores,
    sample,
    sample_next,
    uniforms,
)
from minglm.testing.inference import check_sampler
from minglm.testing.strategies import numbers, seeds


def test_sampler_keeps_the_contract():
    """Softmax at the temperature, cut to the nucleus; greedy at 0; rows alone as in a batch."""
    check_sampler(sample)


def ignores_the_temperature(logits_BV, temperature_B, top_p_B, uniform_B):
    """Broken: sample at temperature 1, except for greedy rows."""
    return sample(logits_BV, temperature_B.masked_fill(temperature_B > 0, 1.0), top_p_B, uniform_B)


def multiplies_by_the_temperature(logits_BV, temperature_B, top_p_B, uniform_B):
    """Broken: multiply by the temperature instead of dividing."""
    return sample(
        logits_BV, torch.where(temperature_B > 0, 1 / temperature_B, 0.0), top_p_B, uniform_B
    )


def nucleus_without_its_last(logits_BV, temperature_B, top_p_B, uniform_B):
    """Broken: stop before the mass is reached, as when `cumsum > top_p` cuts the token that crosses it."""
    probabilities_BV = (logits_BV / temperature_B.clamp(min=1e-6)[:, None]).softmax(-1)
    ordered, index = probabilities_BV.sort(descending=True, stable=True)
    outside = ordered.cumsum(-1) > top_p_B[:, None] + 1e-5
    outside[:, 0] = False
    cut_BV = logits_BV.masked_fill(torch.zeros_like(outside).scatter(1, index, outside), -1e9)
    tokens_B, _ = sample(cut_BV, temperature_B, torch.ones_like(top_p_B), uniform_B)
    return tokens_B, sample(logits_BV, temperature_B, top_p_B, uniform_B)[1]


def logprob_after_the_nucleus(logits_BV, temperature_B, top_p_B, uniform_B):
    """Broken: report the log-probability within the nucleus, which the loss would not reproduce."""
    tokens_B, logprobs_B = sample(logits_BV, temperature_B, top_p_B, uniform_B)
    p_BV = (logits_BV / temperature_B.clamp(min=1e-6)[:, None]).softmax(-1)
    return tokens_B, logprobs_B - cut(p_BV, top_p_B).sum(-1).log()


def shares_one_number(logits_BV, temperature_B, top_p_B, uniform_B):
    """Broken: use the first row's uniform number for all rows."""
    return sample(logits_BV, temperature_B, top_p_B, uniform_B[:1].expand_as(uniform_B))


@pytest.mark.parametrize(
    "broken",
    [
        ignores_the_temperature,
        multiplies_by_the_temperature,
        nucleus_without_its_last,
        logprob_after_the_nucleus,
        shares_one_number,
    ],
)
def test_contract_finds_broken_samplers(broken):
    """Each mistake others have made is found."""
    with pytest.raises(AssertionError):
        check_sampler(broken)


def draws(logits_V, temperature, top_p, seed, count):
    """Count each token in `count` draws whose numbers come from the hash: token 0, 1, 2, ... of a seed."""
    index_B = torch.arange(count)
    rows = (
        logits_V.expand(count, -1),
        torch.full((count,), temperature),
        torch.full((count,), top_p),
    )
    tokens_B, _ = sample(*rows, uniforms(torch.full((count,), seed), index_B))
    return torch.bincount(tokens_B, minlength=len(logits_V))


@given(
    seed=st.integers(0, 10_000), V=st.integers(2, 6), temperature=st.sampled_from([0.5, 1.0, 2.0])
)
def test_hashed_draws_follow_the_softmax(seed, V, temperature):
    """20,000 draws of one request: the chi-square statistic is what random draws would give."""
    logits_V = torch.randn(V, generator=numbers(seed))
    expected_V = 20_000 * (logits_V.double() / temperature).softmax(0)
    counts_V = draws(logits_V, temperature, 1.0, seed, 20_000)
    statistic = ((counts_V - expected_V) ** 2 / expected_V).sum()
    # mean V - 1 and at most 5 here; with 5 degrees of freedom a value above 35 has a chance of 1.5e-6
    assert statistic < 35, f"chi-square {statistic:.1f} for counts {counts_V.tolist()}"


@given(seed=seeds, rows=st.integers(1, 4), V=st.integers(1, 9), top_p=st.floats(0, 1))
def test_nucleus_is_the_smallest_set_with_the_mass(seed, rows, V, top_p):
    """What stays has the mass asked for, would not without its least token, and nothing likelier is left out."""
    p_BV = torch.randn(rows, V, generator=numbers(seed)).softmax(-1)
    kept_BV = cut(p_BV, torch.full((rows,), top_p))
    for p_V, kept_V in zip(p_BV, kept_BV):
        inside = kept_V > 0
        assert inside.any() and torch.equal(kept_V[inside], p_V[inside])
        assert kept_V.sum() >= top_p - 1e-5  # float32 sums to one
        assert kept_V.sum() - kept_V[inside].min() < top_p + 1e-5 or inside.sum() == 1
        assert inside.all() or p_V[~inside].max() <= p_V[inside].min()


@given(seed=seeds, S=st.integers(1, 5), V=st.integers(3, 9), count=st.integers(0, 3))
def test_scores_of_a_prompt_by_definition(seed, S, V, count):
    """The log-softmax of each target, its rank among all tokens, and the most likely tokens with theirs."""
    logits_SV = torch.randn(S, V, generator=numbers(seed))
    targets = torch.randint(V, (S,), generator=numbers(seed + 1)).tolist()
    found = prompt_scores(logits_SV, targets, count)
    assert len(found) == S
    for logits_V, target, score in zip(logits_SV, targets, found):
        logp_V = logits_V.log_softmax(0)
        assert score.token == target
        assert score.logprob == pytest.approx(logp_V[target].item(), abs=1e-5)
        assert score.rank == 1 + sum(value > logp_V[target] for value in logp_V)
        likely = logp_V.sort(descending=True).indices[:count].tolist()
        assert [token for token, _ in score.top] == likely
        expected = logp_V[likely].tolist()
        assert [logprob for _, logprob in score.top] == pytest.approx(expected, abs=1e-5)
    assert prompt_scores(logits_SV[:0], [], count) == []


@given(seed=seeds, counts=st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_each_request_gets_the_log_probabilities_it_asked_for(seed, counts):
    """As many of the most likely tokens of its row, whatever the others of the batch asked for."""
    logits_BV = torch.randn(len(counts), 7, generator=numbers(seed))
    rows = [SimpleNamespace(request=Request([1], top_logprobs=n), rules=None) for n in counts]
    batch = SamplerSettings(rows, logits_BV.device)
    with torch.inference_mode():  # as the engine does, so that the kernel in C may be chosen
        found = sample_next(logits_BV, batch, torch.zeros(len(counts), dtype=torch.long))
    order = logits_BV.sort(descending=True).indices.tolist()
    for count, likely, top in zip(counts, order, found.top_logprobs, strict=True):
        assert [token for token, _ in top] == likely[:count]


def test_cuts_at_their_bounds():
    """The smallest set with at least the share; as many as top-k; at least the share of the most likely token."""
    p_BV = torch.tensor([[0.5, 0.25, 0.125, 0.125]])  # sums that float32 holds exactly
    for top_p, count in ((0.0, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (1.0, 4)):
        assert (cut(p_BV, top_p_B=torch.tensor([top_p])) > 0).sum() == count
    for top_k, count in ((0, 4), (1, 1), (2, 2), (4, 4), (9, 4)):
        assert (cut(p_BV, top_k_B=torch.tensor([top_k])) > 0).sum() == count
    for min_p, count in ((0.0, 4), (0.25, 4), (0.26, 2), (0.5, 2), (0.51, 1), (1.0, 1)):
        assert (cut(p_BV, min_p_B=torch.tensor([min_p])) > 0).sum() == count
    # top-p is a share of what top-k left: 0.5 of 0.75
    found = cut(p_BV, torch.tensor([0.6]), torch.tensor([2]))
    assert torch.equal(found, torch.tensor([[0.5, 0.0, 0.0, 0.0]]))


@given(seed=seeds, V=st.integers(1, 70), zeros=st.floats(0, 0.9))
def test_a_draw_is_where_the_cumulated_sum_passes(seed, V, zeros):
    """Also at u of nearly one and at the ends of tokens, where rounding decides: never a token of probability 0."""
    q_BV = torch.rand(40, V, generator=numbers(seed))
    q_BV[torch.rand(40, V, generator=numbers(seed + 1)) < zeros] = 0.0
    q_BV[:, 0] += q_BV.sum(1) == 0  # something to draw
    ends_BV = q_BV.double().cumsum(1)
    share_BV = ends_BV / ends_BV[:, -1:]
    at_B = torch.randint(0, V, (40,), generator=numbers(seed + 2))
    edge_B = share_BV[torch.arange(40), at_B]
    one = torch.tensor(1.0, dtype=torch.float64)
    for u_B in (
        torch.rand(40, generator=numbers(seed + 3), dtype=torch.float64),
        torch.zeros(40, dtype=torch.float64),
        torch.full((40,), 1 - 2**-53, dtype=torch.float64),
        edge_B.clamp(max=1 - 2**-53),
        torch.nextafter(edge_B, one).clamp(max=1 - 2**-53),
    ):
        tokens_B = draw(q_BV, u_B)
        assert (q_BV.gather(1, tokens_B[:, None]) > 0).all()
        high_B = share_BV.gather(1, tokens_B[:, None])[:, 0]
        low_B = high_B - (q_BV / ends_BV[:, -1:]).gather(1, tokens_B[:, None])[:, 0]
        assert ((low_B <= u_B + 1e-12) & (u_B <= high_B + 1e-12)).all()  # float64 sums of 70


def test_top_p_one_keeps_every_token_beside_other_rows():
    """A row without a nucleus loses nothing when another row of the batch has one, whatever the rounding of a sum."""
    p_BV = torch.randn(200, 500, generator=numbers(1)).mul(4).softmax(-1)
    top_p_B = torch.ones(200)
    top_p_B[0] = 0.5
    assert torch.equal(cut(p_BV, top_p_B)[1:], p_BV[1:])


@given(start=st.integers(-(2**40), 2**40), index=st.integers(0, 2**20))
def test_uniforms_are_uniform(start, index):
    """Over seeds in a row, and over tokens in a row: mean, variance, and no correlation of neighbours."""
    n = 10_000
    range_B = torch.arange(n)
    same_B = torch.zeros(n, dtype=torch.int64)
    for seeds_B, index_B in ((start + range_B, same_B + index), (same_B + start, index + range_B)):
        u_B = uniforms(seeds_B, index_B)
        assert u_B.dtype == torch.float64
        assert u_B.min() >= 0
        assert u_B.max() < 1
        # standard deviations: of the mean 0.0029, of the variance 0.0007, of the correlation 0.01; five of each
        assert abs(u_B.mean() - 0.5) < 0.0145
        assert abs(u_B.var() - 1 / 12) < 0.0038
        assert abs(torch.corrcoef(torch.stack([u_B[1:], u_B[:-1]]))[0, 1]) < 0.05
        counts = torch.histc(u_B.float(), bins=20, min=0, max=1)
        # 19 degrees of freedom: a chance of 1.4e-8.
        assert ((counts - n / 20) ** 2 / (n / 20)).sum() < 75


def test_uniforms_of_neighbouring_requests_are_unrelated():
    """Seeds and token numbers that add up to the same give different numbers: no request shifts another's."""
    seeds_B, index_B = (
        x.flatten() for x in torch.meshgrid(torch.arange(100), torch.arange(100), indexing="ij")
    )
    assert len(uniforms(seeds_B, index_B).unique()) == 10_000


@given(seed=seeds, B=st.integers(1, 9))
def test_uniforms_do_not_depend_on_the_batch(seed, B):
    """Each (seed, index) has its number, alone and in any company; the largest integers included."""
    seeds_B = torch.randint(-(2**62), 2**62, (B,), generator=numbers(seed))
    index_B = torch.randint(0, 2**20, (B,), generator=numbers(seed + 1))
    together = uniforms(seeds_B, index_B)
    assert all(together[b] == uniforms(seeds_B[b : b + 1], index_B[b : b + 1])[0] for b in range(B))


def test_published_splitmix64():
    """One round of the hash is the finaliser of splitmix64: its published first outputs for the state 1234567."""
    golden = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    state = 1234567
    mask = 2**64 - 1
    for expected in golden:
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        assert z ^ (z >> 31) == expected

    # and ours, in int64 tensors, is two such rounds: once with the index, once more for good measure
    def plain(seed, index):
        x = seed & mask
        for word in (index, 1):
            x = (x + (word + 1) * 0x9E3779B97F4A7C15) & mask
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
            x ^= x >> 31
        return (x >> 11) / 2**53

    for seed, index in ((0, 0), (1234567, 0), (-5, 3), (2**62, 2**31)):
        assert uniforms(torch.tensor([seed]), torch.tensor([index])).item() == plain(seed, index)
