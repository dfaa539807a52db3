"""Check a tokenizer, fill-in-the-middle, a packer or a batch stream of your own (paper 2.2 to 2.4).

    from minglm.testing.data import check_packer
    check_packer(my_best_fit)            # my_best_fit(lengths, capacity) -> rows of indices

Each contract draws examples with hypothesis and raises AssertionError for a property that fails.
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from hypothesis import strategies as st

from minglm.data.packing import Batch
from minglm.data.tokenizer import Tokenizer
from minglm.testing.strategies import for_all, seeds, texts

Fim = Callable[[str, Tokenizer, np.random.Generator], Sequence[int]]
Packer = Callable[[list[int], int], Sequence[Sequence[int]]]


class Stream(Protocol):
    """A stream of batches that can be resumed."""

    def next(self, rows: int) -> Batch:
        """Return the next rows."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        ...


# Tokenizer


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Check a tokenizer: `encode`, `decode`, `special`, `vocab_size`, `end`, `stop_ids`.

    - decode(encode(text)) is the text;
    - text never produces a special id;
    - a special id decodes to its name.
    """
    special = set(tokenizer.special.values())
    assert len(special) == len(tokenizer.special), "two special tokens share an id"
    assert tokenizer.end in special, "the end token must be special"
    assert set(tokenizer.stop_ids) <= special, "the stop ids must be special"
    for name in tokenizer.special:
        ids = tokenizer.encode(f"a {name} b")
        assert not special & set(ids), f"the text {name!r} gave a special id"
    _text_survives(tokenizer)
    _special_ids_decode_to_their_names(tokenizer)


def _text_survives(tokenizer: Tokenizer) -> None:
    special = set(tokenizer.special.values())

    @for_all(text=texts(list(tokenizer.special)))
    def encode_and_decode(text: str) -> None:
        ids = tokenizer.encode(text)
        decoded = tokenizer.decode(ids)
        assert decoded == text, f"decode(encode({text!r})) = {decoded!r}"
        assert not special & set(ids), f"{text!r} gave the special ids {special & set(ids)}"
        inside = all(0 <= token < tokenizer.vocab_size for token in ids)
        assert inside, f"{text!r} gave an id outside the vocabulary"


def _special_ids_decode_to_their_names(tokenizer: Tokenizer) -> None:
    @for_all(before=texts(), after=texts(), name=st.sampled_from(sorted(tokenizer.special)))
    def decode_between_texts(before: str, after: str, name: str) -> None:
        ids = [*tokenizer.encode(before), tokenizer.special[name], *tokenizer.encode(after)]
        assert tokenizer.decode(ids) == before + name + after, f"{name} does not decode to its name"
        skipped = tokenizer.decode(ids, skip_special=True)
        assert skipped == before + after, f"{name} was not skipped"


# Fill in the middle

SECTIONS = ("prefix", "suffix", "middle")


def unfim(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text that was rewritten to `ids`: the inverse of fill-in-the-middle, by which contracts check it.

    Ids without markers are simply decoded. Raises ValueError if a section is missing or repeated.
    """
    name_of = {tokenizer.special[f"<|code_{name}|>"]: name for name in SECTIONS}
    starts = [position for position, token in enumerate(ids) if token in name_of]
    if not starts:
        return tokenizer.decode(ids)
    ends = [*starts[1:], len(ids)]
    names = [name_of[ids[start]] for start in starts]
    if sorted(names) != sorted(SECTIONS) or starts[0] != 0:
        raise ValueError(f"not a fill-in-the-middle sequence: markers {names} at {starts}")
    sections = {
        name: ids[start + 1 : end] for name, start, end in zip(names, starts, ends, strict=True)
    }
    # They are decoded together; no character has bytes on both sides of a cut.
    return tokenizer.decode([*sections["prefix"], *sections["middle"], *sections["suffix"]])


