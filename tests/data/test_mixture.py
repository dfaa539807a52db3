"""The mixture: exact resume, exact shares, every token once an epoch; tokenising."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.data.mixture import Mixture
from minglm.data.store.documents import Document
from minglm.data.tokenization import FimOptions, tokenize
from minglm.data.tokenizer import Tokenizer
from minglm.testing.data import check_batch, check_stream, unfim

TOKENIZER = Tokenizer.train(["def f(x):\n    return x\n", "Zwei Wörter, 两个词."] * 5, 330)


def make_sources(seed, names="abc", most=12, longest=40):
    """Return sources of random lengths. Every token says where it is from: ids are distinct over all sources."""
    rng = np.random.default_rng(seed)
    sources = {}
    at = 0
    for name in names:
        sizes = rng.integers(1, longest, rng.integers(1, most))
        ends = at + np.cumsum(sizes)
        sources[name] = [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        at = int(ends[-1])
    return sources


def real(batch, name, sources):
    """Return all tokens of a batch, without padding, that come from one source."""
    low = sources[name][0][0]
    high = sources[name][-1][-1]
    kept = (
        batch.tokens_BS if batch.documents_BS is None else batch.tokens_BS[batch.documents_BS >= 0]
    )
    return kept[(kept >= low) & (kept <= high)].tolist()


weights = st.fixed_dictionaries({"a": st.floats(0.1, 9), "b": st.floats(0.1, 9), "c": st.just(0.0)})
packings = st.sampled_from(["truncate", "best_fit"])


@pytest.mark.parametrize("packing", ["truncate", "best_fit"])
def test_contract_holds(packing):
    """Our stream resumes exactly, with masks too."""
    sources = make_sources(1)
    masks = {"b": [np.arange(len(d)) % 3 == 0 for d in sources["b"]]}
    check_stream(lambda: Mixture(sources, {"a": 2, "b": 1, "c": 0.5}, 24, packing, 5, masks))


class ForgetsPool(Mixture):
    def state_dict(self):
        return {**super().state_dict(), "pool": []}


class ForgetsEpoch(Mixture):
    def state_dict(self):
        return {**super().state_dict(), "epoch": dict.fromkeys(self.weights, 0)}


class SharesState(Mixture):
    def state_dict(self):
        return {
            "epoch": self._epoch,
            "cursor": self._cursor,
            "drawn": self._drawn,
            "pool": self._pool,
        }


class TrainsOnFirstToken(Mixture):
    def next(self, rows):
        batch = super().next(rows)
        batch.mask_BS[:, 0] = True
        return batch


class Unseeded(Mixture):
    def __init__(self, *args):
        super().__init__(*args)
        self.seed = int(np.random.default_rng().integers(2**31))


@pytest.mark.parametrize(
    "broken", [ForgetsPool, ForgetsEpoch, SharesState, TrainsOnFirstToken, Unseeded]
)
def test_contract_rejects_a_broken_twin(broken):
    """Each broken stream fails the contract."""
    sources = make_sources(1)
    with pytest.raises(AssertionError):
        check_stream(lambda: broken(sources, {"a": 2, "b": 1}, 24, "best_fit", 5))


@given(weights, packings, st.integers(1, 60), st.integers(0, 2**31))
def test_shares_follow_the_weights_at_every_moment(weights, packing, length, seed):
    """Tokens drawn from a source never exceed its share by more than one row, nor fall short by one row per source."""
    mixture = Mixture(make_sources(seed), weights, length, packing, seed)
    for _ in range(12):
        mixture.next(3)
        total = sum(mixture.state_dict()["drawn"].values())
        for name, drawn in mixture.state_dict()["drawn"].items():
            share = weights[name] / sum(weights.values()) * total
            # 1e-6: rounding of the weights.
            assert share - length * len(weights) <= drawn <= share + length + 1e-6


@given(weights, st.integers(1, 60), st.integers(0, 2**31))
def test_epochs_are_what_was_drawn_over_what_there_is(weights, length, seed):
    """None at the start; of full rows, their tokens over the tokens of the source, and all sources together."""
    sources = make_sources(seed)
    mixture = Mixture(sources, weights, length, "truncate", seed)
    sizes = {name: sum(map(len, sources[name])) for name in weights}
    for rows in range(4):
        assert mixture.epochs.keys() == {"a", "b"}
        drawn = sum(mixture.epochs[name] * sizes[name] for name in mixture.epochs)
        assert drawn == pytest.approx(3 * rows * length)
        mixture.next(3)


@given(st.integers(2, 60), st.integers(0, 2**31))
def test_truncation_gives_no_token_twice_in_an_epoch(length, seed):
    """The rows of an epoch are full and share no token; fewer tokens than a row are left out of it."""
    sources = make_sources(seed, "a")
    size = sum(map(len, sources["a"]))
    mixture = Mixture(sources, {"a": 1}, length, "truncate", seed)
    for _ in range(3):
        seen = real(mixture.next(max(1, size // length)), "a", sources)
        assert len(set(seen)) == min(size, len(seen))
        assert size - len(set(seen)) < length


@given(st.integers(2, 60), st.integers(1, 4), st.integers(0, 2**31))
def test_best_fit_gives_every_token_equally_often(length, rows, seed):
    """Counting what was given and what waits in the pool, no token is more than one time ahead of another."""
    sources = make_sources(seed, "a")
    size = sum(map(len, sources["a"]))
    seen = []
    mixture = Mixture(sources, {"a": 1}, length, "best_fit", seed)
    for _ in range(12):
        seen += real(mixture.next(rows), "a", sources)
        waiting = [
            sources["a"][d][start:stop] for _, d, start, stop in mixture.state_dict()["pool"]
        ]
        counts = np.bincount([*seen, *(int(t) for span in waiting for t in span)], minlength=size)
        assert counts.max() - counts.min() <= 1


@given(st.integers(4, 60), st.integers(0, 2**31), st.integers(1, 4))
def test_best_fit_keeps_documents_whole(length, seed, rows):
    """A document that fits a row is read from its first token to its last, in one piece."""
    sources = make_sources(seed, "ab")
    whole = {tuple(d.tolist()) for some in sources.values() for d in some if len(d) <= length}
    mixture = Mixture(sources, {"a": 1, "b": 1}, length, "best_fit", seed)
    for _ in range(5):
        batch = mixture.next(rows)
        check_batch(batch)
        for tokens, ids in zip(batch.tokens_BS, batch.documents_BS, strict=True):
            for document in range(int(ids.max()) + 1):
                span = tuple(tokens[ids == document].tolist())
                assert span in whole or len(span) <= length
                assert not any(set(span) & set(d) and span != d for d in whole)


@given(packings, st.integers(1, 3), st.integers(0, 2**31))
def test_ranks_share_one_stream(packing, ranks, seed):
    """The rows of all ranks together are the rows of one process, whatever the number of ranks."""
    sources = make_sources(seed)
    one = Mixture(sources, {"a": 1, "b": 1}, 16, packing, seed)
    many = []
    many = [Mixture(sources, {"a": 1, "b": 1}, 16, packing, seed) for _ in range(ranks)]
    for _ in range(4):
        whole = one.next(6).tokens_BS
        for rank, mixture in enumerate(many):
            assert mixture.next(6, rank, ranks).tokens_BS.tolist() == whole[rank::ranks].tolist()


@given(packings, st.lists(st.integers(1, 6), min_size=2, max_size=5), st.integers(0, 2**31))
def test_a_run_resumes_on_another_number_of_ranks(packing, worlds, seed):
    """Whatever the number of ranks in each leg of a run, with the state passed through JSON from any rank, the rows of
    all ranks are those of one process that was never stopped."""
    sources = make_sources(seed)

    def new():
        return Mixture(sources, {"a": 1, "b": 2}, 16, packing, seed)

    alone = new()
    state = None
    for ranks in worlds:
        mixtures = [new() for _ in range(ranks)]
        for mixture in mixtures if state else []:
            mixture.load_state_dict(json.loads(state))
        for _ in range(2):
            whole = alone.next(12)
            for rank, mixture in enumerate(mixtures):
                mine = mixture.next(12, rank, ranks)
                assert mine.tokens_BS.tolist() == whole.tokens_BS[rank::ranks].tolist()
                assert mine.mask_BS.tolist() == whole.mask_BS[rank::ranks].tolist()
        states = {json.dumps(mixture.state_dict()) for mixture in mixtures}
        assert len(states) == 1, "ranks do not agree on where they are"
        (state,) = states


@given(packings, st.integers(0, 2**31))
def test_masked_tokens_are_never_targets(packing, seed):
    """A target is a token whose own mask is True, in either packing."""
    sources = make_sources(seed, "ab")
    rng = np.random.default_rng(seed)
    masks = {"b": [rng.random(len(d)) < 0.5 for d in sources["b"]]}
    targets = {
        int(t)
        for d, m in zip(sources["b"], masks["b"], strict=True)
        for t, kept in zip(d, m, strict=True)
        if kept
    }
    targets |= {int(t) for d in sources["a"] for t in d}
    mixture = Mixture(sources, {"a": 1, "b": 1}, 20, packing, seed, masks)
    for _ in range(5):
        batch = mixture.next(3)
        assert set(batch.tokens_BS[batch.mask_BS].tolist()) <= targets


def test_every_document_is_given_within_a_few_batches():
    """A document of awkward length is not passed over for ever: after three epochs all have come."""
    sources = {"a": [np.array([n] * size) for n, size in enumerate([17, 17, 17, *[10] * 60])]}
    mixture = Mixture(sources, {"a": 1}, 20, "best_fit", 0)
    seen = set()
    while mixture.epochs["a"] < 3:
        seen |= set(mixture.next(2).tokens_BS.flatten().tolist())
    assert seen == set(range(63))


def test_bad_mixtures_are_refused():
    """A missing source, a bad weight or packing, an empty source and masks of other lengths each name themselves."""
    sources = {"code": [np.arange(3)], "empty": []}
    for weights, said in (
        ({"cod": 1}, "names the source 'cod'; the corpus has code, empty"),
        ({"code": -1}, "gives 'code' the weight -1"),
        ({"code": float("nan")}, "gives 'code' the weight nan"),
        ({"code": 0}, "at least one source with a positive weight"),
        ({"empty": 1}, "source 'empty' has no tokens"),
    ):
        with pytest.raises(ValueError, match=said):
            Mixture(sources, weights, 8)
    with pytest.raises(ValueError, match="packing = 'best'"):
        Mixture(sources, {"code": 1}, 8, "best")
    with pytest.raises(ValueError, match="masks of source 'code'"):
        Mixture(sources, {"code": 1}, 8, masks={"code": [np.ones(2, dtype=bool)]})
    state = Mixture(sources, {"code": 1}, 8).state_dict()
    with pytest.raises(ValueError, match="saved mixture has sources"):
        Mixture({"a": [np.arange(3)]}, {"a": 1}, 8).load_state_dict(state)


def document(text, source, n=0):
    return Document(text, source, "python" if source == "code" else "en", 1.0, f"{source}/{n}")


@given(
    st.lists(st.sampled_from(["code", "prose"]), max_size=6), st.floats(0, 1), st.integers(0, 2**31)
)
def test_tokenised_documents_decode_to_their_texts(kinds, rate, seed):
    """Every array ends with the end token; undone, a source's arrays are its texts in order."""
    documents = [
        document(f"def f{n}(x):\n    return {n}\n\n" * (n + 1), kind, n)
        for n, kind in enumerate(kinds)
    ]
    options = FimOptions(rate, 40, seed)
    shards = tokenize(documents, TOKENIZER, options)
    again = tokenize(documents, TOKENIZER, options)
    for source, arrays in shards.items():
        assert all(array.dtype == np.uint16 and array[-1] == TOKENIZER.end for array in arrays)
        assert [a.tolist() for a in arrays] == [a.tolist() for a in again[source]]
        text = "".join(unfim(array[:-1].tolist(), TOKENIZER) for array in arrays)
        assert text == "".join(d.text for d in documents if d.source == source)
    assert set(shards) == set(kinds)
    halves = [
        tokenize(documents[:3], TOKENIZER, options),
        tokenize(documents[3:], TOKENIZER, options, 3),
    ]
    for source, arrays in shards.items():  # in two parts as in one
        joined = [a.tolist() for half in halves for a in half.get(source, [])]
        assert joined == [a.tolist() for a in arrays]
