"""The engine: in any batch, in any order, every request gets what it would get alone from plain forward passes."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.inference import Completion, Engine, Request
from minglm.inference.kv_cache import BlockManager
from minglm.inference.sampling import sample, uniforms
from minglm.inference.scheduler import Scheduler, Sequence
from minglm.testing.model import tiny_model
from minglm.testing.strategies import numbers, seeds


def drawn_requests(seed, count):
    """Draw prompts of 1 to 9 tokens, many sharing a beginning or equal, with different lengths, samplers and stops."""

    def pick(values, i):
        return values[int(torch.randint(len(values), (1,), generator=numbers(seed + i)))]

    stem = torch.randint(0, 24, (6,), generator=numbers(seed)).tolist()
    requests = []
    for i in range(count):
        tail = torch.randint(0, 24, (3,), generator=numbers(seed + 100 + i)).tolist()
        requests.append(
            Request(
                prompt=stem[: pick([1, 4, 6], 7 * i)] + tail[: pick([0, 0, 1, 3], 7 * i + 1)],
                max_new_tokens=pick([0, 1, 3, 8], 7 * i + 2),
                temperature=pick([0.0, 0.7, 1.0], 7 * i + 3),
                top_p=pick([1.0, 0.8], 7 * i + 4),
                seed=pick([0, 1, 12345], 7 * i + 5),
                stop_ids=tuple(range(pick([0, 4], 7 * i + 6))),
            )
        )
    return requests


@torch.no_grad()
def alone(model, request):
    """Generate with a full forward pass for every token, no cache, no batch."""
    done = Completion([], [])
    while len(done.tokens) < request.max_new_tokens and done.finish_reason != "stop":
        text = torch.tensor([request.prompt + done.tokens])
        if text.shape[1] >= model.config.max_position_embeddings:
            break
        number = uniforms(torch.tensor([request.seed]), torch.tensor([len(done.tokens)]))
        settings_1 = torch.tensor([request.temperature]), torch.tensor([request.top_p])
        token, logprob = sample(model(text)[:, -1], *settings_1, number)
        done.tokens.append(token.item())
        done.logprobs.append(logprob.item())
        if token.item() in request.stop_ids:
            done.finish_reason = "stop"
    return done


@settings(max_examples=15)
@given(seed=seeds, count=st.integers(0, 9), max_batch=st.sampled_from([1, 2, 3, 256]))
def test_batched_equals_one_by_one(seed, count, max_batch):
    """Tokens, log-probabilities and the reason to end are those of each request alone, for any batch size."""
    model = tiny_model(seed)
    requests = drawn_requests(seed, count)
    found = Engine(model, max_batch=max_batch).generate(requests)
    assert len(found) == count
    for request, completion in zip(requests, found):
        expected = alone(model, request)
        assert completion.tokens == expected.tokens
        assert completion.finish_reason == expected.finish_reason
        # float32 logits of size 10, and each row's expert products round with the others of its batch
        torch.testing.assert_close(completion.logprobs, expected.logprobs, atol=1e-4, rtol=0)


@settings(max_examples=10)
@given(seed=seeds)
def test_order_of_requests_does_not_matter(seed):
    """Requests in another order get the same answers in that order."""
    engine = Engine(tiny_model(seed), max_batch=3)
    requests = drawn_requests(seed, 6)
    order = torch.randperm(6, generator=numbers(seed)).tolist()
    answers = engine.generate(requests)
    moved = engine.generate([requests[i] for i in order])
    assert [a.tokens for a in moved] == [answers[i].tokens for i in order]


@settings(max_examples=10)
@given(seed=seeds)
def test_logprobs_are_those_of_the_training_pass(seed):
    """The stored log-probability of each token is what the model gives for the whole text, at the temperature."""
    model = tiny_model(seed)
    requests = drawn_requests(seed, 4)
    for request, answer in zip(requests, Engine(model).generate(requests)):
        if not answer.tokens:
            continue
        text = torch.tensor([request.prompt + answer.tokens])
        with torch.no_grad():
            logits = model(text)[0, len(request.prompt) - 1 : -1] / (request.temperature or 1.0)
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        # As above.
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=0)


class Counting(Engine):
    """An engine that notes how many tokens each pass has."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.sizes = []

    def _forward(self, pages, rows):
        self.sizes.append(sum(row.stop - row.start for row in rows))
        return super()._forward(pages, rows)


def test_a_prompt_is_computed_once_and_a_shared_beginning_once():
    """Eight samples of one prompt are computed once; so is what prompts begin with, block by block."""
    model = tiny_model(1)
    engine = Counting(model)
    engine.generate([Request([1, 2, 3, 4], 3, seed=i) for i in range(8)])
    assert engine.sizes == [4, 8, 8]
    engine = Counting(model, block=2)
    stem = [1, 2, 3, 4, 5]
    engine.generate([Request([*stem, tail], 1) for tail in (5, 6, 5)])
    # The block of the last token is never shared: its logits are needed.
    assert engine.sizes == [6 + 2]
    engine.generate([Request([*stem, 6], 1), Request([*stem, 6, 7, 8], 1)])
    assert engine.sizes[1:] == [2 + 2]  # the second begins with all that the first has
    (answer,) = engine.generate([Request(stem, 4)])
    engine.sizes.clear()
    engine.generate([Request([*stem, *answer.tokens, 9], 1)])  # the next turn of a conversation
    assert engine.sizes == [2]


