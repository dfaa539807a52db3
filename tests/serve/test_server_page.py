"""The chat page in a headless Chromium: thinking, tool calls with their results, the switches, stopping, and faults."""

import contextlib
import os
import shutil

import pytest
from helpers.serving import Script, running, settled

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER) and os.environ.get("CI") != "true",
    reason="no Chromium on this machine",
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1100,900"
)


def script(prompt):
    """A small shop: it looks an order up, and says what it found. Only the last question counts."""
    prompt = prompt.rsplit("<|user|>", 1)[-1]
    if prompt.endswith("</tool_response><|assistant|>"):
        return "\n<think>The shop says pending.</think>\nOrder 123 is pending: <b>cancel</b> it?<|user|>"
    if "break" in prompt:
        return "\n<think></think>\n<tool_call>{}</tool_call><|user|>"
    if "crash" in prompt:
        return RuntimeError("a fault on purpose")
    if "long" in prompt:
        return "\n<think></think>\n" + "on and on " * 300 + "<|user|>"
    if prompt.endswith("</think>"):
        return "\nAt once.<|user|>"
    if "order" in prompt:
        call = "<tool_call>get_order\n<arg_key>order_id</arg_key>\n<arg_value>123</arg_value>\n</tool_call>"
        return f"\n<think>I have to look the order up.</think>\nLet me see.\n{call}<|observation|>"
    return "\n<think>A greeting.</think>\nHello, wörld.<|user|>"


@contextlib.contextmanager
def browser(folder):
    """A Chromium that keeps everything in `folder` and talks to this machine only."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={folder}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """What a person can do and see."""

    def __init__(self, driver, url):
        self.driver = driver
        driver.get(url)

    def all(self, css):
        """The texts of the elements that a CSS selector finds, as they are shown."""
        return [
            element.get_attribute("innerText")
            for element in self.driver.find_elements("css selector", css)
        ]

    def shows(self, css, text):
        """Whether an element comes to show a text."""
        return settled(lambda: any(text in found for found in self.all(css)))

    def click(self, css):
        """Press a button."""
        self.driver.find_element("css selector", css).click()

    def type(self, css, text):
        """Type into a field, and press Enter."""
        self.driver.find_element("css selector", css).send_keys(text + "\n")

    def quiet(self):
        """Whether the answer has ended."""
        return settled(lambda: self.all("#send") == ["Send"])


@pytest.mark.slow
def test_a_conversation(tmp_path):
    """Thinking and calls are shown as they come, results go back, switches work, faults are said."""
    engine = Script(script, pause=0.002)
    with running(engine, bare_tools=True) as (http, _, service), browser(tmp_path) as driver:
        page = Page(driver, str(http.base_url))
        assert page.shows("#model.up", "tiny")

        page.type("#say", "hello")
        assert page.shows(".said", "Hello, wörld.") and page.quiet()
        assert page.shows("details.thought", "A greeting.") and page.shows("summary", "Thought for")
        assert page.shows(".foot", "tokens")

        page.click("#offer")
        page.type("#say", "what of my order 123?")
        assert (
            page.shows(".call .name", "get_order")
            and page.shows(".call td", "123")
            and page.quiet()
        )
        assert '"name": "cancel_order"' in engine.prompts[-1]
        page.type(".call input", '{"status": "pending"}')
        assert page.shows(".said", "Order 123 is pending: <b>cancel</b> it?") and page.quiet()
        assert '<tool_response>\n{"status": "pending"}\n</tool_response>' in engine.prompts[-1]
        assert (
            "I have to look the order up." in engine.prompts[-1]
        )  # the reasoning went back with the result
        if folder := os.environ.get("SCREENSHOTS"):
            driver.save_screenshot(f"{folder}/page.png")

        page.click("#thinking")
        page.type("#say", "quickly")
        assert page.shows(".said", "At once.") and page.quiet()
        assert engine.prompts[-1].endswith("/nothink<|assistant|>\n<think></think>")

        page.type("#say", "break it")
        assert page.shows(".fault", "broken format: bad tool call") and page.quiet()
        page.type("#say", "crash")
        assert page.shows(".fault", "the engine failed") and page.quiet()
        typed = driver.find_element("css selector", "#say")
        assert typed.get_property("value") == "crash"  # given back, to be tried again
        typed.clear()

        page.click("#fresh")
        page.type("#say", "a long one")
        assert page.shows(".said", "on and on")
        page.click("#send")
        assert (
            page.quiet()
            and page.shows(".foot", "stopped")
            and settled(lambda: not service.engine_thread.open_requests)
        )
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
