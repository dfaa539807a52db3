"""Near duplicates and duplicates in meaning: contracts with broken twins, estimates within bounds, recall of bands."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from helpers.documents import (
    best_documents_first,
    near_duplicates,
    semantic_duplicates,
)
from hypothesis import given
from hypothesis import strategies as st

from minglm.data.cleaning import minhash as dedup
from minglm.data.cleaning import semdedup
from minglm.data.cleaning.minhash import banding, minhash, recall
from minglm.data.cleaning.semdedup import embed, kmeans
from minglm.data.cleaning.shingles import mix
from minglm.testing import cleaning


def near(documents):
    return near_duplicates(documents, 0.7)


def semantic(documents):
    return semantic_duplicates(documents, 0.65)


def test_near_duplicates_keep_their_contract():
    """At two thresholds: similar documents go, each for a better one that stays."""
    cleaning.check_near_duplicates(near)
    cleaning.check_near_duplicates(lambda documents: near_duplicates(documents, 0.5), 0.5)


def test_semantic_duplicates_keep_their_contract():
    """One page of each form stays, and every page of other words."""
    cleaning.check_semantic_duplicates(semantic)


def first_stays(documents):
    """Broken: keep the earlier one of two twins, whatever its quality."""
    stays = dedup.keep_best(
        dedup.signatures([d.text for d in documents]), 0.7, range(len(documents))
    )
    return [d for d, stay in zip(documents, stays, strict=True) if stay]


def whole_families(documents):
    """Broken: join pairs, so that the ends of a chain of versions count as twins."""
    stays = documents
    for _ in documents:
        gone = {d.name for d in stays} - {d.name for d in near(stays)}
        ends = [
            d
            for d in stays
            if d.name not in gone and not any(g[0] == d.name[0] and g != d.name for g in gone)
        ]
        best = {
            g[0]: max((d for d in stays if d.name[0] == g[0]), key=lambda d: d.quality)
            for g in gone
        }
        following = [d for d in stays if d in ends or d in best.values()]
        if following == stays:
            break
        stays = following
    return stays


BROKEN = {
    "keeps everything": (lambda documents: documents, "both stayed"),
    "keeps nothing": (lambda documents: [], "nothing like it"),
    "same length": (lambda documents: list({len(d.text): d for d in documents}.values()), "."),
    "the first stays": (first_stays, "nothing like it|order of the documents"),
    "whole families": (whole_families, "nothing like it"),
    "exact copies only": (
        lambda documents: list({d.text: d for d in documents}.values()),
        "both stayed|order",
    ),
    "changes the order": (lambda documents: near(documents)[::-1], "order was changed"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_contract_finds_broken_near_duplicates(name):
    """Each broken twin fails with the property it breaks."""
    twin, said = BROKEN[name]
    with pytest.raises(AssertionError, match=said):
        cleaning.check_near_duplicates(twin)


SEMANTIC = {
    "MinHash": (near, "of . pages of a form . stayed"),
    "too eager": (
        lambda documents: semantic_duplicates(documents, 0.1),
        "page of other words was removed",
    ),
    "worst stays": (
        lambda documents: [
            d
            for d in documents
            if d.name
            in {
                x.name
                for x in semantic([dataclasses.replace(y, quality=-y.quality) for y in documents])
            }
        ],
        "not the best",
    ),
}


@pytest.mark.parametrize("name", SEMANTIC)
def test_the_contract_finds_broken_removal_by_meaning(name):
    """Each broken twin fails with the property it breaks; MinHash is one: it takes pages of a form for different."""
    twin, said = SEMANTIC[name]
    with pytest.raises(AssertionError, match=said):
        cleaning.check_semantic_duplicates(twin)


def pair(rng, shared, each):
    """Return two sets of random hashes with `shared` values in common and `each` of their own."""
    values = np.array([rng.getrandbits(64) for _ in range(shared + 2 * each)], np.uint64)
    return values[: shared + each], np.concatenate([values[:shared], values[shared + each :]])


@given(st.integers(0, 2**31), st.integers(0, 300), st.integers(1, 300))
def test_the_estimate_is_near_the_jaccard_index(seed, shared, each):
    """The share of equal values is within 0.22 of |a and b| / |a or b|, by Hoeffding wrong once in 10^5."""
    first, second = minhash(pair(random.Random(seed), shared, each))
    jaccard = shared / (shared + 2 * each)
    assert abs((first == second).mean() - jaccard) < 0.22


def test_the_estimate_has_no_bias():
    """Over 400 pairs of Jaccard index 1/2 the mean estimate is within 0.01 (four and a half standard deviations)."""
    rng = random.Random(0)
    signature = minhash([one for _ in range(400) for one in pair(rng, 60, 30)])
    assert abs((signature[::2] == signature[1::2]).mean() - 0.5) < 0.01


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20, unique=True),
    st.randoms(use_true_random=False),
)
def test_a_signature_is_of_a_set(values, rng):
    """It depends neither on the order of the values nor on the sets beside it; a union takes the smaller values."""
    values = np.array(values, np.uint64)
    shuffled = values[rng.sample(range(len(values)), len(values))]
    other = np.array([rng.getrandbits(64) for _ in range(5)], np.uint64)
    alone, again, third, union = minhash([values, shuffled, other, np.concatenate([values, other])])
    assert (alone == again).all()
    assert (alone == minhash([values])[0]).all()
    assert (union == np.minimum(alone, third)).all()


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_bands_find_pairs_as_often_as_the_curve_says(similarity):
    """Of 300 pairs the share that has a band in common is 1 - (1 - s^rows)^bands, within five standard deviations."""
    bands, rows = banding(0.7)
    rng = random.Random(int(similarity * 100))
    each = 60
    shared = round(2 * each * similarity / (1 - similarity))
    sets = []
    for _ in range(300):
        sets += pair(rng, shared, each)
    signature = minhash(sets)[:, : bands * rows]

    equal_values = (signature[::2] == signature[1::2]).reshape(300, bands, rows)
    found = equal_values.all(2).any(1).mean()  # a band in common
    chance = recall(shared / (shared + 2 * each), bands, rows)
    deviation = (chance * (1 - chance) / 300) ** 0.5
    assert abs(found - chance) < 5 * deviation + 0.01


@given(st.floats(0.05, 1))
def test_banding_finds_the_threshold_with_the_longest_bands(threshold):
    """A pair at the threshold is found with the chance that was promised; one more row in a band would lose it."""
    bands, rows = banding(threshold)
    assert bands == 128 // rows
    assert 1 - (1 - threshold**rows) ** bands >= 0.95 or rows == 1
    assert all(
        1 - (1 - threshold**longer) ** (128 // longer) < 0.95 for longer in range(rows + 1, 129)
    )


@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 12),
    threshold=st.sampled_from([0.25, 0.5, 0.75, 1.0]),
    groups=st.integers(1, 3),
)
def test_who_stays_by_definition(seed, count, threshold, groups):
    """Best first: a document goes if one of its group that stays shares a band with it and is as similar or more.

    Eight values of two kinds each, so that many similarities are exactly the threshold.
    """
    rng = np.random.default_rng(seed)
    signature = rng.integers(0, 2, (count, 8)).astype(np.uint32)
    order = rng.permutation(count).tolist()
    group = rng.integers(0, groups, count) if groups > 1 else None
    bands, rows = banding(threshold, 8)
    stays = []
    for index in order:
        equal = [
            signature[index] == signature[other]
            for other in stays
            if group is None or group[other] == group[index]
        ]
        if not any(
            same.mean() >= threshold and same[: bands * rows].reshape(bands, rows).all(1).any()
            for same in equal
        ):
            stays.append(index)
    found = dedup.keep_best(signature, threshold, order, group)
    assert np.flatnonzero(found).tolist() == sorted(stays)


def test_a_threshold_of_one_is_allowed():
    """Whole signatures are compared; and documents that share no band stay, however low the threshold."""
    assert banding(1.0) == (1, 128)
    assert banding(1e-9) == (128, 1)


@given(st.integers(0, 2**31), st.integers(1, 9))
def test_choice_of_groups_is_that_of_each_alone(seed, forms):
    """Documents of different groups never remove each other, by neither method, however alike they are."""
    documents = cleaning.templates(random.Random(seed), forms, 3) * 2
    group = [number // (3 * forms) for number in range(len(documents))]
    for method, features in ((dedup, dedup.signatures), (semdedup, embed)):
        values = features([d.text for d in documents])
        order = best_documents_first(documents)
        stays = method.keep_best(values, 0.75, order, group)
        half = 3 * forms
        alone = method.keep_best(values[:half], 0.75, best_documents_first(documents[:half]))
        assert stays[:half].tolist() == stays[half:].tolist() == alone.tolist()


def test_many_copies_cost_little():
    """Of 20,000 copies of a page and 2,000 other pages, 2,001 stay, in a second or two: copies meet only the best."""
    rng = np.random.default_rng(0)
    pages = minhash(mix(rng.integers(0, 2**63, (2001, 30)).astype(np.uint64)))
    signature = np.concatenate([pages, np.repeat(pages[:1], 19_999, 0)])
    assert dedup.keep_best(signature, 0.8, range(len(signature))).sum() == 2001


@given(st.integers(0, 2**31), st.integers(1, 5))
def test_kmeans_puts_a_vector_where_it_is_nearest(seed, clusters):
    """At the end every vector is in the cluster of the nearest centre, and well separated clouds are found again."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(clusters, 64, generator=generator))
    centres = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q[:clusters]
    cloud = torch.arange(clusters).repeat_interleave(20)
    vectors = torch.nn.functional.normalize(
        centres[cloud] + 0.02 * torch.randn(len(cloud), 64, generator=generator)
    )
    nearest = kmeans(vectors, clusters)
    assert all(len(nearest[cloud == c].unique()) == 1 for c in range(clusters))
    assert len(nearest.unique()) == clusters


@given(st.lists(st.text(max_size=40), max_size=6))
def test_embeddings_are_unit_vectors_of_the_words(texts):
    """Length one, or zero for a text without words; order, case and the texts beside it do not matter."""
    vectors = embed(texts)
    lengths = np.linalg.norm(vectors, axis=1)
    assert ((abs(lengths - 1) < 1e-5) | (lengths == 0)).all()
    for text, vector in zip(texts, vectors, strict=True):
        assert np.allclose(embed([text])[0], vector, atol=1e-6)
    a, b = embed(["one two three two", "Two, two! THREE one"])
    assert np.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5])
def test_thresholds_are_refused(threshold):
    """A similarity outside (0, 1] is one line for either method."""
    for method in (near_duplicates, semantic_duplicates):
        with pytest.raises(ValueError, match="must be above 0 and at most 1"):
            method(cleaning.templates(random.Random(0), 1, 2), threshold)


def test_no_documents_are_no_trouble():
    """An empty corpus stays one."""
    assert near([]) == semantic([]) == []
