"""Episodes: the ids that were sampled are the ids that are trained, whatever the model says."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers.scripted import Scripted, byte_tokenizer, oracle, said, spelled, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.chat import render
from minglm.envs import ENVIRONMENTS
from minglm.envs.base import assistant
from minglm.inference import Engine
from minglm.rl.rollout import rollout
from minglm.testing.model import tiny_model
from minglm.testing.strategies import numbers, seeds

PLAYABLE = ("arithmetic", "retail", "instructions", "provocation")  # the code tasks start processes
RETAIL = ENVIRONMENTS["retail"]


def bounds(**values):
    """Settings of a rollout."""
    return SimpleNamespace(**{"max_new_tokens": 400, "temperature": 1.0, "max_turns": 8, **values})


def play(script, tasks, thinking=True, samples=1, tokenizer=None, limit=10**6, **values):
    """(trajectories, engine) of these tasks with a scripted model."""
    tokenizer = tokenizer or byte_tokenizer()
    engine = Scripted(tokenizer, script, limit)
    switches = [thinking] * len(tasks)
    groups = rollout(engine, tokenizer, ENVIRONMENTS, tasks, samples, bounds(**values), switches)
    assert [len(group) for group in groups] == [samples] * len(tasks)
    return [t for group in groups for t in group], engine


def retail(tier, status="pending", n=0):
    """The n-th task of the shop of this tier whose first order has this status."""
    tasks = (RETAIL.task(index, 1, tiers=(tier,)) for index in range(1000))
    return [
        t
        for _, t in zip(range(60), tasks)
        if t.label["orders"][str(t.label["wanted"][0])] == status
    ][n]


@settings(max_examples=12)
@given(seed=seeds, names=st.sets(st.sampled_from(PLAYABLE), min_size=1), thinking=st.booleans())
def test_perfect_play_is_rewarded_and_every_prompt_is_the_rendering(seed, names, thinking):
    """The oracle as a model: each prompt is the rendered conversation so far (it knows no other), each reward is 1."""
    tasks = [task for name in sorted(names) for task in ENVIRONMENTS[name].tasks(2, seed)]
    known = [
        oracle(byte_tokenizer(), ENVIRONMENTS[task.environment], [task], thinking) for task in tasks
    ]

    def script(prompt):
        return next(k(prompt) for k in known if prompt in k.__self__)

    played, _ = play(script, tasks, thinking)
    for task, t in zip(tasks, played):
        assert (t.score.value, t.score.status, t.truncated, t.switch_obeyed) == (
            1.0,
            "ok",
            False,
            True,
        ), t.score
        told = [
            m
            for m in ENVIRONMENTS[task.environment].demonstrate(task, thinking)
            if m["role"] == "assistant"
        ]
        assert [m["content"] for m in t.messages if m["role"] == "assistant"] == [
            m["content"] for m in told
        ]
        whole = render(byte_tokenizer(), t.messages, task.tools, thinking)
        assert byte_tokenizer().decode(t.segments[-1].tokens) == whole.text
        assert t.texts == [said(byte_tokenizer(), message, thinking) for message in told]


@settings(max_examples=12)
@given(seed=seeds, tier=st.integers(1, 3), thinking=st.booleans())
def test_tokens_in_tokens_out(seed, tier, thinking):
    """Sampled ids are never tokenized again: spelled byte by byte, they stand so in the prompts and in the segments."""
    tokenizer, task = word_tokenizer(), RETAIL.task(0, seed, tiers=(tier,))
    played, engine = play(
        oracle(tokenizer, RETAIL, [task], thinking), [task], thinking, tokenizer=tokenizer
    )
    (t,), answers = played, [completion for call in engine.answers for completion in call]
    assert t.score.value == 1 and len(answers) == len(t.texts)
    sampled = [
        (i, p)
        for s in t.segments
        for i, m, p in zip(s.tokens, s.mask, s.logprobs, strict=True)
        if m
    ]
    assert sampled == [pair for c in answers for pair in zip(c.tokens, c.logprobs)]
    assert t.length == len(sampled)
    assert all(p == 0 for s in t.segments for m, p in zip(s.mask, s.logprobs) if not m), (
        "no token of ours has a logprob"
    )
    assert any(tokenizer.encode(text) != spelled(tokenizer, text) for text in t.texts), (
        "a test that could not fail"
    )
    for (
        call
    ) in engine.asked:  # a prompt is the beginning of a segment, up to where it was asked to go on
        assert any(s.tokens[: len(call[0].prompt)] == call[0].prompt for s in t.segments)


def test_tool_results_extend_the_segment():
    """Environment tokens join the segment with mask False, between two stretches that the model sampled."""
    task = retail(1)
    (t,), _ = play(oracle(byte_tokenizer(), RETAIL, [task]), [task])
    (segment,) = t.segments
    runs = []
    for token, mask in zip(segment.tokens, segment.mask):
        if not runs or runs[-1][0] != mask:
            runs.append([mask, []])
        runs[-1][1].append(token)
    assert [mask for mask, _ in runs] == [False, True] * 3  # look up, cancel, tell
    texts = [byte_tokenizer().decode(ids) for _, ids in runs]
    assert texts[1::2] == t.texts
    assert texts[2] == '\n<tool_response>\n{"status": "pending"}\n</tool_response><|assistant|>'
    assert texts[3].endswith("<|observation|>") and texts[5].endswith("<|user|>")


def test_a_user_turn_opens_a_new_segment():
    """When the customer speaks again the old reasoning is dropped from the prompt, and kept in the segment before."""
    task = retail(2)
    (t,), _ = play(oracle(byte_tokenizer(), RETAIL, [task]), [task])
    first, second = (byte_tokenizer().decode(segment.tokens) for segment in t.segments)
    assert t.score.value == 1 and len(t.messages[-1]["content"]) > 0
    assert "<think>no number, ask</think>\nWhich order?<|user|>" in first
    assert "<think></think>\nWhich order?<|user|>" in second and "ask" not in second
    assert [sum(s.mask) > 0 for s in t.segments] == [True, True]
    earlier = len(spelled(byte_tokenizer(), second[: second.index("Which order?") + 20]))
    assert not any(t.segments[1].mask[:earlier]), (
        "an answer is trained where it was sampled, and not once more"
    )


CALL = (
    "\n<tool_call>get_order\n<arg_key>order_id</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>"
)
FAULTS = {
    "truncated": ("\n<think>look</think>\nLet me", True, "truncated"),
    "cut off inside a call": ("\n<think>look</think>" + CALL[:40], True, "unclosed_tool_call"),
    "cut off inside the thought": ("\n<think>look", True, "unclosed_think"),
    "an answer that hands over to a tool": (
        "\n<think>a</think>\nDone.<|observation|>",
        True,
        "wrong_stop",
    ),
    "an answer that ends the text": ("\n<think>a</think>\nDone.<|endoftext|>", True, "wrong_stop"),
    "a call that hands over to the user": (
        "\n<think>a</think>" + CALL.format(1) + "<|user|>",
        True,
        "wrong_stop",
    ),
    "no thought although asked": ("\nDone.<|user|>", True, "thinking_switch"),
    "an empty thought": ("\n<think></think>\nDone.<|user|>", True, "thinking_switch"),
    "a thought although told not to": (
        "\n<think>a</think>\nDone.<|user|>",
        False,
        "thinking_switch",
    ),
    "nothing but a stop": ("<|user|>", True, "thinking_switch"),
    "an unknown tool": (
        "\n<think>a</think>" + CALL.format(1).replace("get", "eat") + "<|observation|>",
        True,
        "unknown_tool",
    ),
    "an argument of another type": (
        "\n<think>a</think>" + CALL.format("x") + "<|observation|>",
        True,
        "bad_argument",
    ),
    "a stray tag": ("\n<think>a</think>\nDone.</tool_call><|user|>", True, "stray_tag"),
    "a forged turn": ("\n<think>a</think>\nDone.<|assistant|>Yes.<|user|>", True, "stray_tag"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_halts_with_reward_zero(name):
    """A turn that nobody could go on from ends the episode at once: value 0, status format, and the fault by name."""
    text, thinking, fault = FAULTS[name]
    (t,), engine = play(lambda prompt: text, [retail(1)], thinking)
    assert (t.score.value, t.score.status, t.score.detail) == (0.0, "format", fault)
    assert len(engine.asked) == 1 and len(t.texts) == 1, "the model was asked again"
    assert (
        t.truncated == name.startswith(("truncated", "cut off"))
        and t.messages[-1]["error"] == fault
    )
    assert t.switch_obeyed == (fault != "thinking_switch")
    assert byte_tokenizer().decode(t.segments[0].tokens).endswith(text), (
        "a faulty turn is trained against as it is"
    )


def test_a_fault_after_a_good_turn_costs_everything():
    """The first call was fine, the answer after it is cut off: 0, and both turns are in the segment."""
    task = retail(1, "shipped")
    number = task.label["wanted"][0]
    turns = iter(
        [
            "\n<think>a</think>" + CALL.format(number) + "<|observation|>",
            "\n<think>a</think>\nOn its",
        ]
    )
    (t,), _ = play(lambda prompt: next(turns), [task])
    assert (t.score.value, t.score.status, t.truncated) == (0.0, "format", True)
    assert t.score.parts["calls"] == 2 and t.score.parts["valid_calls"] == 1 and len(t.texts) == 2


@given(seed=seeds, name=st.sampled_from(PLAYABLE), thinking=st.booleans())
def test_nothing_that_a_model_can_say_breaks_a_rollout(seed, name, thinking):
    """Random ids of the whole vocabulary, role tokens and tags among them: a score between 0 and 1, never an error."""
    draws = numbers(seed)
    common = [
        byte_tokenizer().special[tag] for tag in ("<think>", "</think>", "<tool_call>", "<|user|>")
    ]

    def script(prompt):
        size = int(torch.randint(1, 30, (), generator=draws))
        ids = torch.randint(292 + 40, (size,), generator=draws).tolist()
        return [token if token < 292 else common[token % 4] for token in ids]

    played, _ = play(script, ENVIRONMENTS[name].tasks(3, seed), thinking, samples=2)
    assert all(
        0 <= t.score.value <= 1 and t.score.status in ("ok", "wrong", "format") for t in played
    )


def test_episodes_end_at_the_bound_on_turns():
    """max_turns of the settings bounds an episode: it counts as not solved, and nobody is asked again."""
    task = retail(1)
    (t,), engine = play(oracle(byte_tokenizer(), RETAIL, [task]), [task], max_turns=2)
    assert len(engine.asked) == 2 and (t.score.value, t.score.status) == (0.0, "wrong")
    (t,), engine = play(oracle(byte_tokenizer(), RETAIL, [task]), [task], max_turns=3)
    assert len(engine.asked) == 3 and t.score.value == 1


def test_a_conversation_that_outgrows_the_model_ends():
    """No room for another answer: the episode is over and cut off, and the other episodes go on."""
    short, long = retail(1, "shipped"), retail(1)
    script = oracle(byte_tokenizer(), RETAIL, [short, long])
    _, engine = play(script, [long, short])
    room = len(engine.asked[2][0].prompt)  # the call to cancel fits, its result leaves no room
    (stopped, other), engine = play(script, [long, short], limit=room)
    assert (
        stopped.truncated and stopped.score.value == 0 and len(stopped.segments[0].tokens) == room
    )
    assert other.score.value == 1 and not other.truncated
    assert all(len(request.prompt) < room for call in engine.asked for request in call)


def test_samples_of_a_prompt_share_it_and_differ_in_their_draws():
    """Every request of a step has a seed of its own: by prompt, sample, turn and the rollout's seed."""
    tasks, wrong = RETAIL.tasks(3, 5), "\n<think>a</think>" + CALL.format(1) + "<|observation|>"
    found = []
    for seed, first in ((1, 0), (2, 0), (1, 4)):
        engine = Scripted(byte_tokenizer(), lambda prompt: wrong)
        rollout(
            engine,
            byte_tokenizer(),
            ENVIRONMENTS,
            tasks,
            4,
            bounds(max_turns=3),
            seed=seed,
            first_sample=first,
        )
        found += [[request.seed for request in call] for call in engine.asked]
        assert [len({tuple(r.prompt) for r in call}) for call in engine.asked] == [3, 3, 3]
    assert len({seed for call in found for seed in call}) == 9 * 12 and all(
        0 <= s < 2**63 for c in found for s in c
    )