@settings(max_examples=25)
@given(
    budget=st.integers(1, 12),
    long=st.integers(1, 60),
    short=st.lists(st.integers(1, 6), max_size=30),
)
def test_a_short_prompt_does_not_wait_for_all_of_a_long_one(budget, long, short):
    """In each pass the oldest prompt gets half of the tokens or what it needs, and of the others the shortest go first.

    In each pass one more prompt comes. No token of the pass is left unused.
    """
    scheduler = Scheduler(BlockManager(block_size=2), prefill_tokens=budget)
    lengths = [long, *short]
    # No two begin with the same block, which would be computed once.
    texts = [[2 * number, 2 * number + 1] * length for number, length in enumerate(lengths)]
    texts = [text[:length] for text, length in zip(texts, lengths)]
    left: dict[int, int] = {}  # tokens to compute, by number
    passes = 0
    while left or texts:
        if texts:
            number = passes
            text = texts.pop(0)
            left[number] = len(text)
            scheduler.add(Sequence(number, Request(text, 1), set(), 1000))
        rows = scheduler.plan().rows
        oldest = min(left)
        used = {row.owners[0].number: row.end - row.start for row in rows}
        assert sum(used.values()) == min(budget, sum(left.values()))
        assert used[oldest] >= min(left[oldest], (budget + 1) // 2)
        others = {number: size for number, size in left.items() if number != oldest}
        unserved = [size for number, size in others.items() if used.get(number, 0) < size]
        served = [size for number, size in others.items() if used.get(number, 0) == size]
        assert not unserved or max(served, default=0) <= min(unserved)
        for number, size in used.items():
            left[number] -= size
        left = {number: size for number, size in left.items() if size}
        for sequence in list(scheduler.running):
            scheduler.remove(sequence)
        passes += 1


def test_finished_rows_make_room():
    """Never more rows than allowed; short answers leave, waiting requests enter before the long ones are done."""
    engine = Counting(tiny_model(1), max_batch=4)
    engine.generate([Request([1], n, seed=n) for n in (2, 2, 2, 20, 2, 2)])
    assert max(engine.sizes) <= 4
    # Four, then two, share the prompt.
    assert len(engine.sizes) == 20
    assert sum(engine.sizes) == 5 * 2 + 20 - 3 - 1


def test_stop_ids():
    """The stop id is kept, ends the answer, and comes from the tokenizer unless the request names its own."""

    class Tokenizer:
        stop_ids = tuple(range(24))

    model = tiny_model(1)
    (answer,) = Engine(model, Tokenizer).generate([Request([1, 2], 5)])
    assert answer.finish_reason == "stop" and len(answer.tokens) == len(answer.logprobs) == 1
    (answer,) = Engine(model, Tokenizer).generate([Request([1, 2], 5, stop_ids=())])
    assert answer.finish_reason == "length" and len(answer.tokens) == 5
    (answer,) = Engine(model).generate([Request([1, 2], 5)])
    assert answer.finish_reason == "length"


def test_the_longest_sequence_bounds_the_answer():
    """A prompt that leaves room for two tokens gets two; one that leaves none, or is empty, is refused in one line."""
    model = tiny_model(1, max_position_embeddings=6)
    (answer,) = Engine(model).generate([Request([1, 2, 3, 4], 99)])
    assert len(answer.tokens) == 2 and answer.finish_reason == "length"
    for prompt in ([], [1] * 6):
        with pytest.raises(
            ValueError, match=f"request 1: a prompt of {len(prompt)} tokens"
        ) as error:
            Engine(model).generate([Request([1]), Request(prompt)])
        assert "\n" not in str(error.value)


def test_greedy_takes_the_largest_logit_whatever_the_seed():
    """Temperature 0 is the argmax of every step."""
    model = tiny_model(2)
    request = Request([1, 2, 3], 6, temperature=0.0)
    answers = Engine(model).generate([dataclasses.replace(request, seed=seed) for seed in range(3)])
    text = torch.tensor([[1, 2, 3, *answers[0].tokens]])
    with torch.no_grad():
        assert model(text)[0, 2:-1].argmax(-1).tolist() == answers[0].tokens
    assert answers[0].tokens == answers[1].tokens == answers[2].tokens


def test_tokens_arrive_as_they_are_drawn():
    """The callback sees every token once, in order, under its request's number."""
    seen = {}
    requests = drawn_requests(3, 5)
    answers = Engine(tiny_model(3), max_batch=2).generate(
        requests, lambda i, token: seen.setdefault(i, []).append(token)
    )
    assert [seen.get(i, []) for i in range(5)] == [a.tokens for a in answers]


def test_new_weights_are_used_from_the_next_call():
    """The engine holds no copy of the weights."""
    model = tiny_model(1)
    request = Request([1, 2, 3], 8, temperature=0.0)
    engine = Engine(model)
    before = engine.generate([request])[0].tokens
    with torch.no_grad():
        model.lm_head.weight.neg_()
    after = engine.generate([request])[0].tokens
    assert after == alone(model, dataclasses.replace(request, stop_ids=())).tokens
    assert after != before


def test_a_request_that_comes_while_another_fails_is_answered():
    """A failed pass ends what it knew with an error; what is queued from that moment on is neither lost nor failed."""
    engine = Engine(tiny_model(1))
    later = []

    def hear(event):
        assert event.finish_reason == "error"
        later.append(engine.submit(Request([4, 5], 3), events.append))

    events = []
    engine.submit(Request([1, 2, 3], 3), hear)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_forward", lambda pages, rows: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert later and engine.busy == 1
    for _ in range(3):
        engine.step()
    assert engine.busy == 0 and [event.finish_reason for event in events] == [None, None, "length"]
