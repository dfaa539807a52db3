"""A learned quality score: logistic regression on hashed words and pairs of words (paper 2.2).

    p(text) = sigmoid(a z + b),   z = w . x / |x|,   x = counts of words and pairs of words, hashed into 2^18 places

Readers, or a large model, mark some thousands of documents between 0 and 1; the classifier learns to give the mark and
then reads millions, as in the paper, where a small model predicts what a large one said. One classifier for each kind
of document, since what is good prose is not good mathematics: `kind`.

Choices, and why:
- Linear on n-grams, as fastText: tens of megabytes a second on one core, and a weight can be looked up.
- Soft labels: the loss is the cross-entropy to a mark between 0 and 1, so a share of educational content and a yes or
  no are learned by the same code.
- Calibrated: a and b are fitted on marked documents that the weights have not seen, so that of the documents with a
  score of 0.8 about 80 % are good, and a threshold means the same for each kind. A third part of the marked
  documents says how far this holds (expected calibration error).

Simplified: no subwords; word order beyond pairs does not count.
"""

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minglm.common.files import atomic_path
from minglm.data.cleaning.shingles import grams, words

BITS = 18
EPOCHS, BATCH, RATE, DECAY = 20, 256, 0.05, 1e-3
LONGEST = 10_000
"""Characters of a document that are read: how it begins says how good it is."""

FEWEST = 40
"""Marked documents of a kind below which nothing is learned from them."""


def kind(source, language):
    """Which classifier judges a document: one for each language of code, one for math and science, one for the rest."""
    if source in ("math", "science"):
        return "science"
    return f"code:{language}" if source == "code" else "prose"


def features(texts):
    """Words and pairs of words of texts, (text, place, value) of each different one: the index of its text, its place
    among 2^BITS, and its count, scaled so that the counts of a text have length one. All tensors, sorted by text."""
    texts, rows = list(texts), [np.zeros(0, np.uint64)]
    for found, owner in words(text[:LONGEST] for text in texts):
        for _, value, text in grams(found, owner, {1, 2}):
            rows.append(text.astype(np.uint64) << np.uint64(BITS) | value >> np.uint64(64 - BITS))
    both, count = np.unique(np.concatenate(rows), return_counts=True)
    text, place = (
        (both >> np.uint64(BITS)).astype(np.int64),
        (both & np.uint64(2**BITS - 1)).astype(np.int64),
    )
    norm = np.sqrt(np.bincount(text, count.astype(float) ** 2, len(texts)))
    return tuple(map(torch.from_numpy, (text, place, (count / norm[text]).astype(np.float32))))


def reliability(scores, marks, bins=10):
    """How far scores can be believed: (mean score, mean mark, documents) for each tenth of [0, 1] that has scores."""
    scores, marks = np.asarray(scores, float), np.asarray(marks, float)
    place = np.minimum((scores * bins).astype(int), bins - 1)
    inside = [place == at for at in np.unique(place)]
    return [(float(scores[at].mean()), float(marks[at].mean()), int(at.sum())) for at in inside]


def calibration_error(scores, marks, bins=10):
    """Expected calibration error: the mean distance of score and mark over `reliability`, weighted by documents."""
    return sum(abs(score - mark) * n for score, mark, n in reliability(scores, marks, bins)) / max(
        1, len(scores)
    )


@dataclass
class Classifier:
    """A learned score. weight: float32 (2^BITS,); bias; a, b: calibration. `fit` makes one, `score` uses it."""

    weight: torch.Tensor
    bias: float = 0.0
    a: float = 1.0
    b: float = 0.0

    def logits(self, texts):
        """w . x + bias of each text, before calibration: float32 (texts,)."""
        text, place, value = features(texts)
        return torch.zeros(len(texts)).index_add_(0, text, value * self.weight[place]) + self.bias

    def score(self, texts):
        """Calibrated score of each text, 0 to 1: float32 array."""
        return (
            torch.sigmoid(self.a * self.logits(texts) + self.b).numpy()
            if len(texts)
            else np.zeros(0, np.float32)
        )


def _learn(texts, marks, seed):
    """A Classifier, not yet calibrated: Adam on the cross-entropy, weight decay, the rate falling to zero."""
    batches = [features(texts[at : at + BATCH]) for at in range(0, len(texts), BATCH)]
    used = torch.cat([place for _, place, _ in batches]).unique()  # the others keep the weight 0
    batches = [(text, torch.searchsorted(used, place), value) for text, place, value in batches]
    targets = torch.tensor(marks, dtype=torch.float32).split(BATCH)
    mean = min(max(float(np.mean(marks)), 0.01), 0.99)
    weight, bias = (
        torch.zeros(len(used)),
        torch.tensor([np.log(mean / (1 - mean))], dtype=torch.float32),
    )
    optimizer = torch.optim.AdamW([weight, bias], RATE, weight_decay=DECAY)
    generator, steps = torch.Generator().manual_seed(seed), max(EPOCHS * len(targets), 100)
    order = torch.cat(
        [
            torch.randperm(len(targets), generator=generator)
            for _ in range(-(-steps // len(targets)))
        ]
    )
    for step, batch in enumerate(order[:steps].tolist()):
        (text, place, value), target = batches[batch], targets[batch]
        z = torch.zeros(len(target)).index_add_(0, text, value * weight[place]) + bias
        error = (torch.sigmoid(z) - target) / len(
            target
        )  # the gradient of the mean cross-entropy by z
        weight.grad = torch.zeros_like(weight).index_add_(0, place, value * error[text])
        bias.grad = error.sum()[None]
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        optimizer.step()
    return Classifier(torch.zeros(2**BITS).index_add_(0, used, weight), bias.item())


def calibrate(z, marks):
    """(a, b) that make sigmoid(a z + b) fit the marks best, by Newton's method on the cross-entropy; a >= 0.

    Marks are drawn a little to the middle, as Platt (1999) proposes, so that a finite a is best even where z separates
    them.
    """
    z, marks = np.asarray(z, float), np.asarray(marks, float)
    target = (marks * len(marks) + 1) / (len(marks) + 2)
    x, ab = np.stack([z, np.ones_like(z)], 1), np.array([1.0, 0.0])

    def loss(ab):
        return np.logaddexp(0, x @ ab).sum() - target @ (x @ ab)

    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(x @ ab, -500, 500)))
        step = np.linalg.solve(
            (x * (p * (1 - p))[:, None]).T @ x + 1e-6 * np.eye(2), x.T @ (p - target)
        )
        while loss(ab - step) > loss(ab) + 1e-9:  # too far: half the way
            step = step / 2
        ab = ab - step
    if ab[0] < 0:  # the score says nothing: the mean mark is the best guess
        mean = target.mean()
        ab = np.array([0.0, np.log(mean / (1 - mean))])
    return float(ab[0]), float(ab[1])


