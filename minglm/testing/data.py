"""Contracts of the data side: tokenizer, fill-in-the-middle, packer and batch stream, for any implementation.

    from minglm.testing.data import check_packer
    check_packer(my_best_fit)            # my_best_fit(lengths, capacity) -> rows of indices

Each draws its own examples with hypothesis and raises AssertionError for a property that fails (paper 2.2 to 2.4).
"""

import json
import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.testing.strategies import contract, seeds, texts


def check_tokenizer(tokenizer):
    """Hold a tokenizer to its contract: `encode`, `decode`, `special`, `vocab_size`, `end`, `stop_ids`.

    decode(encode(text)) is the text; text never gives a special id; special ids decode to their names.
    """
    special = set(tokenizer.special.values())
    assert len(special) == len(tokenizer.special), "two special tokens share an id"
    assert tokenizer.end in special and set(tokenizer.stop_ids) <= special, (
        "end and stop ids must be special"
    )

    @contract
    @given(texts(list(tokenizer.special)))
    def text_survives(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, (
            f"decode(encode({text!r})) = {tokenizer.decode(ids)!r}"
        )
        assert not special & set(ids), f"{text!r} gave the special ids {special & set(ids)}"
        assert all(0 <= token < tokenizer.vocab_size for token in ids), (
            "an id lies outside the vocabulary"
        )

    @contract
    @given(texts(), texts(), st.sampled_from(sorted(tokenizer.special)))
    def special_tokens_are_told_apart(before, after, name):
        ids = [*tokenizer.encode(before), tokenizer.special[name], *tokenizer.encode(after)]
        assert tokenizer.decode(ids) == before + name + after, f"{name} does not decode to its name"
        assert tokenizer.decode(ids, skip_special=True) == before + after, f"{name} was not skipped"

    for name in tokenizer.special:
        ids = tokenizer.encode(f"a {name} b")
        assert not special & set(ids), f"the text {name!r} gave a special id"
    text_survives()
    special_tokens_are_told_apart()


def check_fim(fim, unfim, tokenizer):
    """Hold fill-in-the-middle to its contract: fim(text, tokenizer, rng) -> ids, unfim(ids, tokenizer) -> text.

    Nothing is lost; each marker stands once, the middle last; over many draws both orders and inner cuts occur.
    """
    markers = [tokenizer.special[f"<|code_{name}|>"] for name in ("prefix", "suffix", "middle")]

    @contract
    @given(texts(list(tokenizer.special)), seeds)
    def nothing_is_lost(text, seed):
        ids = list(fim(text, tokenizer, np.random.default_rng(seed)))
        assert unfim(ids, tokenizer) == text, f"{text!r} came back as {unfim(ids, tokenizer)!r}"
        found = [token for token in ids if token in markers]
        assert sorted(found) == sorted(markers), f"markers {found}"
        assert found[-1] == markers[-1] and ids[0] in markers[:2], (
            "the middle must come last, a marker first"
        )

    nothing_is_lost()
    drawn = [list(fim("abcdefgh", tokenizer, np.random.default_rng(seed))) for seed in range(64)]
    assert {ids[0] for ids in drawn} == set(markers[:2]), (
        "only one of the orders PSM and SPM occurs"
    )
    middles = {tuple(ids[ids.index(markers[2]) :]) for ids in drawn}
    assert len(middles) > 8, f"only {len(middles)} different middles in 64 draws"


def _fewest_rows(lengths, capacity):
    """The fewest rows that hold all lengths, by trying every choice that differs; for ten lengths or so."""
    best = len(lengths)

    def place(at, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if at == len(lengths):
            best = len(rooms)
            return
        for room in sorted({room for room in rooms if room >= lengths[at]}):
            rest = list(rooms)
            rest[rest.index(room)] -= lengths[at]
            place(at + 1, rest)
        place(at + 1, [*rooms, capacity - lengths[at]])

    lengths = sorted(lengths, reverse=True)
    place(0, [])
    return best


def check_packer(best_fit):
    """Hold a packer to the contract of best-fit decreasing: best_fit(lengths, capacity) -> list of lists of indices.

    Every document is in one row; no row is over capacity or empty; any two rows together exceed the capacity; the rows
    are at most 11/9 of the fewest possible plus 6/9, a theorem for this rule, checked by search on small inputs.
    """
    capacities = st.integers(1, 200)

    def holds(lengths, capacity):
        rows = [list(row) for row in best_fit(lengths, capacity)]
        assert sorted(i for row in rows for i in row) == list(range(len(lengths))), (
            "documents were lost or repeated"
        )
        sums = sorted(sum(lengths[i] for i in row) for row in rows)
        assert all(0 < total <= capacity for total in sums), (
            f"rows hold {sums}, capacity {capacity}"
        )
        assert len(sums) < 2 or sums[0] + sums[1] > capacity, (
            f"rows of {sums[:2]} fit into one of {capacity}"
        )
        return rows

    def any_lengths(capacity, most):
        return st.tuples(st.lists(st.integers(1, capacity), max_size=most), st.just(capacity))

    @contract
    @given(capacities.flatmap(lambda capacity: any_lengths(capacity, 100)))
    def rows_are_lawful(example):
        holds(*example)

    @contract
    @given(st.integers(4, 30).flatmap(lambda capacity: any_lengths(capacity, 9)))
    def rows_are_few(example):
        lengths, capacity = example
        fewest = _fewest_rows(lengths, capacity)
        rows = len(holds(lengths, capacity))
        assert rows <= math.floor((11 * fewest + 6) / 9), (
            f"{rows} rows for {lengths}, {fewest} suffice"
        )

    rows_are_lawful()
    rows_are_few()
    # 13 leaves room for 7; 11 and 8 leave room for 1: the document of length 1 fits best there, first fit takes the 7
    assert sorted(map(sorted, holds([1, 8, 11, 13], 20))) == [[0, 1, 2], [3]], (
        "a document is not where it fits best"
    )


def check_batch(batch):
    """Hold a Batch to its layout: dtypes, no targets in padding or at a document's start, positions that restart."""
    tokens_BS, mask_BS = batch.tokens_BS, batch.mask_BS
    assert (
        tokens_BS.dtype == torch.int64
        and mask_BS.dtype == torch.bool
        and tokens_BS.shape == mask_BS.shape
    )
    assert not mask_BS[:, 0].any(), (
        "the first token of a row has nothing before it to be predicted from"
    )
    if batch.documents_BS is None:
        return
    documents_BS, positions_BS = batch.documents_BS, batch.positions_BS
    assert documents_BS.dtype == torch.int32 and positions_BS.dtype == torch.int64
    assert documents_BS.shape == positions_BS.shape == tokens_BS.shape
    for ids, positions, mask in zip(documents_BS, positions_BS, mask_BS, strict=True):
        starts = torch.cat([torch.ones(1, dtype=torch.bool), ids[1:] != ids[:-1]])
        assert len(ids[starts].unique()) == int(starts.sum()), (
            "a document lies in two places of a row"
        )
        assert not mask[starts & (ids >= 0)].any(), "the first token of a document is a target"
        assert not mask[ids < 0].any(), "padding is a target"
        real = ids >= 0
        begin = torch.where(starts, torch.arange(len(ids)), 0).cummax(0).values
        assert torch.equal(positions[real], (torch.arange(len(ids)) - begin)[real]), (
            "positions do not restart"
        )


def _same(a, b):
    """Whether two batches are equal in every field."""
    for name in ("tokens_BS", "mask_BS", "documents_BS", "positions_BS"):
        x, y = getattr(a, name), getattr(b, name)
        if (x is None) != (y is None) or (x is not None and not torch.equal(x, y)):
            return False
    return True


def check_stream(make_stream):
    """Hold a batch stream to exact resume. make_stream() gives a new stream with .next(rows) -> Batch and a state.

    Two new streams agree; a state taken after some batches, and put through JSON, brings a stream to the same next
    batches, be it new or somewhere else; it is a copy, which going on does not change.
    """

    @contract
    @given(
        st.lists(st.integers(1, 5), max_size=12),
        st.lists(st.integers(1, 5), min_size=1, max_size=12),
    )
    def resumes(before, after):
        first, second = make_stream(), make_stream()
        for rows in before:
            batch = first.next(rows)
            check_batch(batch)
            assert len(batch.tokens_BS) == rows, (
                f"asked for {rows} rows, got {len(batch.tokens_BS)}"
            )
            assert _same(batch, second.next(rows)), (
                "two new streams differ: the order is not a function of the seed"
            )
        state = first.state_dict()
        text = json.dumps(state)
        expected = [first.next(rows) for rows in after]
        assert json.dumps(state) == text, "the state changes while the stream goes on"
        second.next(40)  # a stream that has gone elsewhere can be brought back as well as a new one
        for resumed in (make_stream(), second):
            resumed.load_state_dict(json.loads(text))
            for rows, batch in zip(after, expected, strict=True):
                assert _same(resumed.next(rows), batch), "a resumed stream gives other batches"

    resumes()
