"""Score documents by a rubric, and decide how often to repeat the good ones (paper 2.2).

The paper sorts pages into quality buckets with a trained scorer, drops the lowest bucket and lets the highest
be seen in more than 3.2 epochs; code goes into three tiers by per-language models. Here the scorer is a
rubric, the mean of marks between 0 and 1, each of which can be argued with:

    prose   letters     share of characters that are letters, their marks, or white space: full from 85 %, none at 50 %
            sentence    mean words per sentence: full from 8 to 30, none at 2 or 80
            variety     different words among the first 200: full from 50 %, none at 20 %
            length      full from 600 characters, none at 60
    code    line        share of lines up to 100 characters: full at 100 %, none at 80 %
            comments    share of lines with a comment: full from 5 %
            data        share of digits, brackets and commas: full up to 15 %, none at 50 % (tables of numbers)
    Python  documented  functions and classes with a docstring: full from 60 %
    other languages
            names       words that stand in sentences, as in prose: full up to 20 %, none at 60 %
            closed      brackets with their partner, and tokens that the language has: full at 100 %, none at 80 %

    math, science   `educational`: share of sentences that compute or explain

Scripts that write no space between words (Chinese, Japanese, Thai and others) are counted by characters: two
of them are taken for a word, and a text of them has as many letters in 200 characters as an alphabet has in
600. The script is read from the text itself and not from the name of its language.

Code that does not parse, or of which `names` or `closed` is none, and text without letters, scores 0.
`epochs` makes buckets by rank and not by the score itself, so that the learned score of `classifier` can
replace this one.
"""

import re
import zlib
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from minglm.data.cleaning.code_tokens import MAX_CHARACTERS, read_tokens
from minglm.data.cleaning.python_ast import outline
from minglm.data.languages import LANGUAGES

DENSE = (
    r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana, Han
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
)
DENSE_SCRIPTS = re.compile(f"[{DENSE}]")
"""Characters of scripts that write no space between words."""

MARKS = r"\u0300-\u036f\u0591-\u05c7\u0610-\u065f\u0670\u0900-\u0dff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
"""Characters that belong to a word and that Python does not count as letters, such as the vowels of Hindi."""

DENSE_WORDS = re.compile(rf"[{DENSE}]{{2}}|[{DENSE}]|[^\W{DENSE}]+")
WORDS = re.compile(rf"(?:\w|[{MARKS}])+")
LETTERS_AND_SPACES = re.compile(rf"(?:[^\W\d_]|\s|[{MARKS}])+")
SENTENCE_ENDS = re.compile(r"[.!?\u06d4\u061f\u0964](?:\s|$)|[。！？]|\n\s*\n")
"""What ends a sentence: also in Urdu, Arabic and Hindi, and with the wide signs that no space follows."""

TOP_EPOCHS = 3.0
"""How often documents of the top bucket are used; the paper reports more than 3.2 epochs."""

RANKED = ("code", "prose")
"""Sources that are divided into buckets."""

SCIENCE = ("math", "science")
"""Sources with a threshold of educational content."""

TEACHES = re.compile(
    r"[=<>≤≥≈∑∫√]|\d\s*[-+*/^%]\s*\d|[因所例等定证若]"
    r"|\b(because|therefore|thus|hence|so|since|if|then|let|suppose|means?|called|defined?|example|proof)\b",
    re.IGNORECASE,
)
"""What a sentence that computes or explains contains: a relation, an operation, or a word of reasoning."""


class Rated(Protocol):
    """A document or a record of one, with a quality."""

    @property
    def name(self) -> str:
        """Return its name, which breaks ties."""
        ...

    @property
    def source(self) -> str:
        """Return its source."""
        ...

    @property
    def language(self) -> str:
        """Return its language."""
        ...

    @property
    def quality(self) -> float:
        """Return its quality, 0 to 1."""
        ...


def _ramp(value: float, none: float, full: float) -> float:
    """Return 0 at `none`, 1 at `full`, and a linear value between; `none` may be above `full`."""
    return min(1.0, max(0.0, (value - none) / (full - none)))


def prose_marks(text: str) -> dict[str, float]:
    """Return the marks of a prose text, {name: 0 to 1}."""
    dense = len(DENSE_SCRIPTS.findall(text))
    letters_and_spaces = sum(len(run) for run in LETTERS_AND_SPACES.findall(text))
    is_dense = dense > letters_and_spaces / 2
    words = DENSE_WORDS.findall(text) if is_dense else WORDS.findall(text)
    sentences = len(SENTENCE_ENDS.findall(text))
    words_per_sentence = len(words) / max(1, sentences)
    letters = letters_and_spaces / max(1, len(text))
    first_words = [word.lower() for word in words[:200]]
    variety = len(set(first_words)) / max(1, len(first_words))
    return {
        # Sentences of a dense script are short, so their punctuation weighs more.
        "letters": _ramp(letters, 0.5, 0.8 if is_dense else 0.85),
        "sentence": min(_ramp(words_per_sentence, 2, 8), _ramp(words_per_sentence, 80, 30)),
        "variety": _ramp(variety, 0.2, 0.5),
        "length": _ramp(len(text), 20, 200) if is_dense else _ramp(len(text), 60, 600),
    }


