"""The documents: where text comes from, under which name, and what is held out (paper 2.2, 2.3).

The toy needs no download. Its code is the standard library of the Python that runs it, its prose the docstrings of
that library, its mathematics, science, questions and long ledgers are written by `synthetic`, its repositories are the
packages of the library, joined by `repository`. Your own files, read by `sources`, join these or take their place.

    source      what                                                            language
    code        Python files                                                    python
    prose       docstrings of modules, classes, functions; your text files      en
    math, science, qa, long        procedural text                              en, zh
    repository  one document per package                                        python

Held out is decided by a hash of the document's name, so it does not change with the seed or the size of the corpus. A
docstring goes with its file, and a repository leaves its held-out files out: no held-out text stands in a training
document.

Simplified: no web, no languages but these two.
"""

import hashlib
import inspect
import math
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

from minglm.data.cleaning import classifier, quality
from minglm.data.sources import synthetic
from minglm.data.sources.files import SYNTHETIC, Document, is_heldout, repositories, user_files
from minglm.data.sources.python_ast import outline

LARGEST_FILE = 200_000
"""Bytes above which a file of the library is taken for data."""

SHORTEST_DOCSTRING = 120
"""Characters below which a docstring is a label and not prose."""


@dataclass(frozen=True)
class _File:
    name: str
    repository: str | None
    path: Path


def python_library(share=0.0, megabytes=math.inf):
    """Documents of source "code": the files of the running Python's standard library, without its tests, in order.

    share: how much is held out. A package is a repository, and its files are held out one by one.
    megabytes: bound on what is read, as `bounded` understands it.
    """
    root, files = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        folders = inside.parts[:-1]
        if {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"} & set(
            folders
        ):
            continue
        if any(
            part.startswith(("config-", "_sysconfigdata")) for part in inside.parts
        ):  # differ between machines
            continue
        if 0 < path.stat().st_size <= LARGEST_FILE:
            files.append(
                _File(
                    f"python/{inside.as_posix()}", f"python/{folders[0]}" if folders else None, path
                )
            )
    for file in bounded(files, megabytes, lambda file: file.path.stat().st_size):
        try:
            text = file.path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # a few files show other encodings on purpose
            continue
        score, heldout = quality.score(text, "python"), is_heldout(file.name, share)
        yield Document(text, "code", "python", score, file.name, file.repository, heldout)


def docstrings(files):
    """Documents of source "prose": the docstrings of Python documents, cleaned, each text once, in order.

    A docstring is held out when every file it stands in is.
    """
    found, training = {}, set()
    for file in files:
        for line, docstring in getattr(outline(file.text), "docstrings", ()):
            text = inspect.cleandoc(docstring).strip()
            if len(text) >= SHORTEST_DOCSTRING:
                name = f"{file.name}:{line}"
                found.setdefault(
                    text, Document(text, "prose", "en", quality.score(text), name, None, True)
                )
                if not file.heldout:
                    training.add(text)
    for text, document in found.items():
        yield replace(document, heldout=text not in training)


def generated(kind, count, seed, share=0.0):
    """`count` documents of a kind of synthetic text: math, science, qa or long."""
    for index in range(count):
        text, language = synthetic.document(kind, index, seed)
        name = f"{kind}/{index}"
        yield Document(
            text, kind, language, quality.score(text, language), name, None, is_heldout(name, share)
        )


def _bytes(document):
    return len(document.text.encode("utf-8", "replace"))


def bounded(items, megabytes, size=_bytes):
    """At most `megabytes` of the items, by a hash of name or repository (which so stays together), in the given order.

    items: with `name` and `repository`; size: bytes of an item. An item that does not fit any more is passed over.
    """
    items, room, kept = list(items), megabytes * 1e6, set()
    for item in sorted(
        items, key=lambda i: (hashlib.sha256((i.repository or i.name).encode()).digest(), i.name)
    ):
        if size(item) <= room:
            room -= size(item)
            kept.add(id(item))
    return [item for item in items if id(item) in kept]


def documents(config, seed=0, skipped=None):
    """Every document of a `DataConfig`, as a stream; deterministic by config and seed.

    Your own come first and are held one at a time; the built-in ones are held, as `corpus_megabytes` bounds them.
    skipped: a `Skipped` that counts what cannot be used.
    """
    share, megabytes = config.heldout, config.corpus_megabytes
    judge = classifier.fit_pages(config.web_labels, seed) if config.web_labels else None
    yield from user_files(config.files, share, skipped, config.stream_megabytes, judge)
    code = list(python_library(share, megabytes))
    yield from code
    yield from bounded(docstrings(code), megabytes)
    for kind in SYNTHETIC:
        yield from bounded(generated(kind, config.synthetic_documents, seed, share), megabytes)
    yield from bounded(repositories(code), megabytes)


def originals(records):
    """Indices of the documents that are not exact copies, in order.

    records: (digest, heldout) of each, the digest of its source and text. Training documents come first: a held-out
    document whose text also stands in training is a copy.
    """
    first = {}
    for index in sorted(range(len(records)), key=lambda i: records[i][1]):  # stable
        first.setdefault(records[index][0], index)
    return sorted(first.values())


def digest(document):
    """Sixteen bytes that two documents share exactly when they have the same source and text."""
    return hashlib.sha256(
        f"{document.source}\0{document.text}".encode("utf-8", "surrogatepass")
    ).digest()[:16]


def build(config, seed=0):
    """All documents of a `DataConfig` as a list, without empty ones and exact copies: for a corpus that fits memory."""
    found = [document for document in documents(config, seed) if document.text.strip()]
    return [found[index] for index in originals([(digest(d), d.heldout) for d in found])]
