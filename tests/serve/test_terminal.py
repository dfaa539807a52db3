"""The terminal chat: what is printed, what the model is asked, and that nothing but the user ends it."""

import io
import json
import re

import pytest
from helpers.scripted import Scripted, byte_tokenizer, said, spelled
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.envs.base import assistant
from minglm.serve import terminal
from minglm.testing.model import tiny_model
from minglm.testing.strategies import seeds

TOKENIZER = byte_tokenizer()


class Screen(io.StringIO):
    """Standard output that remembers each write."""

    def __init__(self):
        super().__init__()
        self.writes = []

    def write(self, text):
        """Write and remember."""
        self.writes.append(text)
        return super().write(text)


class Keys:
    """A user who types these lines; an exception among them is raised in place of a line. Then the input ends."""

    def __init__(self, *lines):
        self.lines = list(lines)
        self.prompts = []

    def __call__(self, prompt):
        """Return the next line."""
        self.prompts.append(prompt)
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line


def talk(monkeypatch, lines, answers=(), **options):
    """Return (what stood on the screen without colours, the scripted engine, the screen) of a chat.

    answers: what the model says, turn by turn: text, ids, or an exception that the engine raises.
    """
    queue = list(answers)
    screen = Screen()

    def script(prompt):
        answer = queue.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    engine = Scripted(TOKENIZER, script)
    monkeypatch.setattr(terminal, "Engine", lambda model, tokenizer, **options: engine)
    keys = Keys(*lines)
    terminal.chat(None, TOKENIZER, terminal.ChatSettings(**options), read=keys, out=screen)
    assert not keys.lines, "the chat ended early"
    assert not queue, "the model was not asked"
    return re.sub(r"\x1b\[\d*m", "", screen.getvalue()), engine, screen


def test_drafts_are_the_engines(monkeypatch):
    """The number of drafted tokens reaches the engine."""
    given = {}
    monkeypatch.setattr(terminal, "Engine", lambda *_, **options: given.update(options))
    terminal.Conversation(None, TOKENIZER, terminal.ChatSettings(draft_tokens=3))
    assert given == {"draft_tokens": 3}


def prompts(engine):
    """Return what the model was asked, as text."""
    return [TOKENIZER.decode(request.prompt) for call in engine.asked for request in call]


def answer(text="fine", reasoning="so", calls=()):
    """Return an assistant turn with thinking."""
    return said(TOKENIZER, assistant(text, reasoning, calls))


@settings(max_examples=15)
@given(text=st.text(min_size=1, max_size=20), reasoning=st.text(min_size=1, max_size=20))
def test_only_whole_characters_are_printed(text, reasoning):
    """Characters of several tokens are held back until they are whole; the screen shows what was said, in order."""
    clean = [re.sub(r"[\s\ufffd\ud800-\udfff<>\x1b]+", "", part) for part in (reasoning, text)]
    if not all(clean):
        return
    with pytest.MonkeyPatch.context() as patch:
        shown, _, screen = talk(
            patch, ["hello"], [f"\n<think>{clean[0]}</think>\n{clean[1]}<|user|>"]
        )
    assert not any("\ufffd" in write for write in screen.writes)
    assert shown.endswith(f"{clean[0]}\n{clean[1]}\n"), (
        "the thought, then the answer on a line of its own"
    )
    pieces = [w for w in screen.writes if w != "\n"]
    assert len(pieces) > len(clean[0]) + len(clean[1]) - 1, "it streams, character by character"


def test_half_a_character_at_the_end_is_replaced(monkeypatch):
    """A model stops inside a character: the rest of the answer is printed, and the chat continues."""
    ids = (
        spelled(TOKENIZER, "\n<think>a</think>\nno ")
        + spelled(TOKENIZER, "猫")[:2]
        + [TOKENIZER.special["<|user|>"]]
    )
    shown, engine, _ = talk(monkeypatch, ["hello", "again"], [ids, answer("yes")])
    assert "a\nno \ufffd" in shown and "yes" in shown and len(engine.asked) == 2


def test_thoughts_are_grey_and_tags_are_not_shown(monkeypatch):
    """Reasoning is printed in grey, content plain, and no markup of the template appears."""
    _, _, screen = talk(monkeypatch, ["hello"], [answer("fine", "well")])
    grey = [write for write in screen.writes if write.startswith(terminal.GREY)]
    assert "".join(grey).replace(terminal.GREY, "").replace(terminal.PLAIN, "").endswith("well")
    assert "fine" in re.sub(r"\x1b\[2m.*?\x1b\[0m", "", screen.getvalue(), flags=re.DOTALL)
    assert not re.search(r"<\|?/?(think|user|assistant)", screen.getvalue())


