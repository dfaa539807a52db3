"""Detect faults of form: wrong language, endless repetition, broken format (paper 3.4, pathology RL).

These appear in less than 1% of outputs, so general RL hardly ever meets them. The paper's remedy is a last
phase on prompts chosen because they provoke them, with penalties that are cheap to compute. The paper names
the three faults; how to find them is our choice, and each detector reads only the raw text of one assistant
turn, with special tokens spelled out, or for the format its pieces, so that text which spells a tag is text:

    language mixing   share of words outside the script of the expected language        > 1% (en), > 30% (zh)
    repetition        share of the text inside its longest run of copies of one piece   > 20%, and over 40 characters
                      or share of distinct 4-grams of words                             < 20%, of 64 or more
    format            template tags out of order, stray or unbalanced; nothing said

Choices
- A word is a run of letters, or a single Han character, which says about as much. Chinese prose is full of Latin
  names, so its bound is wide and single letters (a variable, choice B) do not count; in English a few Han characters
  are a fault. One foreign word is a quotation, two begin to be mixing. Code, tool calls, formulas, links, lone Greek
  letters and digits belong to no language.
- A run is three or more copies in a row; rulers, dots and indentation are first reduced to one space, so that a ruled
  line is no loop. Sentences that return without being adjacent are left to the 4-grams.
- Format is a grammar over the tags alone: at most one block of reasoning, which comes first, then text and calls.

Simplified: scripts stand for languages (French passes for English), two languages are known, and where only
letters are given a special token that is quoted in prose on purpose counts as stray.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from minglm.chat.parser import TEXT_TAGS, Piece
from minglm.chat.template import STOPS

FAULTS = ("language_mixing", "repetition", "format")

MAX_PIECE = 256  # characters of a piece whose copies count as a run
NO_CHARACTER = 0xFFFFFFFF
GRAM_FACTOR = np.uint64(0x9E3779B97F4A7C15)
RUN_BLOCK = 1 << 16  # comparisons of characters at once
MIN_RUN = 40  # characters of a run from which on it may be a fault
MAX_RUN_SHARE = 0.2
MIN_GRAMS = 64  # 4-grams from which on their variety is judged
MIN_DISTINCT_SHARE = 0.2

_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_CALL = re.compile(r"<tool_call>.*?(?:</tool_call>|\Z)", re.DOTALL)
_FORMULA = re.compile(
    r"\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[a-zA-Z]+|https?://\S+", re.DOTALL
)
_TAG = re.compile(
    r"<\|[a-z_]+\|>|</?(?:think|tool_call|tool_response|arg_key|arg_value|tools)>|\[g?s?MASK\]|<sop>|<eop>|/nothink\b"
)
_STOP = re.compile(r"<\|(?:user|observation|endoftext)\|>\s*\Z")
_RULER = re.compile(r"[-\s=_*~#|+:.]+")
_SCRIPTS = {"en": "LATIN", "zh": "CJK"}
# A single character of these scripts is a word; a lone pi is a symbol.
_WORD_CHARACTERS = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")
_MAX_FOREIGN_SHARE = {"en": 0.01, "zh": 0.3}

# One character for each tag that has a place in a turn, and the order in which they may occur.
_TAG_CODES = {
    "<think>": "T",
    "</think>": "t",
    "<tool_call>": "C",
    "</tool_call>": "c",
    "<|begin_of_box|>": "B",
    "<|end_of_box|>": "b",
    "<arg_key>": "K",
    "</arg_key>": "k",
    "<arg_value>": "V",
    "</arg_value>": "v",
}
_ORDER = re.compile(r"(Tt)?(Bb)*(C(KkVv)*c)*")


class WordCounts(NamedTuple):
    """Words of a text by script."""

    foreign: int
    """Outside the script of the language."""
    own: int
    """Inside it."""


class LongestRun(NamedTuple):
    """The longest run of three or more adjacent copies of one piece."""

    characters: int
    """Characters of the run; 0 if there is none."""
    text_characters: int
    """Characters of the text, after rulers were reduced to spaces."""

    @property
    def share(self) -> float:
        """Return the share of the text inside the run."""
        return self.characters / max(1, self.text_characters)


class Distinctness(NamedTuple):
    """The variety of a text's n-grams of words."""

    share: float
    """Share of distinct n-grams; 1 if there are none."""
    grams: int
    """Number of n-grams."""


