"""Quality: the rubric, the learned score with its contract and calibration, and the buckets."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.data.cleaning import classifier, quality
from minglm.data.cleaning.classifier import (
    Classifier,
    Judge,
    MarkedDocument,
    calibrate,
    calibration_error,
    features,
    fit,
    read_labels,
    train_judge,
)
from minglm.data.cleaning.shingles import hash_words_by_text
from minglm.data.store.documents import Document
from minglm.testing.cleaning import check_scorer, made_up
from minglm.testing.strategies import texts


@given(st.text(), st.sampled_from(["en", "zh", "python"]))
def test_quality_is_a_share_for_any_text(text, language):
    """Any text has a quality between 0 and 1, code that does not parse included."""
    assert 0 <= quality.score(text, language) <= 1


GOOD = '"""What it does."""\n\n\ndef add(a, b):\n    """The sum."""\n    return a + b  # exact for whole numbers\n'


@pytest.mark.parametrize(
    ("better", "worse", "language"),
    [
        (GOOD, GOOD.replace('    """The sum."""\n', ""), "python"),
        (GOOD, "x = [" + "1, " * 2000 + "]\n", "python"),
        (GOOD, "def broken(:\n", "python"),
        (
            "A sentence of quite ordinary words follows another one here. " * 4,
            "buy buy buy now !!! $$$ " * 20,
            "en",
        ),
        (
            "A sentence of quite ordinary words follows another one here. " * 4,
            "0.1 0.2 0.3 " * 50,
            "en",
        ),
    ],
)
def test_rubric_prefers(better, worse, language):
    """Documented code over bare, code over tables of numbers, sentences over shouting."""
    assert quality.score(better, language) > quality.score(worse, language)


def prose_mark(name, text):
    """One mark of a prose text."""
    return quality.prose_marks(text)[name]


@pytest.mark.parametrize(("letters", "mark"), [(100, 0.0), (135, 0.5), (170, 1.0), (200, 1.0)])
def test_letters_count_from_50_to_85_percent(letters, mark):
    """Of 200 characters, the others being digits; spaces and the marks of Hindi count as letters."""
    for kind in ("a", " ", "\u0901"):
        text = "a" + kind * (letters - 1) + "7" * (200 - letters)
        assert prose_mark("letters", text) == pytest.approx(mark)


@pytest.mark.parametrize(("letters", "mark"), [(100, 0.0), (130, 0.5), (160, 1.0)])
def test_letters_of_a_script_without_spaces_count_from_50_to_80_percent(letters, mark):
    """Its sentences are short, so their punctuation weighs more."""
    assert prose_mark("letters", "词" * letters + "，" * (200 - letters)) == pytest.approx(mark)


@pytest.mark.parametrize(
    ("words", "mark"),
    [(2, 0.0), (5, 0.5), (8, 1.0), (30, 1.0), (55, 0.5), (80, 0.0), (100, 0.0)],
)
def test_sentences_have_8_to_30_words(words, mark):
    """None below 2 or above 80; a text without an end is one sentence; two characters of Chinese are a word."""
    for copies, end in ((1, ""), (1, ". "), (3, "! "), (3, "\n \n"), (2, "? ")):
        assert prose_mark("sentence", ("word " * words + end) * copies) == pytest.approx(mark)
    for end in ("。", "！", "？"):
        assert prose_mark("sentence", ("这里" * words + end) * 3) == pytest.approx(mark)
    # an odd character of each piece is a word of its own
    assert prose_mark("sentence", ("词，" * words + "。") * 3) == pytest.approx(mark)


@pytest.mark.parametrize(("different", "mark"), [(40, 0.0), (70, 0.5), (100, 1.0), (200, 1.0)])
def test_variety_is_the_share_of_different_words_among_the_first_200(different, mark):
    """From 20% to 50%, capital letters or not; what comes after the 200 does not count."""
    names = [f"w{number}" for number in range(different)]
    words = (names + names * 5)[:200]
    text = " ".join(word.upper() if place % 2 else word for place, word in enumerate(words))
    assert prose_mark("variety", text) == pytest.approx(mark)
    assert prose_mark("variety", text + " w0" * 50) == pytest.approx(mark)
    assert prose_mark("variety", text + " another 9" * 50) == pytest.approx(mark)


@pytest.mark.parametrize(("size", "mark"), [(60, 0.0), (330, 0.5), (600, 1.0), (900, 1.0)])
def test_length_counts_from_60_to_600_characters(size, mark):
    """From 20 to 200 where a character is half a word: where more than half of the letters are such characters."""
    assert prose_mark("length", "a" * size) == pytest.approx(mark)
    assert prose_mark("length", "词" * (size // 2) + "a" * (size // 2)) == pytest.approx(mark)
    for share in (1.0, 0.6):
        dense = round(share * size) // 3
        text = "词" * dense + "a" * (size // 3 - dense)
        assert prose_mark("length", text) == pytest.approx(mark, abs=0.01)


def code_mark(name, lines, language="python"):
    """One mark of a program that has these lines."""
    return quality.code_marks("\n".join(lines), language)[name]


@pytest.mark.parametrize(("long", "mark"), [(0, 1.0), (2, 0.5), (4, 0.0), (6, 0.0)])
def test_lines_of_code_have_up_to_100_characters(long, mark):
    """All of them for the full mark, four fifths for none; empty lines do not count."""
    lines = ["x" * 100] * (20 - long) + ["x" * 101] * long + ["", " "] * 5
    assert code_mark("line", lines) == pytest.approx(mark)


@pytest.mark.parametrize(("comments", "mark"), [(0, 0.0), (1, 0.5), (2, 1.0), (9, 1.0)])
def test_comments_are_full_from_one_line_in_twenty(comments, mark):
    """Empty lines do not count."""
    lines = ["x = y  # why"] * comments + ["x = y"] * (40 - comments) + [""] * 9
    assert code_mark("comments", lines) == pytest.approx(mark)


@pytest.mark.parametrize(("data", "mark"), [(15, 1.0), (30, 1.0), (65, 0.5), (100, 0.0)])
def test_data_is_full_up_to_15_percent_and_none_at_50(data, mark):
    """Digits, brackets and commas among 200 characters."""
    assert code_mark("data", ["a" + "1" * data + "b" * (199 - data)]) == pytest.approx(mark)
    assert code_mark("data", [f"{'b' * 94}  # [1](2){{3}},\\" + "c" * 88]) == 1.0


@pytest.mark.parametrize(("documented", "mark"), [(0, 0.0), (3, 0.5), (6, 1.0), (10, 1.0)])
def test_definitions_are_documented(documented, mark):
    """Full from three of five functions; the docstring of the module does not count."""
    bare = ["def f():", "    return 1"]
    told = ["def f():", '    """Say what."""', "    return 1"]
    lines = told * documented + bare * (10 - documented)
    assert code_mark("documented", lines) == pytest.approx(mark)
    assert code_mark("documented", ['"""A module."""', *lines]) == pytest.approx(mark)


def test_the_score_is_the_mean_of_the_marks():
    """Prose and code by their kind; no letters, no text or no program at all is 0."""
    text = "Some words of a sentence that is short. " * 3
    marks = quality.prose_marks(text)
    assert quality.score(text) == pytest.approx(sum(marks.values()) / 4)
    marks = quality.code_marks(GOOD)
    assert quality.score(GOOD, "Python") == pytest.approx(sum(marks.values()) / 4)
    assert quality.score("7 " * 30) < quality.score("seven " * 30)
    assert quality.score("7" * 30) == quality.score(" \n") == quality.score("def (", "python") == 0


def test_buckets_at_their_bounds():
    """Of ten documents the lowest tenth is the worst one, the top two tenths the best two; by default a tenth each."""
    some = [document(f"{n}", n / 10) for n in range(10)]
    assert quality.epochs(some) == [0, *[1] * 8, 3]
    assert quality.epochs(some[::-1]) == [3, *[1] * 8, 0]
    assert quality.epochs(some, 0.3, 0.2, 2.0) == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2]
    assert quality.epochs(some, 0.5, 0.5, 4.0) == [0] * 5 + [4] * 5
    assert quality.epochs(some, 0.0, 0.0) == [1] * 10
    assert quality.epochs(some, 1.0, 0.0) == [0] * 10
    equal = [document(name, 0.5) for name in "ba"]  # of equals the later name is the better one
    assert quality.epochs(equal, 0.5, 0.5, 2.0) == [2, 0]
    for lowest, top in ((-0.1, 0.1), (0.1, -0.1), (0.6, 0.5)):
        with pytest.raises(ValueError, match="quality buckets"):
            quality.epochs(some, lowest, top)


def document(name, score, source="code", language="python"):
    return Document("x", source, language, score, name)


scores = st.lists(st.floats(0, 1), max_size=40)


@given(scores, scores, st.floats(0, 0.5), st.floats(0, 0.5), st.floats(1, 5))
def test_epochs_drop_the_lowest_and_repeat_the_highest(python, rust, lowest, top, repeat):
    """In each language the lowest share is dropped and the top share repeated, no document more often than a better
    one; other sources come once."""
    groups = [
        [document(f"p{n}", s) for n, s in enumerate(python)],
        [document(f"r{n}", s, language="rust") for n, s in enumerate(rust)],
    ]
    other = [document(f"m{n}", s, "qa", "en") for n, s in enumerate(python)]
    everything = [*groups[0], *groups[1], *other]
    epochs = quality.epochs(everything, lowest, top, repeat)
    times = {document.name: count for document, count in zip(everything, epochs, strict=True)}
    assert all(times[document.name] == 1 for document in other)
    for group in groups:
        mine = [times[document.name] for document in group]
        assert abs(mine.count(0) - lowest * len(group)) <= 1
        assert sum(count >= int(repeat) for count in mine) >= top * len(group) - 1
        assert set(mine) <= {0, 1, int(repeat), int(repeat) + 1}
        for a in group:
            for b in group:
                assert a.quality >= b.quality or times[a.name] <= times[b.name] + 1


def test_a_fraction_of_an_epoch_is_a_share_of_the_documents():
    """At 3.2 epochs a fifth of 2,000 documents come a fourth time, within four standard deviations."""
    times = quality.epochs([document(f"{n}", 0.5) for n in range(2000)], 0, 1, 3.2)
    assert set(times) == {3, 4} and abs(np.mean(times) - 3.2) < 0.036


def test_educational_pages_come_twice():
    """With a threshold, mathematics and science at or above it come twice, and nothing else does."""
    some = [
        document("a", 0.9, "math", "en"),
        document("b", 0.4, "science", "en"),
        document("c", 0.9, "qa", "en"),
    ]
    assert quality.epochs(some, educational_from=0.9) == [2, 1, 1]
    assert quality.epochs(some) == [1, 1, 1]


def test_buckets_that_overlap_are_refused():
    """Shares that sum to more than one are one line."""
    with pytest.raises(ValueError, match="quality buckets"):
        quality.epochs([], lowest_share=0.7, top_share=0.7)


def test_educational_share_prefers_explanations():
    """Computing and explaining counts, in both languages; only saying things does not."""
    assert quality.educational("Let x = 3. Then x+1 = 4, because 3+1 = 4.") == 1
    assert quality.educational("因为三加一等于四，所以答案是四。你好。") == 0.5
    assert quality.educational("Buy now. Great offers today. Click here.") == 0
    assert quality.educational("") == 0


def test_the_classifier_keeps_its_contract():
    """Scores are shares, repeatable, each text's own, in the right order and calibrated."""
    check_scorer(fit)


