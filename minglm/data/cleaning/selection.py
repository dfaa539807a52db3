"""Decide how often each document is used: every step of cleaning, from features of single documents (paper 2.2).

    chunk -> features of its documents        many processes: quality, copies of test items, MinHash, embedding
    features of all -> repeats                one process; some hundred bytes a document (2 kB to find duplicates)

The steps come in the order of the paper's pipeline: exact copies, evaluation items, near duplicates, semantic
duplicates, quality. Memory grows with the number of documents, slowly, and not with their length.

Choices: duplicates are searched within a source, because a file may be in `code` and in its repository.
Held-out documents are compared for exact copies only.
"""

import functools
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minglm.config.data import DataConfig
from minglm.data.cleaning import minhash, quality, semdedup
from minglm.data.cleaning.classifier import Judge
from minglm.data.cleaning.decontaminate import Index
from minglm.data.cleaning.exact import digest, originals
from minglm.data.store.documents import Document, read_documents

MAX_REPEATS = 255
"""Repeats are stored as uint8."""


@dataclass(frozen=True, slots=True)
class DocumentRecord:
    """What is kept in memory of a document."""

    name: str
    source: str
    language: str
    heldout: bool
    digest: bytes
    """Equal for exact copies."""
    quality: float = 0.0

    @classmethod
    def of(cls, document: Document) -> "DocumentRecord":
        """Make the record of a document."""
        return cls(
            document.name,
            document.source,
            document.language,
            document.heldout,
            digest(document),
            document.quality or 0.0,
        )


def read_records(paths: Sequence[Path]) -> list[DocumentRecord]:
    """Return a record of every document in these chunks, in order."""
    return [DocumentRecord.of(document) for path in paths for document in read_documents(path)]


def find_originals(records: Sequence[DocumentRecord]) -> list[int]:
    """Return the indices of the records that are not exact copies, in order."""
    return originals([(record.digest, record.heldout) for record in records])


@dataclass(frozen=True)
class FeatureTask:
    """Which features of a chunk a process computes."""

    path: str
    """The chunk of documents."""
    index: str | None
    """Path of the pickled `decontaminate.Index` of the evaluation items; None: they are not searched."""
    judge: str | None
    """Path of the saved `classifier.Judge`; None: the rubric gives the quality."""
    near: bool
    """Compute MinHash signatures."""
    semantic: bool
    """Compute embeddings."""
    educational: bool
    """Use the share of educational content as the quality of mathematics and science."""


class ChunkFeatures(NamedTuple):
    """Features of the documents of a chunk, in order."""

    quality: np.ndarray
    """float64 (documents,)"""
    contaminated: dict[int, str]
    """{index of a training document: name of the evaluation set that it has an item of}"""
    signature: np.ndarray | None
    """uint32 (documents, permutations): see `minhash`"""
    vector: np.ndarray | None
    """float32 (documents, width): see `semdedup`"""


# The pickled index and the judge are large; a process reads each once. The time stamp tells new files of the same name.
@functools.lru_cache(maxsize=2)
def _load_index(path: str, stamp: int) -> Index:
    with open(path, "rb") as file:
        return pickle.load(file)


@functools.lru_cache(maxsize=2)
def _load_judge(path: str, stamp: int) -> Judge:
    return Judge.load(path)


def _cached(load: Callable[[str, int], Any], path: str | None) -> Any:
    return None if path is None else load(path, Path(path).stat().st_mtime_ns)


def _with_quality(document: Document, educational: bool) -> Document:
    """Return the document with the quality that the rubric gives it."""
    if educational and document.source in quality.SCIENCE:
        return replace(document, quality=quality.educational(document.text))
    if document.quality is None:
        return replace(
            document, quality=quality.score(document.text, document.language, document.source)
        )
    return document


def compute_features(task: FeatureTask) -> ChunkFeatures:
    """Compute the features of the documents of a chunk."""
    documents = [_with_quality(d, task.educational) for d in read_documents(task.path)]
    texts = [document.text for document in documents]

    judge = _cached(_load_judge, task.judge)
    if judge is None:
        scores = np.array([document.quality for document in documents], float)
    else:
        scores = judge.scores(documents)

    index = _cached(_load_index, task.index)
    contaminated = {}
    if index is not None:
        training = [n for n, document in enumerate(documents) if not document.heldout]
        matches = index.search([texts[n] for n in training])
        contaminated = {training[n]: name for n, name in matches.items()}

    return ChunkFeatures(
        quality=scores,
        contaminated=contaminated,
        signature=minhash.signatures(texts) if task.near else None,
        vector=semdedup.embed(texts) if task.semantic else None,
    )


