"""Check a step of data cleaning of your own: decontamination, duplicates, quality scores (paper 2.2).

    from minglm.testing.cleaning import check_near_duplicates
    check_near_duplicates(my_function, 0.7)        # my_function(documents) -> the documents it keeps

Each contract draws texts of made-up words in two scripts and raises AssertionError for a property that fails.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from hypothesis import strategies as st

from minglm.data.cleaning.shingles import shingles
from minglm.data.store.documents import Document
from minglm.testing.strategies import for_all, seeds

Remove = Callable[[Sequence[Document]], Sequence[Document]]
"""Documents -> the documents that stay."""

Decontaminate = Callable[[Sequence[Document], Mapping[str, Sequence[str]]], Sequence[Document]]
"""Documents, {name of an evaluation set: texts} -> the documents that stay."""


class Scorer(Protocol):
    """A learned quality score."""

    def score(self, texts: Sequence[str]) -> Sequence[float] | np.ndarray:
        """Return a score of each text."""
        ...


Fit = Callable[[Sequence[str], Sequence[float], int], tuple[Scorer, Any]]
"""Texts, marks, seed -> (a scorer, a report)."""

SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 1500)]


def made_up(rng: random.Random, count: int, chinese: bool = False) -> list[str]:
    """Return `count` random words, or Chinese characters; two such lists share next to no run of three."""
    if chinese:
        return [rng.choice(HAN) for _ in range(count)]
    return ["".join(rng.choices(SYLLABLES, k=3)) for _ in range(count)]


def document(
    name: str, words: Sequence[str], chinese: bool = False, quality: float | None = 0.5
) -> Document:
    """Return a document of these words, with spaces between them unless they are Chinese."""
    text = ("" if chinese else " ").join(words)
    return Document(text, "prose", "zh" if chinese else "en", quality, name)


def _shuffled(rng: random.Random, documents: Sequence[Document]) -> list[Document]:
    return rng.sample(documents, len(documents))


# Decontamination


def check_decontamination(decontaminate: Decontaminate) -> None:
    """Check decontamination: decontaminate(documents, {name: texts}) -> the documents that stay.

    - A document that contains a whole evaluation item is removed, whatever its case, spacing and punctuation.
    - A document without one stays, also if it shares a sentence with a long item, or a few words with any.
    - Items of a few words, which occur in any text, and wording that a set repeats, remove nothing.
    - The order stays, and a second search removes nothing more.
    """
    _copies_are_removed(decontaminate)
    _wording_is_not_evidence(decontaminate)


def _copies_are_removed(decontaminate: Decontaminate) -> None:
    @for_all(seed=seeds, chinese=st.booleans())
    def copies_go_and_the_rest_stays(seed: int, chinese: bool) -> None:
        rng = random.Random(seed)
        short = made_up(rng, rng.randint(8, 20), chinese)
        long = made_up(rng, 80, chinese)
        few = made_up(rng, 3, chinese)
        sets = {
            "tasks:x": [document("", short, chinese).text, document("", few, chinese).text],
            "prose": [document("", long, chinese).text],
        }
        around = [made_up(rng, 60, chinese) for _ in range(6)]
        shouted = [word.upper() + rng.choice(["", ",", "!\n", " "]) for word in short]
        bad = [
            around[0] + short,
            around[1][:5] + shouted + around[1][5:],
            long,
            long[:60],
        ]
        good = [
            around[2],
            around[3] + long[:20],
            around[4] + short[:7],
            few + around[5],
            few,
        ]
        documents = [document(f"bad{n}", words, chinese) for n, words in enumerate(bad)]
        documents += [document(f"good{n}", words, chinese) for n, words in enumerate(good)]
        rng.shuffle(documents)

        kept = decontaminate(documents, sets)
        names = [d.name for d in kept]
        copies = [name for name in names if name.startswith("bad")]
        assert not copies, f"copies of test items were kept: {names}"
        innocent = [d.name for d in documents if d.name.startswith("good")]
        assert names == innocent, f"of the innocent ones, only {names}"
        again = decontaminate(kept, sets)
        assert list(again) == list(kept), "a second search removes more"


def _wording_is_not_evidence(decontaminate: Decontaminate) -> None:
    @for_all(seed=seeds)
    def a_new_text_in_the_same_wording_stays(seed: int) -> None:
        rng = random.Random(seed)
        wording = made_up(rng, 20)
        items = [document("", wording + made_up(rng, 4)).text for _ in range(30)]
        own = document("template", wording + made_up(rng, 4))
        kept = decontaminate([own], {"tasks:x": items})
        assert kept, "a new text in the wording of a test set was removed"


# Duplicates


def check_near_duplicates(function: Remove, threshold: float = 0.7) -> None:
    """Check near-duplicate removal: function(documents) -> the documents that stay.

    Similarity is the Jaccard index of runs of five words. The contract allows an error of 0.2 for estimating
    it (4.6 standard deviations of 128 samples).

    - No two documents that stay are more similar than the threshold.
    - Whatever is removed is as similar to a document of better or equal quality that stays.
    - The order of what stays is that of the input, which decides nothing else.
    """

    @for_all(seed=seeds, chinese=st.booleans())
    def the_best_of_each_family_stays(seed: int, chinese: bool) -> None:
        rng = random.Random(seed)
        documents = _shuffled(rng, _families(rng, chinese))
        stay = list(function(documents))
        in_order = [d for d in documents if d in stay]
        assert in_order == stay, "documents were added, or their order was changed"

        runs = shingles([d.text for d in documents], 5)
        runs_of = {d.name: set(hashes) for d, hashes in zip(documents, runs, strict=True)}

        def similarity(a: Document, b: Document) -> float:
            common = runs_of[a.name] & runs_of[b.name]
            return len(common) / len(runs_of[a.name] | runs_of[b.name])

        for n, a in enumerate(stay):
            for b in stay[:n]:
                assert similarity(a, b) < threshold + 0.2, "two near duplicates both stayed"
        for removed in documents:
            if removed in stay:
                continue
            twins = [
                d
                for d in stay
                if similarity(removed, d) > threshold - 0.2 and _quality(d) >= _quality(removed)
            ]
            assert twins, f"{removed.name} went, but nothing like it, and as good, stayed"
        again = {d.name for d in function(_shuffled(rng, documents))}
        assert again == {d.name for d in stay}, "what stays depends on the order of the documents"


def _quality(document: Document) -> float:
    assert document.quality is not None
    return document.quality


def _families(rng: random.Random, chinese: bool) -> list[Document]:
    """Return three chains of versions: each version changes a few words of the one before."""
    documents = []
    for family in range(3):
        words = made_up(rng, 120, chinese)
        for version in range(rng.randint(1, 8)):
            documents.append(document(f"{family}.{version}", words, chinese, rng.random()))
            changed = rng.choice([0, 1, 6, 20, 60])
            start = rng.randrange(121 - changed)
            words = words[:start] + made_up(rng, changed, chinese) + words[start + changed :]
    return documents


def templates(rng: random.Random, forms: int, pages: int, chinese: bool = False) -> list[Document]:
    """Return documents "form.page": pages of made-up forms.

    A page has eight sentences of 16 words, of which three are names that are new on every page.
    """
    documents = []
    for form in range(forms):
        sentences = [made_up(rng, 13, chinese) for _ in range(8)]
        for page in range(pages):
            words = []
            for sentence in sentences:
                words += _fill_in(sentence, made_up(rng, 3, chinese))
            documents.append(document(f"{form}.{page}", words, chinese, rng.random()))
    return documents


def _fill_in(sentence: list[str], names: list[str]) -> list[str]:
    return sentence[:4] + names[:1] + sentence[4:9] + names[1:2] + sentence[9:] + names[2:]


def check_semantic_duplicates(function: Remove) -> None:
    """Check removal of semantic duplicates: function(documents) -> the documents that stay.

    - Of the pages of a form, which share four words in five but hardly a run of five words, the best one stays.
    - All pages of other words stay.
    - The order of what stays is that of the input, which decides nothing else.
    """

    @for_all(seed=seeds, chinese=st.booleans())
    def one_page_of_a_form_stays(seed: int, chinese: bool) -> None:
        rng = random.Random(seed)
        pages = templates(rng, 2, rng.randint(1, 6), chinese)
        others = [
            document(f"other.{n}", made_up(rng, 130, chinese), chinese, rng.random())
            for n in range(6)
        ]
        documents = _shuffled(rng, pages + others)
        stay = list(function(documents))
        in_order = [d for d in documents if d in stay]
        assert in_order == stay, "documents were added, or their order was changed"
        assert all(d in stay for d in others), "a page of other words was removed"
        for form in ("0.", "1."):
            members = [d for d in pages if d.name.startswith(form)]
            kept = [d for d in members if d in stay]
            assert len(kept) == 1, f"of {len(members)} pages of a form {len(kept)} stayed"
            best = max(_quality(d) for d in members)
            assert kept[0].quality == best, "the page that stayed is not the best of its form"
        again = {d.name for d in function(_shuffled(rng, documents))}
        assert again == {d.name for d in stay}, "what stays depends on the order of the documents"


# Quality

CHANCES = (0.1, 0.5, 0.9)
"""The probability that a text of each kind is marked good."""

MARKED = 600
NEW_PER_KIND = 60


class _Kinds:
    """Draws texts of three kinds, which a few words tell apart."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.telling_words = [made_up(rng, 4) for _ in CHANCES]

    def text(self, kind: int) -> str:
        words = made_up(self.rng, 40) + self.rng.choices(self.telling_words[kind], k=12)
        return " ".join(self.rng.sample(words, len(words)))


