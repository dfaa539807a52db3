"""The chat template: equal to the published one, with the loss mask of what the model writes."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.chat import continuation, render, render_text
from minglm.chat.template import Segment, _joined, segments
from minglm.data.tokenizer import Tokenizer
from minglm.testing.chat import (
    TOOLS,
    ByteTokenizer,
    assistant_messages,
    check_template,
    conversations,
)

CASES = json.loads(
    (Path(__file__).parent / "goldens" / "chat_glm45.json").read_text(encoding="utf-8")
)["cases"]


@pytest.fixture(scope="module")
def tokenizer():
    """Return a trained tokenizer, so that merges across the seams of the template would show."""
    return Tokenizer.train([case["text"] for case in CASES], vocab_size=600)


def targets(tokenizer, rendered):
    """Return the text of the tokens that are trained."""
    return tokenizer.decode(
        [token for token, trained in zip(rendered.ids, rendered.mask, strict=True) if trained]
    )


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_text_is_the_published_template(case, tokenizer):
    """The text equals the published template's, character by character, and the ids spell the same text."""
    arguments = {key: case[key] for key in ("messages", "tools", "thinking", "generation_prompt")}
    assert render_text(**arguments) == case["text"]
    assert tokenizer.decode(render(tokenizer, **arguments, close=False).ids) == case["text"]


# Turns that no tool call asked for, or that no result follows: TRL's training template rewrites their role tokens.
REWRITTEN = ("call, then user", "role names in text")

# Where our mask departs from TRL's: {case: [what TRL trains at that place]}, with the reason.
DEPARTURES = {
    # The model wrote reasoning here, and the template cut it: an empty pair would teach it not to think.
    "whitespace is stripped": ["\n<think></think>"],
    "think tags inside content": ["\n<think></think>"],
    "two calls, two results": ["\n<think></think>", "\n<think></think>"],
    # No sampler stops at <|system|>.
    "no user": ["<|system|>"],
}


def test_targets_are_those_of_trl(tokenizer):
    """The targets equal the loss region of TRL's training template but for the departures listed above."""
    compared = [case for case in CASES if case.get("targets") and case["name"] not in REWRITTEN]
    assert len(compared) >= 9
    for case in compared:
        expected = "".join(case["targets"])
        for extra in DEPARTURES.get(case["name"], []):
            expected = expected.replace(extra, "", 1)
        assert targets(tokenizer, render(tokenizer, case["messages"], case["tools"])) == expected, (
            case["name"]
        )


def test_contract(tokenizer):
    """The template holds its contract, on single bytes and with a trained tokenizer."""
    check_template(render)
    check_template(render, tokenizer)


def forget_the_stop(tokenizer, messages, **switches):
    """Broken: end the mask before the role token that ends a turn, so the model never stops."""
    rendered = render(tokenizer, messages, **switches)
    roles = [tokenizer.special[name] for name in ("<|user|>", "<|observation|>")]
    return rendered._replace(
        mask=[t and i not in roles for i, t in zip(rendered.ids, rendered.mask, strict=True)]
    )


def shift_the_mask(tokenizer, messages, **switches):
    """Broken: shift the mask by one token."""
    rendered = render(tokenizer, messages, **switches)
    return rendered._replace(mask=[False, *rendered.mask[:-1]])


def tokenize_the_string(tokenizer, messages, **switches):
    """Broken: look for special tokens in the finished text, where a user may have typed them."""
    rendered = render(tokenizer, messages, **switches)
    ids = []
    text = rendered.text
    while text:
        name = next((name for name in tokenizer.special if text.startswith(name)), None)
        ids += [tokenizer.special[name]] if name else tokenizer.encode(text[0])
        text = text.removeprefix(name) if name else text[1:]
    return rendered._replace(ids=ids, mask=[True] * len(ids))


def one_observation_each(tokenizer, messages, **switches):
    """Broken: open a new turn for every tool result, by way of the form that carries a list."""
    lists = [
        {**m, "content": [{"output": m["content"]}]} if m["role"] == "tool" else m for m in messages
    ]
    return render(tokenizer, lists, **switches)


def forget_the_last_stop(tokenizer, messages, **switches):
    """Broken: leave the last turn open."""
    return render(tokenizer, messages, **{**switches, "close": False})


TWINS = [
    forget_the_stop,
    shift_the_mask,
    tokenize_the_string,
    one_observation_each,
    forget_the_last_stop,
]


@pytest.mark.parametrize("twin", TWINS)
def test_contract_rejects_broken_twins(twin):
    """The contract sees each of the usual mistakes."""
    with pytest.raises(AssertionError):
        check_template(twin)


@given(conversations(user_turns=1), st.booleans(), st.booleans())
def test_sampled_turns_are_never_tokenized_again(tokenizer, messages, thinking, tools):
    """Within a user turn, prompt, sampled turns and continuations make the tokens of the whole, with its targets."""
    tools = TOOLS if tools else None
    first = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
    if not thinking:  # the prompt holds the empty pair, so no turn has reasoning
        messages = [
            {**m, "reasoning_content": ""} if m["role"] == "assistant" else m for m in messages
        ]
    ids = render(tokenizer, messages[:first], tools, thinking, generation_prompt=True).ids
    mask = [False] * len(ids)
    while first < len(messages):
        before = len(
            render(tokenizer, messages[:first], tools, thinking, generation_prompt=True).ids
        )
        sampled = render(tokenizer, messages[: first + 1], tools, thinking).ids[before:]
        first += 1
        ids = ids + sampled
        mask = mask + [True] * len(sampled)
        results = []
        while first < len(messages) and messages[first]["role"] == "tool":
            results.append(messages[first])
            first += 1
        if results:
            new = continuation(tokenizer, results, thinking)
            ids = ids + new
            mask = mask + [False] * len(new)
    whole = render(tokenizer, messages, tools, thinking)
    assert (ids, mask) == (whole.ids, whole.mask)


