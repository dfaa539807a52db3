"""Decontamination: its contract with broken twins, the words it counts, and the run that uses it."""

import dataclasses
import re

import numpy as np
import pytest
from helpers.documents import decontaminate
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import load_config
from minglm.data import build
from minglm.data.cleaning import shingles
from minglm.data.cleaning.decontaminate import Index
from minglm.data.store.documents import Document, write_documents
from minglm.envs import ENVIRONMENTS
from minglm.eval.tasks import TEST_SEED
from minglm.recipe.solutions import evaluation_texts
from minglm.testing.cleaning import check_decontamination
from minglm.testing.strategies import texts

CONFIG = "configs/nano.py"


def test_decontamination_keeps_its_contract():
    """Copies of evaluation items go, innocent documents stay."""
    check_decontamination(decontaminate)


def _runs(text, n):
    """Return every run of n words of a text; a Chinese character is a word."""
    words = re.findall(r"[\u4e00-\u9fff]|\w+", text.lower())
    starts = range(len(words) - n + 1)
    return {tuple(words[i : i + n]) for i in starts}


def by(predicate):
    """Return a decontaminator that removes a document when predicate(its text, an item) holds for any item."""

    def twin(documents, sets):
        items = [text for texts in sets.values() for text in texts]
        return [d for d in documents if not any(predicate(d.text, item) for item in items)]

    return twin


BROKEN = {
    "keeps everything": (by(lambda text, item: False), "copies of test items were kept"),
    "compares characters": (
        by(lambda text, item: len(item) > 30 and item in text),
        "copies of test items were kept",
    ),
    "any run of 13": (
        by(lambda text, item: bool(_runs(text, 13) & _runs(item, 13))),
        "copies of test|of the innocent",
    ),
    "any run of 3": (
        by(lambda text, item: bool(_runs(text, 3) & _runs(item, 3))),
        "of the innocent ones, only",
    ),
    "any run of 8": (
        by(lambda text, item: bool(_runs(text, 8) & _runs(item, 8))),
        "of the innocent ones, only",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_contract_finds_broken_decontamination(name):
    """Each broken twin fails with the property it breaks."""
    twin, said = BROKEN[name]
    with pytest.raises(AssertionError, match=said):
        check_decontamination(twin)


@given(st.lists(texts(), max_size=12), st.integers(1, 200))
def test_a_text_has_the_same_words_in_any_company(some, chunk):
    """Hashes of words and runs of a text do not depend on the texts beside it, nor on how much is hashed at a time."""
    alone = [
        np.concatenate([words.hashes for words in shingles.hash_words_in_batches([text])])
        for text in some
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shingles, "BATCH_CHARACTERS", chunk)
        together = shingles.hash_words_by_text(some)
        assert [a.tolist() for a in alone] == [b.tolist() for b in together]
        for text, found in zip(some, together, strict=True):
            whole = [
                [
                    runs.hashes.tolist()
                    for runs in shingles.ngrams(found, np.zeros(len(found), int), {n})
                ]
                for n in (2, 3)
            ]
            assert [len(w[0]) if w else 0 for w in whole] == [
                max(0, len(found) - 1),
                max(0, len(found) - 2),
            ]
            assert all(len(s) for s in shingles.shingles([text], 3))


@pytest.mark.parametrize(
    ("text", "same", "other"),
    [
        ("The cat, sat.", "the  CAT sat", "the cats at"),
        ("2+3=5", "2 + 3 = 5", "2-3=5"),
        ("你好，世界", "你 好世界！", "你好世"),
        ("ﬁne ①", "fine 1", "fine 2"),
        ("a b", "a\nb", "b a"),
        ("été", "e\u0301te\u0301", "ete"),
    ],
)
def test_what_counts_as_the_same_words(text, same, other):
    """Case, spacing, punctuation and compatibility forms are folded; operators, letters and order are not."""
    hashes = [found.tolist() for found in shingles.hash_words_by_text([text, same, other])]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("letter", "words"),
    [
        *[
            (letter, 2)
            for letter in "\u3041\u30fa\u3400\u4dbf\u4e00\u9fff\ufa0e\U00020000\U00030000"
        ],
        *[(letter, 1) for letter in "\u3005\u3105\u31f0\ua000\uac00aé"],
    ],
)
def test_which_scripts_have_no_spaces(letter, words):
    """A Chinese character or a kana is a word, to the edges of their blocks; of other scripts two letters are one."""
    (found,) = shingles.hash_words_by_text([letter * 2])
    assert len(found) == words


def test_hashes_of_words_are_those_of_a_loop():
    """The vectorised hash is the sum over characters that the module's docstring gives, on text of three scripts."""
    word = int(shingles.WORD_BASE)
    both = 2**64 - 1

    def mix(x):
        return int(shingles.mix(np.array([x & both], np.uint64))[0])

    def loop(letters):
        return mix(
            sum(mix((ord(c) + 1) * word) * pow(word, k + 1, 2**64) for k, c in enumerate(letters))
            & both
        )

    (found,) = shingles.hash_words_by_text(["Zwölf Boxer-Kämpfer, 12 世界"])
    assert found.tolist() == [loop(w) for w in ["zwölf", "boxer", "-", "kämpfer", "12", "世", "界"]]


def clean(run, documents, folder):
    """Return (names of the training documents that stay, what each step took)."""
    times, done = build.clean(
        run,
        write_documents(documents, folder / "documents"),
        folder,
        lambda: evaluation_texts(run),
    )
    return {d.name for d, n in zip(documents, times, strict=True) if n}, done


def test_a_planted_test_task_is_removed_and_an_innocent_page_stays(tmp_path):
    """A page that quotes a task of the test split goes, with its set in the log; the same page without it stays; with
    the search turned off both stay."""
    run = load_config(CONFIG)
    run = dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, problems=40))
    task = max(
        ENVIRONMENTS["code"].tasks(40, TEST_SEED, "test"),
        key=lambda t: len(t.messages[-1]["content"]),
    )
    innocent = Document(
        "A page of sums: 2+2=4, 3+3=6, write it as you like. " * 3, "math", "en", 0.5, "innocent"
    )
    quoting = dataclasses.replace(
        innocent, text=f"{innocent.text} Exam: {task.messages[-1]['content']}", name="quoting"
    )
    kept, done = clean(run, [innocent, quoting], tmp_path)
    assert kept == {"innocent"}
    assert done["decontamination"]["removed"] == {"tasks:code": 1}
    off = dataclasses.replace(run, data=dataclasses.replace(run.data, decontaminate=0))
    kept, done = clean(off, [innocent, quoting], tmp_path)
    assert kept == {"innocent", "quoting"} and "decontamination" not in done