class Selection(NamedTuple):
    """How often each document is used, and what each step of cleaning removed."""

    repeats: np.ndarray
    """uint8 (documents,): 0 for a document that is dropped; a held-out document is used once"""
    report: dict[str, Any]
    """Counts for the log: a number, or one number a source."""


def select(
    records: Sequence[DocumentRecord], features: Sequence[ChunkFeatures], config: DataConfig
) -> Selection:
    """Run the steps of cleaning.

    Args:
        records: of all documents.
        features: of all chunks, in order.
    """
    report: dict[str, Any] = {}
    repeats = np.zeros(len(records), np.uint8)
    scores = np.concatenate([chunk.quality for chunk in features] or [np.zeros(0)])
    records = [replace(r, quality=float(score)) for r, score in zip(records, scores, strict=True)]

    kept = find_originals(records)
    report["exact_copies"] = len(records) - len(kept)
    repeats[[n for n in kept if records[n].heldout]] = 1
    kept = [n for n in kept if not records[n].heldout]

    if config.decontaminate:
        matches = _contaminated(features)
        report["decontamination"] = dict(Counter(matches[n] for n in kept if n in matches))
        kept = [n for n in kept if n not in matches]

    if config.near_duplicates and kept:
        signatures = np.concatenate([_array(chunk.signature) for chunk in features])[kept]
        stays = minhash.keep_best(
            signatures,
            config.near_duplicates,
            best_first([records[n] for n in kept]),
            _sources(records, kept),
        )
        report["near_duplicates"] = _count_sources(records, kept, ~stays)
        kept = [n for n, stay in zip(kept, stays) if stay]

    if config.semantic_duplicates and kept:
        vectors = np.concatenate([_array(chunk.vector) for chunk in features])[kept]
        stays = semdedup.keep_best(
            vectors,
            config.semantic_duplicates,
            best_first([records[n] for n in kept]),
            _sources(records, kept),
        )
        report["semantic_duplicates"] = _count_sources(records, kept, ~stays)
        kept = [n for n, stay in zip(kept, stays) if stay]

    epochs = np.array(
        quality.epochs(
            [records[n] for n in kept],
            config.lowest_share,
            config.top_share,
            config.top_epochs,
            config.educational,
        ),
        np.int64,
    )
    repeats[kept] = np.minimum(epochs, MAX_REPEATS)
    report["lowest_quality"] = _count_sources(records, kept, epochs == 0)
    report["documents"] = int(repeats[kept].sum())
    report["repeated"] = _count_sources(records, kept, epochs > 1)
    return Selection(repeats, report)


def _array(values: np.ndarray | None) -> np.ndarray:
    assert values is not None, "the config asks for a feature that was not computed"
    return values


def _contaminated(features: Sequence[ChunkFeatures]) -> dict[int, str]:
    """Return {index in the whole corpus: evaluation set} from the indices in each chunk."""
    contaminated = {}
    first = 0
    for chunk in features:
        for n, name in chunk.contaminated.items():
            contaminated[first + n] = name
        first += len(chunk.quality)
    return contaminated


def best_first(records: Sequence[DocumentRecord]) -> list[int]:
    """Return indices of records, the best one first; ties are broken by the text and not by the order."""
    return sorted(range(len(records)), key=lambda n: (-records[n].quality, records[n].digest))


def _sources(records: Sequence[DocumentRecord], kept: Sequence[int]) -> np.ndarray:
    """Return one integer for each kept document, equal for documents of the same source."""
    _, group = np.unique([records[n].source for n in kept], return_inverse=True)
    return group


def _count_sources(
    records: Sequence[DocumentRecord], kept: Sequence[int], chosen: np.ndarray
) -> dict[str, int]:
    """Count the chosen ones among the kept documents by source."""
    counts = Counter(records[n].source for n, choice in zip(kept, chosen, strict=True) if choice)
    return dict(counts)
