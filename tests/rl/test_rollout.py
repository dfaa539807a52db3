"""Episodes: the ids that were sampled are the ids that are trained, whatever the model says."""

import asyncio
import dataclasses

import pytest
import torch
from helpers.scripted import (
    ScriptedGenerator,
    byte_tokenizer,
    oracle,
    said,
    spelled,
    word_tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.chat import render
from minglm.envs import ENVIRONMENTS
from minglm.envs.base import Misconfigured, assistant
from minglm.envs.worlds.base import WorldEpisode
from minglm.envs.worlds.retail import Retail
from minglm.inference import Engine
from minglm.inference.client import EngineGenerator
from minglm.rl.episode import Player, SamplingSettings
from minglm.rl.rollout import rollout
from minglm.testing.model import tiny_model
from minglm.testing.strategies import numbers, seeds

PLAYABLE = ("arithmetic", "retail", "instructions", "provocation")  # the code tasks start processes
RETAIL = ENVIRONMENTS["retail"]


def bounds(**values):
    """Return settings of a rollout."""
    return SamplingSettings(**{"max_new_tokens": 400, "max_turns": 8, **values})


def play(script, tasks, thinking=True, samples=1, tokenizer=None, limit=10**6, **values):
    """Return (trajectories, generator) of these tasks with a scripted model."""
    tokenizer = tokenizer or byte_tokenizer()
    generator = ScriptedGenerator(tokenizer, script, limit)
    switches = [thinking] * len(tasks)
    player = Player(generator, tokenizer, bounds(**values))
    groups = rollout(player, ENVIRONMENTS, tasks, samples, switches)
    assert [len(group) for group in groups] == [samples] * len(tasks)
    return [t for group in groups for t in group], generator


def retail(difficulty, status="pending", n=0):
    """Return the n-th task of the shop of this difficulty whose first order has this status."""
    tasks = (RETAIL.task(index, 1, difficulties=(difficulty,)) for index in range(1000))
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
@given(seed=seeds, difficulty=st.integers(1, 3), thinking=st.booleans())
def test_tokens_in_tokens_out(seed, difficulty, thinking):
    """Sampled ids are never tokenized again: spelled byte by byte, they stand so in the prompts and in the segments."""
    tokenizer = word_tokenizer()
    task = RETAIL.task(0, seed, difficulties=(difficulty,))
    played, engine = play(
        oracle(tokenizer, RETAIL, [task], thinking), [task], thinking, tokenizer=tokenizer
    )
    (t,) = played
    answers = engine.answers
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
    for request in engine.asked:  # every prompt is the beginning of a segment
        assert any(s.tokens[: len(request.prompt)] == request.prompt for s in t.segments)


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
    "a thought that ends the turn": ("\n<think>look<|user|>", True, "unclosed_think"),
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
    """A turn from which the conversation cannot continue ends the episode: value 0, status format, the fault by name."""
    text, thinking, fault = FAULTS[name]
    (t,), engine = play(lambda prompt: text, [retail(1)], thinking)
    assert (t.score.value, t.score.status, t.score.detail) == (0.0, "format", fault)
    assert len(engine.asked) == 1 and len(t.texts) == 1, "the model was asked again"
    assert t.truncated == name.startswith(("truncated", "cut off"))
    assert t.messages[-1]["error"] == fault
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
    assert t.score.parts["calls"] == 2
    assert t.score.parts["valid_calls"] == 1
    assert len(t.texts) == 2


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
    """max_turns of the settings bounds an episode: it counts as not solved, and the model is not asked again."""
    task = retail(1)
    (t,), engine = play(oracle(byte_tokenizer(), RETAIL, [task]), [task], max_turns=2)
    assert len(engine.asked) == 2 and (t.score.value, t.score.status) == (0.0, "wrong")
    (t,), engine = play(oracle(byte_tokenizer(), RETAIL, [task]), [task], max_turns=3)
    assert len(engine.asked) == 3 and t.score.value == 1


def test_a_conversation_that_outgrows_the_model_ends():
    """Without room for another answer the episode is over and truncated, and the other episodes continue."""
    short = retail(1, "shipped")
    long = retail(1)
    script = oracle(byte_tokenizer(), RETAIL, [short, long])
    _, engine = play(script, [long, short])
    room = len(engine.asked[-1].prompt)  # the call to cancel fits, its result leaves no room
    (stopped, other), engine = play(script, [long, short], limit=room)
    assert stopped.truncated
    assert stopped.score.value == 0
    assert len(stopped.segments[0].tokens) == room
    assert other.score.value == 1 and not other.truncated
    assert all(len(request.prompt) < room for request in engine.asked)


def test_samples_of_a_prompt_share_it_and_differ_in_their_draws():
    """Every request of a step has a seed of its own: by prompt, sample, turn and the rollout's seed."""
    wrong = "\n<think>a</think>" + CALL.format(1) + "<|observation|>"
    seen = []
    for seed in (1, 2, 3):
        generator = ScriptedGenerator(byte_tokenizer(), lambda prompt: wrong)
        player = Player(generator, byte_tokenizer(), bounds(max_turns=3))
        rollout(player, ENVIRONMENTS, RETAIL.tasks(3, 5), 4, seed=seed)
        assert len(generator.asked) == 3 * 3 * 4
        assert len({tuple(request.prompt) for request in generator.asked}) == 3 * 3
        seen += [request.seed for request in generator.asked]
    assert len(set(seen)) == 3 * 3 * 3 * 4
    assert all(0 <= seed < 2**63 for seed in seen)


class Scheduled(Retail):
    """A shop whose episodes fail where they are told to, and record that they were left.

    waits_for: an environment whose six episodes must be scored before `step` answers.
    """

    def __init__(self, name, fails_in=None, waits_for=None):
        self.name = name
        self.fails_in = fails_in
        self.waits_for = waits_for
        self.tried = 0
        self.opened = 0
        self.left = 0
        self.scored = 0

    def episode(self, task):
        """Return an episode of this environment."""
        environment = self

        class Recorded(WorldEpisode):
            """An episode that reports to its environment."""

            async def __aenter__(self):
                environment.tried += 1
                if environment.fails_in == "open":
                    raise OSError("no sandbox")
                if environment.fails_in == "open at first" and environment.tried % 2:
                    raise OSError("no sandbox yet")
                environment.opened += 1
                return self

            async def __aexit__(self, *_):
                environment.left += 1
                if environment.fails_in == "close":
                    raise OSError("it hangs")
                if environment.fails_in == "hang at the end":
                    await asyncio.sleep(60)

            async def step(self, message):
                if environment.fails_in == "step":
                    raise OSError("the server is gone")
                if environment.fails_in == "hang in step":
                    await asyncio.sleep(60)
                if environment.waits_for:
                    async with asyncio.timeout(60):
                        while environment.waits_for.scored < 6:
                            await asyncio.sleep(0.001)
                return await super().step(message)

            async def score(self):
                if environment.fails_in == "hang":
                    await asyncio.sleep(60)
                if environment.fails_in == "score":
                    raise OSError("no verdict")
                environment.scored += 1
                return await super().score()

        return Recorded(self, task)


def scheduled(environments, generator=None, samples=2):
    """Play three tasks in each of these environments, by the oracle; return the groups in order."""
    tasks = []
    for task in RETAIL.tasks(3, 1):
        tasks += [dataclasses.replace(task, environment=e.name) for e in environments]
    script = oracle(byte_tokenizer(), RETAIL, RETAIL.tasks(3, 1))
    generator = generator or ScriptedGenerator(byte_tokenizer(), script)
    player = Player(generator, byte_tokenizer(), bounds())
    groups = rollout(player, {e.name: e for e in environments}, tasks, samples)
    assert [t.task for group in groups for t in group] == [t for t in tasks for _ in range(samples)]
    return groups


def test_a_slow_episode_does_not_hold_up_the_others():
    """Every episode of the quick environment is scored before the slow one has answered its first turn."""
    quick = Scheduled("quick")
    slow = Scheduled("slow", waits_for=quick)
    groups = scheduled([slow, quick])
    assert all(t.score.value == 1 for group in groups for t in group)


@pytest.mark.parametrize("where", ["open", "step", "score"])
def test_a_failure_of_the_environment_is_its_own_sample_s_alone(where):
    """An exception in the environment: status infrastructure, the others are played, and every episode is left."""
    broken = Scheduled("broken", fails_in=where)
    sound = Scheduled("sound")
    groups = scheduled([broken, sound])
    for group in groups:
        for t in group:
            failed = t.task.environment == "broken"
            assert t.valid != failed and (t.score.status == "infrastructure") == failed
            assert t.score.value == (0 if failed else 1)
            assert ("OSError" in t.score.detail) == failed
            assert not any(t.faults().values())
    for environment in (broken, sound):
        assert environment.left == environment.opened
    assert broken.opened == (0 if where == "open" else 6)


def test_an_environment_that_says_nothing_fails_its_own_samples():
    """After its patience: status infrastructure, with the reason; the others are scored, and every episode is left."""
    silent = Scheduled("silent", fails_in="hang")
    waiting = Scheduled("waiting", fails_in="hang in step")
    stuck = Scheduled("stuck", fails_in="hang at the end")
    sound = Scheduled("sound")
    silent.patience = waiting.patience = stuck.patience = 1.0
    with pytest.warns(UserWarning, match="stuck did not close: TimeoutError: nothing within 1 s"):
        groups = scheduled([silent, waiting, stuck, sound], samples=1)
    for (t,) in groups:
        failed = t.task.environment in ("silent", "waiting")
        assert t.valid != failed and t.score.value == (0 if failed else 1)
        assert ("TimeoutError: nothing within 1 s" in t.score.detail) == failed
    for environment in (silent, waiting, stuck, sound):
        assert environment.left == environment.opened == 3


def test_an_environment_that_opens_at_the_second_attempt_costs_nothing():
    """Nothing had been sampled: all samples are valid, and each episode that was opened is left."""
    late = Scheduled("late", fails_in="open at first")
    groups = scheduled([late])
    assert all(t.valid and t.score.value == 1 for group in groups for t in group)
    assert (late.tried, late.opened, late.left) == (12, 6, 6)


def test_an_episode_that_cannot_be_closed_keeps_its_score():
    """The score stands; the failure is a warning."""
    with pytest.warns(UserWarning, match="an episode of sticky did not close: OSError: it hangs"):
        groups = scheduled([Scheduled("sticky", fails_in="close")], samples=1)
    assert [t.score.value for group in groups for t in group] == [1, 1, 1]


def test_a_failure_of_the_generator_ends_the_rollout():
    """An exception that is not the environment's is raised, and every episode is left."""

    def fail(prompt):
        raise RuntimeError("out of memory")

    environment = Scheduled("shop")
    with pytest.raises(RuntimeError, match="out of memory"):
        scheduled([environment], ScriptedGenerator(byte_tokenizer(), fail))
    assert environment.opened == environment.left == 6


def test_an_environment_that_cannot_run_at_all_ends_the_rollout():
    """A misconfigured machine is one clear error, and not a failure of every sample."""

    class Refused(Scheduled):
        """A shop that this machine cannot open."""

        def episode(self, task):
            episode = super().episode(task)

            async def refuse():
                raise Misconfigured("no isolation here")

            episode.score = refuse
            return episode

    with pytest.raises(ValueError, match="no isolation here"):
        scheduled([Refused("shop")])


@settings(max_examples=5)
@given(seed=seeds, temperature=st.sampled_from([0.7, 1.0, 1.5]), thinking=st.booleans())
def test_logprobs_are_the_model_s_own(seed, temperature, thinking):
    """Each sampled token has the log-probability that a plain forward pass of the segment gives it; twice the same."""
    model = tiny_model(seed, vocab_size=292, max_position_embeddings=512)
    tokenizer = byte_tokenizer()
    tasks = ENVIRONMENTS["arithmetic"].tasks(2, seed)
    runs = [
        rollout(
            Player(
                EngineGenerator(Engine(model, tokenizer)),
                tokenizer,
                bounds(max_new_tokens=9, temperature=temperature),
            ),
            ENVIRONMENTS,
            tasks,
            2,
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


@pytest.mark.parametrize("thought", ["", "12 plus"])
def test_a_token_that_was_put_in_is_not_trained(thought):
    """The forced close of a thought is context; the thought counts as thinking, however short, and is no fault."""
    task = ENVIRONMENTS["arithmetic"].tasks(1, 1)[0]
    tokenizer = byte_tokenizer()
    close = tokenizer.special["</think>"]
    answer = f"\n<think>{thought}</think>\n{task.label}<|user|>"

    class Closing(ScriptedGenerator):
        """A model whose thoughts are closed by force."""

        async def generate(self, request):
            completion = await super().generate(request)
            completion.forced.append(completion.tokens.index(close))
            return completion

    generator = Closing(tokenizer, lambda prompt: answer)
    player = Player(generator, tokenizer, bounds(thinking_budget=len(thought)))
    ((t,),) = rollout(player, ENVIRONMENTS, [task], 1, [True])
    assert generator.asked[0].thinking_budget == len(thought)
    (segment,) = t.segments
    untrained = [i for i, m in zip(segment.tokens, segment.mask, strict=True) if not m]
    assert untrained == generator.asked[0].prompt + [close]
    assert segment.logprobs[segment.tokens.index(close, len(untrained) - 1)] == 0
    assert t.switch_obeyed and t.score.status != "format" and not t.messages[-1]["error"]


def test_messages_that_came_from_outside_are_kept():
    """A task may begin in the middle of a conversation; the trajectory's messages continue from there."""
    task = ENVIRONMENTS["arithmetic"].tasks(1, 1)[0]
    before = ({"role": "user", "content": "1+1="}, assistant("2", "1+1=2"))
    longer = dataclasses.replace(task, messages=(*before, *task.messages))
    answer = said(byte_tokenizer(), assistant(task.label, "so"))
    (t,), engine = play(lambda prompt: answer, [longer])
    assert t.score.value == 1
    assert [m["content"] for m in t.messages[:3]] == [m["content"] for m in longer.messages]
    assert byte_tokenizer().decode(engine.asked[0].prompt).count("<|assistant|>") == 2
    assert sum(t.segments[0].mask) == len(spelled(byte_tokenizer(), answer)), (
        "earlier answers are not trained"
    )
