"""The chat page in a headless Chromium: what it shows of an answer, what it survives, and what a model cannot do to it."""

import os

import pytest
from helpers.browser import Page, browser, needs_browser
from helpers.serving import Script, running, settled

from minglm.serve.access import Access

pytestmark = [needs_browser, pytest.mark.slow]

CALL = "<tool_call>get_order\n<arg_key>order_id</arg_key>\n<arg_value>123</arg_value>\n</tool_call>"
ESSAY = (
    """# A list of things

Some **strong** and *slanted* words, a [link](https://example.org/a), and `code`.

1. first
2. second
   - inner

> A quotation.

```python
def f(x):  # a comment
    return "text" * (x + 3)
```

| name | count |
|---|---:|
| tea | 12 |

- [x] done

---

The end, with a line that is much too long for a phone: """
    + "word" * 60
)


def script(prompt):
    """A small shop: it looks an order up, and says what it found. Only the last question counts."""
    prompt = prompt.rsplit("<|user|>", 1)[-1]
    if prompt.endswith("</tool_response><|assistant|>"):
        return "\n<think>The shop says pending.</think>\nOrder 123 is pending: <b>cancel</b> it?<|user|>"
    if "break" in prompt:
        return "\n<think></think>\n<tool_call>{}</tool_call><|user|>"
    if "withdraw" in prompt:
        broken = CALL.replace("</tool_call>", "<arg_key>x</tool_call>")
        return f"\n<think></think>\n{broken}\n{CALL}<|observation|>"
    if "crash" in prompt:
        return RuntimeError("a fault on purpose")
    if "essay" in prompt:
        return f"\n<think>Some thoughts.</think>\n{ESSAY}<|user|>"
    if "program" in prompt:
        return "\n<think></think>\ndef f(x):\n    return x * 2 * __x__\n<|user|>"
    if "ponder" in prompt:
        return "\n<think>" + "hm, hm, " * 300 + "</think>\nYes.<|user|>"
    if "long" in prompt:
        return "\n<think></think>\n" + "on and on\n\n" * 300 + "<|user|>"
    if prompt.endswith("</think>"):
        return "\nAt once.<|user|>"
    if "order" in prompt:
        return f"\n<think>I have to look the order up.</think>\nLet me see.\n{CALL}<|observation|>"
    return "\n<think>A greeting.</think>\nHello, wörld.<|user|>"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """One Chromium for all tests: each has a server of its own, and so an origin of its own."""
    with browser(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


def opened(driver, http, width=1280, scheme="light"):
    """The page of a server, ready."""
    page = Page(driver, "about:blank")
    page.look_like(width, scheme)
    driver.get_log("browser")
    page = Page(driver, str(http.base_url))
    assert page.shows("#model.up", "tiny") and page.shows(".idea")
    return page


def quiet(page):
    """Whether the answer has ended."""
    return settled(lambda: page.all("#send") == ["Send"])


def test_a_conversation(driver):
    """Thinking and calls are shown as they come, results go back, and the switches work."""
    engine = Script(script, pause=0.002)
    with running(engine, bare_tools=True, environments=("retail",)) as (http, _, _):
        page = opened(driver, http)
        page.type("#say", "hello")
        assert page.shows(".said", "Hello, wörld.") and quiet(page)
        assert page.shows("summary", "Thought for") and page.shows(".foot", "tokens")
        page.click("details.thought summary")
        assert page.shows("details.thought", "A greeting.")

        page.click("#offer")
        page.type("#say", "what of my order 123?")
        assert (
            page.shows(".call .name", "get_order") and page.shows(".call td", "123") and quiet(page)
        )
        assert '"name": "cancel_order"' in engine.prompts[-1]
        page.type(".call input", '{"status": "pending"}')
        assert page.shows(".said", "Order 123 is pending: <b>cancel</b> it?") and quiet(page)
        assert '<tool_response>\n{"status": "pending"}\n</tool_response>' in engine.prompts[-1]
        # The reasoning went back with the result.
        assert "I have to look the order up." in engine.prompts[-1]

        page.click("#thinking")
        page.type("#say", "quickly")
        assert page.shows(".said", "At once.") and quiet(page)
        assert engine.prompts[-1].endswith("/nothink<|assistant|>\n<think></think>")
        assert page.faults() == []


def test_questions_are_asked_again(driver):
    """An answer is made once more, and the last question is edited; what came after it goes."""
    engine = Script(script)
    with running(engine) as (http, _, _):
        page = opened(driver, http)
        page.type("#say", "hello")
        assert page.shows(".said", "Hello") and quiet(page)
        page.click(".again")
        assert settled(lambda: len(engine.prompts) == 2) and quiet(page)
        assert engine.prompts[0] == engine.prompts[1] and len(page.all(".answer")) == 1
        page.click(".asked .small")
        page.find(".edit textarea").clear()
        page.find(".edit textarea").send_keys("a program")
        page.click(".edit .solid")
        # A program without a fence is shown as code, with its indentation and its signs.
        assert page.shows(".said pre", "def f(x):\n    return x * 2 * __x__") and quiet(page)
        assert page.all(".user") == ["a program"] and "hello" not in engine.prompts[-1]
        # The button is gone; the keyboard is where the next question is written.
        assert page.run("return document.activeElement.id") == "say"
        page.click(".code-head .small")
        assert page.shows(".code-head", "Copied")
        assert page.faults() == []


def test_what_happens_is_said(driver):
    """Waiting, thinking, stopped, cut off, malformed, withdrawn and failed answers each have their words."""
    engine = Script(script, pause=0.004)
    with running(engine, bare_tools=True, environments=("retail",)) as (http, _, service):
        page = opened(driver, http)
        page.type("#say", "ponder")
        assert page.shows("summary", "Thinking · ") and page.shows("#status", "Thinking")
        page.click("#send")
        assert quiet(page) and page.shows(".note", "You stopped the answer.")
        assert page.shows("summary", "Broke off thinking after")
        assert settled(lambda: not service.engine_thread.open_requests)

        page.click("#fresh")
        engine.pause = 2.0
        page.type("#say", "hello")
        assert page.shows(".state", "Waiting in the queue")
        engine.pause = 0.001
        assert page.shows(".said", "Hello") and quiet(page)

        page.type("#say", "break it")
        assert page.shows(".note", "A tool call was malformed.") and quiet(page)
        page.click("#fresh")
        page.click("#offer")
        page.type("#say", "withdraw it")
        assert page.shows(".note", "A tool call was malformed.") and quiet(page)
        # The broken one is text, the whole one a call.
        assert page.shows(".said", "<arg_key>x") and len(page.all(".call")) == 1
        assert page.all(".call td") == ["123"]

        page.type("#say", "crash")
        assert page.shows(".fault", "Your message is back in the field below.") and quiet(page)
        assert page.value("#say") == "crash" and page.all(".user") == ["withdraw it"]
        page.find("#say").clear()

        page.click("#open")
        page.find("#most").send_keys("20")  # in sight, wherever the reader is
        page.type("#say", "a long one")
        assert page.shows(".note", "The answer was cut off at 20 tokens") and quiet(page)
        page.find("#tools").clear()
        page.find("#tools").send_keys("[")
        page.type("#say", "not yet")
        assert page.shows("#tools-fault", "Tools must be a JSON list")
        assert page.value("#say") == "not yet"
        if folder := os.environ.get("SCREENSHOTS"):
            driver.save_screenshot(f"{folder}/states.png")
        assert page.faults() == []


def test_the_server_goes_and_comes_back(driver):
    """A reader is told that the server is gone, loses no text, and goes on when it is there again."""
    with running(Script(script, pause=0.01)) as (http, _, _):
        page = opened(driver, http)
        page.type("#say", "a long one")
        assert page.shows(".said", "on and on")
        # The page stands for a network that is gone: what it sends fails.
        page.run("window.wire = fetch; window.fetch = async () => { throw new TypeError('gone'); }")
        page.click("#send")
        assert quiet(page) and page.shows(".note", "You stopped the answer.")
        page.type("#say", "hello?")
        assert page.shows(".fault", "The server cannot be reached.") and page.shows(
            "#gone:not([hidden])"
        )
        assert page.value("#say") == "hello?" and page.shows("#model.gone", "no server")
        page.run("window.fetch = window.wire")
        assert page.shows("#model.up", "tiny") and page.lacks("#gone:not([hidden])")
        page.click("#send")
        assert page.shows(".said", "Hello") and quiet(page)


def test_an_answer_that_breaks_off_is_kept(driver):
    """What came before a failure stays, with the reason, and can be tried again; it is the same after a reload."""
    failing = []

    def some_then_crash(prompt):
        return RuntimeError("a fault on purpose") if failing else script(prompt)

    with running(Script(some_then_crash, pause=0.005)) as (http, _, _):
        page = opened(driver, http)
        page.type("#say", "a long one")
        assert page.shows(".said", "on and on")
        failing.append(True)
        assert page.shows(".fault", "ngine failed") and quiet(page)
        assert page.shows(".said", "on and on") and page.all(".user") == ["a long one"]
        driver.refresh()
        assert page.shows(".fault", "ngine failed") and page.shows(".said", "on and on")
        failing.clear()
        assert page.all(".again") == ["Try again"]
        page.click(".again")
        assert page.lacks(".fault:not(#gone):not(#tools-fault)")


def test_a_conversation_survives_a_reload(driver):
    """Questions, thoughts, calls and results are there again, an answer under way is marked, a new chat is empty."""
    engine = Script(script, pause=0.002)
    with running(engine, bare_tools=True, environments=("retail",)) as (http, _, service):
        page = opened(driver, http)
        page.click("#offer")
        page.type("#say", "what of my order 123?")
        assert page.shows(".call input") and quiet(page)
        driver.refresh()
        assert page.shows(".call td", "123") and page.shows(".user", "what of my order")
        page.type(".call input", '{"status": "pending"}')
        assert page.shows(".said", "Order 123 is pending") and quiet(page)
        page.type("#say", "a long one")
        assert page.shows(".said", "on and on")
        page.find("#say").send_keys("a draft")
        before = page.all(".user"), page.all(".call"), page.all("summary")[:2]
        driver.refresh()
        assert page.shows(".note", "The page was reloaded before the answer ended.")
        assert (page.all(".user"), page.all(".call"), page.all("summary")[:2]) == before
        assert page.value("#say") == "a draft"
        assert page.find("#offer").get_attribute("aria-pressed") == "true"
        assert settled(lambda: not service.engine_thread.open_requests)  # nobody reads it any more
        page.click("#fresh")
        driver.refresh()
        assert page.shows(".hello") and page.all(".turn") == []


def test_a_reader_stays_where_they_are(driver):
    """An answer that grows moves the page only for a reader at its end; a button leads back there."""
    with running(Script(script, pause=0.003)) as (http, _, _):
        page = opened(driver, http)
        page.type("#say", "a long one")
        end = "return document.documentElement.scrollHeight - innerHeight - scrollY"
        assert settled(lambda: page.run("return scrollY") > 300)
        assert settled(lambda: page.run(end) < 40)
        page.run("scrollTo(0, 100)")
        assert page.shows("#latest:not([hidden])", "Jump to latest")
        height = page.run("return document.documentElement.scrollHeight")
        assert settled(
            lambda: page.run("return document.documentElement.scrollHeight") > height + 300
        )
        assert page.run("return scrollY") == 100
        page.click("#latest")
        assert settled(lambda: page.run(end) < 40) and page.all("#latest:not([hidden])") == []
        grown = page.run("return document.documentElement.scrollHeight")
        assert settled(
            lambda: page.run("return document.documentElement.scrollHeight") > grown + 100
        )
        assert settled(lambda: page.run(end) < 40)
        page.click("#send")
        # The last lines of an answer, how it ended and what it took, are in sight too.
        assert quiet(page) and page.shows(".note") and settled(lambda: page.run(end) < 40)


def test_a_key_is_asked_for(driver):
    """A server with a key: the page shows a field, keeps the key for the tab, and sends it; a wrong one is refused."""
    engine = Script(script)
    with running(engine, access=Access(key="open-sesame")) as (http, _, _):
        page = Page(driver, str(http.base_url))
        assert page.shows("#key-form:not([hidden])", "API key") and page.shows(
            "#model.key", "needs a key"
        )
        page.type("#key", "wrong")
        assert page.shows("#key-note", "does not accept this key")
        page.type("#key", "open-sesame")
        assert page.shows("#model.up", "tiny") and page.lacks("#key-form:not([hidden])")
        driver.refresh()
        assert page.shows("#model.up", "tiny")
        page.type("#say", "hello")
        assert page.shows(".said", "Hello") and quiet(page)
