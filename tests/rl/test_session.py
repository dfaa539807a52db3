"""Sessions of outside agents: whatever an agent does with its conversation, sampled ids are what is trained."""

from dataclasses import replace

import pytest
from helpers.scripted import ScriptedGenerator, said, spelled, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.chat import render
from minglm.envs import ENVIRONMENTS
from minglm.envs.base import assistant, user
from minglm.inference import Completion
from minglm.rl.episode import Player, SamplingSettings
from minglm.rl.session import Session, key_of

TOKENIZER = word_tokenizer()
TASK = ENVIRONMENTS["retail"].task(0, 1)
ORDER = {"order_id": 317}
ANSWERS = (
    assistant("order is cancelled", "the shop"),
    assistant("", "look", [("get_order", ORDER)]),
    assistant("in the shop", "both", [("get_order", ORDER), ("cancel_order", ORDER)]),
)
RESULT = {"role": "tool", "content": '{"status": "pending"}'}


class Retokenizing(Session):
    """The broken twin: every prompt is rendered anew, so what was sampled is tokenized again."""

    def known_prompt(self, messages, tools):
        """Know nothing."""
        return None


def opened(kind=Session, **values):
    """Return a session of the shop; its seeds are the numbers of the calls."""
    bounds = SamplingSettings(**{"max_new_tokens": 1000, "max_turns": 1000, **values})
    player = Player(ScriptedGenerator(TOKENIZER, None), TOKENIZER, bounds)
    return kind(player, TASK, True, lambda turn: turn)


def as_openai(message):
    """Return an assistant message as a client sends it back: no reasoning, arguments as text, ids, None for no text."""
    calls = [
        {"id": f"call_{n}", "type": "function", "function": {**c, "arguments": '{"order_id":317}'}}
        for n, c in enumerate(message.get("tool_calls") or ())
    ]
    sent = {"role": "assistant", "content": message["content"] or None}
    return sent | ({"tool_calls": calls} if calls else {})


def call(session, messages, answer, tools=TASK.tools):
    """Ask for the next answer of a conversation; return (prompt, completion, conversation with the answer)."""
    prompt = session.known_prompt(messages, tools)
    if prompt is None:
        prompt = render(TOKENIZER, messages, tools, True, generation_prompt=True).ids
    request = session.ask(prompt, 10**6)
    # Spelled byte by byte: no tokenizer would return these ids.
    ids = spelled(TOKENIZER, said(TOKENIZER, answer))
    number = request.seed
    completion = Completion(ids, [-number - 1e-3 * (i + 1) for i in range(len(ids))], "stop")
    session.note(request.prompt, completion, messages, tools)
    return prompt, completion, [*messages, as_openai(answer)]


MOVES = st.lists(
    st.tuples(
        st.sampled_from(["go on", "user", "back", "anew", "reworded", "other tools"]),
        st.integers(0, 2),
        st.integers(0, 10),
    ),
    max_size=8,
)


def played(kind, moves):
    """Return (session, prompts, completions) of an agent that goes on, asks anew, branches, or rewrites what was said."""
    session = opened(kind)
    conversations = [list(TASK.messages)]
    asked, answered = [], []
    for move, answer, which in [("anew", 1, 0), *moves]:
        conversation = conversations[-1]
        tools = TASK.tools
        if move == "back":
            conversation = conversations[which % len(conversations)]
        elif move == "anew":
            conversation = [user(f"order {which}")]
        elif move == "reworded":
            conversation = [user("now, then"), *conversation[1:]]
        elif move == "other tools":
            tools = TASK.tools[:1] if answer == 1 else ()
        last = conversation[-1]
        calls = len(last.get("tool_calls") or ()) if last["role"] == "assistant" else 0
        if calls:
            conversation = [*conversation, *[RESULT] * calls]
        if move == "user" or conversation[-1]["role"] == "assistant":
            conversation = [*conversation, user("and in the shop?")]
        said_now = ANSWERS[answer] if tools == TASK.tools else ANSWERS[0]
        prompt, completion, conversation = call(session, conversation, said_now, tools)
        asked.append(prompt)
        answered.append(completion)
        conversations.append(conversation)
        assert session.fault is None
    return session, asked, answered


def keeps_the_tokens(session, asked, answered):
    """Tell whether each sampled token is trained once, with its log-probability, after the very prompt it was drawn for."""
    segments = session.trajectory.segments
    trained = [
        (token, logprob)
        for segment in segments
        for token, mask, logprob in zip(segment.tokens, segment.mask, segment.logprobs, strict=True)
        if mask
    ]
    sampled = [pair for c in answered for pair in zip(c.tokens, c.logprobs)]
    if sorted(trained) != sorted(sampled):
        return False
    for prompt, completion in zip(asked, answered, strict=True):
        stretch = [*prompt, *completion.tokens]
        first = completion.logprobs[0]
        (home,) = [s for s in segments if first in s.logprobs]
        at = home.logprobs.index(first)
        if home.tokens[: at + len(completion.tokens)] != stretch:
            return False
    return True


