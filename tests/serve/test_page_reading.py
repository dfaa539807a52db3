"""The chat page as something to read: Markdown that is safe, the same however it comes, and fast; colours and widths."""

import json

import pytest
from helpers.browser import browser, needs_browser
from helpers.serving import Script, running, settled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve.test_server_page import ESSAY, opened, quiet, script

pytestmark = [needs_browser, pytest.mark.slow]

HOSTILE = [
    "<script>window.owned = 1</script>",
    "<img src=x onerror='window.owned = 1'>",
    "<svg onload='window.owned = 1'><script>window.owned = 1</script></svg>",
    "<svg><animate onbegin=window.owned=1 attributeName=x dur=1s>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.owned=1>",
    "<iframe srcdoc='<script>parent.owned = 1</script>'></iframe>",
    "<iframe src='javascript:parent.owned = 1'></iframe>",
    "<object data='/health'></object><embed src='/health'>",
    "<style>body { display: none } @import '/metrics';</style>",
    "<link rel=stylesheet href=/metrics><base href=https://evil.test/>",
    "<meta http-equiv=refresh content='0; url=https://evil.test/'>",
    "<form action=/v1/chat/completions><input name=q autofocus onfocus=window.owned=1></form>",
    "<body onload=window.owned=1><details open ontoggle=window.owned=1>",
    "<a href='javascript:window.owned = 1'>x</a>",
    "[x](javascript:window.owned=1)",
    "[x](JaVaScRiPt&colon;window.owned=1)",
    "[x](java\tscript:window.owned=1)",
    "[x](data:text/html,<script>window.owned=1</script>)",
    "[x](vbscript:window.owned=1)",
    "[x](/v1/models)",
    "[x](//evil.test/)",
    '[x](<https://evil.test/" onclick="window.owned=1>)',
    "[x]: javascript:window.owned=1\n\n[x] and [y][x]",
    "<javascript:window.owned=1>",
    "![x](https://evil.test/a.png)",
    "![x](/metrics)",
    "![x](data:image/svg+xml,<svg onload=window.owned=1>)",
    '![x](https://evil.test/a.png" onerror="window.owned=1)',
    '![" onerror="window.owned=1](x)',
    '```"><img src=x onerror=window.owned=1>\n</code></pre><script>window.owned=1</script>\n```',
    "```html\n<script>window.owned = 1</script>\n```",
    "`<img src=x onerror=window.owned=1>`",
    "# <img src=x onerror=window.owned=1>",
    "| <script>window.owned=1</script> |\n|---|\n| <img src=x onerror=window.owned=1> |",
    "<p id=say name=body class=unseen style='position:fixed;inset:0'>cover</p>",
    "<a id=DOMPurify href=x><form name=documentElement>",
    "<!--><img src=x onerror=window.owned=1>-->",
    "<![CDATA[><img src=x onerror=window.owned=1>]]>",
    "<noscript><p title='</noscript><img src=x onerror=window.owned=1>'>",
    "<template><script>window.owned=1</script></template><slot>",
    "&lt;script&gt;window.owned=1&lt;/script&gt;",
    "<<b>script>window.owned=1<</b>/script>",
    ">" * 5000,
    "- " * 300 + "x",
    "[" * 3000 + "](" * 3000,
]

SHOW = """
const {Prose} = await import("/page/markdown.js");
const draw = (text, cuts = []) => {
  const box = document.createElement("div"), prose = new Prose(box);
  document.querySelector("main").replaceChildren(box);
  for (const cut of cuts) prose.show(text.slice(0, cut));
  prose.show(text, true);
  return box;
};
"""

# What a drawn text holds that it must not: elements, attributes, addresses.
OFFENCES = """
const TAGS = ["P", "BR", "HR", "H3", "H4", "H5", "H6", "STRONG", "EM", "DEL", "CODE", "PRE", "BLOCKQUOTE", "UL", "OL",
  "LI", "A", "SPAN", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD", "DIV", "BUTTON"];
const ATTRIBUTES = ["href", "target", "rel", "start", "align", "class", "dir", "tabindex", "type", "aria-label",
  "data-language"];
const offences = box => [...box.querySelectorAll("*")].flatMap(node => [
  ...(TAGS.includes(node.tagName) ? [] : [node.tagName]),
  ...node.getAttributeNames().filter(name => !ATTRIBUTES.includes(name)),
  ...(node.tagName === "A" && !/^(https?|mailto):/.test(node.href) ? [node.href] : []),
  ...(node.tagName === "A" && !node.relList.contains("noopener") ? ["no noopener"] : []),
  ...(/^(hljs-[\\w ]+|language-\\w+|code|code-head|wide-table|raw|small|)$/.test(node.className) ? [] : [node.className]),
]);
"""