def test_the_thinking_switch(monkeypatch):
    """/nothink asks for a direct answer from then on, /think for reasoning again."""
    direct = said(TOKENIZER, assistant("2"), False)
    lines = ["1+1=", "/nothink", "1+1=", "/think", "1+1="]
    shown, engine, _ = talk(monkeypatch, lines, [answer(), direct, answer()])
    ends = [prompt.rpartition("<|user|>")[2] for prompt in prompts(engine)]
    thinks, direct_end = "\n1+1=<|assistant|>", "\n1+1=/nothink<|assistant|>\n<think></think>"
    assert ends == [thinks, direct_end, thinks]
    assert "thinking off" in shown and "thinking on" in shown


def test_the_dialect_of_4_7(monkeypatch):
    """Its prompt opens the reasoning or closes it, and what comes after the opening is grey."""
    lines = ["1+1=", "/nothink", "1+1="]
    answers = ["well</think>fine<|user|>", "2<|user|>"]
    _, engine, screen = talk(monkeypatch, lines, answers, dialect="glm-4.7")
    assert [p.rpartition("<|user|>")[2] for p in prompts(engine)] == [
        f"1+1=<|assistant|>{t}think>" for t in ("<", "</")
    ]
    assert f"{terminal.GREY}w{terminal.PLAIN}" in screen.getvalue()
    assert "think>" not in screen.getvalue()


def test_the_conversation_is_remembered_until_new(monkeypatch):
    """Each prompt holds what was said before, the reasoning of old turns left out; /new begins again."""
    lines = ["first", "second", "/new", "third"]
    _, engine, _ = talk(monkeypatch, lines, [answer("one", "idea"), answer("two"), answer("three")])
    asked = prompts(engine)
    assert "first" in asked[1]
    assert "one" in asked[1]
    assert "idea" not in asked[1]
    assert asked[2] == "[gMASK]<sop><|user|>\nthird<|assistant|>"


def test_settings_reach_the_engine(monkeypatch):
    """Temperature, nucleus and bound are those given; each turn has a seed of its own, and the chat's seed counts."""
    found = []
    for seed in (3, 4):
        options = {"temperature": 0.2, "top_p": 0.5, "max_new_tokens": 9, "seed": seed}
        _, engine, _ = talk(monkeypatch, ["a", "b"], [answer(), answer()], **options)
        requests = [request for call in engine.asked for request in call]
        assert all((r.temperature, r.top_p, r.max_new_tokens) == (0.2, 0.5, 9) for r in requests)
        found += [r.seed for r in requests]
    assert len(set(found)) == 4


def shop_of(shown):
    """Return the orders that /tools announced, {number: status}."""
    listed = re.search(r"has the orders (.*)", shown)[1]
    return {int(number): status for number, status in re.findall(r"(\d+) (\w+)", listed)}


def test_tools_are_offered_called_and_answered(monkeypatch):
    """With /tools the functions are in the prompt; a call runs on the shop that was announced, in training's format."""
    orders = shop_of(talk(monkeypatch, ["/tools"], seed=2)[0])
    assert len(orders) == 6
    assert set(orders.values()) <= {"pending", "shipped", "delivered"}
    for number, status in orders.items():
        turns = [answer("", "a", [("get_order", {"order_id": number})]), answer("Good.")]
        shown, engine, _ = talk(monkeypatch, ["/tools", "where is it?"], turns, seed=2)
        before, after = prompts(engine)
        assert '{"name": "cancel_order"' in before
        result = json.dumps({"status": status})
        assert (
            after == f"{before}{turns[0]}\n<tool_response>\n{result}\n</tool_response><|assistant|>"
        )
        assert f"get_order({{'order_id': {number}}}) -> {{'status': '{status}'}}" in shown


def test_a_call_changes_the_shop_until_new(monkeypatch):
    """An order that was cancelled stays so in the next turn; /new opens a fresh shop."""
    orders = shop_of(talk(monkeypatch, ["/tools"], seed=2)[0])
    number = next(n for n, status in orders.items() if status == "pending")
    look, cancel = (
        answer("", "a", [(name, {"order_id": number})]) for name in ("get_order", "cancel_order")
    )
    lines = ["/tools", "cancel it", "and now?", "/new", "and now?"]
    turns = [look, cancel, answer(), look, answer(), look, answer()]
    shown, engine, _ = talk(monkeypatch, lines, turns, seed=2)
    results = re.findall(r"-> (.*)", shown)
    assert results == [
        "{'status': 'pending'}",
        "{'ok': True}",
        "{'status': 'cancelled'}",
        "{'status': 'pending'}",
    ]
    assert '\n{"ok": true}\n' in prompts(engine)[2], "JSON as in training, and not Python"


