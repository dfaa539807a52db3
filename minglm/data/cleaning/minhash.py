"""Remove near duplicates with MinHash and locality-sensitive hashing, and keep the best of each (paper 2.2).

    J(a, b) = |a and b| / |a or b|          a, b: the sets of runs of n = 5 words of two documents
    signature_k(a) = min over shingles of h_k(shingle),       P(signature_k(a) = signature_k(b)) = J(a, b)
    candidates: all `rows` values of one of `bands` bands are equal,       P = 1 - (1 - J^rows)^bands

The share of equal values estimates J with a standard deviation of at most 0.5 / sqrt(128) = 0.044. The bands
find the few pairs worth an estimate; `banding` takes the longest bands that still find a pair at the
threshold with 95 %.

Choices, and why:
- A document is dropped if a better one that *stays* is as similar as the threshold. So whatever is dropped has a twin in
  the corpus, and a chain of small changes does not connect its two ends, as the usual union of pairs does.
- Documents are compared best first, and ties are broken by a hash of the text: what stays does not depend on the order
  of the documents.
- Only documents that share a band with another are looked at one by one, and of each band of such documents only those
  that stay are compared, so ten thousand copies of a page cost ten thousand comparisons and not fifty million.

The paper names MinHash as the method that its SemDedup goes beyond; the numbers are the field's usual ones.
Simplified: signatures are an array of 512 bytes a document, in memory or memory-mapped; one process compares
them.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from minglm.data.cleaning.shingles import mix, shingles

PERMUTATIONS = 128
SHINGLE_WORDS = 5

MIN_RECALL = 0.95
"""Minimum probability that a pair of exactly the threshold's similarity is found."""


def minhash(sets: Iterable[np.ndarray], permutations: int = PERMUTATIONS) -> np.ndarray:
    """Return the signatures of sets of 64-bit hashes, none of them empty: uint32 (sets, permutations).

    h_k(x) = the upper half of (a_k x + b_k) mod 2^64 with a_k odd; a_k, b_k are the same in every process.
    """
    sets = list(sets)
    signature = np.zeros((len(sets), permutations), np.uint32)
    if not sets:
        return signature
    values = np.concatenate(sets)
    starts = np.cumsum([0, *(len(members) for members in sets[:-1])])
    constants = mix(np.arange(1, 2 * permutations + 1, dtype=np.uint64))
    with np.errstate(over="ignore"):
        for k in range(permutations):
            a_k = constants[2 * k] | np.uint64(1)
            b_k = constants[2 * k + 1]
            hashes = (values * a_k + b_k) >> np.uint64(32)
            signature[:, k] = np.minimum.reduceat(hashes, starts)
    return signature


def signatures(texts: Iterable[str]) -> np.ndarray:
    """Return the MinHash signatures of texts: uint32 (texts, PERMUTATIONS)."""
    return minhash(shingles(texts, SHINGLE_WORDS))


def recall(similarity: float, bands: int, rows: int) -> float:
    """Return the probability that a pair of this Jaccard similarity shares a band."""
    return 1 - (1 - similarity**rows) ** bands


class Banding(NamedTuple):
    """How a signature is cut into bands."""

    bands: int
    rows: int
    """Values of a band."""


def banding(threshold: float, permutations: int = PERMUTATIONS) -> Banding:
    """Return the longest bands that find a pair at the threshold with a probability of MIN_RECALL or more.

    Raises ValueError for a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(
            f"near duplicates from a similarity of {threshold}: must be above 0 and at most 1"
        )
    for rows in range(permutations, 1, -1):
        bands = permutations // rows
        if recall(threshold, bands, rows) >= MIN_RECALL:
            return Banding(bands, rows)
    return Banding(permutations, 1)


def keep_best(
    signature: np.ndarray,
    threshold: float,
    order: Sequence[int],
    group: np.ndarray | None = None,
) -> np.ndarray:
    """Return which documents stay, as a boolean array (documents,).

    A document is dropped if its estimated similarity to an earlier one of its group that stays is `threshold`
    or more. No two documents that stay and share a band are as similar.

    Args:
        signature: uint32 (documents, permutations).
        order: all indices, best first.
        group: integers; only documents of the same group are compared (None: all).
    """
    count, permutations = signature.shape
    bands, rows = banding(threshold, permutations)
    group = np.zeros(count, np.uint64) if group is None else np.asarray(group, np.uint64)

    # One key for each band of each document, and which documents share a key with another one.
    keys = np.zeros((bands, count), np.uint64)
    is_candidate = np.zeros(count, bool)
    for band in range(bands):
        key = mix(group + np.uint64(1))
        for column in range(band * rows, (band + 1) * rows):
            key = mix(key ^ signature[:, column])
        _, inverse, counts = np.unique(key, return_inverse=True, return_counts=True)
        keys[band] = key
        is_candidate |= counts[inverse] > 1

    stays = np.ones(count, bool)
    buckets: dict[tuple[int, int], list[int]] = {}  # {(band, key): documents that stay}
    for index in order:
        if not is_candidate[index]:
            continue
        own_keys = [(band, int(keys[band, index])) for band in range(bands)]
        others = {
            other
            for key in own_keys
            for other in buckets.get(key, ())
            if group[other] == group[index]
        }
        if others:
            similarity = (signature[sorted(others)] == signature[index]).mean(axis=1)
            if similarity.max() >= threshold:
                stays[index] = False
                continue
        for key in own_keys:
            buckets.setdefault(key, []).append(index)
    return stays
