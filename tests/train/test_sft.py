"""Fine-tuning data: the targets are what the assistant says after the last user message, to the token that ends it."""

import numpy as np
import pytest
from helpers.scripted import byte_tokenizer, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.chat import render
from minglm.config import SFTConfig, load_config
from minglm.data import dialogues
from minglm.data.mixture import Mixture
from minglm.envs import ENVIRONMENTS
from minglm.testing.strategies import seeds
from minglm.train import sft

TOOLS = ENVIRONMENTS["retail"].tools()
WORDS = ("Yes.", "Order 482?", "38+7=45", "两个", "a <b> c", "def f():\n    pass")
words = st.sampled_from(WORDS)
calls = st.lists(
    st.tuples(st.sampled_from(["get_order", "cancel_order"]), st.integers(1, 999)),
    min_size=1,
    max_size=2,
)


@st.composite
def conversations(draw):
    """Draw (messages, tools, thinking): perhaps a system message, one to three user turns, calls and their results."""
    thinking = draw(st.booleans())
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(words)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(words)})
        for made in [*draw(st.lists(calls, max_size=2)), None]:
            message = {"role": "assistant", "content": "" if made else draw(words)}
            if thinking:
                message["reasoning_content"] = draw(words)
            if made:
                message["tool_calls"] = [
                    {"name": name, "arguments": {"order_id": number}} for name, number in made
                ]
            messages.append(message)
            messages += [{"role": "tool", "content": draw(words)} for _ in made or ()]
    return messages, draw(st.sampled_from([(), TOOLS])), thinking


def spoken(message, thinking):
    """Return the text that a model must write for this message, up to the role token that ends its turn."""
    text = f"\n<think>{message['reasoning_content']}</think>" if thinking else ""
    text += f"\n{message['content']}" if message["content"] else ""
    for call in message.get("tool_calls", ()):
        text += f"\n<tool_call>{call['name']}\n<arg_key>order_id</arg_key>\n"
        text += f"<arg_value>{call['arguments']['order_id']}</arg_value>\n</tool_call>"
    return text + ("<|observation|>" if "tool_calls" in message else "<|user|>")


@given(conversations(), st.sampled_from([byte_tokenizer, word_tokenizer]))
def test_targets_are_what_the_assistant_says_last(conversation, tokenizer):
    """One example per user turn; its targets spell the assistant's messages after that turn, and nothing before."""
    tokenizer = tokenizer()
    messages, tools, thinking = conversation
    found = dialogues.examples(tokenizer, messages, tools, thinking)
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
    assert len(found) == len(starts)
    for (tokens, mask), start, end in zip(found, starts, [*starts[1:], len(messages)]):
        assert tokens.shape == mask.shape and mask.dtype == bool and tokens.dtype == np.int64
        answers = [m for m in messages[start:end] if m["role"] == "assistant"]
        assert tokenizer.decode(tokens[mask]) == "".join(spoken(m, thinking) for m in answers)
        prompt = render(tokenizer, messages[: start + 1], tools, thinking, generation_prompt=True)
        assert tokens[: len(prompt.ids)].tolist() == prompt.ids
        assert not mask[: len(prompt.ids)].any()
        assert tokenizer.decode(tokens) == render(tokenizer, messages[:end], tools, thinking).text


@given(conversations())
def test_mid_training_trains_every_token_of_a_conversation_once(conversation):
    """Language modelling: all of the first example is trained on; of a later one all that follows its role token."""
    tokenizer, (messages, tools, thinking) = byte_tokenizer(), conversation
    found = dialogues.examples(tokenizer, messages, tools, thinking, language_modelling=True)
    fine_tuning = dialogues.examples(tokenizer, messages, tools, thinking)
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for number, (tokens, mask) in enumerate(found):
        same_tokens, answers = fine_tuning[number]
        assert (tokens == same_tokens).all()
        assert mask[answers].all()
        untrained = ""
        if number:
            question = messages[starts[number]]["content"]
            prompt = render(tokenizer, messages[: starts[number] + 1], tools, thinking).text
            untrained = prompt[: prompt.rindex(f"\n{question}")]
        assert tokenizer.decode(tokens[~mask]) == untrained