def fit(texts, marks, seed=0):
    """(Classifier, what can be said of it) from texts and marks between 0 and 1.

    A hash of the text puts three in five documents into training, one into calibration, one into the test. What can be
    said, on the test documents: "documents" in all, "calibration_error" before and after, "correlation" of score and
    mark, and "reliability". Raises ValueError for fewer than FEWEST documents or a mark outside [0, 1].
    """
    if len(texts) < FEWEST:
        raise ValueError(
            f"{len(texts)} marked documents are too few to learn from; mark {FEWEST} or more of a kind"
        )
    marks = np.asarray(marks, float)
    if not ((marks >= 0) & (marks <= 1)).all():
        raise ValueError("marks of quality must lie between 0 and 1")
    order = np.argsort(
        [hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in texts], kind="stable"
    )
    cuts = np.split(order, [len(order) * 3 // 5, len(order) * 4 // 5])
    train, middle, test = ([texts[i] for i in cut] for cut in cuts)
    train_marks, middle_marks, test_marks = (marks[cut] for cut in cuts)
    model = _learn(train, train_marks, seed)
    before = torch.sigmoid(model.logits(test)).numpy()
    model.a, model.b = calibrate(model.logits(middle).numpy(), middle_marks)
    after = model.score(test)
    spread = np.std(after) * np.std(test_marks)
    return model, {
        "documents": len(texts),
        "calibration_error": [
            round(calibration_error(scores, test_marks), 4) for scores in (before, after)
        ],
        "correlation": round(float(np.corrcoef(after, test_marks)[0, 1]), 4) if spread > 0 else 0.0,
        "reliability": reliability(after, test_marks),
    }


class Judge:
    """Scores of documents by the classifier of their kind. models: {kind: Classifier}."""

    def __init__(self, models):
        self.models = models

    def scores(self, documents):
        """Quality of each document, a float array; `document.quality`, by the rubric, where its kind has no model."""
        result, groups = np.array([d.quality for d in documents], float), defaultdict(list)
        for index, document in enumerate(documents):
            groups[kind(document.source, document.language)].append(index)
        for name in groups.keys() & self.models.keys():
            result[groups[name]] = self.models[name].score(
                [documents[i].text for i in groups[name]]
            )
        return result

    def save(self, path):
        """Write all models to one .npz, atomically."""
        arrays = {f"{name}/weight": model.weight.numpy() for name, model in self.models.items()}
        arrays |= {
            f"{name}/numbers": np.array([m.bias, m.a, m.b]) for name, m in self.models.items()
        }
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path):
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            names = [name.removesuffix("/weight") for name in arrays if name.endswith("/weight")]
            return cls(
                {
                    n: Classifier(
                        torch.from_numpy(arrays[f"{n}/weight"]), *arrays[f"{n}/numbers"].tolist()
                    )
                    for n in names
                }
            )


def train(rows, seed=0):
    """(Judge, what can be said of each model) from marked documents: rows of (text, mark, source, language).

    A kind with fewer than FEWEST rows gets no model. Raises ValueError when no kind has enough.
    """
    groups = defaultdict(list)
    for text, mark, source, language in rows:
        groups[kind(source, language)].append((text, mark))
    models, about = {}, {}
    for name, group in sorted(groups.items()):
        if len(group) >= FEWEST:
            models[name], about[name] = fit(
                [text for text, _ in group], [mark for _, mark in group], seed
            )
    if not models:
        raise ValueError(
            f"no kind of document has {FEWEST} marks: { ({n: len(g) for n, g in groups.items()}) }"
        )
    return Judge(models), about


def fit_pages(path, seed=0):
    """A Classifier of web pages from marked ones, `read_labels` of "web_labels": 1 where the text teaches code."""
    rows = read_labels(path, "data.web_labels")
    return fit([text for text, *_ in rows], [mark for _, mark, *_ in rows], seed)[0]


def read_labels(path, field="data.quality"):
    """Marked documents from a .jsonl file, as `train` takes them. field: of the config, for what is wrong.

    Each line has a "text" and a "label" from 0 to 1, and may have a "source" ("prose" unless given) and a "language".
    Raises ValueError naming file and line: a wrong mark is worse than none.
    """
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{field}: cannot read the labels {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                text, mark = row["text"], float(row["label"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f'{field}: {path}, line {number}: needs "text" and a number "label"'
                ) from None
            if not (isinstance(text, str) and 0 <= mark <= 1):
                raise ValueError(
                    f"{field}: {path}, line {number}: label {mark} must lie between 0 and 1"
                )
            rows.append((text, mark, row.get("source", "prose"), row.get("language", "en")))
    return rows
