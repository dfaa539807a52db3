"""The needle test on models that are told what to say, and bits per byte by position against sums written out."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.scripted import byte_tokenizer, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.config import load_config
from minglm.eval.needles import (
    DEPTHS,
    Needle,
    answer_scores,
    bin_edges,
    bits_by_position,
    hide,
    measure,
    needle_test,
)
from minglm.eval.needles import written_needles as written
from minglm.eval.text import bits_per_byte
from minglm.model.glm import Output
from minglm.testing.model import tiny_model
from minglm.testing.strategies import seeds

V = 40
ids = st.lists(st.integers(0, V - 1), min_size=1, max_size=4)
TEXTS = (
    "the order is cancelled in the shop, 38+7=45; " * 3,
    "两个 words é " * 9,
    "a",
    "return pending get_order " * 4,
)


def told(say, reach=10**9):
    """Return a model whose most probable next id at position s of a row is say(row[max(0, s + 1 - reach) : s + 1])."""

    def hidden(tokens_BS):
        said = [
            [say(row[max(0, s + 1 - reach) : s + 1]) for s in range(len(row))]
            for row in tokens_BS.tolist()
        ]
        return Output(torch.nn.functional.one_hot(torch.tensor(said), V).float() * 9)

    return SimpleNamespace(hidden=hidden, lm_head=lambda x: x, device=torch.device("cpu"))


@given(statement=ids, question=ids, answer=ids, room=st.integers(0, 30), depth=st.floats(0, 1))
def test_a_row_holds_everything_once(statement, question, answer, room, depth):
    """A row has exactly its length: the filler in order, the needle at its depth, question and answer at the end."""
    needle = Needle(statement, question, answer)
    filler = np.arange(100, 140)
    length = room + len(statement) + len(question) + len(answer)
    row = hide(filler, needle, length, depth).tolist()
    at = round(depth * room)
    assert row == [
        *range(100, 100 + at),
        *statement,
        *range(100 + at, 100 + room),
        *question,
        *answer,
    ]


def test_what_does_not_fit_is_refused():
    """A row shorter than the needle, or a filler shorter than the row, is one clear line."""
    needle = Needle([1, 2, 3], [1, 2], [3])
    with pytest.raises(ValueError, match="a needle of 6 tokens does not fit into a row of 5"):
        hide(np.arange(9), needle, 5, 0.5)
    with pytest.raises(ValueError, match="a row of 20 tokens needs 14 tokens of filler, got 9"):
        hide(np.arange(9), needle, 20, 0.5)


MARK = 30  # an id that no filler has; what follows it first in the row is the answer
LENGTHS = (16, 40)


def searched(reach):
    """Return the needle test of a model that sees the last `reach` ids and repeats what followed MARK in them."""

    def say(seen):
        return seen[seen.index(MARK) + 1] if MARK in seen[:-1] else 0

    needles = [Needle([MARK, answer], [MARK], [answer]) for answer in (33, 34, 35, 36)]
    return needle_test(told(say, reach), np.arange(200) % 20, needles, LENGTHS)


def test_a_model_that_reads_everything_finds_everything():
    """Found is one at every length and depth for a model that looks the answer up, and zero for one that never does."""
    records = searched(10**9)
    assert [(r.length, r.depth) for r in records] == [(n, d) for n in LENGTHS for d in DEPTHS]
    sure = pytest.approx(math.log(1 + 39 * math.exp(-9)), abs=1e-5)  # float32, logits of 9
    assert all(r.found == 1 and r.nats == sure for r in records)
    assert all(r.found == 0 and r.nats > 9 for r in searched(1))


@given(reach=st.integers(2, 40))
def test_a_model_with_a_window_finds_what_is_in_it(reach):
    """With a window of so many ids, exactly the needles no further from the question are found."""
    for record in searched(reach):
        begin = round(record.depth * (record.length - 4))
        assert record.found == float(record.length - 1 - begin <= reach), record


def test_one_wrong_token_is_a_wrong_answer():
    """An answer of several tokens counts when all are right; answers of other sizes may stand in one batch."""
    rows = [np.array([1, 2, 3, 4]), np.array([1, 2, 3, 9]), np.array([7, 5, 6, 7])]
    scores = answer_scores(told(lambda seen: (seen[-1] + 1) % V), rows, [2, 2, 3])
    assert [right for right, _ in scores] == [1, 0, 0]
    right_nats = scores[0][1]
    wrong_nats = 9 + math.log(1 + 39 * math.exp(-9))
    assert right_nats < 0.1
    assert scores[1][1] == pytest.approx((right_nats + wrong_nats) / 2)
    assert scores[1][1] > 4


@settings(max_examples=8)
@given(seed=seeds, count=st.integers(1, 9))
def test_scores_are_those_of_each_row_alone(seed, count):
    """Rows in one pass score as the plain forward pass of each."""
    model = tiny_model(seed)
    random = np.random.default_rng(seed)
    rows = list(random.integers(0, 24, (count, 12)))
    sizes = random.integers(1, 4, count).tolist()
    for row, size, (right, nats) in zip(rows, sizes, answer_scores(model, rows, sizes)):
        with torch.no_grad():
            log_p_SV = model(torch.tensor(row)[None])[0].log_softmax(-1)
        answer = torch.tensor(row[-size:])
        before_SV = log_p_SV[-size - 1 : -1]  # the positions that predict the answer
        assert right == (before_SV.argmax(1) == answer).all()
        wanted = -before_SV.gather(1, answer[:, None]).mean().item()
        assert nats == pytest.approx(wanted, rel=1e-4)  # float32, products of other shapes


@given(count=st.integers(1, 30), seed=seeds)
def test_written_needles_end_in_their_answer(count, seed):
    """The question leads to the answer as the statement did, no key comes twice, and the same seed gives the same."""
    tokenizer = byte_tokenizer()
    needles = written(tokenizer, count, seed)
    for needle in needles:
        assert needle.statement[: len(needle.question) + len(needle.answer)] == [
            *needle.question,
            *needle.answer,
        ]
    assert len({tuple(needle.answer) for needle in needles}) == count
    assert needles == written(tokenizer, count, seed)


def test_every_key_has_four_digits():
    """As many needles as there are keys of four digits have all of them."""
    tokenizer = byte_tokenizer()
    keys = [tokenizer.decode(needle.answer) for needle in written(tokenizer, 9000)]
    assert sorted(keys) == [f" {key}" for key in range(1000, 10_000)]


@given(length=st.integers(1, 5000))
def test_bins_cover_a_row_once(length):
    """Bins begin at 0, end at the length, and each is as long as all before it, but for the first and the last."""
    found = bin_edges(length)
    assert found[0] == 0
    assert found[-1] == length
    assert found == sorted(set(found))
    assert all(b == 2 * a for a, b in pairwise(found[1:-1]))


@settings(max_examples=8)
@given(seed=seeds, length=st.sampled_from([20, 64, 70, 100]))
def test_bits_by_position_are_sums_over_positions(seed, length):
    """The sum of -log2 p over a bin's tokens by a plain pass of each row, over the bytes of those tokens."""
    tokenizer = word_tokenizer()
    model = tiny_model(seed, vocab_size=330)
    documents = [np.array([*tokenizer.encode(text), tokenizer.end]) for text in TEXTS]
    rows = [d[a : a + length] for d in documents for a in range(0, len(d) - length + 1, length)]
    found = bits_by_position(model, tokenizer, documents, length, 10**6)
    if not rows:
        assert found is None
        return
    assert [(a, b) for a, b, _ in found] == list(pairwise(bin_edges(length)))
    for first, end, bits in found:
        nats = size = 0.0
        for row in rows:
            with torch.no_grad():
                log_p_SV = model(torch.tensor(row)[None])[0].log_softmax(-1)
            nats -= sum(log_p_SV[s - 1, row[s]].item() for s in range(max(1, first), end))
            size += len(tokenizer.bytes(row[max(1, first) : end], skip_special=True))
        assert bits == (pytest.approx(nats / math.log(2) / size, rel=1e-4) if size else None)
    if len(found) == 1 and all(len(d) % length == 0 for d in documents if len(d) >= length):
        long = [d for d in documents if len(d) >= length]
        assert found[0][2] == pytest.approx(
            bits_per_byte(model, tokenizer, long, length, 10**6), rel=1e-4
        )


