"""Greedy answers of the engine are those of Hugging Face's `generate`, prompts of different lengths in one batch."""

import tempfile

import torch
from helpers.released import build, drawn_tokens, ours, shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.inference import Engine, Request

NEW = 12


def close_call(reference, ids, chosen, limit=1e-4):
    """Return True if the reference's two largest logits after `ids` are so close that rounding decides between them."""
    with torch.no_grad():
        logits = reference(torch.tensor([ids])).logits[0, -1]
    return float(logits.max() - logits[chosen]) < limit


@settings(max_examples=8)
@given(data=st.data(), drafts=st.sampled_from([0, 2]))
def test_greedy_answers_are_those_of_hugging_face(data, drafts):
    """Random models of every shape, three prompts of different lengths, ending at an end-of-text token or the limit."""
    values, seed = data.draw(shapes(False))
    reference = build(values, seed).eval()
    with tempfile.TemporaryDirectory() as folder:
        model = ours(reference, folder)
    if model.mtp is None:
        drafts = 0
    prompts = [drawn_tokens(seed + i, 1, length)[0].tolist() for i, length in enumerate((2, 5, 9))]
    free = [generate(reference, prompt, None) for prompt in prompts]
    end = free[0][NEW // 2]  # a token that at least one answer meets
    expected = [generate(reference, prompt, end) for prompt in prompts]
    requests = [Request(prompt, NEW, temperature=0.0, stop_ids=(end,)) for prompt in prompts]
    found = Engine(model, draft_tokens=drafts, prefill_tokens=7).generate(requests)
    for prompt, answer, reply in zip(prompts, found, expected):
        if answer.tokens != reply:
            at = next(i for i, (a, b) in enumerate(zip(answer.tokens, reply)) if a != b)
            assert close_call(reference, prompt + reply[:at], answer.tokens[at])
            continue
        assert answer.finish_reason == ("stop" if reply[-1] == end else "length")
    assert expected[0][-1] == end
    assert len(expected[0]) <= NEW // 2 + 1


def generate(reference, prompt, end):
    """Return the ids that transformers adds to one prompt, the end-of-text id included."""
    tokens_BS = torch.tensor([prompt])
    ids = reference.generate(
        tokens_BS,
        attention_mask=torch.ones_like(tokens_BS),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=0,
    )
    return ids[0, len(prompt) :].tolist()
