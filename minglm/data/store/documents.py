"""The documents of a corpus on disk, in parts, and what is decided from looking at each (paper 2.2).

    documents -> parts of about 16 MB                 one process reads the sources
    part -> features of its documents                 many: quality, copies of test items, MinHash, embedding
    features of all -> how often each is used         one; some hundred bytes a document (2 kB to find duplicates)
    part, times -> token shard                        many

Text is in memory for one part at a time, so memory grows with the number of documents only, slowly, and not with their
length. The steps in the middle are functions of a path or of a list, which any engine may run (`minglm.data.workers`).

Choices: a part is JSON lines, one list a document, under a name that is no source of text itself. The steps of cleaning
come in the order of the paper's pipeline: exact copies, evaluation items, near duplicates, duplicates in meaning,
quality. Duplicates are looked for inside a source: a file may stand in `code` and in its repository.
"""

import functools
import json
import pickle
from collections import Counter
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np

from minglm.common.files import atomic_path
from minglm.data.cleaning import classifier, minhash, quality, semdedup
from minglm.data.mixture import tokenize
from minglm.data.sources.corpus import digest, originals
from minglm.data.sources.files import Document
from minglm.data.store.shards import write_part
from minglm.data.tokenizer import Tokenizer

PART = 16_000_000
"""Characters of a part, about."""


def write(documents, folder):
    """Write a stream of documents as parts of PART characters or more; empty ones are left out. Returns the paths."""
    folder, paths, waiting, length = Path(folder), [], [], 0

    def flush():
        path = folder / f"{len(paths):05d}.documents"
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(astuple(document)) + "\n" for document in waiting)
        paths.append(path)

    for document in documents:
        if document.text.strip():
            waiting.append(document)
            length += len(document.text)
            if length >= PART:
                flush()
                waiting, length = [], 0
    if waiting or not paths:
        flush()
    return paths


