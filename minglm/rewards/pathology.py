"""Faults of form: wrong language, endless repetition, broken format (paper 3.4, pathology RL).

These appear in less than 1% of outputs, so general RL hardly ever meets them. The paper's remedy is a last phase on
prompts chosen because they provoke them, with penalties that are cheap to compute. The paper names the three faults;
how to find them is ours, and each detector reads only the raw text of one assistant turn, special tokens spelled out:

    language mixing   share of words outside the script of the expected language        > 1% (en), > 30% (zh)
    repetition        share of the text inside its longest run of copies of one piece   > 20%, and over 40 characters
                      or share of distinct 4-grams of words                             < 20%, of 64 or more
    format            template tags out of order, stray or unbalanced; nothing said

Choices
- A word is a run of letters, or a single Han character, which says about as much. Chinese prose is full of Latin
  names, so its bound is wide and single letters (a variable, choice B) do not count; in English a few Han characters
  are a fault. One foreign word is a quotation, two begin to be mixing. Code, tool calls, formulas, links, lone Greek
  letters and digits belong to no language.
- A run is three or more copies in a row; rulers, dots and indentation are first shrunk to one space, so that a ruled
  line is no loop. Sentences that return without being adjacent are left to the 4-grams.
- Format is a grammar over the tags alone: at most one block of reasoning, which comes first, then text and calls.

Simplified: scripts stand for languages (French passes for English), two languages are known, and a special token that
is quoted in prose on purpose counts as stray.
"""

import re
import unicodedata

import numpy as np

FAULTS = ("language_mixing", "repetition", "format")

_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_CALL = re.compile(r"<tool_call>.*?(?:</tool_call>|\Z)", re.DOTALL)
_FORMULA = re.compile(
    r"\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[a-zA-Z]+|https?://\S+", re.DOTALL
)
_TAG = re.compile(
    r"<\|[a-z_]+\|>|</?(?:think|tool_call|tool_response|arg_key|arg_value|tools)>|\[g?s?MASK\]|<sop>|<eop>|/nothink\b"
)
_BOXES = ("<|begin_of_box|>", "<|end_of_box|>")
_STOP = re.compile(r"<\|(?:user|observation|endoftext)\|>\s*\Z")
_SCRIPTS = {"en": "LATIN", "zh": "CJK"}
_WORD_CHARACTERS = (
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "HANGUL",
)  # one of these alone is a word, a lone pi is a symbol
_MIXING = {"en": 0.01, "zh": 0.3}

# One letter for each tag that has a place in a turn, and the order they may stand in.
_LETTERS = {
    "<think>": "T",
    "</think>": "t",
    "<tool_call>": "C",
    "</tool_call>": "c",
    "<|begin_of_box|>": "B",
}
_LETTERS |= {
    "<arg_key>": "K",
    "</arg_key>": "k",
    "<arg_value>": "V",
    "</arg_value>": "v",
    "<|end_of_box|>": "b",
}
_ORDER = re.compile(r"(Tt)?(Bb)*(C(KkVv)*c)*")


def _words(text):
    """(word, script) of every word: runs of letters of one script, each Han character alone."""
    for run in re.findall(r"[^\W\d_]+", text):
        word, script = "", ""
        for letter in filter(
            str.isalpha, run
        ):  # a superscript two passes the pattern and is no letter
            kind = unicodedata.name(letter, "UNKNOWN").split()[0]
            if word and (kind != script or script == "CJK"):
                yield word, script
                word = ""
            word, script = word + letter, kind
        if word:
            yield word, script


def _foreign(text, language):
    """(words outside the script of the language, words inside it)."""
    if language not in _SCRIPTS:
        raise ValueError(f"language = {language!r}: must be one of {', '.join(_SCRIPTS)}")
    for pattern in (_CALL, _CODE, _FORMULA, _TAG):
        text = pattern.sub(" ", text)
    own, foreign = 0, 0
    for word, script in _words(text):
        if script == _SCRIPTS[language]:
            own += 1
        elif len(word) > 1 or script in _WORD_CHARACTERS:
            foreign += 1
    return foreign, own


