"""Read what any program is made of: shares of tokens, from the lexer of its language (paper 2.2).

The lexers are those of Pygments, which knows some five hundred languages. They split a text and do not parse
it, so what is measured is what all languages share: brackets that close, names that stand between operators
and not in sentences, comments. A language without a lexer is read by rules that suit most.
"""

import functools
from dataclasses import dataclass
from typing import Any

from pygments.lexers import get_lexer_by_name
from pygments.lexers.c_cpp import CppLexer
from pygments.token import Comment, Error, Keyword, Literal, Name, Other, String, Text
from pygments.util import ClassNotFound

MAX_CHARACTERS = 20_000
"""Characters of a file that are read: its beginning says how good it is."""

SENTENCE = 4
"""So many words in a row, with nothing but space between them, are no expression of most languages."""

CLOSES = {")": "(", "]": "[", "}": "{"}
OPENS = tuple(CLOSES.values())

PREPROCESSOR = (Comment.Preproc, Comment.PreprocFile)
"""Kinds of comment that are none."""


@dataclass(frozen=True)
class CodeTokens:
    """What a program is made of."""

    tokens: int
    """Tokens without space and comments."""
    comment_lines: int
    """Lines with a comment."""
    errors: int
    """Tokens that the lexer does not know."""
    unmatched: int
    """Brackets without their partner."""
    brackets: int
    words: int
    """Names; words that are no names to the lexer; not keywords."""
    words_in_sentences: int
    """Those of them that stand in runs of SENTENCE or more."""


@functools.lru_cache(maxsize=64)
def _lexer(language: str) -> Any:
    try:
        # Spaces at both ends stay, so that lines are counted as they are.
        return get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return CppLexer(stripnl=False)


def read_tokens(text: str, language: str) -> CodeTokens:
    """Return what the first MAX_CHARACTERS of a program are made of."""
    is_whole = len(text) <= MAX_CHARACTERS
    tokens = comment_lines = errors = brackets = unmatched = words = in_sentences = run = 0
    opened: list[str] = []
    for kind, value in _lexer(language.lower()).get_tokens(text[:MAX_CHARACTERS]):
        if kind in String.Doc or (
            kind in Comment and not any(kind in other for other in PREPROCESSOR)
        ):
            comment_lines += 1 + value.rstrip("\n").count("\n")
            run = 0
        elif not value.strip():
            # A statement ends with its line in many languages.
            run = 0 if "\n" in value else run
        elif kind in Keyword:
            # Some stand in a row in every language: public static final int.
            tokens += 1
        elif (kind in Name or kind in Text) and value.strip().replace(" ", "").isidentifier():
            for _ in value.split():
                tokens += 1
                words += 1
                run += 1
                # With the word that makes a sentence, those before it are known to be in one.
                in_sentences += SENTENCE if run == SENTENCE else run > SENTENCE
        else:
            tokens += 1
            run = 0
            # What stands outside the tags of PHP, and is no part of it, is of the kind Other.
            errors += kind in Error or kind in Other
            for bracket in value if kind not in Literal else "":
                if bracket in OPENS:
                    opened.append(bracket)
                    brackets += 1
                elif bracket in CLOSES:
                    brackets += 1
                    if opened and opened[-1] == CLOSES[bracket]:
                        opened.pop()
                    else:
                        unmatched += 1
    if is_whole:
        unmatched += len(opened)
    return CodeTokens(tokens, comment_lines, errors, unmatched, brackets, words, in_sentences)