class Twin:
    def __init__(self, score):
        self.score = score


def uncalibrated(texts, marks, seed):
    model, about = fit(texts, marks, seed)
    return Classifier(model.weight, model.bias, model.a, model.b + 1.5), about


def by_rank(texts, marks, seed):
    model, about = fit(texts, marks, seed)
    return Twin(lambda some: model.score(some).argsort().argsort() / max(1, len(some))), about


def backwards(texts, marks, seed):
    return fit(texts, [1 - mark for mark in marks], seed)


def unseeded(texts, marks, seed):
    return fit(texts, marks, random.SystemRandom().getrandbits(30))


def logits(texts, marks, seed):
    model, about = fit(texts, marks, seed)
    return Twin(model.logits), about


BROKEN = {
    "not calibrated": (uncalibrated, "are not calibrated"),
    "ranks among the texts beside it": (by_rank, "depends on the other texts"),
    "upside down": (backwards, "do not order kinds"),
    "another seed each time": (unseeded, "score otherwise"),
    "before the sigmoid": (logits, "outside"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_contract_finds_a_broken_score(name):
    """Each broken twin fails with the property it breaks."""
    twin, said = BROKEN[name]
    with pytest.raises(AssertionError, match=said):
        check_scorer(twin)


@given(st.lists(texts(), max_size=8))
def test_features_are_unit_counts_of_words_and_pairs(some):
    """Every text with words has a vector of length one, with at most as many places as words and pairs; a text's
    features do not depend on the texts beside it."""
    text, place, value = features(some)
    for index, (one, found) in enumerate(zip(some, hash_words_by_text(some), strict=True)):
        mine = text == index
        assert int(mine.sum()) <= max(0, 2 * len(found) - 1)
        if len(found):
            length = float((value[mine] ** 2).sum())
            assert length == pytest.approx(1, abs=1e-5)  # float32
        alone = features([one])
        assert alone[1].tolist() == place[mine].tolist()
        assert torch.equal(alone[2], value[mine])


def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


@given(st.floats(0.2, 4), st.floats(-2, 2), st.integers(0, 2**31))
def test_calibration_finds_slope_and_shift(a, b, seed):
    """From 4,000 marks drawn with the chance sigmoid(a z + b) a and b come back, to five standard errors and a bit."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=4000)
    marks = rng.random(4000) < sigmoid(a * z + b)
    slope, shift = calibrate(z, marks)
    assert abs(slope - a) < 0.2 + 0.12 * a
    assert abs(shift - b) < 0.2 + 0.1 * abs(b) + 0.05 * a


def test_calibration_of_odd_marks_is_finite():
    """Marks that are all alike, that z separates, or that z turns round give finite numbers, and never a negative a."""
    z = np.linspace(-1, 1, 50)
    for marks in (np.ones(50), np.zeros(50), z > 0, z < 0, np.full(50, 0.3)):
        a, b = calibrate(z, marks)
        assert a >= 0 and np.isfinite([a, b]).all()
    _, shift = calibrate(z, np.full(50, 0.3))
    assert abs(sigmoid(shift) - 0.3) < 0.02


def test_calibration_error_is_the_mean_distance():
    """Scores of 0.9 of which half are right are 0.4 off; scores that are right are not off at all."""
    assert calibration_error([0.9] * 10, [0, 1] * 5) == pytest.approx(0.4)
    assert calibration_error([0.5] * 10 + [1.0], [0, 1] * 5 + [1]) == pytest.approx(0)
    assert classifier.reliability([0.05, 0.95, 1.0], [0, 1, 1]) == [
        (0.05, 0, 1),
        (pytest.approx(0.975), 1, 2),
    ]


def test_each_kind_has_its_own_judge(tmp_path):
    """What is good prose is bad code here, and each kind of document is judged by its own marks; a kind with too few
    keeps its rubric; saved and loaded, the judge says the same."""
    rng = random.Random(0)
    word = {True: made_up(rng, 5), False: made_up(rng, 5)}
    rows = []
    for n in range(200):
        good = n % 2 == 0
        text = " ".join(made_up(rng, 20) + word[good] * 2)
        rows += [
            (text, float(good), "prose", "en"),
            (text, float(not good), "code", "rust"),
            (text, good, "math", "en"),
        ]
    rows = [MarkedDocument(*row) for row in rows]
    few = [MarkedDocument("x", 1.0, "code", "go")] * 3
    judge, about = train_judge([*rows, *few])
    assert set(judge.models) == set(about) == {"prose", "code:rust", "science"}
    page = " ".join(word[True] * 4)
    some = [
        Document(page, s, language, 0.25, "n")
        for s, language in (("prose", "zh"), ("code", "rust"), ("science", "en"), ("code", "go"))
    ]
    prose, rust, science, go = judge.scores(some)
    assert prose > 0.8 and rust < 0.2 and science > 0.8 and go == 0.25
    judge.save(tmp_path / "judge.npz")
    assert Judge.load(tmp_path / "judge.npz").scores(some).tolist() == [prose, rust, science, go]
    with pytest.raises(ValueError, match=r"no kind of document has 40 marks: \{'prose': 9\}"):
        train_judge(rows[:27:3])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r'line 2: needs "text" and a number "label"'),
        ('{"text": "x"}', r'line 2: needs "text" and a number "label"'),
        ('{"text": "x", "label": "good"}', r'line 2: needs "text" and a number "label"'),
        ('{"text": "x", "label": 5}', r"line 2: label 5.0 must lie between 0 and 1"),
        ('{"text": 3, "label": NaN}', r"line 2: label nan must lie"),
    ],
)
def test_wrong_labels_are_named(tmp_path, line, said):
    """A mark that cannot be used is an error with its line; right ones are read with their source and language."""
    path = tmp_path / "marks.jsonl"
    path.write_text(
        '{"text": "x", "label": 1, "source": "code", "language": "go"}\n' + line + "\n",
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match=said):
        read_labels(path)
    path.write_text(json.dumps({"text": "y", "label": 0.5}) + "\n\n", encoding="utf-8")
    assert read_labels(path) == [("y", 0.5, "prose", "en")]
    with pytest.raises(ValueError, match=r"cannot read the labels .*absent"):
        read_labels(tmp_path / "absent")
    with pytest.raises(ValueError, match="too few to learn from"):
        fit(["x"], [1.0])
    with pytest.raises(ValueError, match="between 0 and 1"):
        fit(["x"] * 40, [2.0] * 40)
