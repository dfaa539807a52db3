"""Near duplicates by MinHash and locality-sensitive hashing: of pages that say almost the same, the best one stays.

    J(a, b) = |a and b| / |a or b|          a, b: the sets of runs of n = 5 words of two documents
    signature_k(a) = min over shingles of h_k(shingle),       P(signature_k(a) = signature_k(b)) = J(a, b)
    candidates: all `rows` values of one of `bands` bands are equal,       P = 1 - (1 - J^rows)^bands

The share of equal values estimates J with a standard deviation of at most 0.5 / sqrt(128) = 0.044. The bands find the
few pairs worth an estimate; `banding` takes the longest that still find a pair at the threshold with 95 %.

Choices, and why:
- A document goes when a better one that *stays* is as similar as the threshold. So what is dropped always has a twin in
  the corpus, and a chain of small changes does not pull its two ends together, as the usual union of pairs does.
- Better is (quality, then a hash of the text): what stays does not depend on the order of the documents.
- Only documents that share a band with another are looked at one by one, and of each band of such documents only those
  that stay are compared, so ten thousand copies of a page cost ten thousand comparisons and not fifty million.

Paper: section 2.2 names MinHash as what its SemDedup goes beyond; the numbers are the field's usual ones. Simplified:
signatures are an array of 512 bytes a document, in memory or memory-mapped; everything is one process.
"""

import hashlib

import numpy as np

from minglm.data.cleaning.shingles import mix, shingles

PERMUTATIONS = 128
WORDS = 5
"""Words of a shingle."""

RECALL = 0.95
"""Chance, at least, that a pair of exactly the threshold's similarity is found."""


def minhash(sets, permutations=PERMUTATIONS):
    """Signatures of sets of 64-bit hashes, none of them empty: uint32 array (sets, permutations).

    h_k(x) = the upper half of (a_k x + b_k) mod 2^64 with a_k odd; a_k, b_k are the same in every process.
    """
    sets = list(sets)
    result = np.zeros((len(sets), permutations), np.uint32)
    if not sets:
        return result
    values, starts = np.concatenate(sets), np.cumsum([0, *map(len, sets[:-1])])
    factors = mix(np.arange(1, 2 * permutations + 1, dtype=np.uint64))
    with np.errstate(over="ignore"):
        for k in range(permutations):
            hashes = (values * (factors[2 * k] | np.uint64(1)) + factors[2 * k + 1]) >> np.uint64(
                32
            )
            result[:, k] = np.minimum.reduceat(hashes, starts)
    return result


def signatures(texts):
    """MinHash signatures of texts: uint32 array (texts, PERMUTATIONS)."""
    return minhash(shingles(texts, WORDS))


def found(similarity, bands, rows):
    """Chance that a pair of this Jaccard similarity shares a band."""
    return 1 - (1 - similarity**rows) ** bands


def banding(threshold, permutations=PERMUTATIONS):
    """(bands, rows): the longest bands that find a pair at the threshold with a chance of RECALL or more.

    Raises ValueError for a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(
            f"near duplicates from a similarity of {threshold}: must be above 0 and at most 1"
        )
    for rows in range(permutations, 1, -1):
        if found(threshold, permutations // rows, rows) >= RECALL:
            return permutations // rows, rows
    return permutations, 1


def best_first(documents):
    """Indices of documents in an order that depends on what they are and not on where they stand: best ones first."""
    keys = [
        (-d.quality, hashlib.sha256(d.text.encode("utf-8", "replace")).digest(), d.name)
        for d in documents
    ]
    return sorted(range(len(keys)), key=keys.__getitem__)


def choose(signature, threshold, order, group=None):
    """Which documents stay: a boolean array.

    signature: (documents, permutations). order: all indices, best first. group: integers; only documents of one group
    are compared (None: all). Every document that goes has an estimated similarity of `threshold` or more with an
    earlier one of its group that stays, and no two that share a band and stay have one.
    """
    bands, rows = banding(threshold, signature.shape[1])
    group = np.zeros(len(signature), np.uint64) if group is None else np.asarray(group, np.uint64)
    keys, shared = np.zeros((bands, len(signature)), np.uint64), np.zeros(len(signature), bool)
    for band in range(bands):
        key = mix(group + np.uint64(1))
        for column in range(band * rows, (band + 1) * rows):
            key = mix(key ^ signature[:, column])
        _, inverse, counts = np.unique(key, return_inverse=True, return_counts=True)
        keys[band], shared = key, shared | (counts[inverse] > 1)
    stays, buckets = np.ones(len(signature), bool), {}
    for index in order:
        if not shared[index]:
            continue
        mine = [(band, int(keys[band, index])) for band in range(bands)]
        others = sorted(
            {
                other
                for key in mine
                for other in buckets.get(key, ())
                if group[other] == group[index]
            }
        )
        if others and (signature[others] == signature[index]).mean(1).max() >= threshold:
            stays[index] = False
        else:
            for key in mine:
                buckets.setdefault(key, []).append(index)
    return stays


def near_duplicates(documents, threshold):
    """The documents without near duplicates, in the given order. documents: with `text`, `quality` and `name`."""
    stays = choose(signatures([d.text for d in documents]), threshold, best_first(documents))
    return [document for document, stay in zip(documents, stays, strict=True) if stay]
