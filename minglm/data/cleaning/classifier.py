"""Learn a quality score: logistic regression on hashed words and pairs of words (paper 2.2).

    p(text) = sigmoid(a z + b),   z = w . x / |x|,   x = counts of words and pairs of words in 2^18 hash buckets

Readers, or a large model, mark some thousands of documents between 0 and 1. The classifier learns to predict
the mark and then reads millions of documents, as in the paper, where a small model predicts what a large one
said. There is one classifier for each kind of document, since good prose is not good mathematics:
`document_kind`.

Choices, and why:
- Linear on n-grams, as fastText: tens of megabytes a second on one core, and a weight can be looked up.
- Soft labels: the loss is the cross-entropy to a mark between 0 and 1, so the same code learns a share of educational
  content and a yes or no.
- Calibrated: a and b are fitted on marked documents that the weights have not seen, so that of the documents with a
  score of 0.8 about 80 % are good, and a threshold means the same for each kind. A third set of marked documents
  measures how well this holds (expected calibration error).

Simplified: no subwords; word order beyond pairs does not count.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from minglm.common.files import atomic_path
from minglm.data.cleaning.shingles import hash_words_in_batches, ngrams
from minglm.data.store.documents import Document

BITS = 18
"""2^BITS hash buckets."""

EPOCHS = 20
MIN_STEPS = 100
BATCH = 256
LEARNING_RATE = 0.05
WEIGHT_DECAY = 1e-3

MAX_CHARACTERS = 10_000
"""Characters of a document that are read: its beginning says how good it is."""

MIN_DOCUMENTS = 40
"""Nothing is learned from fewer marked documents of a kind."""


class MarkedDocument(NamedTuple):
    """A document that a reader, a large model or the rubric has marked."""

    text: str
    mark: float
    """0 (bad) to 1 (good)."""
    source: str = "prose"
    language: str = "en"


def document_kind(source: str, language: str) -> str:
    """Return which classifier judges a document: one for each language of code, one for math and science, one for prose."""
    if source in ("math", "science"):
        return "science"
    return f"code:{language}" if source == "code" else "prose"


class Features(NamedTuple):
    """A sparse matrix of hashed n-gram counts in coordinate form, sorted by text."""

    text: torch.Tensor
    """int64: row, the index of the text"""
    bucket: torch.Tensor
    """int64: column, the hash bucket of the n-gram, 0 to 2^BITS - 1"""
    value: torch.Tensor
    """float32: the count; each row is scaled to unit length"""


def features(texts: Sequence[str]) -> Features:
    """Count the words and pairs of words of each text in hash buckets: x / |x| of the header."""
    # Row and bucket share one uint64, so that a single np.unique sorts, groups and counts.
    keys = [np.zeros(0, np.uint64)]
    for words in hash_words_in_batches(text[:MAX_CHARACTERS] for text in texts):
        for runs in ngrams(words.hashes, words.text, lengths={1, 2}):
            bucket = runs.hashes >> np.uint64(64 - BITS)  # the upper bits of the hash
            row = runs.text.astype(np.uint64)
            keys.append(row << np.uint64(BITS) | bucket)
    key, count = np.unique(np.concatenate(keys), return_counts=True)

    row = (key >> np.uint64(BITS)).astype(np.int64)
    bucket = (key & np.uint64(2**BITS - 1)).astype(np.int64)
    row_length = np.sqrt(np.bincount(row, count.astype(float) ** 2, len(texts)))
    value = (count / row_length[row]).astype(np.float32)
    return Features(torch.from_numpy(row), torch.from_numpy(bucket), torch.from_numpy(value))


class ReliabilityBin(NamedTuple):
    """The documents whose scores lie in one tenth of [0, 1]."""

    mean_score: float
    mean_mark: float
    documents: int


def reliability(
    scores: Sequence[float] | np.ndarray, marks: Sequence[float] | np.ndarray, bins: int = 10
) -> list[ReliabilityBin]:
    """Compare scores with marks in equal bins of the score; empty bins are left out."""
    scores = np.asarray(scores, float)
    marks = np.asarray(marks, float)
    bin_of = np.minimum((scores * bins).astype(int), bins - 1)
    result = []
    for number in np.unique(bin_of):
        inside = bin_of == number
        result.append(
            ReliabilityBin(
                float(scores[inside].mean()), float(marks[inside].mean()), int(inside.sum())
            )
        )
    return result


def calibration_error(
    scores: Sequence[float] | np.ndarray, marks: Sequence[float] | np.ndarray, bins: int = 10
) -> float:
    """Return the expected calibration error: the mean over documents of |mean score - mean mark| of their bin."""
    total = 0.0
    for score, mark, documents in reliability(scores, marks, bins):
        total += abs(score - mark) * documents
    return total / max(1, len(scores))


def _logits(features: Features, texts: int, weight: torch.Tensor) -> torch.Tensor:
    """Return w . x / |x| for each of the texts, float32 (texts,)."""
    products = features.value * weight[features.bucket]
    return torch.zeros(texts).index_add_(0, features.text, products)


@dataclass
class Classifier:
    """A learned score; `fit` makes one."""

    weight: torch.Tensor
    """float32 (2^BITS,)"""
    bias: float = 0.0
    a: float = 1.0
    """Calibration: p = sigmoid(a z + b)."""
    b: float = 0.0

    def logits(self, texts: Sequence[str]) -> torch.Tensor:
        """Compute z of each text, before calibration: float32 (texts,)."""
        return _logits(features(texts), len(texts), self.weight) + self.bias

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Compute the calibrated score of each text, 0 to 1: float32 (texts,)."""
        if not len(texts):
            return np.zeros(0, np.float32)
        return torch.sigmoid(self.a * self.logits(texts) + self.b).numpy()


