"""Fill in the middle: code rewritten so that a model that reads forwards learns to insert (paper 2.2, "Code").

A text is cut at two random characters into prefix, middle and suffix, and the middle is moved to the end:

    PSM   <|code_prefix|> prefix <|code_suffix|> suffix <|code_middle|> middle
    SPM   <|code_suffix|> suffix <|code_prefix|> prefix <|code_middle|> middle

The model then predicts the middle with both sides in view. Nothing is lost: the markers say which part is which.

Choices: cuts fall on characters, not tokens, because a cursor may stand inside a word. Either order has probability
one half. A rewritten text has to fit into one row, or its parts are read apart: `rewrite` therefore works on spans of
whole lines and leaves the text between rewritten spans as it is.

Simplified: the paper applies it to all source code but publishes neither the rate nor the orders.
"""


def fim(text, tokenizer, rng):
    """Rewrite a text: ids with the markers, in PSM or SPM order.

    rng: a numpy Generator; it gives the order and the two cuts, each pair of places equally likely.
    """
    psm = rng.random() < 0.5
    first, second = sorted(rng.integers(0, len(text) + 1, 2).tolist())
    prefix, middle, suffix = (
        [tokenizer.special[f"<|code_{name}|>"], *tokenizer.encode(part)]
        for name, part in (
            ("prefix", text[:first]),
            ("middle", text[first:second]),
            ("suffix", text[second:]),
        )
    )
    return (prefix + suffix if psm else suffix + prefix) + middle


def unfim(ids, tokenizer):
    """The text that was rewritten to `ids`; ids without markers are simply decoded.

    Raises ValueError where a part is missing or stands twice.
    """
    names = {tokenizer.special[f"<|code_{name}|>"]: name for name in ("prefix", "middle", "suffix")}
    marks = [at for at, token in enumerate(ids) if token in names]
    if not marks:
        return tokenizer.decode(ids)
    parts = {
        names[ids[at]]: ids[at + 1 : end]
        for at, end in zip(marks, [*marks[1:], len(ids)], strict=True)
    }
    if len(marks) != 3 or len(parts) != 3 or marks[0] != 0:
        raise ValueError(
            f"not a fill-in-the-middle sequence: markers {[names[ids[at]] for at in marks]} at {marks}"
        )
    # Parts are decoded together: bytes of one character cannot lie on both sides of a cut, so nothing changes.
    return tokenizer.decode([*parts["prefix"], *parts["middle"], *parts["suffix"]])


def spans(text, characters):
    """Cut a text at line ends into spans of at most `characters`; a longer line is a span of its own.

    characters = 0: the whole text is one span. Joined, the spans are the text.
    """
    if not characters:
        return [text]
    found = [""]
    for line in text.splitlines(keepends=True):
        if found[-1] and len(found[-1]) + len(line) > characters:
            found.append("")
        found[-1] += line
    return found


def rewrite(text, tokenizer, rng, rate, characters):
    """A text as sequences of ids, in order: each span is rewritten with probability `rate`, the rest stays joined."""
    sequences, plain = [], ""
    for span in spans(text, characters):
        if rng.random() >= rate:
            plain += span
            continue
        if plain:
            sequences.append(tokenizer.encode(plain))
        sequences.append(fim(span, tokenizer, rng))
        plain = ""
    return [*sequences, tokenizer.encode(plain)] if plain else sequences
