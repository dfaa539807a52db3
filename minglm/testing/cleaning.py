"""Contracts of data cleaning: decontamination, near duplicates, duplicates by meaning, quality scores (paper 2.2).

    from minglm.testing.cleaning import check_near_duplicates
    check_near_duplicates(my_function, 0.7)        # my_function(documents) -> the documents it keeps

Each draws texts of made-up words in two scripts and raises AssertionError for a property that fails.
"""

import random

from hypothesis import given
from hypothesis import strategies as st

from minglm.data.cleaning.shingles import shingles
from minglm.data.sources.corpus import Document
from minglm.testing.strategies import contract, seeds

SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 1500)]


def made_up(rng, count, chinese=False):
    """A list of `count` random words, or Chinese characters; two such lists share next to no run of three."""
    return [
        rng.choice(HAN) if chinese else "".join(rng.choices(SYLLABLES, k=3)) for _ in range(count)
    ]


def document(name, words, chinese=False, quality=0.5):
    """A Document of these words, with spaces between them unless they are Chinese."""
    return Document(
        ("" if chinese else " ").join(words), "prose", "zh" if chinese else "en", quality, name
    )


def check_decontamination(decontaminate):
    """Hold decontamination to its contract: decontaminate(documents, {name: texts}) -> (kept documents, report).

    A document with a whole evaluation item in it goes, whatever its case, spacing and punctuation; one without stays,
    also where it shares a sentence of boilerplate with a long item, or a few words with any; the order stays; items of
    a few words, which stand in any text, remove nothing; a document that is taken away and asked for again stays away.
    """

    @contract
    @given(seeds, st.booleans())
    def copies_go_and_the_rest_stays(seed, chinese):
        rng = random.Random(seed)
        short, long = made_up(rng, rng.randint(8, 20), chinese), made_up(rng, 80, chinese)
        few = made_up(rng, 3, chinese)
        sets = {"tasks:x": [document("", words, chinese).text for words in (short, few)]}
        sets["prose"] = [document("", long, chinese).text]
        around = [made_up(rng, 60, chinese) for _ in range(6)]
        shouted = [word.upper() + rng.choice(["", ",", "!\n", " "]) for word in short]
        bad = [around[0] + short, around[1][:5] + shouted + around[1][5:], long, long[:60]]
        good = [around[2], around[3] + long[:20], around[4] + short[:7], few + around[5], few]
        documents = [document(f"bad{n}", words, chinese) for n, words in enumerate(bad)]
        documents += [document(f"good{n}", words, chinese) for n, words in enumerate(good)]
        rng.shuffle(documents)
        kept, _ = decontaminate(documents, sets)
        names = [d.name for d in kept]
        assert not [name for name in names if name.startswith("bad")], (
            f"copies of test items were kept: {names}"
        )
        assert names == [d.name for d in documents if d.name.startswith("good")], (
            f"of the innocent ones, only {names}"
        )
        assert list(decontaminate(kept, sets)[0]) == list(kept), "a second search removes more"

    @contract
    @given(seeds)
    def wording_is_no_evidence(seed):
        rng = random.Random(seed)
        wording = made_up(rng, 20)
        items = [document("", wording + made_up(rng, 4)).text for _ in range(30)]
        own = document("template", wording + made_up(rng, 4))
        assert decontaminate([own], {"tasks:x": items})[0], (
            "a new text in the wording of a test set was removed"
        )

    copies_go_and_the_rest_stays()
    wording_is_no_evidence()


def _shuffled(rng, documents):
    return rng.sample(documents, len(documents))


def check_near_duplicates(function, threshold=0.7):
    """Hold near-duplicate removal to its contract: function(documents) -> the documents that stay.

    With similarity as the Jaccard index of runs of five words, and 0.2 allowed for its being estimated (4.6 standard
    deviations of 128 samples): no two that stay are more similar than the threshold; whatever goes is as similar to one
    of better or equal quality that stays; the order of what stays is that of the input, which decides nothing else.
    """

    @contract
    @given(seeds, st.booleans())
    def holds(seed, chinese):
        rng, documents = random.Random(seed), []
        for family in range(3):
            words = made_up(rng, 120, chinese)
            for step in range(
                rng.randint(1, 8)
            ):  # each changes a few words of the one before: a chain of versions
                documents.append(document(f"{family}.{step}", words, chinese, rng.random()))
                changed = rng.choice([0, 1, 6, 20, 60])
                at = rng.randrange(121 - changed)
                words = words[:at] + made_up(rng, changed, chinese) + words[at + changed :]
        documents = _shuffled(rng, documents)
        stay = list(function(documents))
        assert [d for d in documents if d in stay] == stay, (
            "documents were added, or their order was changed"
        )
        sets = dict(
            zip(
                [d.name for d in documents],
                map(set, shingles([d.text for d in documents], 5)),
                strict=True,
            )
        )

        def similarity(a, b):
            return len(sets[a.name] & sets[b.name]) / len(sets[a.name] | sets[b.name])

        pairs = [(a, b) for n, a in enumerate(stay) for b in stay[:n]]
        assert all(similarity(a, b) < threshold + 0.2 for a, b in pairs), (
            "two near duplicates both stayed"
        )
        for gone in documents:
            twins = [
                d
                for d in stay
                if similarity(gone, d) > threshold - 0.2 and d.quality >= gone.quality
            ]
            assert gone in stay or twins, (
                f"{gone.name} went, but nothing like it, and as good, stayed"
            )
        again = {d.name for d in function(_shuffled(rng, documents))}
        assert again == {d.name for d in stay}, "what stays depends on the order of the documents"

    holds()