def read(path):
    """The documents of a part, one after the other. Raises ValueError for one that is damaged."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                yield Document(*json.loads(line))
            except (ValueError, TypeError):
                raise ValueError(
                    f"damaged part of the corpus {path}; delete its folder to read the sources again"
                ) from None


@dataclass(frozen=True, slots=True)
class Record:
    """What is kept in memory of a document. part: number of its part. digest: equal for exact copies."""

    part: int
    name: str
    source: str
    language: str
    heldout: bool
    digest: bytes
    quality: float = 0.0


def records(paths):
    """A Record of every document, in order."""
    return [
        Record(number, d.name, d.source, d.language, d.heldout, digest(d))
        for number, path in enumerate(paths)
        for d in read(path)
    ]


@functools.lru_cache(maxsize=2)
def _load(path, stamp):
    if path.endswith(".npz"):
        return classifier.Judge.load(path)
    with open(path, "rb") as file:
        return pickle.load(file)


def _from(path):
    return path and _load(f"{path}", Path(path).stat().st_mtime_ns)


def measure(task):
    """Features of the documents of a part, a dictionary of sequences as long as it.

    task: "path" of the part; "index" of the evaluation items (path of a pickled `decontaminate.Index`) and "judge"
    (path of a saved `classifier.Judge`), or None; "near" and "semantic", whether their features are wanted;
    "educational", whether that is the quality of mathematics and science.
    """
    documents = list(read(task["path"]))
    texts, index, judge = [d.text for d in documents], _from(task["index"]), _from(task["judge"])
    documents = [
        d if d.quality is not None else replace(d, quality=quality.score(d.text, d.language))
        for d in documents
    ]
    if task["educational"]:
        shares = [
            quality.educational(d.text) if d.source in ("math", "science") else d.quality
            for d in documents
        ]
        documents = [replace(d, quality=share) for d, share in zip(documents, shares, strict=True)]
    found = {
        "quality": judge.scores(documents)
        if judge
        else np.array([d.quality for d in documents], float)
    }
    training = [n for n, d in enumerate(documents) if not d.heldout]
    hits = index.search([texts[n] for n in training]) if index else {}
    found["contaminated"] = {training[n]: name for n, name in hits.items()}
    if task["near"]:
        found["signature"] = minhash.signatures(texts)
    if task["semantic"]:
        found["vector"] = semdedup.embed(texts)
    return found


def decide(found, features, config):
    """(how often each document is used, what each step took): a uint8 array, and counts for the log.

    found: Records of all documents. features: results of `measure`, one a part, in order. config: `DataConfig`.
    Held-out documents are used once. Exact copies are used nowhere.
    """
    times, done = np.zeros(len(found), np.uint8), {}
    scores = np.concatenate([f["quality"] for f in features]) if features else np.zeros(0)
    found = [
        replace(record, quality=float(score)) for record, score in zip(found, scores, strict=True)
    ]
    stay = originals([(r.digest, r.heldout) for r in found])
    done["exact_copies"] = len(found) - len(stay)
    times[[n for n in stay if found[n].heldout]] = 1
    stay = [n for n in stay if not found[n].heldout]
    firsts = np.cumsum([0, *(len(f["quality"]) for f in features)])
    hits = {
        int(firsts[k]) + n: name
        for k, f in enumerate(features)
        for n, name in f["contaminated"].items()
    }
    if config.decontaminate:
        done["decontamination"] = dict(Counter(hits[n] for n in stay if n in hits))
        stay = [n for n in stay if n not in hits]
    for name, threshold, method, feature in (
        ("near_duplicates", config.near_duplicates, minhash, "signature"),
        ("semantic_duplicates", config.semantic_duplicates, semdedup, "vector"),
    ):
        if threshold and stay:
            values = np.concatenate([f[feature] for f in features])[stay]
            sources = np.unique([found[n].source for n in stay], return_inverse=True)[1]
            order = sorted(
                range(len(stay)), key=lambda i: (-found[stay[i]].quality, found[stay[i]].digest)
            )
            keeps = method.choose(values, threshold, order, sources)
            done[name] = dict(
                Counter(found[n].source for n, keep in zip(stay, keeps, strict=True) if not keep)
            )
            stay = [n for n, keep in zip(stay, keeps, strict=True) if keep]
    epochs = quality.epochs(
        [found[n] for n in stay],
        config.lowest_share,
        config.top_share,
        config.top_epochs,
        config.educational,
    )
    times[stay] = np.minimum(epochs, 255)
    done["lowest_quality"] = dict(
        Counter(found[n].source for n, t in zip(stay, epochs, strict=True) if not t)
    )
    done["documents"] = int(times[stay].sum())
    done["repeated"] = dict(
        Counter(found[n].source for n, t in zip(stay, epochs, strict=True) if t > 1)
    )
    return times, done


def shard(task):
    """Write the training and held-out shards of a part.

    task: "path" and "number" of the part; "times" each document is used; "first", the place of its first document
    among all that are used; "tokenizer", a path; "folder" of the shards and their "key"; "seed", "fim_rate" and
    "fim_characters".
    """
    documents, folder = list(read(task["path"])), Path(task["folder"])
    used = list(zip(documents, task["times"], strict=True))
    training = [d for d, n in used if not d.heldout for _ in range(n)]
    heldout = [d for d, n in used if d.heldout and n]
    tokenizer = Tokenizer.load(task["tokenizer"])
    fim = {name: task[name] for name in ("seed", "fim_rate", "fim_characters")}
    for name, some, options in (
        ("train", training, {**fim, "first": task["first"]}),
        ("heldout", heldout, {}),
    ):
        sizes = Counter()
        for document in some:
            sizes[document.source] += len(document.text.encode("utf-8", "replace"))
        write_part(
            folder / name, task["number"], tokenize(some, tokenizer, **options), task["key"], sizes
        )
