"""A headless Chromium for tests: what a person can do and see on a page."""

import contextlib
import os
import shutil

import pytest
from helpers.serving import settled

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER) and os.environ.get("CI") != "true",
    reason="no Chromium on this machine",
)
STARTS = 4
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1100,900"
)


@contextlib.contextmanager
def browser(folder, *flags):
    """A Chromium that keeps everything in `folder` and talks to this machine only."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS.split(), *flags, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    driver = started(options)
    try:
        driver.set_script_timeout(300)
        yield driver
    finally:
        driver.quit()


def started(options):
    """Start the browser; on a machine that is too busy for its patience, try again."""
    from selenium import webdriver
    from selenium.common.exceptions import SessionNotCreatedException

    for _ in range(STARTS - 1):
        with contextlib.suppress(SessionNotCreatedException):
            return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


class Page:
    """What a person can do and see."""

    def __init__(self, driver, url):
        self.driver = driver
        driver.get(url)

    def all(self, css):
        """The texts of the elements that a CSS selector finds, as they are shown; none while they change."""
        script = "return [...document.querySelectorAll(arguments[0])].map(node => node.innerText)"
        return self.driver.execute_script(script, css)

    def shows(self, css, text=""):
        """Whether an element comes to show a text."""
        return settled(lambda: any(text in found for found in self.all(css)))

    def lacks(self, css):
        """Whether the elements that a CSS selector finds come to be gone."""
        return settled(lambda: self.all(css) == [])

    def find(self, css):
        """The first element that a CSS selector finds."""
        return self.driver.find_element("css selector", css)

    def click(self, css):
        """Press a button; it may be under another part of the page before."""
        button = self.find(css)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()

    def type(self, css, text):
        """Type into a field, and press Enter."""
        self.find(css).send_keys(text + "\n")

    def value(self, css):
        """What a field holds."""
        return self.find(css).get_property("value")

    def run(self, script, *arguments):
        """The result of a script, which may await; it must return."""
        wrapped = (
            "const [...given] = arguments, done = given.pop(); (async (...values) => {"
            + script
            + "})(...given).then(value => done([value]), error => done(String(error)))"
        )
        found = self.driver.execute_async_script(wrapped, *arguments)
        assert isinstance(found, list), found
        return found[0]

    def look_like(self, width, scheme):
        """Change the window's width in pixels, and the colours, "light" or "dark"."""
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def faults(self):
        """The errors that the browser's console has shown."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] == "SEVERE"
        ]
