"""Web pages that teach code: found in two stages, then parsed again so that their code survives (paper 2.2, "Code").

    page  --  has a code tag, or a classifier says so  -->  candidate  --  quality tier  -->  kept
    kept  --  parsed again  -->  text with its code blocks as they were, line for line

Parsers that make text of the web throw away line breaks and indentation, which is all that holds a program together.
Here headings, paragraphs and lists become plain text, `pre` becomes a fenced block with every space kept, and the frame
of the page (scripts, menus, forms) goes.

Choices: stage one is cheap, a search for tags; a `minglm.data.cleaning.classifier`, taught by the pages that `data.web_labels`
names, is asked only about pages without them. The tiers are those of `quality.epochs`: pages have the language "web"
and are ranked among themselves, the lowest share dropped and the best repeated. Rows with an "html" instead of a "text"
come in this way.

Simplified: no rendering, no style sheets: code that only a style makes look like code is found by stage two alone.
"""

import re
from html.parser import HTMLParser

TAGS = re.compile(
    r"<(pre|code|kbd|samp)\b|class\s*=\s*[\"'][^\"']*(highlight|code-?block|language-)",
    re.IGNORECASE,
)
FRAME = {
    "script",
    "style",
    "nav",
    "header",
    "footer",
    "aside",
    "form",
    "noscript",
    "svg",
    "template",
    "button",
    "head",
}
BLOCKS = {
    "p",
    "div",
    "section",
    "article",
    "ul",
    "ol",
    "table",
    "tr",
    "blockquote",
    "main",
    "dl",
    "dt",
    "dd",
    "figure",
}
EMPTY = {
    "br",
    "hr",
    "img",
    "input",
    "meta",
    "link",
    "source",
    "wbr",
    "col",
    "area",
    "base",
    "embed",
    "track",
    "param",
}
THRESHOLD = 0.5


def is_candidate(html, classifier=None, threshold=THRESHOLD):
    """Whether a page is likely to hold code: stage one.

    classifier: with `score(texts)`, asked about pages without a code tag; None: the tags decide alone.
    """
    if TAGS.search(html):
        return True
    return classifier is not None and float(classifier.score([parse(html)])[0]) >= threshold


class _Page(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.frame, self.code = (
            [],
            [],
            0,
        )  # parts: strings; frame: open tags from a tag of FRAME on

    def handle_starttag(self, tag, attributes):
        if self.frame or tag in FRAME:
            if tag not in EMPTY:
                self.frame.append(tag)
        elif tag == "pre":
            if not self.code:
                names = " ".join(value or "" for name, value in attributes if name == "class")
                language = re.search(r"(?:language|lang|highlight)-([\w+#]+)", names)
                self.parts.append(("code", language[1] if language else ""))
            self.code += 1
        elif self.code:
            if tag == "br":
                self.parts.append("\n")
        elif tag in ("code", "kbd", "samp"):
            self.parts.append("`")
        elif re.fullmatch("h[1-6]", tag):
            self.parts.append("\n\n" + "#" * int(tag[1]) + " ")
        elif tag == "li":
            self.parts.append("\n- ")
        elif tag in BLOCKS:
            self.parts.append("\n\n")
        elif tag in ("br", "hr"):
            self.parts.append("\n")

    def handle_endtag(self, tag):
        if self.frame:
            if tag in self.frame:
                del self.frame[len(self.frame) - 1 - self.frame[::-1].index(tag) :]
        elif tag == "pre" and self.code:
            self.code -= 1
            if not self.code:
                self.parts.append(("end", ""))
        elif self.code:
            return
        elif tag in ("code", "kbd", "samp"):
            self.parts.append("`")
        elif tag in BLOCKS or re.fullmatch("h[1-6]|li", tag):
            self.parts.append("\n\n" if tag != "li" else "")

    def handle_data(self, data):
        if not self.frame:
            self.parts.append(data if self.code else re.sub(r"\s+", " ", data))


def parse(html):
    """The text of a page: prose with single spaces, code blocks fenced and exactly as they stand in the page."""
    page = _Page()
    page.feed(html)
    page.close()
    done, prose, code, language = [], [], None, ""
    for part in [*page.parts, ("end", "")]:
        if isinstance(part, str):
            (prose if code is None else code).append(part)
        elif part[0] == "code":
            done.append(_prose(prose))
            prose, code, language = [], [], part[1]
        elif code is not None:
            text = "".join(code)
            text = text.removeprefix(
                "\n"
            ).rstrip()  # as browsers: the line break after <pre> is none of the code's
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            done.append(f"{fence}{language}\n{text}\n{fence}" if text.strip() else "")
            code = None
    done.append(_prose(prose))
    return "\n\n".join(part for part in done if part) + "\n" if any(done) else ""


def _prose(parts):
    text = re.sub(r" *\n *", "\n", re.sub(r" +", " ", "".join(parts)))
    return re.sub(r"\n{3,}", "\n\n", text).replace("``", "").strip()
