"""How good is a document? A score from rules, and how often to repeat what is good (paper 2.2).

The paper sorts pages into quality buckets with a trained scorer, drops the lowest bucket and lets the highest be seen
in more than 3.2 epochs; code goes into three tiers by per-language models. Here the scorer is a rubric, the mean of
marks between 0 and 1, each of which can be argued with:

    prose   letters     share of characters that are letters or spaces: full from 85 %, none at 50 %
            sentence    mean words per sentence: full from 8 to 30, none at 2 or 80
            variety     different words among the first 200: full from 50 %, none at 20 %
            length      full from 600 characters, none at 60
    code    documented  functions and classes with a docstring: full from 60 %
            line        share of lines up to 100 characters: full at all, none at 80 %
            comments    share of lines with a comment: full from 5 %
            data        share of digits, brackets and commas: full up to 15 %, none at 50 % (tables of numbers)

    math, science   `educational`: share of sentences that compute or explain

Code that does not parse, or text with no letters, scores 0. `epochs` makes buckets of a source by rank, not by the
score itself, so that the learned score of `classifier` can take this one's place.
"""

import re
import zlib
from collections import defaultdict

from minglm.data.sources.python_ast import outline

REPEAT = 3.0
"""How often documents of the top bucket stand in the training data; the paper reports more than 3.2 epochs."""

JUDGED = ("code", "prose")

TEACHES = re.compile(
    r"[=<>≤≥≈∑∫√]|\d\s*[-+*/^%]\s*\d|[因所例等定证若]"
    r"|\b(because|therefore|thus|hence|so|since|if|then|let|suppose|means?|called|defined?|example|proof)\b",
    re.IGNORECASE,
)
"""What a sentence that computes or explains contains: a relation, an operation, a word of reasoning."""


def _ramp(value, none, full):
    """0 at `none`, 1 at `full`, linear between; the two may stand in either order."""
    return min(1.0, max(0.0, (value - none) / (full - none)))


def prose_marks(text):
    """The marks of a prose text, {name: 0..1}."""
    words = re.findall(r"\w+", text)
    sentences = max(1, len(re.findall(r"[.!?。！？](?:\s|$)|\n\s*\n", text)))
    mean = len(words) / sentences
    letters = sum(map(len, re.findall(r"(?:[^\W\d_]|\s)+", text))) / max(1, len(text))
    first = [word.lower() for word in words[:200]]
    return {
        "letters": _ramp(letters, 0.5, 0.85),
        "sentence": min(_ramp(mean, 2, 8), _ramp(mean, 80, 30)),
        "variety": _ramp(len(set(first)) / max(1, len(first)), 0.2, 0.5),
        "length": _ramp(len(text), 60, 600),
    }


def code_marks(text):
    """The marks of a Python file, {name: 0..1}; None where it does not parse."""
    file = outline(text)
    if file is None:
        return None
    documented = sum(line > 0 for line, _ in file.docstrings) / max(1, file.definitions)
    lines = [line for line in text.splitlines() if line.strip()]
    short = sum(len(line) <= 100 for line in lines) / max(1, len(lines))
    comments = sum("#" in line for line in lines) / max(1, len(lines))
    data = len(re.findall(r"[0-9\[\]{}(),\\]", text)) / max(1, len(text))
    return {
        "documented": _ramp(documented, 0, 0.6),
        "line": _ramp(short, 0.8, 1),
        "comments": _ramp(comments, 0, 0.05),
        "data": _ramp(data, 0.5, 0.15),
    }


def score(text, language="en"):
    """Quality between 0 and 1. language: "python" uses the rubric for code, anything else the one for prose."""
    if not text.strip():
        return 0.0
    marks = code_marks(text) if language == "python" else prose_marks(text)
    if marks is None or marks.get("letters") == 0:
        return 0.0
    return sum(marks.values()) / len(marks)


def educational(text):
    """Share of educational content of a page of mathematics or science, 0 to 1: sentences that compute or explain."""
    sentences = [
        part
        for part in re.split(r"[.!?。！？](?:\s|$)|\n|(?<=[。！？])", text)
        if re.search(r"\w", part)
    ]
    return sum(bool(TEACHES.search(part)) for part in sentences) / max(1, len(sentences))


def epochs(documents, lowest=0.1, top=0.1, repeat=REPEAT, threshold=0.0):
    """How often each document stands in the training data: a list of whole numbers.

    documents: with `quality`, `source`, `language` and `name`, all for training. Of each language of the sources in
    JUDGED, ranked by (quality, name), the `lowest` share is dropped and the `top` share comes `repeat` times; where
    that is no whole number, a hash of the name decides which documents come once more. threshold: documents of
    mathematics and science with a quality of this or more come twice (0: none). Others come once.
    Raises ValueError unless 0 <= lowest, 0 <= top and lowest + top <= 1.
    """
    if not (lowest >= 0 and top >= 0 and lowest + top <= 1):
        raise ValueError(
            f"quality buckets lowest = {lowest} and top = {top} must be shares that sum to at most 1"
        )
    times, groups = [1] * len(documents), defaultdict(list)
    for index, document in enumerate(documents):
        if document.source in JUDGED:
            groups[document.source, document.language].append(index)
        elif document.source in ("math", "science") and threshold and document.quality >= threshold:
            times[index] = 2
    for members in groups.values():
        members.sort(key=lambda i: (documents[i].quality, documents[i].name))
        for place, index in enumerate(members):
            rank = place / len(members)
            if rank < lowest:
                times[index] = 0
            elif rank >= 1 - top:
                more = zlib.crc32(documents[index].name.encode()) / 2**32 < repeat % 1
                times[index] = int(repeat) + more
    return times
