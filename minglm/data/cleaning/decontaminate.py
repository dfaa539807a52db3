"""Remove evaluation problems from the training text, so that a score is not memory (paper 4 scores what 2.2 trains).

    a document is contaminated  <=>  it contains at least half of the runs of n = 13 words of some evaluation item

An item is the text of one problem, or one held-out document. An item of fewer than n words is one run.

Choices, and why:
- Half of an item, and not any run of it: two programs with the same licence, or two pages with one common sentence,
  are not copies; a question inside a long page is there as a whole, and so is found. The whole document is removed.
- A run that occurs in more than `MAX_ITEMS_PER_RUN` items of one set is the wording of the set ("Solve for x, where
  ...") and not evidence. GPT-3 likewise ignored runs found in more than ten documents.
- Items of fewer than `MIN_WORDS` words ("Malaysia is in") are counted but not searched: they occur in innocent text.
- Matching compares 64-bit hashes of folded words (`shingles`): case, spaces and punctuation do not hide a copy.

Simplified: a paraphrase or a translation of a problem is not found.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minglm.data.cleaning.shingles import hash_words_by_text, hash_words_in_batches, ngrams

NGRAM_WORDS = 13
MIN_WORDS = 8
"""Items of fewer words are not searched."""

MAX_ITEMS_PER_RUN = 10
"""A run of words in more items of a set is the set's wording."""

MIN_SHARE = 0.5
"""Share of an item's runs that makes a copy."""

PREFIX_BITS = 22
"""Bits of a hash that the bitmap of `Index` is indexed by."""


class Index:
    """The runs of words of all evaluation items, as a sorted array of hashes.

    Attributes:
        searched: {set: items that are searched}.
        not_searched: {set: items that are not, because they are too short or only wording}.
    """

    def __init__(self, sets: Mapping[str, Sequence[str]], n: int = NGRAM_WORDS):
        """Index the items of every set, {name: texts}, by runs of n words.

        Raises ValueError for n < MIN_WORDS.
        """
        if n < MIN_WORDS:
            raise ValueError(
                f"data.decontaminate = {n}: runs of fewer than {MIN_WORDS} words occur in innocent text too"
            )
        self.searched: dict[str, int] = {}
        self.not_searched: dict[str, int] = {}
        self._set_of_item: list[str] = []
        self._run_lengths: set[int] = set()
        items: list[list[int]] = []  # the hashes of each item's runs
        for name, texts in sets.items():
            # Two items with the same words count once.
            different = {hashes.tobytes(): hashes for hashes in hash_words_by_text(texts)}.values()
            runs = [self._runs(hashes, n) for hashes in different]
            items_with_run = Counter(run for item in runs for run in item)
            specific = [
                [run for run in item if items_with_run[run] <= MAX_ITEMS_PER_RUN] for item in runs
            ]
            specific = [item for item in specific if item]
            self.searched[name] = len(specific)
            self.not_searched[name] = len(runs) - len(specific)
            items += specific
            self._set_of_item += [name] * len(specific)

        # One row for each run of each item, sorted by hash.
        self._runs_in_item = np.array([len(item) for item in items], np.int64)
        hashes = np.array([run for item in items for run in item], np.uint64)
        item_of_run = np.repeat(np.arange(len(items)), self._runs_in_item)
        order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[order]
        self._item_of_run = item_of_run[order]
        self._set_bitmap()

    def _set_bitmap(self) -> None:
        # A bitmap of hash prefixes: most lookups miss, and a miss costs one read instead of a binary search.
        self._bitmap = np.zeros(2**PREFIX_BITS, bool)
        self._bitmap[self._prefix(self._hashes)] = True

    @staticmethod
    def _prefix(hashes: np.ndarray) -> np.ndarray:
        return hashes >> np.uint64(64 - PREFIX_BITS)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the bitmap: four megabytes that follow from the hashes."""
        return {name: value for name, value in vars(self).items() if name != "_bitmap"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled index and build its bitmap again."""
        vars(self).update(state)
        self._set_bitmap()

    def _runs(self, word_hashes: np.ndarray, n: int) -> list[int]:
        """Return the different runs of one item, and note how many words they have."""
        length = min(n, len(word_hashes))
        if length < MIN_WORDS:
            return []
        self._run_lengths.add(length)
        one_text = np.zeros(len(word_hashes), np.int64)
        (runs,) = ngrams(word_hashes, one_text, {length})
        return np.unique(runs.hashes).tolist()

    def search(self, texts: Sequence[str]) -> dict[int, str]:
        """Return {index of a contaminated text: the set that it has an item of}, the first such set in order."""
        contaminated: dict[int, str] = {}
        for words in hash_words_in_batches(texts):
            matches = [
                self._matches(runs.hashes, runs.text)
                for runs in ngrams(words.hashes, words.text, self._run_lengths)
            ]
            if not matches:
                continue
            # A run that occurs twice in a text counts once.
            different = np.unique(np.concatenate(matches), axis=0)
            # Count the different runs that each text shares with each item.
            text_and_item, shared = np.unique(different[:, :2], axis=0, return_counts=True)
            is_copy = shared >= MIN_SHARE * self._runs_in_item[text_and_item[:, 1]]
            for text, item in text_and_item[is_copy].tolist():
                contaminated.setdefault(text, self._set_of_item[item])
        return contaminated

    def _matches(self, hashes: np.ndarray, text: np.ndarray) -> np.ndarray:
        """Return rows of (text, item, row of the index): one for each run of a text and each item with this run."""
        likely = self._bitmap[self._prefix(hashes)]
        hashes = hashes[likely]
        text = text[likely]
        # Rows start[k] to stop[k] of the index have the hash of run k.
        start = np.searchsorted(self._hashes, hashes, "left")
        stop = np.searchsorted(self._hashes, hashes, "right")
        count = stop - start
        # Write these ranges one after the other: repeat each start, and add 0, 1, 2, ... inside its range.
        range_begin = np.cumsum(count) - count
        inside = np.arange(count.sum()) - np.repeat(range_begin, count)
        row = np.repeat(start, count) + inside
        return np.stack([np.repeat(text, count), self._item_of_run[row], row], axis=1)
