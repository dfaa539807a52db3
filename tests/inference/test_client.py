"""The generator over our engine: callers share batches, each gets its own answer, and failures reach who waits."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.inference import Engine, Request
from minglm.inference.client import EngineGenerator
from minglm.testing.model import tiny_model
from minglm.testing.strategies import seeds

MODEL = tiny_model(1, max_position_embeddings=64)


def request(number, length=6, **values):
    """Return a request with its own prompt and seed, which no token stops."""
    prompt = [1 + number % 20, 2, 3]
    return Request(prompt, max_new_tokens=length, seed=number, stop_ids=(), **values)


def answer_all(generator, requests):
    """Return the completions of requests that are made at once."""

    async def together():
        return await asyncio.gather(*(generator.generate(r) for r in requests))

    return asyncio.run(together())


@settings(max_examples=8)
@given(seed=seeds, count=st.integers(1, 9))
def test_answers_are_those_of_the_engine(seed, count):
    """Tokens, log-probabilities, reasons and likeliest tokens are those of `Engine.generate`, request by request."""
    requests = [
        request(seed % 1000 + i, length=i, top_logprobs=2 if i % 2 else 0) for i in range(count)
    ]
    expected = Engine(MODEL).generate(requests)
    found = answer_all(EngineGenerator(Engine(MODEL)), requests)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tokens == theirs.tokens and ours.finish_reason == theirs.finish_reason
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
        assert len(ours.top_logprobs) == len(theirs.top_logprobs)


def test_requests_that_wait_together_share_every_step():
    """Twenty requests of six tokens take the steps of one, and a second turn joins without delay."""
    engine = Engine(MODEL)
    generator = EngineGenerator(engine)

    async def two_turns(number):
        await generator.generate(request(number))
        await generator.generate(request(number + 100))

    async def together():
        await asyncio.gather(*(two_turns(number) for number in range(20)))

    asyncio.run(together())
    # One pass for each token; the first pass of a turn also reads its prompt.
    assert engine.passes <= 2 * 6 + 2
    assert not generator.unfinished and not engine.busy


def test_a_caller_that_waits_elsewhere_delays_nobody():
    """While one caller sleeps, the others' answers are computed."""
    generator = EngineGenerator(Engine(MODEL))
    order = []

    has_finished = asyncio.Event()

    async def slow():
        async with asyncio.timeout(60):
            await has_finished.wait()
        await generator.generate(request(1))
        order.append("slow")

    async def quick():
        for number in range(3):
            await generator.generate(request(number))
        order.append("quick")
        has_finished.set()

    async def together():
        await asyncio.gather(slow(), quick())

    asyncio.run(together())
    assert order == ["quick", "slow"]


def test_an_impossible_request_fails_alone():
    """ValueError for the caller, and the others are answered."""
    generator = EngineGenerator(Engine(MODEL))

    async def together():
        return await asyncio.gather(
            generator.generate(request(1)),
            generator.generate(Request([])),
            return_exceptions=True,
        )

    good, bad = asyncio.run(together())
    assert len(good.tokens) == 6 and isinstance(bad, ValueError)


def test_a_failed_step_reaches_everyone_who_waits(monkeypatch):
    """The exception of the forward pass is raised to each caller, and the generator works again afterwards."""
    engine = Engine(MODEL)
    generator = EngineGenerator(engine)
    forward = engine._forward

    def fail(pages, rows):
        raise RuntimeError("out of memory")

    async def together():
        calls = (generator.generate(request(i)) for i in range(3))
        return await asyncio.gather(*calls, return_exceptions=True)

    monkeypatch.setattr(engine, "_forward", fail)
    assert [str(error) for error in asyncio.run(together())] == ["out of memory"] * 3
    monkeypatch.setattr(engine, "_forward", forward)
    assert len(answer_all(generator, [request(1)])[0].tokens) == 6


def test_a_cancelled_caller_cancels_its_request():
    """Its request leaves the engine; the other one is answered in full."""
    engine = Engine(MODEL)
    generator = EngineGenerator(engine)

    async def together():
        cancelled = asyncio.create_task(generator.generate(request(1, length=40)))
        kept = asyncio.create_task(generator.generate(request(2, length=20)))
        while engine.busy < 2:  # both have begun; a clock would let a fast machine end them
            await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        return await kept

    assert len(asyncio.run(together()).tokens) == 20
    assert not generator.unfinished and not engine.busy


def test_close_ends_what_is_unfinished():
    """A closed generator answers what is open with the reason cancelled."""
    generator = EngineGenerator(Engine(MODEL))

    async def together():
        task = asyncio.create_task(generator.generate(request(1, length=40)))
        await asyncio.sleep(0)
        generator.close()
        return await task

    assert asyncio.run(together()).finish_reason == "cancelled"


def test_new_weights_are_used():
    """The engine's own tensors are not copied, those of another model are; answers follow the new weights."""
    model = tiny_model(1, max_position_embeddings=64)
    other = tiny_model(2, max_position_embeddings=64)
    generator = EngineGenerator(Engine(model))
    requests = [request(i) for i in range(4)]
    answer_all(generator, requests)

    pointers = [p.data_ptr() for p in model.parameters()]
    generator.update_weights(model.state_dict())
    assert [p.data_ptr() for p in model.parameters()] == pointers
    generator.update_weights(other.state_dict())
    expected = Engine(other).generate(requests)
    assert [c.tokens for c in answer_all(generator, requests)] == [c.tokens for c in expected]