def code_marks(text: str, language: str = "python") -> dict[str, float] | None:
    """Return the marks of a program, {name: 0 to 1}, or None if it is no program of its language."""
    found = _python_marks(text) if language == "python" else _token_marks(text, language)
    if found is None:
        return None
    lines = [line for line in text.splitlines() if line.strip()]
    short_lines = sum(len(line) <= 100 for line in lines)
    data_characters = len(re.findall(r"[0-9\[\]{}(),\\]", text))
    return {
        **found.marks,
        "line": _ramp(short_lines / max(1, len(lines)), 0.8, 1),
        "comments": _ramp(found.commented, 0, 0.05),
        "data": _ramp(data_characters / max(1, len(text)), 0.5, 0.15),
    }


class _Syntax(NamedTuple):
    """What the syntax of a program says."""

    marks: dict[str, float]
    commented: float
    """Share of lines with a comment."""


def _python_marks(text: str) -> _Syntax | None:
    """Return the marks from the syntax tree of Python, or None if it does not parse."""
    file = outline(text)
    if file is None:
        return None
    # The docstring of the module has line 0 and does not count.
    documented = sum(docstring.line > 0 for docstring in file.docstrings)
    lines = [line for line in text.splitlines() if line.strip()]
    comment_lines = sum("#" in line for line in lines)
    marks = {"documented": _ramp(documented / max(1, file.definitions), 0, 0.6)}
    return _Syntax(marks, comment_lines / max(1, len(lines)))


def _token_marks(text: str, language: str) -> _Syntax | None:
    """Return the marks from the tokens of any other language, or None if these are not its tokens."""
    found = read_tokens(text, language)
    lines = sum(bool(line.strip()) for line in text[:MAX_CHARACTERS].splitlines())
    unmatched = found.unmatched / max(1, found.brackets)
    unknown = found.errors / max(1, found.tokens)
    marks = {
        "names": _ramp(found.words_in_sentences / max(1, found.words), 0.6, 0.2),
        "closed": _ramp(max(unmatched, unknown), 0.2, 0),
    }
    if not found.tokens or not all(marks.values()):
        return None
    return _Syntax(marks, found.comment_lines / max(1, lines))


def score(text: str, language: str = "en", source: str = "prose") -> float:
    """Return the quality of a text, 0 to 1, by the rubric of its kind.

    Code is what has the source "code" or the name of a programming language; all other text is prose.
    """
    if not text.strip():
        return 0.0
    language = language.lower()
    is_code = source == "code" or language in LANGUAGES
    marks = code_marks(text, language) if is_code else prose_marks(text)
    if marks is None or marks.get("letters") == 0:
        return 0.0
    return sum(marks.values()) / len(marks)


def educational(text: str) -> float:
    """Return the share of sentences that compute or explain, 0 to 1, for a page of mathematics or science."""
    pieces = re.split(r"[.!?。！？](?:\s|$)|\n|(?<=[。！？])", text)
    sentences = [piece for piece in pieces if re.search(r"\w", piece)]
    teaching = sum(bool(TEACHES.search(sentence)) for sentence in sentences)
    return teaching / max(1, len(sentences))


def epochs(
    documents: Sequence[Rated],
    lowest_share: float = 0.1,
    top_share: float = 0.1,
    top_epochs: float = TOP_EPOCHS,
    educational_from: float = 0.0,
) -> list[int]:
    """Return how often each training document is used.

    Each language of the sources in RANKED is ranked by (quality, name). The rest is used once.

    Args:
        lowest_share: share of the ranked documents that is dropped.
        top_share: share of the ranked documents that is used `top_epochs` times. If that is not a whole number, a hash
            of the name decides which documents are used once more.
        educational_from: mathematics and science of this quality or more is used twice (0: never).

    Raises ValueError unless both shares are at least 0 and their sum is at most 1.
    """
    if not (lowest_share >= 0 and top_share >= 0 and lowest_share + top_share <= 1):
        raise ValueError(
            f"quality buckets lowest = {lowest_share} and top = {top_share}: shares must sum to at most 1"
        )
    times = [1] * len(documents)
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, document in enumerate(documents):
        if document.source in RANKED:
            groups[document.source, document.language].append(index)
        elif document.source in SCIENCE and 0 < educational_from <= document.quality:
            times[index] = 2

    for members in groups.values():
        members.sort(key=lambda i: (documents[i].quality, documents[i].name))
        for place, index in enumerate(members):
            rank = place / len(members)
            if rank < lowest_share:
                times[index] = 0
            elif rank >= 1 - top_share:
                fraction = zlib.crc32(documents[index].name.encode()) / 2**32
                times[index] = int(top_epochs) + (fraction < top_epochs % 1)
    return times
