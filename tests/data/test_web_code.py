"""Web pages that teach code: found by tags or a classifier, and parsed so that every space of their code survives."""

import html
import itertools
import json
import string
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import DataConfig
from minglm.data.cleaning import classifier
from minglm.data.sources import web_code
from minglm.data.sources.corpus import documents
from minglm.data.sources.files import ReadOptions, Skipped, user_files
from minglm.data.sources.web_code import is_candidate, parse

SIGNS = string.ascii_letters + string.digits + " \t\n<>&\"'#{}()[]`=+-*/\\"
code = st.text(SIGNS, min_size=1, max_size=120).filter(str.strip)
words = st.lists(
    st.text(string.ascii_letters, min_size=1, max_size=8), min_size=1, max_size=12
).map(" ".join)


@given(code, words, words, st.booleans())
def test_code_survives_to_the_last_space(text, before, after, marked):
    """What stands in a pre comes out as it was, in a fence that it does not close; the prose stays around it."""
    inner = html.escape(text)
    inner = f'<code class="language-python">{inner}</code>' if marked else inner
    found = parse(f"<html><body><p>{before}</p><pre>\n{inner}</pre><p>{after}</p></body></html>")
    assert f"\n{text.rstrip()}\n" in found
    assert found.startswith(before) and found.rstrip().endswith(after)
    fence = found[len(before) :].strip().split("\n")[0].rstrip(string.ascii_letters)
    assert set(fence) == {"`"} and fence not in text


def test_the_frame_of_a_page_goes_and_its_text_stays():
    """Menus, scripts and forms go; headings, lists, inline code and paragraphs become plain text."""
    page = """<!doctype html><html><head><title>T</title><style>p {x: y}</style></head><body>
    <nav><ul><li>Home<li>About</ul></nav><script>var a = "<p>no</p>";</script>
    <h2>Sorting   a list</h2><p>Call <code>sorted(x)</code>,
    which takes <b>any</b> iterable.</p><ul><li>first</li><li>second</li></ul>
    <div class="highlight-python"><pre><span class="k">def</span> f(x):<br>    return  x &lt; 1</pre></div>
    <form><input name=q>search</form><footer>(c)</footer></body></html>"""
    assert parse(page) == (
        "## Sorting a list\n\nCall `sorted(x)`, which takes any iterable.\n\n- first\n- second\n\n"
        "```\ndef f(x):\n    return  x < 1\n```\n"
    )


tags = st.lists(
    st.sampled_from(["<pre>", "</pre>", "<p", "<nav>", "x", "</nav>", "<!--", "&lt"])
).map("".join)


@given(st.text(max_size=200) | tags)
def test_any_page_can_be_parsed(page):
    """Broken tags never raise, and a page of nothing gives nothing."""
    assert isinstance(parse(page), str) and isinstance(is_candidate(page), bool)


class Says:
    """A classifier that gives every text one score, and counts how often it is asked."""

    def __init__(self, score):
        self.value = score
        self.asked = 0

    def score(self, texts):
        self.asked += 1
        return [self.value] * len(texts)


PAGES = ["<pre>x</pre>", "<p>a <CODE>b</CODE>", '<div class="code-block">x</div>', "<samp>x</samp>"]


@pytest.mark.parametrize("page", PAGES)
def test_tags_are_enough_for_stage_one(page):
    """A code tag, or a class that says code, makes a candidate without asking the classifier."""
    judge = Says(0.0)
    assert is_candidate(page) and is_candidate(page, judge) and judge.asked == 0


def test_the_classifier_decides_where_there_is_no_tag():
    """A page without tags is a candidate when its score reaches the threshold."""
    page = "<p>First define a function, then call it.</p>"
    assert not is_candidate(page)
    assert [is_candidate(page, Says(score)) for score in (0.2, 0.5, 0.9)] == [False, True, True]
    assert not is_candidate(page, Says(0.9), threshold=web_code.THRESHOLD + 0.45)


def test_rows_of_html_become_pages_of_their_own_language(tmp_path):
    """A row with html and no text is a page to be ranked among pages; one without code is counted and left out."""
    rows = [{"html": "<p>see <code>x</code></p>"}, {"html": "<p>a menu</p>"}]
    rows += [{"html": "<pre>y</pre>", "text": "as given"}]
    (tmp_path / "pages.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    skipped = Skipped()
    found = list(user_files([tmp_path / "pages.jsonl"], ReadOptions(skipped=skipped)))
    rest = [(d.text, d.source, d.language) for d in found]
    assert rest == [("see `x`\n", "prose", "web"), ("as given", "prose", "en")]
    assert skipped.reasons == {"a web page without code": 1}


def prose(verbs, nouns, n):
    """Return a few sentences without any tag of code."""
    return " ".join(
        f"{verbs[(n + i) % 5]} the {nouns[(n * 3 + i * 2) % 7]}, then the next." for i in range(6)
    )


def test_marked_pages_teach_a_run_which_pages_are_code(tmp_path):
    """`data.web_labels` finds pages whose code has no tag, and leaves pages about food out."""
    about = {1: "compile call return import debug|function loop variable class list string module"}
    about[0] = "bake stir chop boil taste|onion flour pepper butter sauce garlic soup"
    named = {mark: [part.split() for part in text.split("|")] for mark, text in about.items()}
    marked = [
        {"text": prose(*named[n % 2], n), "label": n % 2}
        for n in range(4 * classifier.MIN_DOCUMENTS)
    ]
    (tmp_path / "marked.jsonl").write_text("\n".join(map(json.dumps, marked)), encoding="utf-8")
    pages = [
        {"html": f"<p>{prose(*named[n % 2], n + 1000)}</p>", "source": f"user:{n % 2}"}
        for n in range(20)
    ]
    (tmp_path / "pages.jsonl").write_text("\n".join(map(json.dumps, pages)), encoding="utf-8")
    config = DataConfig(
        files=(f"{tmp_path / 'pages.jsonl'}",), web_labels=f"{tmp_path / 'marked.jsonl'}"
    )
    skipped = Skipped()
    found = [
        d.source
        for d in itertools.takewhile(lambda d: d.language == "web", documents(config, 0, skipped))
    ]
    assert found == ["user:1"] * 10 and skipped.reasons == {"a web page without code": 10}
    with pytest.raises(ValueError, match=r"data\.web_labels: cannot read"):
        next(documents(replace(config, web_labels=f"{tmp_path / 'absent.jsonl'}")))