words = st.sampled_from(
    [
        "a",
        "<b>",
        "*b*",
        "_c_",
        "`d`",
        "**e**",
        "[f](https://g.h)",
        "![i](j)",
        "&amp;",
        "\\*",
        "<k",
        "l=m>",
        "|",
        "---",
        "x_y_z",
        "你好",
        "é",
        "😀",
    ]
)
lines = st.lists(words, min_size=1, max_size=5).map(" ".join)
marks = st.sampled_from(
    [
        "",
        "",
        "# ",
        "- ",
        "1. ",
        "2) ",
        "> ",
        "    ",
        "  ",
        "```",
        "~~~",
        "| ",
        "---",
        "- [ ] ",
        "[f]: ",
    ]
)
documents = st.lists(
    st.tuples(marks, lines, st.sampled_from(["\n", "\n\n", "\r\n", "\n \n"])).map("".join),
    max_size=14,
).map("".join)
texts = st.one_of(
    documents,
    st.lists(st.sampled_from(HOSTILE[:-3]), min_size=2, max_size=4).map("".join),
    st.text(alphabet="<>&\"'`*_[]()!#-=|\\/:;.\n ascriptjvonerimg", max_size=80),
)
GENTLE = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """One Chromium for all tests."""
    with browser(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture(scope="module")
def address():
    """A server for texts that no model has written."""
    with running(Script(script)) as (http, _, _):
        yield http


@pytest.fixture
def page(driver, address):
    """The page of that server, to draw texts on."""
    return opened(driver, address)


def harm(page, found):
    """What drawn texts have done to the page beside being shown."""
    loaded = page.run(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
        ".filter(name => !/.page.|.v1.models$/.test(new URL(name).pathname))"
    )
    owned = page.run("return window.owned ?? null")
    shown = page.run("return getComputedStyle(document.body).display")
    return [*found, *loaded, *([owned] if owned else []), *([] if shown == "flex" else [shown])]


def test_a_hostile_answer_does_nothing(page):
    """Scripts, handlers, frames, styles, forms, images and addresses of other kinds are text or are gone."""
    check = SHOW + OFFENCES + "return values[0].flatMap(text => offences(draw(text)));"
    for text in HOSTILE:
        assert harm(page, page.run(check, [text])) == [], text
    assert page.faults() == []


def test_without_the_walls_the_check_fails(driver):
    """The broken twin: the same texts, put in as HTML. The server's policy may stop the scripts, the check sees the rest."""
    with running(Script(script)) as (http, _, _):
        page = opened(driver, http)
        naive = "const draw = text => { const box = document.createElement('div'); box.innerHTML = text; return box; };"
        check = naive + OFFENCES + "return offences(draw(values[0]));"
        assert all(page.run(check, text) for text in HOSTILE[:14])
        page.run("document.querySelector('main').innerHTML = values[0]", "<img src=/metrics>")
        assert settled(lambda: any("metrics" in name for name in harm(page, [])))


@given(data=st.lists(texts, min_size=20, max_size=20))
@GENTLE
def test_any_answer_is_harmless(page, data):
    """Whatever a model writes, only the elements and attributes of the list are drawn, and nothing is loaded."""
    check = SHOW + OFFENCES + "return values[0].flatMap(text => offences(draw(text)));"
    assert harm(page, page.run(check, data)) == []


@given(
    data=st.lists(
        st.tuples(documents, st.lists(st.floats(0, 1), max_size=8)), min_size=20, max_size=20
    )
)
@GENTLE
def test_an_answer_looks_the_same_however_it_came(page, data):
    """Drawn in pieces or at once, an answer has the same elements in the end."""
    # JavaScript counts in units of UTF-16.
    cases = [
        [text, sorted(int(cut * len(text.encode("utf-16-le")) // 2) for cut in cuts)]
        for text, cuts in data
    ]
    differing = page.run(
        SHOW
        + "return values[0].filter(([text, cuts]) => draw(text).innerHTML !== draw(text, cuts).innerHTML);",
        cases,
    )
    assert differing == []


def test_blocks_are_not_cut_by_lines(page):
    """The broken twin: drawn line by line for good, a list with a blank line inside would be two."""
    once, twice = page.run(
        SHOW + "return [draw('- a\\n\\n- b'), draw('- a\\n\\n')].map(box => box.innerHTML);"
    )
    assert not once.startswith(twice)


def test_markdown_is_drawn(page):
    """The elements of an answer: headings, lists, a table, code with colours, a link that opens elsewhere."""
    found = page.run(
        SHOW
        + """
        const box = draw(values[0]);
        const count = css => box.querySelectorAll(css).length;
        return [count("h3"), count("ol > li > ul"), count("th[align=right]"), count("pre .hljs-string"),
          count("a[rel~=noopener][target=_blank]"), box.querySelector("pre").textContent, count(".code-head button")];
        """,
        ESSAY,
    )
    assert found[:5] == [1, 1, 1, 1, 1] and found[6] == 1
    assert found[5] == 'def f(x):  # a comment\n    return "text" * (x + 3)'


def test_a_long_answer_stays_fast(page):
    """Ninety thousand characters in four hundred pieces: what is settled is drawn once, and only the end again."""
    text = (ESSAY + "\n\n") * 170
    added, blocks, kept = page.run(
        SHOW
        + """
        const text = values[0], size = text.length / 400;
        const box = document.createElement("div"), prose = new Prose(box);
        document.querySelector("main").replaceChildren(box);
        const watch = new MutationObserver(() => {});
        watch.observe(box, {childList: true});
        let head = null, added = 0;
        for (let piece = 1; piece <= 400; piece++) {
          prose.show(text.slice(0, Math.ceil(piece * size)));
          if (piece === 40) head = box.firstChild;
          for (const record of watch.takeRecords()) added += record.addedNodes.length;
        }
        return [added, box.childNodes.length, head === box.firstChild];
        """,
        text,
    )
    assert len(text) > 90_000 and kept
    # Drawn anew each time there would be 200 times as many new blocks as there are at the end.
    assert added < 4 * blocks, (added, blocks)


def test_drawing_is_rare(driver):
    """However fast tokens come, the answer is drawn about ten times a second, and not for each token."""
    with running(Script(script, pause=0.001)) as (http, _, _):
        page = opened(driver, http)
        page.type("#say", "a long one")
        assert page.shows(".said", "on and on")
        drawn, passed = page.run(
            """
            let drawn = 0;
            const start = performance.now(), passed = () => (performance.now() - start) / 1000;
            const watch = new MutationObserver(() => { drawn += 1; });
            watch.observe(document.querySelector(".said"), {childList: true, subtree: true});
            while (passed() < 1 || (drawn < 3 && passed() < 50)) await new Promise(resolve => setTimeout(resolve, 50));
            return [drawn, passed()];
            """
        )
        assert 3 <= drawn <= 10 * passed + 2, (drawn, passed)
        page.click("#fresh")


# Colours and widths

CONTRAST = """
const parse = text => {
  const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
  return {rgb: [r, g, b], a};
};
const over = (top, below) => top.rgb.map((value, at) => value * top.a + below[at] * (1 - top.a));
const behind = node => {
  const layers = [];
  for (; node; node = node.parentElement) layers.push(parse(getComputedStyle(node).backgroundColor));
  return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
};
const light = rgb => {
  const [r, g, b] = rgb.map(value => value / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ratio = (one, other) => {
  const [dark, bright] = [light(one), light(other)].sort((a, b) => a - b);
  return (bright + 0.05) / (dark + 0.05);
};
const weak = [];
const seen = new Set();
const check = (node, colour, least, what) => {
  const ground = behind(node), found = ratio(over(parse(colour), ground), ground);
  seen.add(what);
  if (found < least) weak.push([what, found.toFixed(2), node.tagName, node.className, node.textContent.slice(0, 30)]);
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || node.closest("script, noscript, .unseen") || !node.checkVisibility()) continue;
  check(node, getComputedStyle(node).color, 4.5, "text");
}
for (const node of document.querySelectorAll("input:not([type=range]), textarea")) {
  if (!node.checkVisibility()) continue;
  check(node, getComputedStyle(node).color, 4.5, "field");
  check(node, getComputedStyle(node, "::placeholder").color, 4.5, "placeholder");
  const frame = node.closest(".box") ?? node;
  check(frame.parentElement, getComputedStyle(frame).borderTopColor, 3, "edge");
}
"""


def weak_colours(page):
    """Texts whose contrast is under 4.5, fields whose edge is under 3 (WCAG 2.2 AA); fails if it sees no text."""
    weak, seen = page.run(CONTRAST + "return [weak, [...seen].sort()]")
    assert seen == ["edge", "field", "placeholder", "text"]
    return weak


def too_wide(page, width):
    """Whether the page is wider than a window; a telephone makes its window wider in that case."""
    return page.run("return document.documentElement.scrollWidth") > width


def small_targets(page):
    """Buttons that are lower or narrower than 24 pixels (WCAG 2.5.8), without space around them."""
    return page.run(
        """
        return [...document.querySelectorAll("button, summary, input")].filter(node => node.checkVisibility())
          .filter(node => node.offsetHeight < 24 || node.offsetWidth < 24).map(node => node.outerHTML.slice(0, 80));
        """
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_everything_can_be_read(driver, width, scheme):
    """Contrast of all text and of the edges of fields, no sideways scrolling, and targets that a finger meets."""
    failing = []

    def shop(prompt):
        return RuntimeError("a fault on purpose") if failing else script(prompt)

    with running(Script(shop), bare_tools=True, environments=("retail", "code")) as (http, _, _):
        page = opened(driver, http, width, scheme)
        dark = scheme == "dark"
        ground = page.run("return getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(26, 25, 23)") == dark

        def looked_at():
            assert weak_colours(page) == []
            assert not too_wide(page, width)
            assert small_targets(page) == []

        looked_at()
        page.type("#say", "an essay")
        assert page.shows(".said", "The end") and quiet(page)
        page.click("summary")
        looked_at()
        page.click("#offer")
        page.type("#say", "what of my order 123?")
        assert page.shows(".call input") and quiet(page)
        page.type("#say", "break it")
        assert page.shows(".note") and quiet(page)
        page.click(".actions .small:not(.again)")
        failing.append(True)
        page.run("document.querySelector('#key-form').hidden = false")
        page.run("document.querySelector('#gone').hidden = false")
        page.type("#say", "crash")
        assert page.shows("p.fault", "back in the field")
        page.click("#open")
        looked_at()
        assert page.faults() == []


def test_a_weak_colour_is_seen(driver):
    """The broken twin: grey on grey, and an element that is wider than a phone."""
    with running(Script(script)) as (http, _, _):
        page = opened(driver, http, 390)
        page.run("document.querySelector('h1').style.color = '#aaa'")
        assert [entry[0] for entry in weak_colours(page)] == ["text"]
        page.run("document.querySelector('main').style.minWidth = '500px'")
        assert too_wide(page, 390)


def test_the_keyboard_is_enough(driver):
    """Each control has a name and is reached with the tabulator key; Escape stops an answer."""
    with running(Script(script, pause=0.01)) as (http, _, _):
        page = opened(driver, http)
        page.click("#open")
        nameless = page.run(
            """
            return [...document.querySelectorAll("button, input, textarea, summary")]
              .filter(node => !(node.innerText || node.getAttribute("aria-label") || node.labels?.length))
              .map(node => node.outerHTML);
            """
        )
        assert nameless == [], nameless
        from selenium.webdriver.common.keys import Keys

        page.run("document.activeElement.blur(); document.querySelector('#open').focus()")
        reached = set()
        for _ in range(20):
            driver.switch_to.active_element.send_keys(Keys.TAB)
            reached.add(driver.switch_to.active_element.get_attribute("id"))
        controls = {"temperature", "most", "seed", "system", "tools", "say", "thinking", "offer"}
        assert controls <= reached, json.dumps(sorted(reached))
        page.type("#say", "a long one")
        assert page.shows(".said", "on and on")
        driver.switch_to.active_element.send_keys(Keys.ESCAPE)
        assert page.shows(".note", "You stopped the answer.") and quiet(page)