def templates(rng, forms, pages, chinese=False):
    """Documents "form.page": pages of made-up forms, sentences of 16 words of which 3, new on every page, are names."""
    found = []
    for form in range(forms):
        sentences = [made_up(rng, 13, chinese) for _ in range(8)]
        for page in range(pages):
            words = [w for s in sentences for w in _filled(s, made_up(rng, 3, chinese))]
            found.append(document(f"{form}.{page}", words, chinese, rng.random()))
    return found


def _filled(sentence, names):
    return sentence[:4] + names[:1] + sentence[4:9] + names[1:2] + sentence[9:] + names[2:]


def check_semantic_duplicates(function):
    """Hold removal by meaning to its contract: function(documents) -> the documents that stay.

    Of the pages of a form, which share four words in five but hardly a run of five words, the best one stays; of pages
    of other words all stay; the order of what stays is that of the input, which decides nothing else.
    """

    @contract
    @given(seeds, st.booleans())
    def one_page_of_a_form_stays(seed, chinese):
        rng = random.Random(seed)
        pages = templates(rng, 2, rng.randint(1, 6), chinese)
        others = [
            document(f"other.{n}", made_up(rng, 130, chinese), chinese, rng.random())
            for n in range(6)
        ]
        documents = _shuffled(rng, pages + others)
        stay = list(function(documents))
        assert [d for d in documents if d in stay] == stay, (
            "documents were added, or their order was changed"
        )
        assert all(d in stay for d in others), "a page of words of its own was removed"
        for form in ("0.", "1."):
            mine = [d for d in pages if d.name.startswith(form)]
            kept = [d for d in mine if d in stay]
            assert len(kept) == 1, f"of {len(mine)} pages of a form {len(kept)} stayed"
            assert kept[0].quality == max(d.quality for d in mine), (
                "the page that stayed is not the best of its form"
            )
        again = {d.name for d in function(_shuffled(rng, documents))}
        assert again == {d.name for d in stay}, "what stays depends on the order of the documents"

    one_page_of_a_form_stays()


def check_scorer(fit):
    """Hold a learned quality score to its contract: fit(texts, marks, seed) -> (model with .score(texts), report).

    Marks are 1 with a probability that a few words in the text tell. Scores lie in [0, 1]; the score of a text depends
    neither on the texts beside it nor on their order, and repeats with the seed; on new texts scores order the kinds of
    text as the probabilities do, and each kind's mean score is its probability, to 0.15 (what 600 marks allow: two
    standard deviations of the 40 marks of a kind that calibrate it).
    """
    rng, chances = random.Random(0), (0.1, 0.5, 0.9)
    tell = [made_up(rng, 4) for _ in chances]

    def text(kind):
        words = made_up(rng, 40) + rng.choices(tell[kind], k=12)
        return " ".join(rng.sample(words, len(words)))

    kinds = [rng.randrange(len(chances)) for _ in range(600)]
    texts, marks = (
        [text(kind) for kind in kinds],
        [float(rng.random() < chances[kind]) for kind in kinds],
    )
    model, again = fit(texts, marks, 0)[0], fit(texts, marks, 0)[0]
    new = [[text(kind) for _ in range(60)] for kind in range(len(chances))]
    scores = [[float(score) for score in model.score(some)] for some in new]
    assert all(0 <= score <= 1 for some in scores for score in some), "a score lies outside [0, 1]"
    assert scores == [[float(s) for s in again.score(some)] for some in new], (
        "the same marks and seed score otherwise"
    )
    mixed = rng.sample(range(60), 30)
    for some, found in zip(new, scores, strict=True):
        beside = model.score([some[i] for i in mixed])
        assert all(abs(beside[n] - found[i]) < 1e-5 for n, i in enumerate(mixed)), (
            "a score depends on the other texts"
        )
    means = [sum(some) / len(some) for some in scores]
    assert means == sorted(means), (
        f"scores {means} do not order kinds of text that are good with chances {chances}"
    )
    wrong = max(abs(mean - chance) for mean, chance in zip(means, chances, strict=True))
    assert wrong < 0.15, f"scores {means} are not calibrated: they mean chances {chances}"
    assert all(0 <= score <= 1 for score in model.score(["", "a", "\0", "你好"])), (
        "odd texts have no score in [0, 1]"
    )