def test_tools_can_be_taken_away(monkeypatch):
    """A second /tools takes the functions from the prompt; a call that was not offered is a fault, and runs nothing."""
    call = answer("", "a", [("get_order", {"order_id": 1})])
    shown, engine, _ = talk(monkeypatch, ["/tools", "/tools", "hello"], [call])
    assert "tools on" in shown
    assert "tools off" in shown
    assert "get_order" not in prompts(engine)[0]
    assert "[unknown_tool]" in shown and "->" not in shown


@pytest.mark.parametrize(
    ("turn", "error"),
    [
        ("\n<think>a</think>\n<tool_call>get_order", "unclosed_tool_call"),
        ("\n<think>a", "unclosed_think"),
        (answer("", "a", [("eat_order", {"order_id": 1})]), "unknown_tool"),
        (answer("", "a", [("get_order", {"number": 1})]), "unknown_argument"),
        (answer("", "a", [("get_order", {})]), "missing_argument"),
        (answer("", "a", [("get_order", {"order_id": "all"})]), "bad_argument"),
    ],
)
def test_malformed_turns_are_named_and_not_run(monkeypatch, turn, error):
    """What cannot be read is shown with the name of its fault; no function runs, and the chat goes on."""
    shown, engine, _ = talk(monkeypatch, ["/tools", "hello", "again"], [turn, answer("fine")])
    assert f"[{error}]" in shown
    assert "->" not in shown
    assert "fine" in shown
    assert len(engine.asked) == 2


def test_calls_without_end_are_stopped(monkeypatch):
    """A model that calls and calls is stopped after a number of turns, and says so."""
    turn = answer("", "a", [("get_order", {"order_id": 1})])
    shown, _, _ = talk(
        monkeypatch, ["/tools", "hello", "again"], [turn] * terminal.MAX_CALLS + [answer("fine")]
    )
    assert shown.count("no such order") == terminal.MAX_CALLS
    assert "[stopped after" in shown
    assert "fine" in shown


def test_errors_and_interrupts_do_not_end_the_chat(monkeypatch):
    """Ctrl-C in an answer, or a prompt too long for the model: one line, the turn is forgotten, the chat goes on."""
    lines = ["first", "second", "third", "fourth"]
    turns = [answer("one"), KeyboardInterrupt(), ValueError("a prompt of 9 tokens"), answer("four")]
    shown, engine, _ = talk(monkeypatch, lines, turns)
    assert "[stopped]" in shown and "a prompt of 9 tokens; /new begins again" in shown
    kept = TOKENIZER.decode(engine.asked[-1][0].prompt)
    assert "first" in kept and "one" in kept and "fourth" in kept
    assert "second" not in kept and "third" not in kept


@pytest.mark.parametrize("last", [EOFError(), KeyboardInterrupt(), "/quit"])
def test_only_the_user_ends_it(monkeypatch, last):
    """End of input, Ctrl-C at the prompt, or /quit: the chat returns, without an error."""
    shown, _, _ = talk(monkeypatch, ["", "   ", "/help", "/unknown", last])
    assert shown.count("/nothink") == 3, "help at the start, when asked, and for what is no command"


@settings(max_examples=5)
@given(seed=seeds)
def test_any_model_can_be_talked_to(seed):
    """A random model, tools and all: it answers something, twice the same for one seed, and never breaks the chat."""
    shown = []
    for _ in range(2):
        screen = Screen()
        model = tiny_model(seed, vocab_size=292, max_position_embeddings=2048)
        keys = Keys("hello", "/tools", "cancel order 482", "/nothink", "一二三")
        chosen = terminal.ChatSettings(temperature=1.0, max_new_tokens=12, seed=seed % 100)
        terminal.chat(model, TOKENIZER, chosen, read=keys, out=screen)
        shown.append(screen.getvalue())
    assert shown[0] == shown[1] and not keys.lines


def test_a_conversation_that_outgrows_the_model_is_one_line():
    """A real engine's refusal: a line with the remedy, and /new helps."""
    screen = Screen()
    model = tiny_model(1, vocab_size=292, max_position_embeddings=40)
    keys = Keys("x" * 60, "/new", "hi")
    chosen = terminal.ChatSettings(max_new_tokens=4)
    terminal.chat(model, TOKENIZER, chosen, read=keys, out=screen)
    shown = screen.getvalue()
    assert shown.count("tokens; this model takes") == 1
    assert "/new begins again" in shown
    assert keys.lines == []