def test_counts_say_what_was_and_was_not_searched():
    """Copies of one item count once; items that are too short are counted as not searched."""
    index = Index({"x": ["a b c d e f g h", "A b, c d e f g h", "too short"], "y": []})
    assert (index.searched, index.not_searched) == ({"x": 1, "y": 0}, {"x": 1, "y": 0})
    assert index.search(["", "a b c d e f g h i", "too short"]) == {1: "x"}
    assert Index({}).search(["anything"]) == {} == Index({"x": ["short"]}).search([])


@pytest.mark.parametrize(
    "item, quoted, is_copy", [(14, 13, True), (14, 12, False), (15, 13, False)]
)
def test_half_of_the_runs_of_13_words_make_a_copy(item, quoted, is_copy):
    """13 of an item's 14 words are one of its two runs, 13 of 15 one of three, and 12 are no run."""
    words = [f"word{i}" for i in range(15)]
    index = Index({"x": [" ".join(words[:item])]})
    assert bool(index.search([" ".join(words[:quoted])])) == is_copy


def test_short_runs_are_refused():
    """One line with field, value and remedy, from the config and from the function."""
    with pytest.raises(ValueError, match=r"data\.decontaminate = 7: .*use 8 to 13, or 0"):
        load_config(CONFIG, ["--data.decontaminate", "7"])
    with pytest.raises(ValueError, match="fewer than 8"):
        Index({}, 3)