def language_mixing(text, language):
    """Share of words outside the script of `language` ("en" or "zh"), 0 for a text without words."""
    foreign, own = _foreign(text, language)
    return foreign / max(1, foreign + own)


def _longest_run(text, longest_piece=256):
    """Characters in the longest run of three or more adjacent copies of a piece, and characters of the shrunk text."""
    text = (
        re.sub(r"[-\s=_*~#|+:.]+", " ", _TAG.sub(" ", text)).strip() + " "
    )  # so the last copy ends as the others do
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    best = 0
    for piece in range(1, min(longest_piece, len(codes) // 3) + 1):
        differs = np.flatnonzero(codes[piece:] != codes[:-piece])
        edges = np.concatenate(([-1], differs, [len(codes) - piece]))
        equal = (
            int(np.diff(edges).max()) - 1
        )  # characters in a row that equal the one `piece` before them
        if equal >= 2 * piece:
            best = max(best, equal + piece)
    return best, len(codes)


def repetition(text):
    """Share of the text inside its longest run of three or more adjacent copies of one piece (up to 256 characters)."""
    run, total = _longest_run(text)
    return run / max(1, total)


def distinctness(text, n=4):
    """(share of distinct n-grams among the n-grams of words, number of n-grams); (1.0, 0) for a shorter text."""
    words = re.findall(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+", text)
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams)) if grams else 1.0, len(grams)


def broken_format(turn):
    """Whether an assistant turn breaks the template.

    turn: the raw text after `<|assistant|>`, with or without the role token that ends it; or a parsed message, which is
    broken when it carries an error, says nothing, or still holds template tags in its text.
    """
    if isinstance(turn, dict):
        said = (turn.get("content") or "", turn.get("reasoning_content") or "")
        silent = not said[0].strip() and not turn.get("tool_calls")
        stray = set(_TAG.findall(" ".join(said))) - set(_BOXES)
        return bool(turn.get("error")) or silent or bool(stray)
    text = _STOP.sub("", turn)
    tags, between = _TAG.findall(text), _TAG.split(text)  # between[i] stands before tags[i]
    if not _ORDER.fullmatch("".join(_LETTERS.get(tag, "?") for tag in tags)):
        return True
    thinks = tags[:1] == ["<think>"]
    if thinks and between[0].strip():
        return True
    for tag, after in zip(tags, between[1:], strict=True):
        if tag == "<tool_call>" and not re.fullmatch(r"\s*[\w.:-]+\s*", after):
            return True  # a call begins with its name
        if tag in ("</arg_key>", "</arg_value>", "</tool_call>") and after.strip():
            return True  # nothing stands between key and value, two arguments, or after a call
    return "<tool_call>" not in tags and not "".join(between[2 if thinks else 0 :]).strip()


def detect(text, language=None, message=None):
    """The three faults of one assistant turn as {"language_mixing", "repetition", "format"}: bool.

    text: raw text, special tokens spelled out. language: "en", "zh" or None, for an unknown language, which is never
    mixed. message: the parsed message, if there is one; its error counts as broken format.
    The bounds are those of the module's docstring.
    """
    mixed = False
    if language is not None:
        foreign, own = _foreign(text, language)
        mixed = foreign >= 2 and foreign > _MIXING[language] * (foreign + own)
    run, total = _longest_run(text)
    distinct, grams = distinctness(text)
    repeats = (run > 40 and run > 0.2 * total) or (grams >= 64 and distinct < 0.2)
    broken = broken_format(text) or (message is not None and broken_format(message))
    return {"language_mixing": mixed, "repetition": repeats, "format": broken}


def penalty(flags):
    """What a turn's faults cost: half of the full reward for each, at most all of it. The paper gives no numbers."""
    return min(1.0, 0.5 * sum(flags.values()))


def incidence(flags_list):
    """Share of turns with each fault, and with any: {"language_mixing", "repetition", "format", "any"}; 0 of none."""
    turns = list(flags_list)
    share = {fault: sum(flags[fault] for flags in turns) / max(1, len(turns)) for fault in FAULTS}
    return share | {"any": sum(any(flags.values()) for flags in turns) / max(1, len(turns))}
