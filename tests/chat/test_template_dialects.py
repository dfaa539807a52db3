"""The dialects of the template: 4.5 and 4.6 against the template as TRL ships it, 4.7 against exact strings."""

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.chat import continuation, parse, render, render_text
from minglm.chat.template import DIALECTS
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
BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def published():
    """Return the template of GLM-4.5 from the installed trl package, compiled with the settings of transformers."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, ensure_ascii: json.dumps(
        value, ensure_ascii=ensure_ascii
    )
    # Found, not imported: that takes seconds.
    folder = importlib.util.find_spec("trl").submodule_search_locations[0]
    template = environment.from_string(
        (Path(folder) / "chat_templates" / "glm4moe.jinja").read_text(encoding="utf-8")
    )

    def text(messages, tools=None, thinking=True, generation_prompt=False):
        return template.render(
            messages=messages,
            tools=tools,
            enable_thinking=thinking,
            add_generation_prompt=generation_prompt,
        )

    return text


@st.composite
def unusual(draw):
    """Draw conversations with all that the published template reads: parts, lists of results, tags inside content."""
    messages = draw(conversations())
    for message in messages:
        role = message["role"]
        odd = draw(st.booleans())
        if role in ("user", "system") and odd:
            message["content"] = [
                {"type": "text", "text": message["content"]},
                draw(st.sampled_from(["", "/nothink"])),
            ]
        elif role == "tool" and odd:
            message["content"] = draw(
                st.sampled_from([[{"output": "a"}, "b"], [{"output": message["content"]}]])
            )
        elif role == "assistant":
            if odd:
                message["content"] = draw(
                    st.sampled_from(["x<think>\n a \n</think>\n\nb", "\n\n</think>c", "<think> "])
                )
            if draw(st.booleans()):
                message["reasoning_content"] = draw(st.sampled_from([None, "", " ", "\nq"]))
            if draw(st.booleans()):
                message["tool_calls"] = [
                    {"type": "function", "function": call} for call in message["tool_calls"]
                ]
    return messages


@pytest.mark.parametrize("dialect", ["glm-4.5", "glm-4.6"])
def test_text_is_what_trl_renders(published, dialect):
    """Character by character, for any conversation and every switch."""

    @given(unusual(), st.booleans(), st.booleans(), st.booleans())
    def equal(messages, tools, thinking, generation_prompt):
        switches = (TOOLS if tools else None, thinking, generation_prompt)
        assert render_text(messages, *switches, dialect=dialect) == published(messages, *switches)

    equal()


def test_the_stored_renderings_are_what_trl_renders(published):
    """The goldens of tests/test_template.py have not aged."""
    for case in CASES:
        text = published(
            case["messages"], case["tools"], case["thinking"], case["generation_prompt"]
        )
        assert text == case["text"], case["name"]


def call(name, **arguments):
    """Return a tool call as a client sends it."""
    return {"function": {"name": name, "arguments": arguments}}


# The course of the paper's figure 4: a question, two calls at once, both results, the answer.
WEATHER = {
    "name": "forecast",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
FIGURE_4 = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "Rain in Oslo or 北京?"},
    {
        "role": "assistant",
        "reasoning_content": "Two cities, two calls.",
        "content": "I will look.",
        "tool_calls": [
            call("forecast", city="Oslo", days=2),
            call("forecast", city="北京", days=2),
        ],
    },
    {"role": "tool", "content": '{"rain": true}'},
    {"role": "tool", "content": '{"rain": false}'},
    {"role": "assistant", "reasoning_content": "Only the first.", "content": "In Oslo."},
]
BEFORE = (
    "<|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"name": "forecast", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}\n</tools>\n\n'
    "For each function call, output the function name and arguments within the following XML format:\n"
)


def test_figure_4_in_4_5(published):
    """The dialogue of figure 4, as the published template and as the figure has it."""
    text = render_text(FIGURE_4, [WEATHER])
    assert text == published(FIGURE_4, [WEATHER])
    assert text.endswith(
        "</tool_call><|system|>\nAnswer briefly.<|user|>\nRain in Oslo or 北京?"
        "<|assistant|>\n<think>Two cities, two calls.</think>\nI will look."
        "\n<tool_call>forecast\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
        "\n<tool_call>forecast\n<arg_key>city</arg_key>\n<arg_value>北京</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
        '<|observation|>\n<tool_response>\n{"rain": true}\n</tool_response>'
        '\n<tool_response>\n{"rain": false}\n</tool_response>'
        "<|assistant|>\n<think>Only the first.</think>\nIn Oslo."
    )


def test_figure_4_in_4_7():
    """The same dialogue in 4.7: not one newline but those of the tools block and of the text itself."""
    assert render_text(FIGURE_4, [WEATHER], dialect="glm-4.7") == (
        "[gMASK]<sop>"
        + BEFORE
        + "<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}"
        "</arg_value><arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call>"
        "<|system|>Answer briefly.<|user|>Rain in Oslo or 北京?"
        "<|assistant|><think>Two cities, two calls.</think>I will look."
        "<tool_call>forecast<arg_key>city</arg_key><arg_value>Oslo</arg_value>"
        "<arg_key>days</arg_key><arg_value>2</arg_value></tool_call>"
        "<tool_call>forecast<arg_key>city</arg_key><arg_value>北京</arg_value>"
        "<arg_key>days</arg_key><arg_value>2</arg_value></tool_call>"
        '<|observation|><tool_response>{"rain": true}</tool_response><tool_response>{"rain": false}</tool_response>'
        "<|assistant|><think>Only the first.</think>In Oslo."
    )


ASK, AGAIN = {"role": "user", "content": "a?"}, {"role": "user", "content": "b?"}
THOUGHT = {"role": "assistant", "reasoning_content": " r\n", "content": "\nc "}
PLAIN = {"role": "assistant", "content": "c"}


@pytest.mark.parametrize(
    "messages, switches, text",
    [
        ([ASK], {"generation_prompt": True}, "<|user|>a?<|assistant|><think>"),
        ([ASK], {"generation_prompt": True, "thinking": False}, "<|user|>a?<|assistant|></think>"),
        ([{"role": "user", "content": "a/nothink"}], {}, "<|user|>a/nothink"),
        ([ASK, THOUGHT], {}, "<|user|>a?<|assistant|><think>r</think>c"),
        ([ASK, PLAIN], {}, "<|user|>a?<|assistant|></think>c"),
        ([ASK, {**PLAIN, "reasoning_content": " "}], {}, "<|user|>a?<|assistant|><think></think>c"),
        (
            [ASK, {**PLAIN, "content": "<think>r</think>c"}],
            {},
            "<|user|>a?<|assistant|><think>r</think>c",
        ),
        ([ASK, THOUGHT, AGAIN], {}, "<|user|>a?<|assistant|></think>c<|user|>b?"),
        (
            [ASK, THOUGHT, AGAIN, THOUGHT],
            {"clear_thinking": False},
            "<|user|>a?<|assistant|><think>r</think>c<|user|>b?<|assistant|><think>r</think>c",
        ),
        (
            [ASK, PLAIN, AGAIN],
            {"clear_thinking": False, "generation_prompt": True, "thinking": False},
            "<|user|>a?<|assistant|></think>c<|user|>b?<|assistant|></think>",
        ),
        (
            [ASK, {"role": "assistant", "content": None, "tool_calls": [call("f")]}],
            {},
            "<|user|>a?<|assistant|></think><tool_call>f</tool_call>",
        ),
        (
            [
                ASK,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [call("f", a="x\n", b=[1, {"c": None}])],
                },
            ],
            {},
            "<|user|>a?<|assistant|></think><tool_call>f<arg_key>a</arg_key><arg_value>x\n</arg_value><arg_key>b"
            '</arg_key><arg_value>[1, {"c": null}]</arg_value></tool_call>',
        ),
        (
            [{"role": "tool", "content": [{"output": "x"}, "y"]}, {"role": "tool", "content": "z"}],
            {},
            "<|observation|><tool_response>x</tool_response><tool_response>y</tool_response>"
            "<tool_response>z</tool_response>",
        ),
        (
            [{"role": "system", "content": [{"type": "text", "text": "s"}, "t"]}, ASK],
            {},
            "<|system|>st<|user|>a?",
        ),
    ],
)
def test_elements_of_4_7(messages, switches, text):
    """Each element of the later dialect, as its published template writes it."""
    assert render_text(messages, dialect="glm-4.7", **switches) == "[gMASK]<sop>" + text


def test_one_dialogue_three_ways():
    """Old reasoning: empty tags in 4.5, a bare closing tag in 4.7, kept where it is preserved."""
    messages = [ASK, THOUGHT, AGAIN]
    assert "\n<think></think>\nc" in render_text(messages)
    assert "<|assistant|></think>c" in render_text(messages, dialect="glm-4.7")
    assert "<|assistant|><think>r</think>c" in render_text(
        messages, dialect="glm-4.7", clear_thinking=False
    )


def test_targets_of_4_7_are_what_the_model_writes():
    """The prompt holds the first think tag, or with thinking off both; the closing tag after reasoning is written."""

    def targets(messages, **switches):
        ids, mask, _ = render(BYTES, messages, dialect="glm-4.7", **switches)
        return BYTES.decode([token for token, trained in zip(ids, mask, strict=True) if trained])

    assert targets([ASK, THOUGHT]) == "r</think>c<|user|>"
    assert targets([ASK, PLAIN]) == targets([ASK, PLAIN], thinking=False) == "c<|user|>"
    assert targets([ASK, THOUGHT, AGAIN, THOUGHT]) == "c<|user|>r</think>c<|user|>"
    assert targets([ASK, THOUGHT, AGAIN, THOUGHT], clear_thinking=False) == "r</think>c<|user|>" * 2
    assert targets(FIGURE_4).count("<|observation|>") == 1


def test_contract():
    """4.7 holds the contract of a template."""
    check_template(render, dialect="glm-4.7")


def target_the_prompt(tokenizer, messages, **switches):
    """Broken: train the tag of a 4.7 template which the prompt holds already."""
    rendered = render(tokenizer, messages, **switches)
    opening = tokenizer.special["<think>"]
    return rendered._replace(
        mask=[t or i == opening for i, t in zip(rendered.ids, rendered.mask, strict=True)]
    )


def always_clear(tokenizer, messages, clear_thinking=True, **switches):
    """Broken: ignore clear_thinking."""
    return render(tokenizer, messages, **switches)


def with_newlines(tokenizer, messages, dialect=None, clear_thinking=True, **switches):
    """Broken: render the earlier dialect."""
    return render(tokenizer, messages, **switches)


@pytest.mark.parametrize("twin", [target_the_prompt, always_clear, with_newlines])
def test_contract_rejects_broken_twins(twin):
    """The contract sees the mistakes of the later dialect."""
    with pytest.raises(AssertionError):
        check_template(twin, dialect="glm-4.7")


@pytest.mark.parametrize("dialect", DIALECTS)
@given(
    message=st.booleans().flatmap(lambda calls: assistant_messages(calls=calls)),
    thinking=st.booleans(),
)
def test_parse_after_render_is_the_identity(dialect, message, thinking):
    """What follows the generation prompt in a rendered turn parses to the same message, in every dialect."""
    if dialect == "glm-4.7" and not message["reasoning_content"]:
        thinking = False  # 4.7 cannot render a turn that opened its reasoning and wrote none
    if not thinking:
        message = {**message, "reasoning_content": ""}
    prompt = render(BYTES, [ASK], TOOLS, thinking, generation_prompt=True, dialect=dialect).ids
    whole = render(BYTES, [ASK, message], TOOLS, thinking, dialect=dialect).ids
    assert whole[: len(prompt)] == prompt
    sampled = BYTES.decode(whole[len(prompt) :])
    opened = BYTES.decode(prompt).endswith("<think>")
    assert parse(sampled, TOOLS, opened) == {**message, "error": None}


@given(conversations(), st.booleans())
def test_preserved_reasoning_never_tokenizes_again(messages, tools):
    """With preserved reasoning, the sampled turns with their continuations are the rendering of all turns."""
    tools = TOOLS if tools else None
    form = {"dialect": "glm-4.7", "clear_thinking": False}
    # A turn that opens its reasoning and writes none is rendered otherwise.
    for message in messages:
        if message["role"] == "assistant":
            message["reasoning_content"] = message["reasoning_content"] or "r"
    first = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
    ids = render(BYTES, messages[:first], tools, generation_prompt=True, **form).ids
    at = first
    while at < len(messages):
        # The sampled turn with its stop.
        ids = ids + render(BYTES, messages[: at + 1], tools, **form).ids[len(ids) :]
        new = []
        at += 1
        while at < len(messages) and messages[at]["role"] != "assistant":
            new.append(messages[at])
            at += 1
        if new:
            ids = ids + continuation(BYTES, new, dialect="glm-4.7")
    assert ids == render(BYTES, messages, tools, **form).ids


def test_mistakes_are_one_clear_line():
    """An unknown dialect, and reasoning that a dialect cannot keep, are refused with the remedy."""
    with pytest.raises(ValueError, match=r"choose one of glm-4\.5"):
        render_text([ASK], dialect="glm-9")
    with pytest.raises(ValueError, match=r"use glm-4\.7"):
        render_text([ASK], clear_thinking=False)
