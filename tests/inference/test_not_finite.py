"""Test that a number that is not finite ends the request that it belongs to, and reaches neither cache nor training."""

import asyncio
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.inference import Engine, Request
from minglm.inference.client import EngineGenerator
from minglm.inference.request import AnswerFailed, FinishReason
from minglm.testing.model import tiny_model

PROMPT = [1, 2, 3, 4, 5, 6]
BAD = st.sampled_from([math.nan, math.inf, -math.inf])


def ended(engine, requests):
    """Return the events that end each request, and whether a step raised."""
    events = {}
    numbers = [
        engine.submit(request, lambda e: events.setdefault(e.id, []).append(e))
        for request in requests
    ]
    raised = False
    while engine.open:
        try:
            engine.step()
        except AnswerFailed:
            raised = True
    return [events[number] for number in numbers], raised


NAMES = [name for name, _ in tiny_model(0).named_parameters()]


@settings(max_examples=25)
@given(name=st.sampled_from(NAMES), bad=BAD, drafts=st.sampled_from([0, 2]), data=st.data())
def test_a_weight_that_is_not_finite_ends_every_request(name, bad, drafts, data):
    """Whichever weight it is; when it is finite again, so are the answers, and they are those of a new engine."""
    model = tiny_model(0)
    engine = Engine(model, draft_tokens=drafts, block=2)
    request = Request(PROMPT, 5, stop_ids=())
    expected = engine.generate([request])[0]
    weight = dict(model.named_parameters())[name].data.view(-1)
    place = data.draw(st.integers(0, len(weight) - 1))
    good = weight[place].item()
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[place] = bad
    (events,), raised = ended(engine, [request])
    assert raised and [event.finish_reason for event in events] == [FinishReason.ERROR]
    assert not engine.blocks.hash_to_block
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[place] = good
    assert engine.generate([request])[0].tokens == expected.tokens


@settings(max_examples=25)
@given(
    bad=st.sampled_from([math.nan, math.inf]),
    step=st.integers(0, 3),
    drafts=st.sampled_from([0, 2]),
    chunk=st.sampled_from([2, 64]),
    in_logits=st.booleans(),
)
def test_numbers_of_one_row_end_that_request(bad, step, drafts, chunk, in_logits):
    """The others get what they get alone, nothing of the row is in the prefix cache, and the next attempt is answered."""
    engine = Engine(tiny_model(0), draft_tokens=drafts, block=2, prefill_tokens=chunk)
    broken = Request(PROMPT, 8, seed=1, stop_ids=())
    sound = Request([9, 8, 7], 8, seed=2, stop_ids=())
    expected = engine.generate([broken, sound])
    engine.blocks.reset_prefix_cache()
    pages = engine._current_pages()
    trunk = pages.trunk
    passes = 0

    def poisoned(rows, tokens, wanted):
        nonlocal passes
        hidden_TD, logits_BV = trunk(rows, tokens, wanted)
        first = 0
        place = 0
        for row in rows:
            if row.ids[: len(PROMPT)] == PROMPT and row.end >= len(PROMPT) + step:
                passes += 1
                if not in_logits:
                    hidden_TD[first] = bad
                elif row.sequences:
                    logits_BV[place, 0] = bad
            first += row.stop - row.start
            place += len(row.drafts) + 1 if row.sequences else 0
        return hidden_TD, logits_BV

    pages.trunk = poisoned
    (lost, kept), raised = ended(engine, [broken, sound])
    pages.trunk = trunk
    assert passes and not raised
    assert lost[-1].finish_reason == FinishReason.ERROR and "finite" in lost[-1].error
    assert all(math.isfinite(event.logprob) for event in lost)
    assert [event.token for event in kept] == expected[1].tokens
    assert all(9 in key[1] or 8 in key[1] or key[0] for key in engine.blocks.hash_to_block)
    assert (0, (1, 2)) not in engine.blocks.hash_to_block
    assert engine.generate([broken])[0].tokens == expected[0].tokens


@pytest.mark.parametrize("length", [1, 2, 6])
@pytest.mark.parametrize("projection", ["q_proj", "k_proj"])
def test_attention_that_overflows_ends_the_request(projection, length):
    """Finite weights whose queries or keys are not: the softmax must not turn them into an answer."""
    model = tiny_model(0)
    with torch.no_grad():
        getattr(model.model.layers[0].self_attn, projection).weight.fill_(3e38)
    (events,), raised = ended(Engine(model), [Request(PROMPT[:length], 1, stop_ids=())])
    assert not raised
    assert [event.finish_reason for event in events] == [FinishReason.ERROR]


def test_a_generator_raises_it_to_its_caller():
    """The caller of the broken request gets an exception of its own, the others their completions."""
    engine = Engine(tiny_model(0))
    generator = EngineGenerator(engine)
    pages = engine._current_pages()
    trunk = pages.trunk

    def poisoned(rows, tokens, wanted):
        hidden_TD, logits_BV = trunk(rows, tokens, wanted)
        logits_BV[0] = math.nan
        return hidden_TD, logits_BV

    async def together():
        calls = [generator.generate(Request([n], 3, stop_ids=())) for n in (1, 2, 3)]
        waiting = asyncio.gather(*calls, return_exceptions=True)
        await asyncio.sleep(0)
        pages.trunk = poisoned
        return await waiting

    results = asyncio.run(together())
    assert all(isinstance(one, AnswerFailed) for one in results)
    with pytest.raises(AnswerFailed, match="not finite"):
        engine.generate([Request([1], 3)])