@settings(max_examples=25, deadline=None)
@given(moves=MOVES)
def test_each_sampled_token_is_trained_once_after_its_own_prompt(moves):
    """Whatever the agent does: go on, speak again, branch, begin anew, rewrite history, offer other tools."""
    assert keeps_the_tokens(*played(Session, moves))


def test_results_of_tools_continue_what_was_sampled():
    """A conversation with results is one segment, whose ids are those that were sampled; the broken twin begins anew."""
    for kind, segments in ((Session, 1), (Retokenizing, 3)):
        session = opened(kind)
        conversation = list(TASK.messages)
        for answer in (ANSWERS[1], ANSWERS[2], ANSWERS[0]):
            _, _, conversation = call(session, conversation, answer)
            results = [RESULT] * len(conversation[-1].get("tool_calls") or ())
            conversation += results
        assert len(session.trajectory.segments) == segments
        text = TOKENIZER.decode(session.trajectory.segments[-1].tokens)
        if kind is Session:
            messages = session.trajectory.messages
            answers = iter((ANSWERS[1], ANSWERS[2], ANSWERS[0]))
            whole = [next(answers) if m["role"] == "assistant" else m for m in messages]
            assert text == render(TOKENIZER, whole, TASK.tools, True).text


def test_a_malformed_turn_ends_the_session_with_nothing():
    """An unknown function, and a reward that the agent claims for it."""
    session = opened()
    call(session, list(TASK.messages), assistant("", "go", [("steal", ORDER)]))
    assert "unknown_tool" in session.closed
    trajectory = session.end(1.0, {"sales": 1})
    assert (trajectory.score.value, trajectory.score.status) == (0.0, "format")
    assert trajectory.score.parts == {"sales": 1} and trajectory.length > 0


def test_bounds_close_a_session():
    """The number of calls; a cut answer is malformed, and the trajectory says that it was cut."""
    session = opened(max_turns=1)
    call(session, list(TASK.messages), ANSWERS[1])
    assert "asked 1 times" in session.closed and session.end(0.5, {}).score.status == "wrong"
    session = opened()
    request = session.ask(list(TASK.messages[0]["content"].encode()), 7)
    assert request.max_new_tokens == 7
    session.note(request.prompt, Completion([65] * 7, [-1.0] * 7, "length"), TASK.messages, ())
    assert session.trajectory.truncated and "truncated" in session.closed


@pytest.mark.parametrize(
    "change",
    [
        {"content": "order is  cancelled"},
        {"role": "user"},
        {"tool_calls": [{"name": "get_order", "arguments": {"order_id": 318}}]},
    ],
)
def test_what_is_said_tells_messages_apart(change):
    """Text, role and calls do; spelling of arguments, ids, reasoning and space around the text do not."""
    plain = {"role": "assistant", "content": "order is cancelled"}
    assert key_of(plain) != key_of(plain | change)
    same = {"content": [{"type": "text", "text": " order is cancelled\n"}], "reasoning": "so"}
    assert key_of(plain) == key_of(plain | same)
    called = assistant("", None, [("get_order", ORDER)])
    assert key_of(called) == key_of(as_openai(called))


def test_the_trainer_samples():
    """Temperature, cuts and seeds of a request are the settings' and the call's, whatever was asked."""
    session = opened(temperature=0.7, top_p=0.9, thinking_budget=5)
    first, second = session.ask([1], 10), session.ask([1], 10)
    assert (first.temperature, first.top_p, first.thinking_budget) == (0.7, 0.9, 5)
    assert second == replace(first, seed=1)


def test_a_malformed_turn_stays_one_when_another_call_was_under_way():
    """Two calls at once, in either order, one of them malformed: the session is closed, and the reward is 0."""
    malformed = assistant("", "look", [("no_such_tool", ORDER)])
    for answers in ((malformed, ANSWERS[0]), (ANSWERS[0], malformed)):
        session = opened()
        for answer in answers:
            call(session, list(TASK.messages), answer)
        assert session.closed
        assert (session.end(1.0, {}).score.value, session.fault) == (0.0, "unknown_tool")


def test_a_reward_without_an_answer_leaves_the_statistics():
    """An agent that never asks the model says nothing about it, whatever reward it gives."""
    with pytest.warns(UserWarning, match="leaves the statistics"):
        trajectory = opened().end(1.0, {})
    assert not trajectory.valid and "never asked the model" in trajectory.score.detail
