"""Text as numbers to be compared: a hash for every word and for every run of n words (paper 2.2).

    word   = letters and digits side by side, folded to lower case and compatibility form (NFKC);
             every character of a script without spaces, and every + - * / = < > % ^ |, is a word of its own
    hash   = sum over characters of mix(character) * B^place,   gram = sum over words of hash * C^place,   mod 2^64

Decontamination, deduplication and the learned quality score all count these. The hashes are the same in every process.

Choices, and why:
- numpy over the characters of a megabyte at a time: a loop over words in Python takes several times as long.
- Operators are words, other punctuation is nothing: "2+3" and "2-3" are different questions, "so," and "so" are not.
- 64 bits: among a billion different grams, two share a hash with a probability of 3 %.
"""

import functools
import hashlib
import unicodedata

import numpy as np

CHUNK = 2**20
"""Characters hashed at a time."""

CODES = 0x40000
"""Unicode code points looked at; those above are tags and private use."""

OPERATORS = "+-*/=<>%^|"
ALONE = (
    (0x2E80, 0x2FDF),
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
"""Scripts written without spaces: Chinese characters, kana."""

WORD, GRAM = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


def mix(values):
    """Spread 64-bit numbers over all 64-bit numbers, one to one (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


@functools.cache
def _tables():
    """For every code point: 0 between words, 1 part of a word, 2 a word alone; and its hash."""
    kind = np.fromiter((chr(code).isalnum() for code in range(CODES)), np.uint8, CODES)
    for first, last in ALONE:
        kind[first : last + 1] *= 2
    kind[[ord(sign) for sign in OPERATORS]] = 2
    return kind, mix(np.arange(1, CODES + 1, dtype=np.uint64) * WORD)


def _chunk(texts):
    """(hash of every word, index of its text) of a few texts."""
    kinds, hashes = _tables()
    texts = [unicodedata.normalize("NFKC", text).lower() for text in texts]
    codes = np.frombuffer("\0".join(texts).encode("utf-32-le", "replace"), np.uint32)
    codes = np.where(codes < CODES, codes, 0)
    kind = kinds[codes]
    begins = kind == 2
    begins[0:1] |= kind[0:1] == 1
    begins[1:] |= (kind[1:] == 1) & (kind[:-1] != 1)
    inside = np.flatnonzero(kind)
    starts = np.flatnonzero(
        begins[inside]
    )  # every word begins at one of the characters inside words
    if not len(starts):
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    place = np.arange(len(inside)) - np.repeat(starts, np.diff(starts, append=len(inside)))
    with np.errstate(over="ignore"):
        power = np.cumprod(np.full(place.max() + 1, WORD, np.uint64))
        found = np.add.reduceat(hashes[codes[inside]] * power[place], starts)
    ends = np.cumsum([len(text) + 1 for text in texts])
    return mix(found), np.searchsorted(ends, inside[starts], "right")


def words(texts):
    """The words of texts, about a megabyte at a time: yields (hash of each word, index of its text), in order."""
    at, texts = 0, list(texts)
    while at < len(texts):
        stop, room = at + 1, CHUNK - len(texts[at])
        while stop < len(texts) and room > 0:
            room -= len(texts[stop])
            stop += 1
        found, owner = _chunk(texts[at:stop])
        yield found, owner + at
        at = stop


def grams(found, owner, lengths):
    """Runs of n words inside one text, for each n of `lengths`: yields (n, hash of each run, index of its text)."""
    value = np.zeros(len(found) + 1, np.uint64)
    for n in range(1, min(max(lengths, default=0), len(found)) + 1):
        with np.errstate(over="ignore"):
            value = value[:-1] * GRAM + found[n - 1 :]
        if n in lengths:
            whole = owner[: len(value)] == owner[n - 1 :]
            yield n, mix(value[whole]), owner[: len(value)][whole]


def by_text(texts):
    """Per text, the hashes of its words, in order."""
    texts = list(texts)
    pieces = list(words(texts))
    found = np.concatenate([piece[0] for piece in pieces] or [np.zeros(0, np.uint64)])
    owner = np.concatenate([piece[1] for piece in pieces] or [np.zeros(0, np.int64)])
    return np.split(found, np.searchsorted(owner, np.arange(1, len(texts)))) if texts else []


def shingles(texts, n):
    """Per text, the sorted different hashes of its runs of n words; of all its words as one run where it has fewer.

    A text without any word has one shingle, made of its characters, so that no text is without. n: at least 1.
    """
    texts, result = list(texts), []
    for text, found in zip(texts, by_text(texts), strict=True):
        if not len(found):
            found = np.frombuffer(
                hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], np.uint64
            )
        length = min(n, len(found))
        result += [
            np.unique(value)
            for _, value, _ in grams(found, np.zeros(len(found), np.int64), {length})
        ]
    return result