@given(conversations())
def test_a_question_without_an_answer_is_no_example(conversation):
    """A user turn at the end, or two in a row, add nothing to learn."""
    messages, tools, thinking = conversation
    expected = dialogues.examples(byte_tokenizer(), messages, tools, thinking)
    asked = [*messages, {"role": "user", "content": "And?"}]
    for longer in (asked, [*asked, {"role": "user", "content": "Hello?"}]):
        found = dialogues.examples(byte_tokenizer(), longer, tools, thinking)
        assert len(found) == len(expected)
        for example, wanted in zip(found, expected, strict=True):
            assert (example.tokens_S == wanted.tokens_S).all()
            assert (example.mask_S == wanted.mask_S).all()
    assert dialogues.examples(byte_tokenizer(), messages[:1], tools, thinking) == []


def test_thinking_off_trains_no_thought():
    """Without thinking the empty think tags belong to the prompt, and no think token is a target."""
    messages = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    ((tokens, mask),) = dialogues.examples(byte_tokenizer(), messages, thinking=False)
    think = [byte_tokenizer().special[tag] for tag in ("<think>", "</think>")]
    assert set(think) <= set(tokens[~mask].tolist())
    assert not set(think) & set(tokens[mask].tolist())
    assert byte_tokenizer().special["/nothink"] in tokens


@given(seeds, st.booleans())
def test_every_demonstration_can_be_learned(seed, thinking):
    """The oracle's conversations of every environment give examples; each ends in the token that stops the model."""
    for name, environment in ENVIRONMENTS.items():
        if name == "code":
            continue  # its oracle runs programs, which takes long; the format is that of the others
        task = environment.task(0, seed)
        found = dialogues.examples(
            byte_tokenizer(), environment.demonstrate(task, thinking), task.tools, thinking
        )
        assert found
        for tokens, mask in found:
            assert mask[-1] and tokens[-1] in byte_tokenizer().stop_ids


@settings(max_examples=10)
@given(st.lists(conversations(), min_size=1, max_size=4), seeds)
def test_packed_rows_keep_the_targets(drawn, seed):
    """Best-fit rows of these examples: the targets of each document in a row are those of one example, and none is lost."""
    pairs = [pair for c in drawn for pair in dialogues.examples(byte_tokenizer(), *c)]
    documents = [tokens for tokens, _ in pairs]
    masks = [mask for _, mask in pairs]
    longest = max(map(len, documents))
    stream = Mixture(
        {"sft": documents}, {"sft": 1.0}, longest, "best_fit", seed, masks={"sft": masks}, pad=0
    )
    found = []
    for _ in range(2 * len(documents)):
        batch = stream.next(1)
        for tokens_S, mask_S, ids_S in zip(batch.tokens_BS, batch.mask_BS, batch.documents_BS):
            for document in range(int(ids_S.max()) + 1):
                found.append(tokens_S[(ids_S == document) & mask_S].tolist())
    expected = [t[m].tolist() for t, m in pairs]
    assert all(targets in expected for targets in found)
    assert all(targets in found for targets in expected)


@pytest.mark.parametrize("tokens", [0, 1, 40, 10_000])
def test_the_phase_warms_up_and_falls_to_a_tenth(tokens):
    """The rate rises over the first 5%, then falls along a cosine to a tenth; the selection bias does not move."""
    run = load_config("configs/nano.py")
    config = SFTConfig(batch_tokens=256, sequence_length=64, peak_lr=1e-3)
    phase = sft.phase("agent.sft", config, run, tokens)
    assert (phase.name, phase.tokens, phase.start, phase.sequence_length) == (
        "agent.sft",
        tokens,
        0,
        64,
    )
    rates = [phase.learning_rate(seen) for seen in range(tokens + 1)]
    assert all(0 < rate <= 1e-3 for rate in rates)
    if tokens == 10_000:
        top = rates.index(max(rates))
        assert top == 500
        assert rates[500] == 1e-3
        assert rates[-1] == pytest.approx(1e-4)
        assert rates[:501] == sorted(rates[:501])
        assert rates[500:] == sorted(rates[500:], reverse=True)
        assert rates[5250] == pytest.approx(5.5e-4)
    for seen in (0, tokens):
        assert (phase.batch_tokens(seen), phase.bias_rate(seen)) == (256, 0.0)
        assert phase.mtp_weight(seen) == run.balance.mtp_weight_late


@pytest.mark.parametrize("asked", [False, True])
def test_what_balances_the_experts_is_asked_for(asked):
    """The balance loss and the step of the selection bias are those of pre-training, or 0."""
    run = load_config("configs/nano.py")
    phase = sft.phase("x", SFTConfig(balance_loss=asked, balance_bias=asked), run, 40)
    of_pretraining = run.balance.sequence_loss_weight, run.balance.bias_rate
    assert all(of_pretraining)
    assert (phase.balance_weight, phase.bias_rate(0)) == (of_pretraining if asked else (0, 0))
