"""Packing: the contract of best fit, conservation of tokens, and the layout of batches."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.data.packing import Batch, TruncatedRows, best_fit, cut_to_fit, fill
from minglm.testing.data import check_batch, check_packer

lengths = st.lists(st.integers(0, 50), min_size=1, max_size=20)
capacities = st.integers(1, 40)


def test_contract_holds():
    """Our best fit keeps the contract."""
    check_packer(best_fit)


def next_fit(lengths, capacity):
    """Broken: look at the last row only."""
    rows = []
    room = 0
    for i, length in enumerate(lengths):
        if length > room:
            rows.append([])
            room = capacity
        rows[-1].append(i)
        room -= length
    return rows


def worst_fit(lengths, capacity):
    """Broken: choose the row with the most room, which leaves many rows half full."""
    rows, rooms = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = max(range(len(rows)), key=rooms.__getitem__, default=None)
        if row is None or rooms[row] < lengths[i]:
            row = len(rows)
            rows.append([])
            rooms.append(capacity)
        rows[row].append(i)
        rooms[row] -= lengths[i]
    return rows


BROKEN = {
    "one row each": lambda lengths, capacity: [[i] for i in range(len(lengths))],
    "all in one row": lambda lengths, capacity: [list(range(len(lengths)))] if lengths else [],
    "drops the last": lambda lengths, capacity: best_fit(lengths[:-1], capacity),
    "next fit": next_fit,
    "worst fit": worst_fit,
}


@pytest.mark.parametrize("name", BROKEN)
def test_contract_rejects_a_broken_twin(name):
    """Each broken packer fails the contract."""
    with pytest.raises(AssertionError):
        check_packer(BROKEN[name])


def test_the_first_row_begins_with_the_first_document():
    """Without an offset; and nothing to cut is one line."""
    rows = TruncatedRows([3, 4], [1, 0], 5)
    assert [list(map(tuple, row)) for row in rows] == [[(1, 0, 4), (0, 0, 1)]]
    for some, order in (([], []), ([0, 0], [0, 1]), ([3], [])):
        with pytest.raises(ValueError, match="nothing to cut"):
            TruncatedRows(some, order, 4)


def test_best_fit_is_fast_and_tight():
    """20,000 documents pack within 1 % of the bound total / capacity: small documents fill the gaps of large ones."""
    rng = random.Random(0)
    some = [rng.randint(1, 512) for _ in range(20_000)]
    rows = best_fit(some, 512)
    assert len(rows) <= 1.01 * sum(some) / 512 + 1


@given(
    st.integers(1, 400).flatmap(
        lambda n: st.tuples(st.lists(st.integers(1, n), min_size=1, max_size=120), st.just(n))
    )
)
def test_rows_are_those_of_trl_and_no_more_than_first_fit_may_have(example):
    """As many rows as TRL's packing `bfd`, written by others, and at most 11/9 of first-fit decreasing's, plus 2/3."""
    datasets, data_utils = pytest.importorskip("datasets"), pytest.importorskip("trl.data_utils")
    some, capacity = example
    packed = data_utils.pack_dataset(
        datasets.Dataset.from_dict({"x": [[0] * n for n in some]}), capacity, "bfd"
    )
    ours = len(best_fit(some, capacity))
    assert ours == len(packed)
    rooms = []  # of first-fit decreasing, which needs at least as many rows as the fewest possible
    for length in sorted(some, reverse=True):
        row = next((i for i, room in enumerate(rooms) if room >= length), len(rooms))
        if row == len(rooms):
            rooms.append(capacity)
        rooms[row] -= length
    assert ours <= (11 * len(rooms) + 6) / 9


@pytest.mark.parametrize("wrong", [[3, 0], [3, 11]])
def test_best_fit_refuses_lengths_that_fit_no_row(wrong):
    """An empty or too long document is a ValueError that names it."""
    with pytest.raises(ValueError, match=f"document 1 has {wrong[1]} tokens"):
        best_fit(wrong, 10)


@given(lengths, capacities)
def test_pieces_cover_every_document_once(some, capacity):
    """Spans of at most the capacity, in order, cover each document without gap or overlap."""
    spans = cut_to_fit(some, capacity).tolist()
    assert [(d, t) for d, a, b in spans for t in range(a, b)] == [
        (d, t) for d, n in enumerate(some) for t in range(n)
    ]
    assert all(0 < b - a <= capacity for _, a, b in spans)
    # Only a document's last span may be short.
    assert sum(b - a < capacity for _, a, b in spans) <= len(some)


@given(lengths.filter(sum), capacities, st.integers(0, 100), st.integers(0, 2**31))
def test_cut_rows_are_consecutive_parts_of_one_ring(some, capacity, offset, seed):
    """Rows are full, follow one another in the stream of documents, and leave out fewer tokens than one row."""
    order = np.random.default_rng(seed).permutation(len(some))
    stream = [(int(d), t) for d in order for t in range(some[d])]
    rows = TruncatedRows(some, order, capacity, offset)
    flat = []
    for row in rows:
        tokens = [(d, t) for d, a, b in row for t in range(a, b)]
        assert len(tokens) == capacity
        flat += tokens
    ring = itertools.cycle(stream)
    expected = itertools.islice(ring, offset % len(stream), offset % len(stream) + len(flat))
    assert flat == list(expected)
    assert len(stream) - capacity < len(flat) <= max(capacity, len(stream))
    if len(stream) >= capacity:
        assert len(set(flat)) == len(flat)  # no token twice in an epoch


@given(
    st.lists(st.lists(st.integers(1, 8), max_size=4), min_size=1, max_size=5),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_fill_lays_documents_out(rows, separate, seed):
    """Tokens stand in order, then padding; masks follow them; ids and positions tell the documents apart."""
    rng = np.random.default_rng(seed)
    spans = [
        [(rng.integers(1, 99, n), rng.random(n) < 0.5 if rng.random() < 0.7 else None) for n in row]
        for row in rows
    ]
    batch = fill(spans, 32, separate, pad=7)
    check_batch(batch)
    for row, parts in enumerate(spans):
        tokens = []
        targets = []
        ids = []
        for document, (part, mask) in enumerate(parts):
            chosen = np.ones(len(part), bool) if mask is None else mask.copy()
            # Nothing predicts the first token of a row, or of a document that is apart.
            if len(part) and (separate or not tokens):
                chosen[0] = False
            tokens += part.tolist()
            targets += chosen.tolist()
            ids += [document] * len(part)
        padding = 32 - len(tokens)
        assert batch.tokens_BS[row].tolist() == tokens + [7] * padding
        assert batch.mask_BS[row].tolist() == targets + [False] * padding
        if separate:
            assert batch.documents_BS[row].tolist() == ids + [-1] * padding
    if separate:
        filled = float((batch.documents_BS >= 0).float().mean())
        assert filled == pytest.approx(sum(map(sum, rows)) / (32 * len(rows)))  # float32 mean


@given(st.integers(1, 9), st.integers(1, 5), st.booleans())
def test_split_parts_join_to_the_batch(rows, size, separate):
    """Splitting a batch keeps every row, in order, at most `size` in a part."""
    spans = [[(np.arange(row + 1, row + 4), None)] for row in range(rows)]
    batch = fill(spans, 4, separate)
    parts = batch.to("cpu").split(size)
    assert torch.equal(torch.cat([part.tokens_BS for part in parts]), batch.tokens_BS)
    assert torch.equal(torch.cat([part.mask_BS for part in parts]), batch.mask_BS)
    assert all(len(part.tokens_BS) <= size for part in parts)
    assert all((part.documents_BS is None) == (not separate) for part in parts)


@given(length=st.integers(1, 9), ahead=st.integers(0, 3))
def test_what_lies_ahead_is_no_input(length, ahead):
    """The model computes all positions but those that are only there to be predicted."""
    tokens_BS = torch.arange(2 * (length + ahead)).reshape(2, -1)
    inputs = Batch(tokens_BS, tokens_BS > 3, ahead=ahead).inputs()
    assert torch.equal(inputs.tokens_BS, tokens_BS[:, :length])
    assert torch.equal(inputs.mask_BS, tokens_BS[:, :length] > 3)
    assert inputs.ahead == 0 and inputs.documents_BS is None


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3))
def test_attention_inside_documents_is_that_of_shorter_rows(rows):
    """A position attends to (length + 1) / 2 others on average, itself among them, whatever the rows are cut into."""
    spans = [[(np.zeros(size, int), None) for size in sizes] for sizes in rows]
    batch = fill(spans, 12, separate=True)
    attended = [n for sizes in rows for size in sizes for n in range(1, size + 1)]
    padding = batch.tokens_BS.numel() - len(attended)
    mean = (sum(attended) + padding) / batch.tokens_BS.numel()  # padding attends to itself
    assert batch.attended_length() == pytest.approx(2 * mean - 1)
    assert fill(spans, 12, separate=False).attended_length() == 12
    assert fill([[(np.zeros(12, int), None)]], 12, separate=True).attended_length() == 12
