"""The thinking budget: a thought of so many tokens is closed, and nothing else about an answer changes."""

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minglm.inference import Engine, Request
from minglm.inference.sampling import sample, uniforms
from minglm.testing.model import tiny_model
from minglm.testing.strategies import seeds

OPEN, CLOSE, STOP = 1, 2, 3
V = 8  # small, so that a random model often opens and closes thoughts


class Tags:
    """A tokenizer with the two tags and one stop token."""

    stop_ids = (STOP,)
    special = {"<think>": OPEN, "</think>": CLOSE}


def must_close(request, answer):
    """Say whether the next token has to close a thought: a walk over the answer, after the end of the prompt."""
    inside = request.prompt[-1] == OPEN
    count = 0
    for token in answer:
        if token in (OPEN, CLOSE) and inside != (token == OPEN):
            inside = token == OPEN
        elif inside:
            count += 1
    return request.thinking_budget is not None and inside and count >= request.thinking_budget


@torch.no_grad()
def alone(model, request):
    """Return (tokens, log-probabilities, forced places) from a whole forward pass for every token."""
    answer, logprobs, forced = [], [], []
    temperature_B = torch.tensor([request.temperature])
    while len(answer) < request.max_new_tokens and STOP not in answer:
        logits_BV = model(torch.tensor([request.prompt + answer]))[:, -1]
        number = uniforms(torch.tensor([request.seed]), torch.tensor([len(answer)]))
        token_B, logprob_B = sample(logits_BV, temperature_B, None, number)
        if must_close(request, answer):
            forced.append(len(answer))
            token_B = torch.tensor([CLOSE])
            logprob_B = (logits_BV[0] / (request.temperature or 1.0)).log_softmax(-1)[token_B]
        answer.append(token_B.item())
        logprobs.append(logprob_B.item())
    return answer, logprobs, forced


def drawn(seed, temperature, budget):
    """Return requests; some prompts open a thought, one is shared, and one request has no budget."""
    opened = [4, 5, OPEN]
    closed = [OPEN, 4, CLOSE, 6]
    requests = []
    for i, prompt in enumerate([opened, opened, closed, [4, 6, 5], opened]):
        own = None if i == 4 else budget
        requests.append(Request(prompt, 14, temperature, seed=seed + i, thinking_budget=own))
    return requests


@settings(max_examples=12)
@given(
    seed=seeds,
    temperature=st.sampled_from([0.0, 1.0, 1.5]),
    budget=st.integers(0, 6),
    drafts=st.integers(0, 3),
)
@example(seed=0, temperature=0.0, budget=2, drafts=3)
def test_a_thought_is_closed_where_its_budget_ends(seed, temperature, budget, drafts):
    """Nowhere else, with drafts too; greedy answers and those without drafts are the definition's, token by token."""
    model = tiny_model(seed, vocab_size=V)
    requests = drawn(seed, temperature, budget)
    engine = Engine(model, Tags(), draft_tokens=drafts, max_batch=3, block=2)
    for request, done in zip(requests, engine.generate(requests), strict=True):
        answer = done.tokens
        due = [place for place in range(len(answer)) if must_close(request, answer[:place])]
        assert done.forced == due
        assert all(answer[place] == CLOSE for place in due)
        if not drafts or not temperature:
            tokens, logprobs, forced = alone(model, request)
            assert (answer, done.forced) == (tokens, forced)
            # float32, other batches
            torch.testing.assert_close(done.logprobs, logprobs, atol=1e-4, rtol=0)
    assert engine.blocks.num_used_blocks == 0


def test_drafts_do_not_change_what_is_sampled():
    """How often each answer of three tokens comes is what the model says, where a thought may have one token."""
    model = tiny_model(1, vocab_size=4, num_hidden_layers=2)
    count = 3000
    requests = [Request([3, 0], 3, seed=i, stop_ids=(), thinking_budget=1) for i in range(count)]
    counts = []
    for drafts in (0, 2):
        engine = Engine(model, Tags(), max_batch=500, draft_tokens=drafts)
        found = [tuple(done.tokens) for done in engine.generate(requests)]
        counts.append({answer: found.count(answer) for answer in set(found)})
    plain, drafted = counts
    for answer in plain.keys() | drafted.keys():
        a, b = plain.get(answer, 0), drafted.get(answer, 0)
        # The difference of two counts: five standard deviations, and a little where they are small.
        assert abs(a - b) <= 5 * (a + b) ** 0.5 + 5, (answer, a, b)
    assert all(answer[2] == CLOSE for answer in drafted if answer[0] == OPEN != answer[1] != CLOSE)


@settings(max_examples=6)
@given(seed=seeds, budget=st.integers(0, 4))
def test_a_forced_token_needs_no_leave_of_the_ids(seed, budget):
    """It is put in although it may not be sampled, and its log-probability is the model's own."""
    model = tiny_model(seed, vocab_size=V)
    allowed = (4, 5, 6)
    request = Request([4, OPEN], 8, seed=seed, thinking_budget=budget, allowed_ids=allowed)
    (done,) = Engine(model, Tags()).generate([request])
    assert done.forced == [budget] and done.tokens[budget] == CLOSE
    assert all(token in allowed for i, token in enumerate(done.tokens) if i != budget)
    with torch.no_grad():
        logits_SV = model(torch.tensor([request.prompt + done.tokens]))[0]
    expected = logits_SV[1 + budget].log_softmax(-1)[CLOSE]
    # float32, another pass
    torch.testing.assert_close(done.logprobs[budget], expected.item(), atol=1e-4, rtol=0)


def test_a_budget_without_tags_or_below_zero_is_refused():
    """Before any work, in one line."""
    engine = Engine(tiny_model(0, vocab_size=V), Tags())
    with pytest.raises(ValueError, match="thinking_budget = -1: must be at least 0"):
        engine.submit(Request([4], thinking_budget=-1))
    for tokenizer in (None, dataclasses.make_dataclass("Plain", [("stop_ids", tuple, ())])()):
        with pytest.raises(ValueError, match="special token <think>"):
            Engine(engine.model, tokenizer).submit(Request([4], thinking_budget=3))
