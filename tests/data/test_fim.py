"""Fill in the middle: reversible for any text, and off when the rate is zero."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.data.fim import fim, rewrite, spans
from minglm.data.tokenizer import Tokenizer
from minglm.testing.data import check_fim, unfim
from minglm.testing.strategies import texts

TOKENIZER = Tokenizer.train(["def f(x):\n    return x\n"] * 5, 320)
CODE = texts(["a = 1\n", "\n", "# <|code_prefix|>\n"])


def test_contract_holds():
    """Our rewriting keeps the contract."""
    check_fim(fim, TOKENIZER)


def drops_suffix(text, tokenizer, rng):
    """Broken: lose the second half of a document, but for its last two tokens."""
    ids = fim(text, tokenizer, rng)
    if len(text) < 3:
        return ids
    return ids[: len(ids) // 2] + ids[-2:]


def psm_only(text, tokenizer, rng):
    ids = fim(text, tokenizer, rng)
    while ids[0] != tokenizer.special["<|code_prefix|>"]:
        ids = fim(text, tokenizer, rng)
    return ids


def never_cuts(text, tokenizer, rng):
    names = ("prefix", "suffix") if rng.random() < 0.5 else ("suffix", "prefix")
    first, second = (tokenizer.special[f"<|code_{name}|>"] for name in names)
    return [first, second, tokenizer.special["<|code_middle|>"], *tokenizer.encode(text)]


@pytest.mark.parametrize("broken", [drops_suffix, psm_only, never_cuts])
def test_contract_rejects_a_broken_twin(broken):
    """Losing text, one order only, or cuts that never fall inside fail the contract."""
    with pytest.raises((AssertionError, ValueError)) as caught:
        check_fim(broken, TOKENIZER)
    assert caught.type is AssertionError or broken is drops_suffix


@given(CODE, st.integers(0, 40))
def test_spans_join_to_the_text(text, characters):
    """Spans are whole lines, at most as long as asked unless a single line is longer, and joined they are the text."""
    found = spans(text, characters)
    assert "".join(found) == text
    if characters:
        assert all(len(span) <= characters or len(span.splitlines()) == 1 for span in found if span)


@given(CODE, st.integers(1, 40))
def test_spans_are_as_long_as_they_may_be(text, characters):
    """A span ends only where the next line does not fit, and none is empty."""
    found = spans(text, characters)
    assert all(found) or found == [""]
    for span, following in itertools.pairwise(found):
        assert len(span) + len(following.splitlines(keepends=True)[0]) > characters


def test_a_line_that_just_fits_stays():
    """At most so many characters: the bound itself is allowed."""
    assert spans("ab\ncd\nef\n", 6) == ["ab\ncd\n", "ef\n"]
    assert spans("ab\ncd\n", 5) == ["ab\n", "cd\n"]


def test_every_pair_of_places_is_equally_likely():
    """Of one character the middle is empty before it, empty after it, or all: a quarter, a quarter, a half."""
    rng = np.random.default_rng(0)
    marker = TOKENIZER.special["<|code_middle|>"]
    found = {"before": 0, "after": 0, "all": 0}
    for _ in range(4000):
        ids = fim("a", TOKENIZER, rng)
        if ids[-1] != marker:
            found["all"] += 1
        else:
            prefix = ids[ids.index(TOKENIZER.special["<|code_prefix|>"]) + 1]
            found["before" if prefix in TOKENIZER.special.values() else "after"] += 1
    for name, share in (("before", 0.25), ("after", 0.25), ("all", 0.5)):
        # four standard deviations of a share of 4,000
        assert abs(found[name] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5, found


@given(CODE, st.floats(0, 1), st.integers(0, 40), st.integers(0, 2**31))
def test_rewriting_keeps_the_text_and_the_order(text, rate, characters, seed):
    """Undoing each sequence of a rewritten text, in order, gives the text."""
    sequences = rewrite(text, TOKENIZER, np.random.default_rng(seed), rate, characters)
    assert "".join(unfim(ids, TOKENIZER) for ids in sequences) == text


@given(CODE, st.integers(0, 40), st.integers(0, 2**31))
def test_rate_zero_is_plain_and_rate_one_is_everything(text, characters, seed):
    """At rate 0 the ids are those of the text; at rate 1 every span carries the markers."""
    rng = np.random.default_rng(seed)
    plain = rewrite(text, TOKENIZER, rng, 0.0, characters)
    assert plain == ([TOKENIZER.encode(text)] if text else [])
    rewritten = rewrite(text, TOKENIZER, rng, 1.0, characters)
    assert len(rewritten) == len(spans(text, characters))
    assert all(TOKENIZER.special["<|code_middle|>"] in ids for ids in rewritten)


def test_rate_is_the_share_of_spans():
    """Over 4,000 spans at rate 0.3 the share rewritten is 0.3 within four standard deviations (0.029)."""
    text = "a = 1\n" * 4000
    sequences = rewrite(text, TOKENIZER, np.random.default_rng(0), 0.3, 6)
    share = sum(TOKENIZER.special["<|code_middle|>"] in ids for ids in sequences) / 4000
    assert abs(share - 0.3) < 0.029


def test_unfim_refuses_what_is_not_one_rewritten_text():
    """A missing or repeated part, or text before the first marker, is a ValueError."""
    ids = fim("abcdef", TOKENIZER, np.random.default_rng(0))
    for wrong in (ids[1:], ids + ids, [5, *ids]):
        with pytest.raises(ValueError, match="not a fill-in-the-middle sequence"):
            unfim(wrong, TOKENIZER)
