"""Test what changes an answer beside temperature and cuts: grammars, penalties, forbidden tokens, scored prompts."""

import re

import pytest
import torch
from helpers.scripted import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.inference import Engine, Request
from minglm.inference.grammar import json_rule
from minglm.inference.request import AnswerFailed, FinishReason
from minglm.testing.model import tiny_model

TOKENIZER = byte_tokenizer()
V = TOKENIZER.vocab_size
MODEL = tiny_model(0, vocab_size=V)
ENGINES = {drafts: Engine(MODEL, TOKENIZER, draft_tokens=drafts) for drafts in (0, 2)}
PROMPT = TOKENIZER.encode("Hello")


def answer(drafts=0, **options):
    """Return the completion of one request."""
    options = {"prompt": PROMPT, "max_new_tokens": 12} | options
    return ENGINES[drafts].generate([Request(**options)])[0]


@pytest.mark.parametrize("drafts", [0, 2])
@given(
    seed=st.integers(0, 99),
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    regex=st.sampled_from(["[0-9]{3}", "(yes|no)", "é+x", "[a-f]{2,5}☕"]),
)
@settings(max_examples=8)
def test_an_answer_matches_its_regular_expression(drafts, seed, temperature, regex):
    """Also beside a request without a grammar, which gets what it gets alone."""
    ruled = Request(PROMPT, 40, temperature, seed=seed, grammar=f"start: /{regex}/")
    free = Request(PROMPT, 6, temperature, seed=seed, stop_ids=())
    ruled_done, free_done = ENGINES[drafts].generate([ruled, free])
    assert free_done.tokens == ENGINES[drafts].generate([free])[0].tokens
    text = TOKENIZER.decode(ruled_done.tokens, skip_special=True)
    if ruled_done.finish_reason == FinishReason.STOP:
        assert re.fullmatch(regex, text)
    else:
        assert len(ruled_done.tokens) == 40  # é+ may go on
    assert all(-1e4 < logprob < 0 for logprob in ruled_done.logprobs)


def test_log_probabilities_of_a_ruled_answer_are_the_models_own():
    """A grammar decides what is drawn; the probability that is reported is the one that training computes."""
    done = answer(grammar="start: /[0-9]{3}/", temperature=0.7)
    logits_SV = MODEL(torch.tensor([PROMPT + done.tokens]))[0, len(PROMPT) - 1 : -1]
    expected_SV = (logits_SV / 0.7).log_softmax(-1)
    expected_S = expected_SV.gather(1, torch.tensor(done.tokens)[:, None])[:, 0]
    # float32 logits of size 10; other batches round differently
    torch.testing.assert_close(torch.tensor(done.logprobs), expected_S, atol=1e-4, rtol=1e-4)


def test_what_is_no_grammar():
    """It is refused before anything runs, in one line."""
    for grammar in ("start: missing", "nonsense", "start: " + json_rule({"not": {}})):
        with pytest.raises(ValueError, match="the grammar cannot be used") as error:
            answer(grammar=grammar)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="tokenizer"):
        Engine(MODEL).submit(Request(PROMPT, 4, grammar="start: /a/"))


@pytest.mark.parametrize("drafts", [0, 2])
def test_rules_that_leave_no_token_end_the_request_with_an_error(drafts):
    """It alone ends; what was sampled before stays."""
    rules = {"grammar": "start: /abc/", "allowed_ids": tuple(TOKENIZER.encode("ab"))}
    with pytest.raises(AnswerFailed, match="no further token"):
        answer(drafts, **rules)
    assert len(answer(drafts, stop_ids=()).tokens) == 12


@pytest.mark.parametrize("drafts", [0, 2])
@given(seed=st.integers(0, 99), data=st.data())
@settings(max_examples=10)
def test_allowed_ids_biases_and_least_lengths(drafts, seed, data):
    """Nothing else than the allowed ids comes; a bias of 1,000 wins; no stop token comes early."""
    allowed = tuple(data.draw(st.sets(st.integers(0, V - 1), min_size=1, max_size=4)))
    done = answer(drafts, seed=seed, allowed_ids=allowed, stop_ids=())
    assert set(done.tokens) <= set(allowed)
    assert set(answer(drafts, seed=seed, logit_bias=((allowed[0], 1e3),)).tokens) == {allowed[0]}
    stops = tuple(range(0, V, 2))
    done = answer(drafts, seed=seed, stop_ids=stops, min_new_tokens=5)
    assert len(done.tokens) > 5 or len(done.tokens) == 12
    assert not set(done.tokens[:5]) & set(stops)


@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty"])
def test_penalties(field):
    """A large penalty forbids what the answer has; without one a greedy answer repeats itself."""
    forever = {"temperature": 0.0, "max_new_tokens": 30, "stop_ids": ()}
    assert len(set(answer(**forever).tokens)) < 30
    assert len(set(answer(**forever, **{field: 1e4}).tokens)) == 30
    tokens = answer(**forever, repetition_penalty=1e4).tokens
    assert not set(tokens) & set(PROMPT)


def test_ids_outside_the_vocabulary_are_refused():
    """The field is named."""
    for field, value in (("allowed_ids", (V,)), ("logit_bias", ((-1, 1.0),))):
        with pytest.raises(ValueError, match=field):
            answer(**{field: value})


@pytest.mark.parametrize("drafts", [0, 2])
@given(
    length=st.integers(1, 40),
    chunk=st.sampled_from([3, 16, 64]),
    more=st.integers(0, 2),
    seed=st.integers(0, 9),
)
@settings(max_examples=10)
def test_scored_prompts(drafts, length, chunk, more, seed):
    """Every token of a prompt gets the log-probability of a plain pass, whatever is in the cache and however it is cut."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, V, (length,), generator=generator).tolist()
    engine = Engine(MODEL, TOKENIZER, draft_tokens=drafts, prefill_tokens=chunk, block=4)
    plain = Request(prompt, 2, seed=seed, stop_ids=())
    engine.generate([plain])
    scored = Request(prompt, more, seed=seed, stop_ids=(), prompt_logprobs=3)
    done, beside = engine.generate([scored, plain])
    assert done.tokens == beside.tokens[:more]
    scores = done.prompt_logprobs
    assert [score.token for score in scores] == prompt[1:]
    logp_SV = MODEL(torch.tensor([prompt]))[0].log_softmax(-1)
    for logp_V, score in zip(logp_SV, scores, strict=False):
        # float32 logits of size 10; other batches round differently
        assert score.logprob == pytest.approx(logp_V[score.token].item(), abs=1e-3)
        assert [logprob for _, logprob in score.top] == sorted(
            (logprob for _, logprob in score.top), reverse=True
        )
        assert score.top[0][1] == pytest.approx(logp_V.max().item(), abs=1e-3)


def test_small_probabilities_stay_finite():
    """At temperature 0.01 the unlikely tokens have probability 0 in float32, and still a log-probability."""
    done = answer(temperature=0.01, top_logprobs=V, stop_ids=())
    assert all(logprob > -1e6 for top in done.top_logprobs for _, logprob in top)
    assert min(logprob for top in done.top_logprobs for _, logprob in top) < -100
