"""Taking evaluation problems out of the training text: a score must not be a memory (paper 4 scores what 2.2 trains).

    a document is contaminated  <=>  it holds at least half of the runs of n = 13 words of some evaluation item

An item is the text of one problem, or one held-out document. One of fewer than n words is looked for whole.

Choices, and why:
- Half of an item, and not any run of it: two programs that share a licence, or two pages of facts with a sentence in
  common, are no copies; a question inside a long page is whole, and so found. Removed is the whole document.
- A run that stands in more than `COMMON` items of one set is the wording of the set ("Solve for x, where ...") and no
  evidence, as GPT-3 ignored runs that were found in more than ten documents.
- Items of fewer than `SHORTEST` words ("Malaysia is in") are counted, not looked for: they stand in innocent text too.
- Matching is by 64-bit hashes of folded words (`shingles`): case, spaces and punctuation do not hide a copy.

Simplified: a paraphrase or a translation of a problem passes, here as in the paper's time everywhere.
"""

from collections import Counter

import numpy as np

from minglm.data.cleaning.shingles import by_text, grams, words

NGRAM = 13
SHORTEST = 8
"""Words below which an item is not looked for."""

COMMON = 10
"""Items of a set above which a run of words is the set's wording."""

SHARE = 0.5
"""Share of an item's runs that make a copy."""


class Index:
    """The runs of words of all evaluation items.

    sets: {name: texts}. n: words of a run. Attributes: `sets` {name: items that are looked for} and `passed` {name:
    items that are not, being too short or nothing but wording}. Raises ValueError for n < SHORTEST.
    """

    def __init__(self, sets, n=NGRAM):
        if n < SHORTEST:
            raise ValueError(
                f"data.decontaminate = {n}: runs of fewer than {SHORTEST} words stand in innocent text too"
            )
        self.sets, self.passed, self._names, runs = {}, {}, [], []
        self.lengths = set()
        for name, texts in sets.items():
            items = {hashes.tobytes(): hashes for hashes in by_text(texts)}.values()
            found = [self._runs(hashes, n) for hashes in items]
            common = Counter(run for values in found for run in values)
            kept = [[run for run in values if common[run] <= COMMON] for values in found]
            kept = [values for values in kept if values]
            self.sets[name], self.passed[name] = len(kept), len(found) - len(kept)
            runs += kept
            self._names += [name] * len(kept)
        self._size = np.array([len(values) for values in runs], np.int64)
        value = np.array([run for values in runs for run in values], np.uint64)
        order = np.argsort(value, kind="stable")
        self._value, self._item = value[order], np.repeat(np.arange(len(runs)), self._size)[order]
        self._open_doors()

    def _open_doors(self):
        self._seen = np.zeros(
            2**22, bool
        )  # four million doors, most of them shut: a miss costs one look
        self._seen[self._value >> np.uint64(42)] = True

    def __getstate__(self):
        """Without the doors: four megabytes that follow from the rest."""
        return {name: value for name, value in vars(self).items() if name != "_seen"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._open_doors()

    def _runs(self, hashes, n):
        """The different runs of one item, and note their length."""
        length = min(n, len(hashes))
        if length < SHORTEST:
            return []
        self.lengths.add(length)
        (found,) = grams(hashes, np.zeros(len(hashes), np.int64), {length})
        return np.unique(found[1]).tolist()

    def search(self, texts):
        """{index of a contaminated text: name of the set it has an item of}; the first such set, by order of `sets`."""
        found = {}
        for hashes, owner in words(texts):
            pairs = [self._hits(value, of) for _, value, of in grams(hashes, owner, self.lengths)]
            hits = np.unique(np.concatenate(pairs), axis=0) if pairs else np.zeros((0, 3), np.int64)
            both, count = np.unique(hits[:, :2], axis=0, return_counts=True)
            for text, item in both[count >= SHARE * self._size[both[:, 1]]].tolist():
                found.setdefault(text, self._names[item])
        return found

    def _hits(self, value, owner):
        """Rows of (text, item, place of the run in the index), one for each run of a text in an item."""
        likely = self._seen[value >> np.uint64(42)]
        value, owner = value[likely], owner[likely]
        left, right = (
            np.searchsorted(self._value, value),
            np.searchsorted(self._value, value, "right"),
        )
        times = right - left
        place = (
            np.repeat(left, times)
            + np.arange(times.sum())
            - np.repeat(np.cumsum(times) - times, times)
        )
        return np.stack([np.repeat(owner, times), self._item[place], place], 1)


def decontaminate(documents, sets, n=NGRAM):
    """(the training documents without those contaminated, what was done, for the log).

    documents: with `text`. sets: {name: texts} of evaluation items. What was done: n; items, too short and removed
    documents of each set. Raises ValueError for n < SHORTEST.
    """
    index = Index(sets, n)
    found = index.search([document.text for document in documents])
    done = {
        "n": n,
        "items": index.sets,
        "not_searched": index.passed,
        "removed": dict(Counter(found.values())),
    }
    return [document for place, document in enumerate(documents) if place not in found], done