def _words(text: str) -> Iterator[tuple[str, str]]:
    """Yield (word, script) of every word: runs of letters of one script, each Han character alone."""
    for run in re.findall(r"[^\W\d_]+", text):
        word = ""
        script = ""
        for letter in run:
            if not letter.isalpha():  # a superscript two passes the pattern and is no letter
                continue
            letter_script = unicodedata.name(letter, "UNKNOWN").split()[0]
            if word and (letter_script != script or script == "CJK"):
                yield word, script
                word = ""
            word += letter
            script = letter_script
        if word:
            yield word, script


def count_words(text: str, language: str) -> WordCounts:
    """Count the words outside and inside the script of `language` ("en" or "zh").

    Raises ValueError for another language.
    """
    if language not in _SCRIPTS:
        raise ValueError(f"language = {language!r}: must be one of {', '.join(_SCRIPTS)}")
    for pattern in (_CALL, _CODE, _FORMULA, _TAG):
        text = pattern.sub(" ", text)
    own = 0
    foreign = 0
    for word, script in _words(text):
        if script == _SCRIPTS[language]:
            own += 1
        elif len(word) > 1 or script in _WORD_CHARACTERS:
            foreign += 1
    return WordCounts(foreign, own)


def longest_run(text: str) -> LongestRun:
    """Find the longest run of three or more adjacent copies of one piece of up to MAX_PIECE characters."""
    text = _RULER.sub(" ", _TAG.sub(" ", text)).strip()
    text += " "  # so that the last copy ends as the others do
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    length = len(codes)
    most = min(MAX_PIECE, length // 3)
    if not most:
        return LongestRun(0, length)
    before = np.concatenate((np.full(most, NO_CHARACTER, dtype=np.uint32), codes))
    place = np.arange(most, most + length)
    pieces = _possible_pieces(before, most)
    longest = 0
    rows = max(1, RUN_BLOCK // length)  # pieces that are looked for at once
    for first in range(0, len(pieces), rows):
        piece = pieces[first : first + rows]
        # A stretch of characters that equal the one `piece` before them is a run, less its first copy.
        # Each row begins with a character that differs, so no stretch goes on from one row to the next.
        differs = before[place - piece[:, None]] != codes
        places = np.flatnonzero(differs)
        equal = np.diff(places, append=differs.size) - 1
        (few,) = np.nonzero(equal >= 2)
        equal = equal[few]
        piece = piece[places[few] // length]
        runs = equal + piece
        longest = max(longest, int(runs[equal >= 2 * piece].max(initial=0)))
    return LongestRun(longest, length)


def _possible_pieces(before: np.ndarray, most: int) -> np.ndarray:
    """Return the lengths of pieces that may be repeated in a text, from 1 to at most `most`, int (pieces,).

    before: the characters of the text, after `most` that are none. All but the first copy of a piece equal what is one
    piece before. Wherever they are, two copies of `size` characters or more hold `size` characters that begin at a
    multiple of `size`: only these are compared, for pieces shorter than twice that.
    """
    possible: list[np.ndarray] = []
    grams = before.astype(np.uint64)  # a number for the `size` characters from each place on
    size = 1
    while size <= most:
        piece = np.arange(size, min(2 * size, most + 1))
        place = np.arange(most, len(grams), size)
        returns = (grams[place - piece[:, None]] == grams[place]).any(axis=1)
        possible.append(piece[returns])
        grams = grams[:-size] * GRAM_FACTOR + grams[size:]  # wraps around
        size *= 2
    return np.concatenate(possible)


def distinctness(text: str, n: int = 4) -> Distinctness:
    """Measure the variety of the n-grams of words of a text; a Han character is a word."""
    words = re.findall(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+", text)
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    if not grams:
        return Distinctness(1.0, 0)
    return Distinctness(len(set(grams)) / len(grams), len(grams))


def broken_format(turn: str | Sequence[Piece] | Mapping[str, Any]) -> bool:
    """Return whether an assistant turn breaks the template.

    turn: the raw text after `<|assistant|>`, with or without the role token that ends it; or its pieces; or a
    parsed message, which is broken when it carries an error, says nothing, or still holds template tags in
    its text.
    """
    if isinstance(turn, Mapping):
        return _broken_message(turn)
    if isinstance(turn, str):
        text = _STOP.sub("", turn)
        tags = _TAG.findall(text)
        between = _TAG.split(text)  # between[i] comes before tags[i]
    else:
        tags, between = _tags_and_text(turn)
    if not _ORDER.fullmatch("".join(_TAG_CODES.get(tag, "?") for tag in tags)):
        return True
    thinks = tags[:1] == ["<think>"]
    if thinks and between[0].strip():
        return True  # text before the reasoning
    for tag, after in zip(tags, between[1:], strict=True):
        if tag == "<tool_call>" and not re.fullmatch(r"\s*[\w.:-]+\s*", after):
            return True  # a call begins with its name
        if tag in ("</arg_key>", "</arg_value>", "</tool_call>") and after.strip():
            return True  # text between key and value, between two arguments, or after a call
    answer = "".join(between[2 if thinks else 0 :])
    return "<tool_call>" not in tags and not answer.strip()


def _broken_message(message: Mapping[str, Any]) -> bool:
    """Return whether a parsed message carries an error, says nothing, or holds template tags."""
    content = message.get("content") or ""
    reasoning = message.get("reasoning_content") or ""
    says_nothing = not content.strip() and not message.get("tool_calls")
    stray_tags = set(_TAG.findall(f"{content} {reasoning}")) - set(TEXT_TAGS)
    return bool(message.get("error")) or says_nothing or bool(stray_tags)


def _tags_and_text(pieces: Sequence[Piece]) -> tuple[list[str], list[str]]:
    """Return the tags, without the stop token at the end, and the text before each and after the last."""
    tags: list[str] = []
    between = [""]
    for piece in pieces:
        if isinstance(piece, str):
            between[-1] += piece
        else:
            tags.append(piece.name)
            between.append("")
    if tags and tags[-1] in STOPS and not between[-1].strip():
        tags.pop()
        between.pop()
    return tags, between


def detect(
    text: str,
    language: str | None = None,
    message: Mapping[str, Any] | None = None,
    pieces: Sequence[Piece] | None = None,
) -> dict[str, bool]:
    """Detect the three faults of one assistant turn: {"language_mixing", "repetition", "format"}.

    Args:
        text: raw text, special tokens spelled out.
        language: "en", "zh" or None, for an unknown language, which is never mixed.
        message: the parsed message, if there is one; its error counts as broken format.
        pieces: the text and the tags of the turn, where they are known. Otherwise tags are read from the letters.

    The bounds are those of the module's docstring.
    """
    mixes = False
    if language is not None:
        words = count_words(text, language)
        allowed = _MAX_FOREIGN_SHARE[language] * (words.foreign + words.own)
        mixes = words.foreign >= 2 and words.foreign > allowed

    run = longest_run(text)
    is_loop = run.characters > MIN_RUN and run.characters > MAX_RUN_SHARE * run.text_characters
    variety = distinctness(text)
    is_monotonous = variety.grams >= MIN_GRAMS and variety.share < MIN_DISTINCT_SHARE

    broken = broken_format(text if pieces is None else pieces)
    broken = broken or (message is not None and broken_format(message))
    return {
        "language_mixing": mixes,
        "repetition": is_loop or is_monotonous,
        "format": broken,
    }


def incidence(turns: Iterable[Mapping[str, bool]]) -> dict[str, float]:
    """Return the share of turns with each fault, and with any: {"language_mixing", "repetition", "format", "any"}.

    turns: the flags of each turn, as `detect` returns them. Without turns every share is 0.
    """
    turns = list(turns)
    total = max(1, len(turns))
    shares = {fault: sum(flags[fault] for flags in turns) / total for fault in FAULTS}
    shares["any"] = sum(any(flags.values()) for flags in turns) / total
    return shares
