"""Weights on their way to rollouts: what becomes float8, what a damaged file does, and whose weights drew a token."""

import asyncio

import pytest
import torch
from helpers.scripted import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.inference import Engine
from minglm.inference.client import EngineGenerator, ResumingGenerator
from minglm.inference.request import Request
from minglm.parallel.workers import buckets
from minglm.rl.weights import SCALE, FileChannel, decoded, fetch, in_float8
from minglm.testing.model import tiny_model
from minglm.testing.strategies import seeds

PLAIN = ("norm", "embed_tokens", "lm_head", "bias", "mlp.gate.", "eh_proj")


def test_attention_mlp_and_experts_go_to_float8():
    """Those, the MTP layer's too; no router, norm, embedding, head or bias, whose values arrive to the bit."""
    state = tiny_model(1).state_dict()
    encoded = in_float8(state)
    restored = decoded(encoded)
    assert restored.keys() == state.keys()
    for name, tensor in state.items():
        plain = any(word in name for word in PLAIN)
        assert plain == (name + SCALE not in encoded), name
        if plain:
            assert torch.equal(restored[name], tensor)
        else:
            assert encoded[name].dtype == torch.float8_e4m3fn
            bound = (
                tensor.abs() / 16 + tensor.abs().max() / 448 / 8
            )  # relative, and for the smallest
            assert ((restored[name] - tensor).abs() <= bound).all(), name
            assert not torch.equal(restored[name], tensor), name
    mtp = state.keys() - {name for name in state if "layers.3." not in name}
    assert any(name + SCALE in encoded for name in mtp), "a test that could not fail"


def test_quantising_twice_changes_nothing():
    """An engine that computes in float8 quantises the same numbers to the same numbers."""
    once = decoded(in_float8(tiny_model(2).state_dict()))
    twice = decoded(in_float8(once))
    assert all(torch.equal(tensor, twice[name]) for name, tensor in once.items())


@given(seed=seeds, most=st.integers(1, 10**5))
@settings(max_examples=10)
def test_buckets_are_the_state_dict(seed, most):
    """Every tensor once, in order, and no more bytes together than allowed, unless one alone is larger."""
    model = tiny_model(seed)
    found = list(buckets(model, most))
    whole = model.state_dict()
    assert [name for bucket in found for name in bucket] == list(whole)
    for bucket in found:
        assert all(torch.equal(tensor, whole[name]) for name, tensor in bucket.items())
        size = sum(tensor.numel() * tensor.element_size() for tensor in bucket.values())
        assert len(bucket) == 1 or size <= most


def test_a_file_has_a_version_and_a_checksum(tmp_path):
    """Fetched, the weights are those published; older files are gone; a flipped bit is one line, and nothing is used."""
    channel = FileChannel(tmp_path)
    notices = []
    for version, seed in ((3, 1), (4, 2)):
        parts = buckets(tiny_model(seed), 1000)
        channel.publish(parts, version, [0, 1], lambda worker, notice: notices.append(notice))
    assert [notice.version for notice in notices] == [3, 3, 4, 4]
    wanted = tiny_model(2).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in fetch(notices[-1]).items())
    (path,) = tmp_path.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="the weights of version 4 are damaged"):
        fetch(notices[-1])
    channel.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("resume", [False, True])
def test_a_token_has_the_log_probability_of_the_weights_that_drew_it(resume):
    """Whether an answer goes on or is aborted and asked for again: given all of the text before it, to 1e-4 nats."""
    models = {
        version: tiny_model(seed, vocab_size=292).eval()
        for version, seed in ((1, 5), (2, 6), (3, 7))
    }
    engine = Engine(tiny_model(5, vocab_size=292).eval(), byte_tokenizer())
    inner = EngineGenerator(engine)
    generator = ResumingGenerator(inner) if resume else inner
    generator.update_weights(models[1].state_dict(), 1)

    async def answers():
        requests = [Request([5 + n, 6, 7], 24, seed=n, stop_ids=()) for n in range(3)]
        asked = [asyncio.ensure_future(generator.generate(request)) for request in requests]
        for version in (2, 3):
            for _ in range(12):
                await asyncio.sleep(0)
            generator.update_weights(models[version].state_dict(), version)
        return requests, await asyncio.gather(*asked)

    requests, completions = asyncio.run(answers())
    seen = set()
    for request, completion in zip(requests, completions, strict=True):
        assert len(completion.tokens) == len(completion.versions) == 24
        assert completion.versions == sorted(completion.versions)
        text = torch.tensor([request.prompt + completion.tokens])
        for place, version in enumerate(completion.versions):
            seen.add(version)
            at = len(request.prompt) + place
            with torch.no_grad():
                logits_V = models[version](text[:, :at])[0, -1]
            expected = torch.log_softmax(logits_V, -1)[text[0, at]]
            assert completion.logprobs[place] == pytest.approx(float(expected), abs=1e-4)
    assert seen == {1, 2, 3}, "a test that could not fail"