def check_fim(fim: Fim, tokenizer: Tokenizer) -> None:
    """Check fill-in-the-middle: fim(text, tokenizer, rng) -> ids.

    - `unfim` gives the text back;
    - each marker occurs once, the middle last;
    - over many draws both orders and cuts inside the text occur.
    """
    prefix, suffix, middle = (tokenizer.special[f"<|code_{name}|>"] for name in SECTIONS)

    @for_all(text=texts(list(tokenizer.special)), seed=seeds)
    def nothing_is_lost(text: str, seed: int) -> None:
        ids = list(fim(text, tokenizer, np.random.default_rng(seed)))
        undone = unfim(ids, tokenizer)
        assert undone == text, f"{text!r} came back as {undone!r}"
        markers = [token for token in ids if token in (prefix, suffix, middle)]
        assert sorted(markers) == sorted([prefix, suffix, middle]), f"markers {markers}"
        assert markers[-1] == middle, "the middle must come last"
        assert ids[0] in (prefix, suffix), "a marker must come first"

    drawn = [list(fim("abcdefgh", tokenizer, np.random.default_rng(seed))) for seed in range(64)]
    first_markers = {ids[0] for ids in drawn}
    assert first_markers == {prefix, suffix}, "only one of the orders PSM and SPM occurs"
    middles = {tuple(ids[ids.index(middle) :]) for ids in drawn}
    assert len(middles) > 8, f"only {len(middles)} different middles in 64 draws"


# Packer


def check_packer(best_fit: Packer) -> None:
    """Check best-fit decreasing: best_fit(lengths, capacity) -> rows of indices.

    - every document is in one row, and no row is empty or over capacity;
    - any two rows together exceed the capacity;
    - the rows are at most 11/9 of the fewest possible plus 6/9, a theorem for this rule;
    - a document goes where it fits best.
    """
    _rows_are_valid(best_fit)
    _rows_are_few(best_fit)
    # 13 leaves room for 7; 11 and 8 leave room for 1, the best fit of the document of length 1. First fit takes the 7.
    rows = _valid_rows(best_fit, [1, 8, 11, 13], 20)
    assert sorted(map(sorted, rows)) == [[0, 1, 2], [3]], "a document is not where it fits best"


def _valid_rows(best_fit: Packer, lengths: list[int], capacity: int) -> list[list[int]]:
    """Return the rows, after checking that they are valid."""
    rows = [list(row) for row in best_fit(lengths, capacity)]
    packed = sorted(index for row in rows for index in row)
    assert packed == list(range(len(lengths))), "documents were lost or repeated"
    sums = sorted(sum(lengths[index] for index in row) for row in rows)
    within = all(0 < total <= capacity for total in sums)
    assert within, f"rows hold {sums}, capacity {capacity}"
    if len(sums) >= 2:
        assert sums[0] + sums[1] > capacity, f"rows of {sums[:2]} fit into one of {capacity}"
    return rows


def _examples(
    capacities: st.SearchStrategy[int], max_documents: int
) -> st.SearchStrategy[tuple[list[int], int]]:
    """Return a strategy for (lengths, capacity), each length from 1 to the capacity."""

    def with_lengths(capacity: int) -> st.SearchStrategy[tuple[list[int], int]]:
        lengths = st.lists(st.integers(1, capacity), max_size=max_documents)
        return st.tuples(lengths, st.just(capacity))

    return capacities.flatmap(with_lengths)


def _rows_are_valid(best_fit: Packer) -> None:
    @for_all(example=_examples(st.integers(1, 200), max_documents=100))
    def valid(example: tuple[list[int], int]) -> None:
        lengths, capacity = example
        _valid_rows(best_fit, lengths, capacity)


def _rows_are_few(best_fit: Packer) -> None:
    @for_all(example=_examples(st.integers(4, 30), max_documents=9))
    def few(example: tuple[list[int], int]) -> None:
        lengths, capacity = example
        fewest = _fewest_rows(lengths, capacity)
        rows = len(_valid_rows(best_fit, lengths, capacity))
        bound = math.floor((11 * fewest + 6) / 9)
        assert rows <= bound, f"{rows} rows for {lengths}, {fewest} suffice"


