"""Find web pages that teach code, and parse them so that their code survives (paper 2.2, "Code").

    page  --  has a code tag, or a classifier says so  -->  candidate  --  quality tier  -->  kept
    kept  --  parsed again  -->  text with its code blocks as they were, line for line

Parsers that extract text from the web drop line breaks and indentation, without which a program is lost. Here
headings, paragraphs and lists become plain text, `pre` becomes a fenced block with every space kept, and the
frame of the page (scripts, menus, forms) is removed.

Choices: stage one is cheap, a search for tags; a `minglm.data.cleaning.classifier`, trained on the pages of
`data.web_labels`, is asked only about pages without them. The tiers are those of `quality.epochs`: pages have
the language "web" and are ranked among themselves, the lowest share dropped and the best repeated. Rows with
an "html" instead of a "text" come in this way.

Simplified: no rendering and no style sheets: only stage two finds code that a style alone makes look like code.
"""

import re
from collections.abc import Sequence
from enum import Enum, auto
from html.parser import HTMLParser
from typing import NamedTuple, Protocol

import numpy as np

CODE_TAG = re.compile(
    r"<(pre|code|kbd|samp)\b|class\s*=\s*[\"'][^\"']*(highlight|code-?block|language-)",
    re.IGNORECASE,
)
LANGUAGE_CLASS = re.compile(r"(?:language|lang|highlight)-([\w+#]+)")
INLINE_CODE_TAGS = {"code", "kbd", "samp"}
FRAME_TAGS = {
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
"""Elements that are removed with all they contain."""

BLOCK_TAGS = {
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
"""Elements that begin and end a paragraph."""

VOID_TAGS = {
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
"""Elements without content, which have no end tag."""

THRESHOLD = 0.5
"""Score of the classifier from which a page is a candidate."""


class PageClassifier(Protocol):
    """A learned score of pages."""

    def score(self, texts: Sequence[str]) -> Sequence[float] | np.ndarray:
        """Return, for each text, how likely it teaches code, 0 to 1."""
        ...


def is_candidate(
    html: str, classifier: PageClassifier | None = None, threshold: float = THRESHOLD
) -> bool:
    """Return True if a page is likely to contain code: stage one.

    Args:
        classifier: asked about pages without a code tag; None: the tags decide alone.
    """
    if CODE_TAG.search(html):
        return True
    if classifier is None:
        return False
    return float(classifier.score([parse(html)])[0]) >= threshold


class _Kind(Enum):
    """What a piece of a page is."""

    TEXT = auto()
    """Text of the page; code while a code block is open."""
    CODE_BEGINS = auto()
    """The beginning of a code block, with its language or ""."""
    CODE_ENDS = auto()


class _Piece(NamedTuple):
    kind: _Kind
    text: str = ""


class _Page(HTMLParser):
    """Collects the pieces of a page."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.pieces: list[_Piece] = []
        self.frame: list[str] = []  # open tags, from a frame tag on
        self.open_pre = 0  # number of open `pre` elements

    def _add(self, text: str) -> None:
        self.pieces.append(_Piece(_Kind.TEXT, text))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.frame or tag in FRAME_TAGS:
            if tag not in VOID_TAGS:
                self.frame.append(tag)
        elif tag == "pre":
            if self.open_pre == 0:
                classes = " ".join(value or "" for name, value in attrs if name == "class")
                language = LANGUAGE_CLASS.search(classes)
                self.pieces.append(_Piece(_Kind.CODE_BEGINS, language[1] if language else ""))
            self.open_pre += 1
        elif self.open_pre:
            if tag == "br":
                self._add("\n")
        elif tag in INLINE_CODE_TAGS:
            self._add("`")
        elif re.fullmatch("h[1-6]", tag):
            self._add("\n\n" + "#" * int(tag[1]) + " ")
        elif tag == "li":
            self._add("\n- ")
        elif tag in BLOCK_TAGS:
            self._add("\n\n")
        elif tag in ("br", "hr"):
            self._add("\n")

    def handle_endtag(self, tag: str) -> None:
        if self.frame:
            if tag in self.frame:
                # Close the innermost element of this name, and all that are open inside it.
                innermost = len(self.frame) - 1 - self.frame[::-1].index(tag)
                del self.frame[innermost:]
        elif tag == "pre" and self.open_pre:
            self.open_pre -= 1
            if self.open_pre == 0:
                self.pieces.append(_Piece(_Kind.CODE_ENDS))
        elif self.open_pre:
            return
        elif tag in INLINE_CODE_TAGS:
            self._add("`")
        elif tag in BLOCK_TAGS or re.fullmatch("h[1-6]", tag):
            self._add("\n\n")

    def handle_data(self, data: str) -> None:
        if self.frame:
            return
        self._add(data if self.open_pre else re.sub(r"\s+", " ", data))


def parse(html: str) -> str:
    """Return the text of a page: prose with single spaces, code blocks fenced and exactly as they are in the page."""
    page = _Page()
    page.feed(html)
    page.close()

    blocks = []  # finished paragraphs and code blocks
    prose: list[str] = []
    code: list[str] | None = None  # None outside of a code block
    language = ""
    # A block that the page does not close ends with the page.
    for piece in [*page.pieces, _Piece(_Kind.CODE_ENDS)]:
        if piece.kind == _Kind.TEXT:
            (prose if code is None else code).append(piece.text)
        elif piece.kind == _Kind.CODE_BEGINS:
            blocks.append(_clean_prose(prose))
            prose = []
            code = []
            language = piece.text
        elif code is not None:
            blocks.append(_fence("".join(code), language))
            code = None
    blocks.append(_clean_prose(prose))
    blocks = [block for block in blocks if block]
    return "\n\n".join(blocks) + "\n" if blocks else ""


def _fence(code: str, language: str) -> str:
    """Return a fenced block, with a fence longer than every run of backticks in the code; "" for an empty block."""
    code = code.removeprefix("\n").rstrip()  # browsers ignore the line break after <pre>, too
    if not code.strip():
        return ""
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _clean_prose(texts: Sequence[str]) -> str:
    """Join texts; leave single spaces, at most one empty line, and no empty inline code."""
    text = re.sub(r" +", " ", "".join(texts))
    text = re.sub(r" *\n *", "\n", text)
    text = re.sub(r"\n{3,}", "\n\n", text)
    return text.replace("``", "").strip()