def test_scores_come_from_each_environment_at_once():
    """Episodes of one environment are graded together, in order, whatever the order of the tasks."""
    graded = []

    class Counts(type(RETAIL)):
        def __init__(self, name):
            self.name = name

        def score_all(self, episodes):
            graded.append((self.name, [episode.task.id for episode in episodes]))
            return super().score_all(episodes)

    tasks = [
        dataclasses.replace(task, environment="ab"[i % 2])
        for i, task in enumerate(RETAIL.tasks(5, 1))
    ]
    engine = Scripted(byte_tokenizer(), lambda prompt: "<|user|>")
    environments = {name: Counts(name) for name in "abc"}
    groups = rollout(engine, byte_tokenizer(), environments, tasks, 2, bounds())
    ids = [task.id for task in tasks]
    expected = {
        "a": [ids[0], ids[0], ids[2], ids[2], ids[4], ids[4]],
        "b": [ids[1], ids[1], ids[3], ids[3]],
        "c": [],
    }
    assert dict(graded) == expected and len(graded) == 3
    assert [t.task.id for group in groups for t in group] == [i for i in ids for _ in range(2)]


@settings(max_examples=5)
@given(seed=seeds, temperature=st.sampled_from([0.7, 1.0, 1.5]), thinking=st.booleans())
def test_logprobs_are_the_model_s_own(seed, temperature, thinking):
    """Each sampled token has the log-probability that a plain forward pass of the segment gives it; twice the same."""
    model, tokenizer = (
        tiny_model(seed, vocab_size=292, max_position_embeddings=512),
        byte_tokenizer(),
    )
    tasks = ENVIRONMENTS["arithmetic"].tasks(2, seed)
    runs = [
        rollout(
            Engine(model, tokenizer),
            tokenizer,
            ENVIRONMENTS,
            tasks,
            2,
            bounds(max_new_tokens=9, temperature=temperature),
            [thinking] * 2,
            seed,
        )
        for _ in range(2)
    ]
    assert [[t.segments for t in group] for group in runs[0]] == [
        [t.segments for t in group] for group in runs[1]
    ]
    for t in (t for group in runs[0] for t in group):
        (segment,) = t.segments
        with torch.no_grad():
            logp_SV = (model(torch.tensor([segment.tokens]))[0] / temperature).log_softmax(-1)
        for at, (token, mask, logprob) in enumerate(
            zip(segment.tokens, segment.mask, segment.logprobs)
        ):
            if mask:  # float32 logits of size 10; the engine sums in another order
                assert logprob == pytest.approx(logp_SV[at - 1, token].item(), abs=1e-4)
        assert 1 <= t.length <= 9 and t.truncated == (segment.tokens[-1] not in tokenizer.stop_ids)


def test_messages_that_came_from_outside_are_kept():
    """A task may begin in the middle of a conversation; the trajectory's messages go on from there."""
    task = ENVIRONMENTS["arithmetic"].tasks(1, 1)[0]
    before = ({"role": "user", "content": "1+1="}, assistant("2", "1+1=2"))
    longer = dataclasses.replace(task, messages=(*before, *task.messages))
    answer = said(byte_tokenizer(), assistant(task.label, "so"))
    (t,), engine = play(lambda prompt: answer, [longer])
    assert t.score.value == 1 and [m["content"] for m in t.messages[:3]] == [
        m["content"] for m in longer.messages
    ]
    assert byte_tokenizer().decode(engine.asked[0][0].prompt).count("<|assistant|>") == 2
    assert sum(t.segments[0].mask) == len(spelled(byte_tokenizer(), answer)), (
        "earlier answers are not trained"
    )
