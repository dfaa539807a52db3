"""Speculative decoding: drafts change how many passes an answer takes, and nothing else about it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.inference import Engine, Request
from minglm.inference.speculative import verify
from minglm.testing.inference import check_verifier
from minglm.testing.model import tiny_model
from minglm.testing.strategies import numbers, seeds


def test_verifier_keeps_the_contract():
    """Whatever the drafts were drawn from, the tokens follow the target."""
    check_verifier(verify)


def keeps_every_draft(p_BSV, q_BSV, drafts_BS, lengths_B, accept_BS, last_B):
    """Broken: never reject."""
    return verify(p_BSV, q_BSV, drafts_BS, lengths_B, torch.zeros_like(accept_BS), last_B)


def draws_again_from_the_target(p_BSV, q_BSV, drafts_BS, lengths_B, accept_BS, last_B):
    """Broken: after a rejection, draw from p and not from what p has left over q; right only for greedy drafts."""
    accepted_B, _ = verify(p_BSV, q_BSV, drafts_BS, lengths_B, accept_BS, last_B)
    nothing_B = torch.zeros_like(lengths_B)
    rows = torch.arange(len(p_BSV))
    return accepted_B, verify(
        p_BSV[rows, accepted_B][:, None],
        q_BSV[:, :0],
        drafts_BS[:, :0],
        nothing_B,
        accept_BS[:, :0],
        last_B,
    )[1]


def bonus_from_the_drafts(p_BSV, q_BSV, drafts_BS, lengths_B, accept_BS, last_B):
    """Broken: where all drafts are accepted, treat the bonus token like a rejected draft."""
    accepted_B, tokens_B = verify(p_BSV, q_BSV, drafts_BS, lengths_B, accept_BS, last_B)
    if not q_BSV.shape[1]:
        return accepted_B, tokens_B
    p_BSV = p_BSV[:, -1:].expand(-1, p_BSV.shape[1], -1)
    again_B = verify(p_BSV, q_BSV, drafts_BS, lengths_B, torch.ones_like(accept_BS), last_B)[1]
    return accepted_B, torch.where(accepted_B == lengths_B, again_B, tokens_B)


def accepts_by_the_wrong_ratio(p_BSV, q_BSV, drafts_BS, lengths_B, accept_BS, last_B):
    """Broken: keep a draft with probability p instead of p / q."""
    ones = torch.ones_like(q_BSV) / q_BSV.shape[2]
    return verify(p_BSV, ones, drafts_BS, lengths_B, accept_BS, last_B)


@pytest.mark.parametrize(
    "broken",
    [
        keeps_every_draft,
        draws_again_from_the_target,
        bonus_from_the_drafts,
        accepts_by_the_wrong_ratio,
    ],
)
def test_contract_finds_broken_verifiers(broken):
    """Each mistake others have made is found."""
    with pytest.raises(AssertionError):
        check_verifier(broken)


def verified(p_SV, q_SV, drafts, accept, last=0.5, length=None):
    """(accepted, token) of one row."""
    accepted_B, tokens_B = verify(
        torch.tensor([p_SV]),
        torch.tensor([q_SV]),
        torch.tensor([drafts]),
        torch.tensor([len(drafts) if length is None else length]),
        torch.tensor([accept], dtype=torch.float64),
        torch.tensor([last], dtype=torch.float64),
    )
    return accepted_B.item(), tokens_B.item()


def test_verification_at_its_bounds():
    """What the target cannot say is never accepted, not even at u = 0; a share that is just reached is rejected."""
    half, first, last = [0.5, 0.5], [1.0, 0.0], [0.0, 1.0]
    assert verified([first, half], [last], [1], [0.0]) == (0, 0)
    assert verified([[0.25, 0.75], last], [half], [0], [0.49]) == (1, 1)
    assert verified([[0.25, 0.75], last], [half], [0], [0.5]) == (
        0,
        1,
    )  # 0.5 * 0.5 is not below 0.25
    # neither has to be normalised
    assert verified([[1.0, 3.0], last], [[4.0, 4.0]], [0], [0.49]) == (1, 1)
    assert verified([[1.0, 3.0], last], [[4.0, 4.0]], [0], [0.51]) == (0, 1)


def test_where_target_and_drafts_agree_a_rejection_draws_from_the_target():
    """Only rounding can reject then; nothing is left over of p, and what p cannot say is not said."""
    only = [0.0, 0.0, 1.0, 0.0]
    for u in (0.0, 0.5, 0.999):
        assert verified([only, only], [only], [2], [1.0], u) == (0, 2)


def test_drafts_beyond_the_length_of_a_row_are_filling():
    """They are not accepted; the bonus token is drawn after the row's own drafts."""
    first, second, third = torch.eye(3).tolist()
    assert verified([first, second, third], [first, second], [0, 1], [0.0, 0.0]) == (2, 2)
    assert verified([first, second, third], [first, second], [0, 1], [0.0, 0.0], length=1) == (1, 1)
    assert verified([first, second, third], [first, second], [0, 1], [0.0, 0.0], length=0) == (0, 0)


@torch.no_grad()
def exact(model, prompt, length, temperature):
    """Return the probability of every answer of `length` tokens, from plain forward passes."""
    answers = list(itertools.product(range(model.config.vocab_size), repeat=length))
    texts = torch.tensor([[*prompt, *answer] for answer in answers])
    log_p = (model(texts)[:, len(prompt) - 1 : -1].double() / temperature).log_softmax(-1)
    return answers, log_p.gather(2, texts[:, len(prompt) :, None])[..., 0].sum(1).exp()


