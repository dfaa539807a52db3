"""The corpus: repeatable, bounded, nothing held out leaks into training. Your own files: tests/test_sources.py."""

import pytest
from helpers.documents import read_corpus
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import DataConfig
from minglm.data.cleaning.exact import digest, originals
from minglm.data.sources import files as sources
from minglm.data.sources.corpus import bounded, docstrings
from minglm.data.sources.files import SYNTHETIC_SOURCES, is_heldout, repositories
from minglm.data.store.documents import Document

SMALL = DataConfig(corpus_megabytes=0.7, synthetic_documents=40, heldout=0.2)


@pytest.fixture(scope="module")
def documents():
    return read_corpus(SMALL, 0)


def test_every_source_is_there_and_bounded(documents):
    """Each built-in source has documents, no more text than asked for, names of its own and a quality in 0..1."""
    for source in sources.BUILT_IN_SOURCES:
        some = [d for d in documents if d.source == source]
        assert some, source
        assert sum(len(d.text.encode()) for d in some) <= 0.7e6, source
        assert len({d.name for d in some}) == len(some)
    assert all(0 <= d.quality <= 1 and d.text.strip() for d in documents)


def test_build_is_repeatable_and_the_seed_only_moves_synthetic_text(documents):
    """The same config and seed give the same documents; another seed changes the generated ones alone."""
    assert read_corpus(SMALL, 0) == documents
    other = read_corpus(SMALL, 1)
    read = [d for d in documents if d.source not in SYNTHETIC_SOURCES]
    assert [d for d in other if d.source not in SYNTHETIC_SOURCES] == read
    assert [d for d in other if d.source == "math"] != [d for d in documents if d.source == "math"]


def test_no_heldout_text_stands_in_a_training_document(documents):
    """Every held-out text is absent from all training text, repositories and docstrings included."""
    training = "\0".join(d.text for d in documents if not d.heldout)
    heldout = [d for d in documents if d.heldout]
    assert {d.source for d in heldout} >= {"code", "prose", "math", "qa"}
    assert not [d.name for d in heldout if d.text.strip() in training]
    # and the same for what repositories strip or re-indent: a held-out file's header is in no repository
    assert not [
        d.name
        for d in heldout
        if d.source == "code" and f"# {d.name.removeprefix('python/')}\n" in training
    ]


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_heldout_shares_are_nested(name, one, other):
    """What a small share holds out, a larger one holds out too; 0 holds out nothing and 1 everything."""
    small, large = sorted((one, other))
    assert not is_heldout(name, 0.0) and is_heldout(name, 1.0)
    assert is_heldout(name, large) or not is_heldout(name, small)


def test_heldout_is_the_share():
    """Of 4,000 names 5 % are held out, within four standard deviations (1.4 %)."""
    assert abs(sum(is_heldout(f"name/{n}", 0.05) for n in range(4000)) / 4000 - 0.05) < 0.014


def file(name, text, repository=None, heldout=False):
    return Document(text, "code", "python", 0.5, name, repository, heldout)


def test_docstrings_follow_their_file():
    """A docstring is held out only when all files that have it are, and stands once; labels are left out."""
    long = "All the words of a long docstring. " * 5
    other = "Quite another long docstring, for a test. " * 4
    both = f'def f():\n    """{long}"""\n\ndef g():\n    """Short."""\n'
    found = list(
        docstrings(
            [
                file("a", both, heldout=True),
                file("b", f'"""{other}"""\n', heldout=True),
                file("c", both),
            ]
        )
    )
    assert [(d.text, d.heldout) for d in found] == [(long.strip(), False), (other.strip(), True)]


def test_repositories_leave_heldout_files_out():
    """A repository document is made of two training files or more, and holds no held-out one."""
    files = [file(f"r/{n}.py", f"x = {n}{n}{n}\n", "r", heldout=n == 2) for n in range(3)]
    (joined,) = repositories(files)
    assert joined.source == "repository" and "111" in joined.text and "222" not in joined.text
    assert not list(repositories(files[1:]))
    assert not list(repositories([file("a.py", "x"), file("b.py", "y")]))


@given(st.lists(st.integers(0, 50), max_size=12), st.floats(0, 300))
def test_bounded_keeps_order_and_bound(sizes, limit):
    """What is kept is in order and within the bound, and whatever was left out did not fit any more."""
    some = [file(f"f{n}", "x" * size) for n, size in enumerate(sizes)]
    kept = bounded(some, limit / 1e6)
    total = sum(len(d.text) for d in kept)
    assert [d for d in some if d in kept] == kept
    assert total <= limit + 1e-6
    assert all(total + len(d.text) > limit - 1e-6 for d in some if d not in kept)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["code", "prose"]), st.booleans()),
        max_size=20,
    )
)
def test_exact_copies_go_and_training_text_is_not_held_out(drawn):
    """Each (source, text) stays once, the first in training if any is, else the first; the order stays."""
    some = [
        Document(text, source, "en", 0.5, f"{n}", None, heldout)
        for n, (text, source, heldout) in enumerate(drawn)
    ]
    stay = [some[i] for i in originals([(digest(d), d.heldout) for d in some])]
    assert [d for d in some if d in stay] == stay
    assert sorted({(d.source, d.text) for d in some}) == sorted((d.source, d.text) for d in stay)
    for one in stay:
        copies = [d for d in some if (d.source, d.text) == (one.source, one.text)]
        assert one == min(copies, key=lambda d: d.heldout)
