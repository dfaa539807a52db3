"""Rewrite code for fill-in-the-middle, so that a model that reads forwards learns to insert (paper 2.2, "Code").

A text is cut at two random characters into prefix, middle and suffix, and the middle is moved to the end:

    PSM   <|code_prefix|> prefix <|code_suffix|> suffix <|code_middle|> middle
    SPM   <|code_suffix|> suffix <|code_prefix|> prefix <|code_middle|> middle

The model then predicts the middle with both sides in view. Nothing is lost: the markers say which section is which.

Choices: cuts are between characters, not tokens, because a cursor may be inside a word. Either order has
probability one half. A rewritten text must fit into one row, or its sections are read apart: `rewrite`
therefore works on spans of whole lines and leaves the text between rewritten spans as it is.

Simplified: the paper applies it to all source code but publishes neither the rate nor the orders.
"""

import numpy as np

from minglm.data.tokenizer import Tokenizer


def fim(text: str, tokenizer: Tokenizer, rng: np.random.Generator) -> list[int]:
    """Return the ids of a rewritten text with the markers, in PSM or SPM order.

    rng: draws the order and the two cuts; each pair of places is equally likely.
    """
    is_psm = rng.random() < 0.5
    first, second = sorted(rng.integers(0, len(text) + 1, 2).tolist())

    def section(name: str, content: str) -> list[int]:
        return [tokenizer.special[f"<|code_{name}|>"], *tokenizer.encode(content)]

    prefix = section("prefix", text[:first])
    middle = section("middle", text[first:second])
    suffix = section("suffix", text[second:])
    if is_psm:
        return prefix + suffix + middle
    return suffix + prefix + middle


def spans(text: str, characters: int) -> list[str]:
    """Cut a text at line ends into spans of at most `characters`; a longer line is one span.

    characters = 0: the whole text is one span. Joined, the spans are the text.
    """
    if not characters:
        return [text]
    result = [""]
    for line in text.splitlines(keepends=True):
        if result[-1] and len(result[-1]) + len(line) > characters:
            result.append("")
        result[-1] += line
    return result


def rewrite(
    text: str, tokenizer: Tokenizer, rng: np.random.Generator, rate: float, characters: int
) -> list[list[int]]:
    """Return a text as sequences of ids, in order: each span is rewritten with probability `rate`.

    The spans between two rewritten ones stay joined. characters: length of a span, see `spans`.
    """
    sequences = []
    plain = ""  # the text since the last rewritten span
    for span in spans(text, characters):
        if rng.random() >= rate:
            plain += span
            continue
        if plain:
            sequences.append(tokenizer.encode(plain))
            plain = ""
        sequences.append(fim(span, tokenizer, rng))
    if plain:
        sequences.append(tokenizer.encode(plain))
    return sequences