@pytest.mark.parametrize("drafts, temperature", [(1, 1.0), (2, 0.5), (3, 1.0), (4, 2.0)])
def test_answers_follow_the_model_exactly(drafts, temperature):
    """A vocabulary of four: how often each of the 64 answers comes is what the model says, drafts or no drafts."""
    model = tiny_model(drafts, vocab_size=4, num_hidden_layers=2)
    count = 2000
    requests = [Request([1, 2], 3, temperature, seed=seed, stop_ids=()) for seed in range(count)]
    engine = Engine(model, max_batch=500, draft_tokens=drafts)
    answers, p = exact(model, [1, 2], 3, temperature)
    place = {answer: i for i, answer in enumerate(answers)}
    found = torch.tensor([place[tuple(done.tokens)] for done in engine.generate(requests)])
    counts = torch.bincount(found, minlength=len(answers))
    expected = count * p
    often = expected >= 5  # the rest together is one class
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    rest = expected[~often].sum()
    statistic += (counts[~often].sum() - rest) ** 2 / rest.clamp(min=1)
    # at most 63 degrees of freedom, mean 63 and standard deviation 11; a value above 120 has a chance of 2e-5
    assert statistic < 120, f"chi-square {statistic:.0f}"
    assert 0 < engine.drafter.accepted < engine.drafter.drafted
    assert engine.blocks.num_used_blocks == 0


@settings(max_examples=8)
@given(
    seed=seeds,
    drafts=st.integers(1, 4),
    block=st.sampled_from([2, 16]),
    batch=st.sampled_from([1, 3]),
)
def test_greedy_answers_are_the_same_with_drafts(seed, drafts, block, batch):
    """Tokens, ends and log-probabilities of greedy answers; every block is returned."""
    model = tiny_model(seed)
    stem = [1, 2, 3, 4]
    requests = [
        Request([*stem, i % 3], 2 + 3 * i, 0.0, stop_ids=(5, 6, 7), top_logprobs=i)
        for i in range(4)
    ]
    plain = Engine(model).generate(requests)
    engine = Engine(model, max_batch=batch, draft_tokens=drafts, block=block, prefill_tokens=3)
    for expected, found in zip(plain, engine.generate(requests)):
        assert (found.tokens, found.finish_reason) == (expected.tokens, expected.finish_reason)
        # float32, other batches.
        torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-4, rtol=0)
        tops = [[[i for i, _ in top] for top in done.top_logprobs] for done in (found, expected)]
        assert tops[0] == tops[1]
    assert engine.blocks.num_used_blocks == 0


@settings(max_examples=8)
@given(seed=seeds, drafts=st.integers(1, 3))
def test_answers_with_drafts_do_not_depend_on_the_batch(seed, drafts):
    """Same seed, same answer: alone, beside others, and after a shared beginning."""
    model = tiny_model(seed)
    requests = [Request([1, 2, 3, 4, 5, i % 2], 8, seed=i, stop_ids=()) for i in range(4)]
    together = Engine(model, draft_tokens=drafts, block=2).generate(requests)
    alone = [Engine(model, draft_tokens=drafts).generate([request])[0] for request in requests]
    assert [done.tokens for done in together] == [done.tokens for done in alone]


@given(seed=seeds, length=st.integers(2, 9), cut=st.integers(1, 4))
@torch.no_grad()
def test_the_first_draft_is_what_training_taught(seed, length, cut):
    """The distribution drafted from is that of the MTP layer in a training pass over the same text."""
    model = tiny_model(seed)
    text = torch.randint(0, 24, (length,), generator=numbers(seed)).tolist()
    engine = Engine(model, draft_tokens=2, block=2, prefill_tokens=cut)
    seen = []
    draft = engine.drafter.draft
    engine.drafter.draft = lambda pages, rows: seen.append(draft(pages, rows)) or seen[-1]
    (done,) = engine.generate([Request(text, 9, stop_ids=())])
    whole = torch.tensor([text + done.tokens])
    at = length
    expected = model.lm_head(model.hidden(whole, mtp=True).mtp_hidden_BSD)[0].softmax(-1)
    # the state at position at - 1 and the token at `at`, the answer's first, give the guess of the one after
    torch.testing.assert_close(seen[0][0, 0], expected[at - 1], atol=1e-4, rtol=1e-3)


def good_drafter(seed):
    """Return a model whose MTP layer sees everything in the last token's embedding, like its trunk: all drafts are accepted."""
    model = tiny_model(seed)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            down = [p for name, p in layer.mlp.named_parameters() if "down" in name]
            for weight in down:
                weight.zero_()
        D = model.config.hidden_size
        model.mtp.eh_proj.weight.copy_(torch.cat([torch.eye(D), torch.zeros(D, D)], 1))
        for norm in (model.mtp.enorm, model.model.norm, model.mtp.shared_head["norm"]):
            norm.weight.fill_(1.0)
    return model


@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_good_drafts_save_passes(drafts):
    """With drafts that always stand, a pass gives one more token than there are drafts."""
    engine = Engine(good_drafter(1), draft_tokens=drafts)
    (done,) = engine.generate([Request([1, 2], 1 + 3 * (drafts + 1), seed=4, stop_ids=())])
    assert engine.drafter.accepted == engine.drafter.drafted == 3 * drafts
    assert engine.passes == 1 + 3
    assert len(done.tokens) == 1 + 3 * (drafts + 1)


def test_drafts_need_the_layer():
    """A model without MTP layer is refused in one line."""
    with pytest.raises(ValueError, match="num_nextn_predict_layers = 0"):
        Engine(tiny_model(1, num_nextn_predict_layers=0), draft_tokens=1)