def _train(texts: Sequence[str], marks: np.ndarray, seed: int) -> Classifier:
    """Learn a classifier, not yet calibrated: AdamW on the cross-entropy, with a learning rate that falls to zero."""
    batches = [features(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
    targets = torch.tensor(marks, dtype=torch.float32).split(BATCH)

    # Only buckets that occur have a weight here; all others keep the weight 0.
    used = torch.cat([batch.bucket for batch in batches]).unique()
    batches = [batch._replace(bucket=torch.searchsorted(used, batch.bucket)) for batch in batches]

    # The bias starts at the log-odds of the mean mark.
    mean = min(max(float(np.mean(marks)), 0.01), 0.99)
    weight = torch.zeros(len(used))
    bias = torch.tensor([np.log(mean / (1 - mean))], dtype=torch.float32)
    optimizer = torch.optim.AdamW([weight, bias], LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    # A new random order of the batches in each epoch.
    steps = max(EPOCHS * len(batches), MIN_STEPS)
    epochs = -(-steps // len(batches))
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(batches), generator=generator) for _ in range(epochs)])

    for step, number in enumerate(order[:steps].tolist()):
        batch = batches[number]
        target = targets[number]
        z = _logits(batch, len(target), weight) + bias
        # The gradient of the mean cross-entropy with respect to z is (p - mark) / texts.
        z_gradient = (torch.sigmoid(z) - target) / len(target)
        weight_gradient = batch.value * z_gradient[batch.text]
        weight.grad = torch.zeros_like(weight).index_add_(0, batch.bucket, weight_gradient)
        bias.grad = z_gradient.sum()[None]
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        optimizer.step()

    all_weights = torch.zeros(2**BITS).index_add_(0, used, weight)
    return Classifier(all_weights, bias.item())


def calibrate(
    z: Sequence[float] | np.ndarray, marks: Sequence[float] | np.ndarray
) -> tuple[float, float]:
    """Return (a, b) for which sigmoid(a z + b) fits the marks best, by Newton's method on the cross-entropy; a >= 0.

    Marks are moved a little towards the middle, as Platt (1999) proposes, so that a finite a is best even
    where z separates them.
    """
    z = np.asarray(z, float)
    marks = np.asarray(marks, float)
    target = (marks * len(marks) + 1) / (len(marks) + 2)
    x = np.stack([z, np.ones_like(z)], axis=1)
    ab = np.array([1.0, 0.0])

    def cross_entropy(ab: np.ndarray) -> float:
        return np.logaddexp(0, x @ ab).sum() - target @ (x @ ab)

    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(x @ ab, -500, 500)))
        gradient = x.T @ (p - target)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 1e-6 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        # Halve a step that makes the loss worse.
        while cross_entropy(ab - step) > cross_entropy(ab) + 1e-9:
            step = step / 2
        ab = ab - step
    if ab[0] < 0:
        # The score says nothing about the mark: the mean mark is the best guess.
        mean = target.mean()
        ab = np.array([0.0, np.log(mean / (1 - mean))])
    return float(ab[0]), float(ab[1])


class Fit(NamedTuple):
    """A classifier and a report on its test documents."""

    classifier: Classifier
    report: dict[str, Any]
    """documents in all; calibration_error before and after calibration; correlation of score and mark; reliability"""


