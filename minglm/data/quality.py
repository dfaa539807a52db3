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

Code that does not parse, or text with no letters, scores 0. `keep` makes buckets of a source by rank, not by the
score itself, so that another scorer, learned one day, can take this one's place.
"""

import re
from collections import Counter

from minglm.data.outline import outline

REPEAT = 3
"""How often documents of the top bucket stand in the training data; the paper reports more than 3.2 epochs."""


def _ramp(value, none, full):
    """0 at `none`, 1 at `full`, linear between; the two may stand in either order."""
    return min(1.0, max(0.0, (value - none) / (full - none)))


def prose_marks(text):
    """The marks of a prose text, {name: 0..1}."""
    words = re.findall(r"\w+", text)
    sentences = max(1, len(re.findall(r"[.!?。！？](?:\s|$)|\n\s*\n", text)))
    mean = len(words) / sentences
    letters = len(re.findall(r"[^\W\d_]|\s", text)) / max(1, len(text))
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


def keep(documents, drop=0.1, top=0.1, sources=("code", "prose"), repeat=REPEAT):
    """The training documents by quality: lowest bucket dropped, top bucket repeated, in the given order.

    documents: with `quality`, `source`, `name` and `heldout`. drop, top: the buckets as shares of a source's documents,
    ranked by (quality, name). Only `sources` are judged; others, and held-out documents, stay once.
    Raises ValueError unless 0 <= drop, 0 <= top and drop + top <= 1.
    """
    if not (drop >= 0 and top >= 0 and drop + top <= 1):
        raise ValueError(f"quality buckets drop = {drop} and top = {top} must be shares that sum to at most 1")
    judged = [d for d in documents if d.source in sources and not d.heldout]
    size, place, rank = Counter(d.source for d in judged), Counter(), {}
    for document in sorted(judged, key=lambda d: (d.quality, d.name)):
        rank[id(document)] = place[document.source] / size[document.source]
        place[document.source] += 1

    def times(document):
        if id(document) not in rank:
            return 1
        return 0 if rank[id(document)] < drop else repeat if rank[id(document)] >= 1 - top else 1

    return [document for document in documents for _ in range(times(document))]