def test_a_longer_stage_logs_both():
    """Needles at the old length, half of the new and the new, each depth; bits for every source with long documents."""
    tokenizer = byte_tokenizer()
    model = tiny_model(1, vocab_size=292)
    heldout = {
        "prose": [np.array(tokenizer.encode("so it goes " * 20))],
        "code": [],
        "math": [np.arange(9)],
    }
    stages = {
        "code_reasoning.sequence_length": 100,
        "repository.tokens": 0,
        "reasoning.sequence_length": 210,
    }
    stages |= {"repository.sequence_length": 150}
    options = [word for name, value in stages.items() for word in (f"--stages.{name}", str(value))]
    run = load_config(
        "configs/nano.py",
        [*options, "--evaluation.needles", "2", "--evaluation.heldout_tokens", "500"],
    )
    found = list(measure(model, tokenizer, heldout, run, "reasoning"))
    needles = [record for record in found if record.kind == "needle"]
    assert [(r.length, r.depth) for r in needles] == [
        (n, d) for n in (100, 105, 210) for d in DEPTHS
    ]
    (bits,) = [record for record in found if record.kind == "bits_by_position"]
    assert bits.source == "prose" and bits.bits[-1][1] == 210
    assert not list(measure(model, tokenizer, heldout, run, "general")), (
        "nothing was shorter before it"
    )
    off = load_config("configs/nano.py", options)
    assert not list(measure(model, tokenizer, heldout, off, "reasoning")), "off unless asked for"
