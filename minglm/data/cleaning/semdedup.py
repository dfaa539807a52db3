"""SemDedup: pages that a template wrote, which MinHash takes for different (paper 2.2; method of arXiv 2303.09540).

    embed every document as a unit vector;  k-means on the sphere;  inside a cluster drop a document when a better one
    that stays has a cosine of `threshold` or more with it

A page made from a form with new names in every sentence shares few runs of five words with its sisters (Jaccard 0.3,
say), but most of its words: the cosine of their counts is above 0.9. Clusters make this n^2 / clusters comparisons and
not n^2.

Choices, and why:
- The embedding is any unit vectors. `embed` counts hashed words, 1 + log of the count each, and projects them on
  random signs, which keeps cosines within about 1 / sqrt(width); the hidden states of a model do as well.
- No inverse document frequency: the words of a template are frequent, and are what has to count.
- As in `dedup`, the better document stays and what stays does not depend on the order of the documents: k-means begins
  with documents spread over the order best first, and sees them in it.

Simplified: SemDedup itself keeps the document farthest from the centroid. Pairs on either side of a cluster's border
are missed.
"""

import numpy as np
import torch

from minglm.data.cleaning.minhash import best_first
from minglm.data.cleaning.shingles import by_text, mix

WIDTH = 256
ROUNDS = 10
PER_CLUSTER = 256
"""Documents of a cluster, on average."""


def embed(texts, width=WIDTH):
    """Unit vectors of texts: float32 array (texts, width); zero for a text without words."""
    result = np.zeros((len(texts), width), np.float32)
    for row, hashes in enumerate(by_text(texts)):
        value, count = np.unique(hashes, return_counts=True)
        weight = (1 + np.log(count)).astype(np.float32)
        bits = [
            mix(value + np.uint64(at + 1)) for at in range(0, width, 64)
        ]  # 64 random signs of a word are one hash
        signs = np.unpackbits(
            np.stack(bits, 1).view(np.uint8), axis=1, bitorder="little", count=width
        )
        result[row] = 2 * (weight @ signs) - weight.sum()
    return result / np.maximum(np.linalg.norm(result, axis=1, keepdims=True), 1e-9)


def kmeans(vectors, clusters, rounds=ROUNDS):
    """The cluster of each unit vector, by k-means with cosine: int64 tensor (documents,).

    vectors: float tensor (documents, width). Begins with every (documents / clusters)-th vector; a cluster that loses
    all its members keeps its centre.
    """
    centres = vectors[torch.arange(clusters) * len(vectors) // clusters].clone()
    for _ in range(rounds):
        nearest = torch.cat([(block @ centres.T).argmax(1) for block in vectors.split(8192)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        centres = torch.where(
            sums.norm(dim=1, keepdim=True) > 0, torch.nn.functional.normalize(sums), centres
        )
    return torch.cat([(block @ centres.T).argmax(1) for block in vectors.split(8192)])


def choose(vectors, threshold, order, group=None):
    """Which documents stay: a boolean array.

    vectors: unit vectors (documents, width). order: all indices, best first. group: integers; only documents of one
    group are compared (None: all). Raises ValueError for a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(
            f"duplicates in meaning from a cosine of {threshold}: must be above 0 and at most 1"
        )
    stays, order = np.ones(len(vectors), bool), np.asarray(order, np.int64)
    group = np.zeros(len(vectors), np.int64) if group is None else np.asarray(group)
    for which in np.unique(group):
        mine = order[group[order] == which]
        inside = torch.from_numpy(np.asarray(vectors[mine], np.float32))
        nearest = kmeans(inside, -(-len(mine) // PER_CLUSTER))
        for cluster in nearest.unique():
            (members,) = torch.where(nearest == cluster)  # in order, best first
            stays[mine[_repeated(inside, members, threshold - 1e-6)]] = (
                False  # 1e-6: rounding of a cosine of 1
            )
    return stays


def _repeated(vectors, members, threshold):
    """Those of the members that a better one, which stays, is as similar as the threshold; as a numpy array."""
    gone = []
    while len(members) > 1:
        first, members = members[0], members[1:]
        same = vectors[members] @ vectors[first] >= threshold
        gone.append(members[same])
        members = members[~same]
    return torch.cat(gone).numpy() if gone else np.zeros(0, np.int64)


def semantic_duplicates(documents, threshold, embedder=embed):
    """The documents without duplicates in meaning, in the given order. documents: with `text`, `quality`, `name`."""
    stays = choose(embedder([d.text for d in documents]), threshold, best_first(documents))
    return [document for document, stay in zip(documents, stays, strict=True) if stay]
