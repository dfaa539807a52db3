"""Hash every word and every run of n words of a text, so that texts can be compared (paper 2.2).

    word   = letters and digits side by side, folded to lower case and compatibility form (NFKC);
             every character of a script without spaces, and every + - * / = < > % ^ |, is one word
    hash   = sum over characters of mix(character) * B^place,   n-gram = sum over words of hash * C^place,   mod 2^64

Decontamination, deduplication and the learned quality score all count these. The hashes are the same in every process.

Choices, and why:
- numpy works on a megabyte of characters at a time: a loop over words in Python takes several times as long.
- Operators are words, other punctuation is ignored: "2+3" and "2-3" are different questions, "so," and "so" are not.
- 64 bits: among a billion different n-grams, two have the same hash with a probability of 3 %.
"""

import functools
import hashlib
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import numpy as np

BATCH_CHARACTERS = 2**20
"""Characters hashed at a time."""

CODE_POINTS = 0x40000
"""Unicode code points that can be part of a word; those above are tags and private use."""

OPERATORS = "+-*/=<>%^|"
SCRIPTS_WITHOUT_SPACES = (
    (0x2E80, 0x2FDF),
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
"""First and last code points: Chinese characters, kana."""

WORD_BASE = np.uint64(0x9E3779B97F4A7C15)  # B of the header
NGRAM_BASE = np.uint64(0xC2B2AE3D27D4EB4F)  # C of the header

BETWEEN_WORDS, PART_OF_WORD, WHOLE_WORD = 0, 1, 2


class Hashes(NamedTuple):
    """Hashes of words or of n-grams, in the order of the texts."""

    hashes: np.ndarray
    """uint64"""
    text: np.ndarray
    """int64: the index of the text that each one is from"""


def mix(values: np.ndarray) -> np.ndarray:
    """Spread 64-bit integers over all 64-bit integers, one to one (the finalizer of splitmix64)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


@functools.cache
def _character_tables() -> tuple[np.ndarray, np.ndarray]:
    """Return, for every code point, its class (BETWEEN_WORDS, PART_OF_WORD or WHOLE_WORD) and its hash."""
    is_word = (chr(code).isalnum() for code in range(CODE_POINTS))
    character_class = np.fromiter(is_word, np.uint8, CODE_POINTS)
    for first, last in SCRIPTS_WITHOUT_SPACES:
        character_class[first : last + 1] *= WHOLE_WORD
    character_class[[ord(sign) for sign in OPERATORS]] = WHOLE_WORD
    character_hash = mix(np.arange(1, CODE_POINTS + 1, dtype=np.uint64) * WORD_BASE)
    return character_class, character_hash


def _hash_words(texts: list[str]) -> Hashes:
    """Return the hash of every word of a few texts."""
    class_of, hash_of = _character_tables()
    texts = [unicodedata.normalize("NFKC", text).lower() for text in texts]
    # A zero byte between two texts ends the last word of the first.
    joined = "\0".join(texts).encode("utf-32-le", "replace")
    codes = np.frombuffer(joined, np.uint32)
    codes = np.where(codes < CODE_POINTS, codes, 0)
    classes = class_of[codes]

    # A word begins at a whole word, and at a part of a word that does not follow another part.
    is_part = classes == PART_OF_WORD
    begins = classes == WHOLE_WORD
    begins[0:1] |= is_part[0:1]
    begins[1:] |= is_part[1:] & ~is_part[:-1]

    inside = np.flatnonzero(classes)  # positions of the characters that belong to words
    starts = np.flatnonzero(begins[inside])  # positions in `inside` where words begin
    if not len(starts):
        return Hashes(np.zeros(0, np.uint64), np.zeros(0, np.int64))
    lengths = np.diff(starts, append=len(inside))
    place = np.arange(len(inside)) - np.repeat(starts, lengths)  # of a character in its word
    with np.errstate(over="ignore"):
        power = np.cumprod(np.full(place.max() + 1, WORD_BASE, np.uint64))
        hashes = np.add.reduceat(hash_of[codes[inside]] * power[place], starts)
    text_ends = np.cumsum([len(text) + 1 for text in texts])
    text = np.searchsorted(text_ends, inside[starts], "right")
    return Hashes(mix(hashes), text)


def hash_words_in_batches(texts: Iterable[str]) -> Iterator[Hashes]:
    """Yield the hashes of the words of texts, about BATCH_CHARACTERS characters at a time, in order."""
    texts = list(texts)
    start = 0
    while start < len(texts):
        # A batch has at least one text, however long it is.
        stop = start + 1
        room = BATCH_CHARACTERS - len(texts[start])
        while stop < len(texts) and room > 0:
            room -= len(texts[stop])
            stop += 1
        hashes, text = _hash_words(texts[start:stop])
        yield Hashes(hashes, text + start)
        start = stop


def ngrams(word_hashes: np.ndarray, text: np.ndarray, lengths: Collection[int]) -> Iterator[Hashes]:
    """Yield the runs of n words inside one text, for each n of `lengths` in increasing order.

    Args:
        word_hashes: hashes of all words, in order.
        text: the index of the text that each word is from.
    """
    hashes = np.zeros(len(word_hashes) + 1, np.uint64)
    longest = min(max(lengths, default=0), len(word_hashes))
    for n in range(1, longest + 1):
        # The run of n words at position i is the run of n - 1 words at i, and the word at i + n - 1.
        with np.errstate(over="ignore"):
            hashes = hashes[:-1] * NGRAM_BASE + word_hashes[n - 1 :]
        if n in lengths:
            first_text = text[: len(hashes)]
            last_text = text[n - 1 :]
            inside_one_text = first_text == last_text
            yield Hashes(mix(hashes[inside_one_text]), first_text[inside_one_text])


def hash_words_by_text(texts: Iterable[str]) -> list[np.ndarray]:
    """Return, for each text, the hashes of its words in order."""
    texts = list(texts)
    if not texts:
        return []
    batches = list(hash_words_in_batches(texts))
    hashes = np.concatenate([batch.hashes for batch in batches])
    text = np.concatenate([batch.text for batch in batches])
    return np.split(hashes, np.searchsorted(text, np.arange(1, len(texts))))


def shingles(texts: Iterable[str], n: int) -> list[np.ndarray]:
    """Return, for each text, the sorted different hashes of its runs of n words.

    A text of fewer than n words has one shingle, all of its words. A text without any word has one shingle
    made of its characters, so that no set is empty. n: at least 1.
    """
    texts = list(texts)
    result = []
    for text, hashes in zip(texts, hash_words_by_text(texts), strict=True):
        if not len(hashes):
            digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
            hashes = np.frombuffer(digest[:8], np.uint64)
        length = min(n, len(hashes))
        one_text = np.zeros(len(hashes), np.int64)
        (runs,) = ngrams(hashes, one_text, {length})
        result.append(np.unique(runs.hashes))
    return result
