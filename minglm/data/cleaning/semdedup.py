"""Remove pages written from a template, which MinHash takes for different (paper 2.2; SemDedup, arXiv 2303.09540).

    embed every document as a unit vector;  k-means on the sphere;  inside a cluster, drop a document if a better one
    that stays has a cosine of `threshold` or more with it

A page made from a form, with new names in every sentence, shares few runs of five words with the other pages
of the form (Jaccard about 0.3), but most of its words: the cosine of their counts is above 0.9. Clusters
reduce the n^2 comparisons to n^2 / clusters.

Choices, and why:
- The embedding is any unit vectors. `embed` counts hashed words, 1 + log of each count, and projects them on random
  signs, which preserves cosines within about 1 / sqrt(width); the hidden states of a model would do as well.
- No inverse document frequency: the words of a template are frequent, and are what has to count.
- As in `minhash`, the better document stays and what stays does not depend on the order of the documents: k-means starts
  from documents spread over the order best first, and sees them in it.

Simplified: SemDedup itself keeps the document farthest from the centroid. Pairs on either side of a cluster's
border are missed.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from minglm.data.cleaning.shingles import hash_words_by_text, mix

WIDTH = 256
ROUNDS = 10
DOCUMENTS_PER_CLUSTER = 256
"""On average."""

BLOCK = 8192
"""Documents that are compared with all centres at once."""

ROUNDING = 1e-6
"""Error of a cosine of 1 in float32."""


def embed(texts: Iterable[str], width: int = WIDTH) -> np.ndarray:
    """Return unit vectors of texts, float32 (texts, width); zero for a text without words."""
    words_by_text = hash_words_by_text(texts)
    vectors = np.zeros((len(words_by_text), width), np.float32)
    for row, hashes in enumerate(words_by_text):
        word, count = np.unique(hashes, return_counts=True)
        weight = (1 + np.log(count)).astype(np.float32)
        # One 64-bit hash of a word gives 64 random signs, as the bits 0 and 1.
        bits = [mix(word + np.uint64(first + 1)) for first in range(0, width, 64)]
        as_bytes = np.stack(bits, axis=1).view(np.uint8)
        bits_of_word = np.unpackbits(as_bytes, axis=1, bitorder="little", count=width)
        # sum over words of weight * sign, with sign = 2 bit - 1
        vectors[row] = 2 * (weight @ bits_of_word) - weight.sum()
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norm, 1e-9)


def kmeans(vectors: torch.Tensor, clusters: int, rounds: int = ROUNDS) -> torch.Tensor:
    """Return the cluster of each unit vector, by k-means with cosine: int64 (documents,).

    vectors: float32 (documents, width). It starts from every (documents / clusters)-th vector. A cluster that
    loses all its members keeps its centre.
    """
    count = len(vectors)
    centres = vectors[torch.arange(clusters) * count // clusters].clone()
    for _ in range(rounds):
        nearest = _nearest(vectors, centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        has_members = sums.norm(dim=1, keepdim=True) > 0
        centres = torch.where(has_members, F.normalize(sums), centres)
    return _nearest(vectors, centres)


def _nearest(vectors: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Return the index of the centre with the largest cosine, int64 (documents,)."""
    blocks = vectors.split(BLOCK)
    return torch.cat([(block @ centres.T).argmax(1) for block in blocks])


def keep_best(
    vectors: np.ndarray,
    threshold: float,
    order: Sequence[int],
    group: np.ndarray | None = None,
) -> np.ndarray:
    """Return which documents stay, as a boolean array (documents,).

    Args:
        vectors: unit vectors (documents, width).
        threshold: cosine from which the worse of two documents is dropped. ValueError outside (0, 1].
        order: all indices, best first.
        group: integers; only documents of the same group are compared (None: all).
    """
    if not 0 < threshold <= 1:
        raise ValueError(
            f"semantic duplicates from a cosine of {threshold}: must be above 0 and at most 1"
        )
    stays = np.ones(len(vectors), bool)
    best_first = np.asarray(order, np.int64)
    group = np.zeros(len(vectors), np.int64) if group is None else np.asarray(group)
    for label in np.unique(group):
        members = best_first[group[best_first] == label]
        of_group = torch.from_numpy(np.asarray(vectors[members], np.float32))
        clusters = -(-len(members) // DOCUMENTS_PER_CLUSTER)
        cluster_of = kmeans(of_group, clusters)
        for cluster in cluster_of.unique():
            (in_cluster,) = torch.where(cluster_of == cluster)  # in order, best first
            dropped = _to_drop(of_group, in_cluster, threshold - ROUNDING)
            stays[members[dropped]] = False
    return stays


def _to_drop(vectors: torch.Tensor, members: torch.Tensor, threshold: float) -> np.ndarray:
    """Return the members to drop: those within the threshold of a better member that is kept."""
    dropped = [torch.zeros(0, dtype=torch.int64)]
    while len(members) > 1:
        best = members[0]
        members = members[1:]
        similar = vectors[members] @ vectors[best] >= threshold
        dropped.append(members[similar])
        members = members[~similar]
    return torch.cat(dropped).numpy()