def check_scorer(fit: Fit) -> None:
    """Check a learned quality score: fit(texts, marks, seed) -> (model with .score(texts), report).

    Marks are 1 with a probability that a few words in the text tell.

    - Scores lie in [0, 1], for odd texts too.
    - The score of a text depends neither on the texts beside it nor on their order, and repeats with the seed.
    - On new texts, scores order the kinds of text as the probabilities do.
    - Each kind's mean score is its probability, to 0.15 (what 600 marks allow: two standard deviations of the
      40 marks of a kind that calibrate it).
    """
    rng = random.Random(0)
    kinds = _Kinds(rng)
    kind_of = [rng.randrange(len(CHANCES)) for _ in range(MARKED)]
    texts = [kinds.text(kind) for kind in kind_of]
    marks = [float(rng.random() < CHANCES[kind]) for kind in kind_of]
    model, _ = fit(texts, marks, 0)
    repeated, _ = fit(texts, marks, 0)

    new = [[kinds.text(kind) for _ in range(NEW_PER_KIND)] for kind in range(len(CHANCES))]
    scores = [_scores(model, group) for group in new]
    in_range = all(0 <= score <= 1 for group in scores for score in group)
    assert in_range, "a score lies outside [0, 1]"
    same = scores == [_scores(repeated, group) for group in new]
    assert same, "the same marks and seed score otherwise"

    chosen = rng.sample(range(NEW_PER_KIND), NEW_PER_KIND // 2)
    for group, expected in zip(new, scores, strict=True):
        beside_others = _scores(model, [group[i] for i in chosen])
        for i, score in zip(chosen, beside_others, strict=True):
            assert abs(score - expected[i]) < 1e-5, "a score depends on the other texts"

    means = [sum(group) / len(group) for group in scores]
    ordered = means == sorted(means)
    assert ordered, (
        f"scores {means} do not order kinds of text that are good with chances {CHANCES}"
    )
    error = max(abs(mean - chance) for mean, chance in zip(means, CHANCES, strict=True))
    assert error < 0.15, f"scores {means} are not calibrated: they mean chances {CHANCES}"
    odd = _scores(model, ["", "a", "\0", "你好"])
    assert all(0 <= score <= 1 for score in odd), "odd texts have no score in [0, 1]"


def _scores(model: Scorer, texts: Sequence[str]) -> list[float]:
    return [float(score) for score in model.score(texts)]