def fit(texts: Sequence[str], marks: Sequence[float] | np.ndarray, seed: int = 0) -> Fit:
    """Learn a classifier from texts and their marks between 0 and 1.

    A hash of the text puts three fifths of the documents into the training set, one fifth into the
    calibration set and one fifth into the test set.

    Raises ValueError for fewer than MIN_DOCUMENTS documents or a mark outside [0, 1].
    """
    if len(texts) < MIN_DOCUMENTS:
        raise ValueError(
            f"{len(texts)} marked documents are too few to learn from; mark at least {MIN_DOCUMENTS} of a kind"
        )
    marks = np.asarray(marks, float)
    if not ((marks >= 0) & (marks <= 1)).all():
        raise ValueError("marks of quality must lie between 0 and 1")

    digests = [hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in texts]
    order = np.argsort(np.array(digests), kind="stable")
    train, middle, test = np.split(order, [len(order) * 3 // 5, len(order) * 4 // 5])
    test_texts = [texts[int(i)] for i in test]

    model = _train([texts[int(i)] for i in train], marks[train], seed)
    before = torch.sigmoid(model.logits(test_texts)).numpy()
    middle_logits = model.logits([texts[int(i)] for i in middle]).numpy()
    model.a, model.b = calibrate(middle_logits, marks[middle])
    after = model.score(test_texts)

    # The correlation of constant scores or marks is not defined.
    correlation = 0.0
    if np.std(after) * np.std(marks[test]) > 0:
        correlation = round(float(np.corrcoef(after, marks[test])[0, 1]), 4)
    report = {
        "documents": len(texts),
        "calibration_error": [
            round(calibration_error(before, marks[test]), 4),
            round(calibration_error(after, marks[test]), 4),
        ],
        "correlation": correlation,
        "reliability": reliability(after, marks[test]),
    }
    return Fit(model, report)


class Judge:
    """Scores documents with the classifier of their kind."""

    def __init__(self, models: dict[str, Classifier]):
        """models: {kind: classifier}, the kinds of `document_kind`."""
        self.models = models

    def scores(self, documents: Sequence[Document]) -> np.ndarray:
        """Return the quality of each document, float64: its rubric score `document.quality` if its kind has no model."""
        scores = np.array([document.quality for document in documents], float)
        members: dict[str, list[int]] = defaultdict(list)
        for index, document in enumerate(documents):
            members[document_kind(document.source, document.language)].append(index)
        for kind, indices in members.items():
            if kind in self.models:
                texts = [documents[i].text for i in indices]
                scores[indices] = self.models[kind].score(texts)
        return scores

    def save(self, path: Path | str) -> None:
        """Write all models to one .npz, atomically."""
        arrays: dict[str, Any] = {}
        for kind, model in self.models.items():
            arrays[f"{kind}/weight"] = model.weight.numpy()
            arrays[f"{kind}/numbers"] = np.array([model.bias, model.a, model.b])
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path | str) -> "Judge":
        """Read what `save` wrote."""
        models = {}
        with np.load(path) as arrays:
            for name in arrays:
                if name.endswith("/weight"):
                    kind = name.removesuffix("/weight")
                    weight = torch.from_numpy(arrays[name])
                    bias, a, b = arrays[f"{kind}/numbers"].tolist()
                    models[kind] = Classifier(weight, bias, a, b)
        return cls(models)


class Judgement(NamedTuple):
    """A judge and the report of each of its models, by kind."""

    judge: Judge
    reports: dict[str, dict[str, Any]]


def train_judge(marked: Sequence[MarkedDocument], seed: int = 0) -> Judgement:
    """Learn one classifier for each kind with at least MIN_DOCUMENTS marked documents.

    Raises ValueError if no kind has enough.
    """
    by_kind: dict[str, list[MarkedDocument]] = defaultdict(list)
    for document in marked:
        by_kind[document_kind(document.source, document.language)].append(document)
    models = {}
    reports = {}
    for kind, group in sorted(by_kind.items()):
        if len(group) >= MIN_DOCUMENTS:
            texts = [document.text for document in group]
            marks = [document.mark for document in group]
            models[kind], reports[kind] = fit(texts, marks, seed)
    if not models:
        counts = {kind: len(group) for kind, group in by_kind.items()}
        raise ValueError(f"no kind of document has {MIN_DOCUMENTS} marks: {counts}")
    return Judgement(Judge(models), reports)


def fit_pages(path: Path | str, seed: int = 0) -> Classifier:
    """Learn which web pages teach code from a file of marked pages, `data.web_labels`."""
    marked = read_labels(path, "data.web_labels")
    texts = [page.text for page in marked]
    marks = [page.mark for page in marked]
    return fit(texts, marks, seed).classifier


def read_labels(path: Path | str, field: str = "data.quality") -> list[MarkedDocument]:
    """Read marked documents from a .jsonl file.

    Each line has a "text" and a "label" from 0 to 1, and may have a "source" ("prose" unless given) and a "language".

    Args:
        field: name of the config field, used in error messages.

    Raises:
        ValueError: naming file and line of a wrong mark, because a wrong mark is worse than none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{field}: cannot read the labels {path}: {error}") from None
    marked = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row["text"]
            mark = float(row["label"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'{field}: {path}, line {number}: needs "text" and a number "label"'
            ) from None
        if not (isinstance(text, str) and 0 <= mark <= 1):
            raise ValueError(
                f"{field}: {path}, line {number}: label {mark} must lie between 0 and 1"
            )
        source = row.get("source", "prose")
        language = row.get("language", "en")
        marked.append(MarkedDocument(text, mark, source, language))
    return marked