def _fewest_rows(lengths: Sequence[int], capacity: int) -> int:
    """Return the fewest rows that hold all lengths, by trying every different choice; for about ten lengths."""
    longest_first = sorted(lengths, reverse=True)
    fewest = len(lengths)

    def place(index: int, rooms: list[int]) -> None:
        """Place the documents from `index` on into rows with these rooms, and into new ones."""
        nonlocal fewest
        if len(rooms) >= fewest:
            return
        if index == len(longest_first):
            fewest = len(rooms)
            return
        length = longest_first[index]
        for room in sorted({room for room in rooms if room >= length}):
            rest = list(rooms)
            rest[rest.index(room)] -= length
            place(index + 1, rest)
        place(index + 1, [*rooms, capacity - length])

    place(0, [])
    return fewest


# Batches


def check_batch(batch: Batch) -> None:
    """Check the layout of a batch: dtypes, no targets in padding or at a document's start, positions that restart."""
    tokens_BS = batch.tokens_BS
    mask_BS = batch.mask_BS
    assert tokens_BS.dtype == torch.int64 and mask_BS.dtype == torch.bool
    assert tokens_BS.shape == mask_BS.shape
    assert not mask_BS[:, 0].any(), "the first token of a row has no context to be predicted from"
    if batch.documents_BS is None:
        return

    documents_BS = batch.documents_BS
    positions_BS = batch.positions_BS
    assert positions_BS is not None, "documents without positions"
    assert documents_BS.dtype == torch.int32 and positions_BS.dtype == torch.int64
    assert documents_BS.shape == positions_BS.shape == tokens_BS.shape
    for documents_S, positions_S, mask_S in zip(documents_BS, positions_BS, mask_BS, strict=True):
        _check_row(documents_S, positions_S, mask_S)


def _check_row(documents_S: torch.Tensor, positions_S: torch.Tensor, mask_S: torch.Tensor) -> None:
    first = torch.ones(1, dtype=torch.bool)
    starts_S = torch.cat([first, documents_S[1:] != documents_S[:-1]])
    different = len(documents_S[starts_S].unique())
    assert different == int(starts_S.sum()), "a document lies in two places of a row"
    is_real_S = documents_S >= 0
    assert not mask_S[starts_S & is_real_S].any(), "the first token of a document is a target"
    assert not mask_S[~is_real_S].any(), "padding is a target"
    index_S = torch.arange(len(documents_S))
    start_S = torch.where(starts_S, index_S, 0).cummax(0).values  # of the token's document
    expected_S = (index_S - start_S)[is_real_S]
    assert torch.equal(positions_S[is_real_S], expected_S), "positions do not restart"


def _equal(a: Batch, b: Batch) -> bool:
    """Return True if two batches are equal in every field."""
    for name in ("tokens_BS", "mask_BS", "documents_BS", "positions_BS"):
        x = getattr(a, name)
        y = getattr(b, name)
        if (x is None) != (y is None):
            return False
        if x is not None and not torch.equal(x, y):
            return False
    return True


# Stream


def check_stream(make_stream: Callable[[], Stream]) -> None:
    """Check that a batch stream resumes exactly. make_stream() returns a new stream with `next(rows)` and a state.

    - two new streams give the same batches;
    - a state taken after some batches, and put through JSON, brings any stream to the same next batches,
      whether it is new or somewhere else;
    - a state is a copy, which does not change when the stream continues.
    """
    rows_before = st.lists(st.integers(1, 5), max_size=12)
    rows_after = st.lists(st.integers(1, 5), min_size=1, max_size=12)

    @for_all(before=rows_before, after=rows_after)
    def resumes(before: list[int], after: list[int]) -> None:
        first = make_stream()
        second = make_stream()
        for rows in before:
            batch = first.next(rows)
            check_batch(batch)
            given = len(batch.tokens_BS)
            assert given == rows, f"asked for {rows} rows, got {given}"
            same = _equal(batch, second.next(rows))
            assert same, "two new streams differ: the order is not a function of the seed"

        state = first.state_dict()
        text = json.dumps(state)
        expected = [first.next(rows) for rows in after]
        assert json.dumps(state) == text, "the state changes while the stream continues"

        second.next(40)  # now it is somewhere else
        for resumed in (make_stream(), second):
            resumed.load_state_dict(json.loads(text))
            for rows, batch in zip(after, expected, strict=True):
                same = _equal(resumed.next(rows), batch)
                assert same, "a resumed stream gives other batches"