@given(assistant_messages(), st.sampled_from(["next", "next/nothink", ""]), st.booleans())
def test_continuation_of_a_chat(tokenizer, answer, question, thinking):
    """After an answer without reasoning, the next user turn continues the sampled ids as the whole is rendered."""
    messages = [{"role": "user", "content": "hi"}, {**answer, "reasoning_content": ""}]
    following = {"role": "user", "content": question}
    ids = render(tokenizer, messages, thinking=thinking).ids + continuation(
        tokenizer, [following], thinking
    )
    whole = render(tokenizer, [*messages, following], thinking=thinking, generation_prompt=True)
    assert ids == whole.ids


def test_seams_do_not_change_the_tokens(tokenizer):
    """Text between two special tokens is tokenized as one piece, as the released tokenizer would."""
    messages = [{"role": "user", "content": "\n\n  deep"}, {"role": "assistant", "content": "x"}]
    ids = render(tokenizer, messages).ids
    start = ids.index(tokenizer.special["<|user|>"])
    end = ids.index(tokenizer.special["<|assistant|>"])
    assert ids[start + 1 : end] == tokenizer.encode("\n\n\n  deep")


def test_calls_in_every_form_are_the_same():
    """Arguments as an object or as JSON text, flat or inside `function`, absent or empty, render the same."""
    ask = {"role": "user", "content": "go"}

    def text(*calls):
        return render_text([ask, {"role": "assistant", "content": None, "tool_calls": list(calls)}])

    flat = {"name": "f", "arguments": {"a": 1, "b": "é"}}
    assert text(flat) == text({"type": "function", "id": "7", "function": flat})
    assert text(flat) == text({"name": "f", "arguments": '{"a": 1, "b": "é"}'})
    without_arguments = text({"name": "f"})
    assert text({"name": "f", "arguments": ""}) == without_arguments
    assert text({"name": "f", "arguments": {}}) == without_arguments
    assert "None" not in text(flat)


def test_tools_text_holds_the_tags_as_special_tokens():
    """The format instruction shows the model the same tokens it has to write."""
    ids = render(ByteTokenizer(), [], [{"name": "<tool_call>"}], generation_prompt=True).ids
    # The instruction's, and not the one in the schema.
    assert ids.count(ByteTokenizer.special["<tool_call>"]) == 1
    assert ids.count(ByteTokenizer.special["<arg_key>"]) == 2


@pytest.mark.parametrize(
    "message, words",
    [
        ({"role": "robot", "content": "x"}, "role must be one of"),
        ({"content": "x"}, "role must be one of"),
        ("hello", "role must be one of"),
        ({"role": "user", "content": 7}, "must be text or a list of parts"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "text only"),
        ({"role": "assistant", "tool_calls": [{"arguments": {}}]}, "needs a name"),
        ({"role": "assistant", "tool_calls": ["f"]}, "needs a name"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, "not JSON"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]},
            "object of arguments",
        ),
    ],
)
def test_mistakes_are_one_clear_line(message, words):
    """A message that the template cannot express is refused with its place and the remedy."""
    with pytest.raises(ValueError, match=words) as caught:
        render_text([{"role": "user", "content": "hi"}, message])
    assert "messages[1]" in str(caught.value) and "\n" not in str(caught.value)


def test_continuation_needs_a_turn_that_a_stop_token_opens():
    """Only a user turn or tool results can follow a sampled stop token."""
    for messages in (
        [],
        [{"role": "assistant", "content": "x"}],
        [{"role": "system", "content": "x"}],
    ):
        with pytest.raises(ValueError, match="role user or tool"):
            continuation(ByteTokenizer(), messages)


def test_every_border_of_the_mask_is_a_special_token():
    """Text pieces that meet have the same mask, which joining them relies on."""
    for case in CASES:
        pieces = _joined(segments(case["messages"], case["tools"], case["thinking"], close=True))
        for left, right in pairwise(pieces):
            assert left.special or right.special
    with pytest.raises(AssertionError):
        _joined([Segment("a", trained=True), Segment("b")])


@pytest.mark.parametrize("field", ["reasoning", "thinking"])
@given(conversation=conversations())
def test_reasoning_under_other_names(field, conversation):
    """A history in which another server named the reasoning renders to the same tokens."""
    renamed = [
        {field if key == "reasoning_content" else key: value for key, value in message.items()}
        for message in conversation
    ]
    assert render(ByteTokenizer(), renamed) == render(ByteTokenizer(), conversation)


def calls(arguments):
    """Return a turn with one call."""
    return [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}]


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.mark.parametrize(
    "messages",
    [
        calls({1: "a"}),
        calls({None: "a"}),
        calls({"a": {1, 2}}),
        calls({"a": b"x"}),
        calls({"a": float("nan")}),
        calls([1]),
        [{"role": "tool", "content": [IMAGE]}],
        [{"role": "tool", "content": [{"type": "text", "text": "a"}, IMAGE]}],
        [{"role": "tool", "content": [{"output": IMAGE}]}],
        [{"role": "tool", "content": [{"output": [IMAGE]}]}],
        [{"role": "tool", "content": [{"type": "input_audio"}]}],
        [{"role": "tool", "content": [5, None]}],
    ],
)
def test_what_cannot_be_rendered_is_refused_in_one_line(messages):
    """Arguments that are no JSON object, and parts that are no text, never become Python's spelling of them."""
    with pytest.raises(ValueError, match=r"^messages\[0\]") as refused:
        render_text(messages)
    assert "\n" not in str(refused.value) and "base64" not in str(refused.value)
