"""List every document of a corpus: where text comes from, its name, and what is held out (paper 2.2, 2.3).

The toy needs no download. Its code is the standard library of the Python that runs it; its prose is the
docstrings of that library; its mathematics, science, questions, long ledgers and copies are written by `synthetic`;
its repositories are the packages of the library, joined by `repository`. Your own files, read by `files`,
join these or replace them.

    source      what                                                            language
    code        Python files                                                    python
    prose       docstrings of modules, classes, functions; your text files      en
    math, ...   procedural text, in the sources of `synthetic`                  en, zh
    repository  one document per package                                        python

A hash of the document's name decides what is held out, so the held-out set does not change with the seed or
the size of the corpus. A docstring goes with its file, and a repository leaves its held-out files out: no
held-out text is in a training document.

Simplified: no web, and no languages but these two.
"""

import hashlib
import inspect
import math
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from minglm.config.data import DataConfig
from minglm.data.cleaning import classifier, quality
from minglm.data.cleaning.python_ast import outline
from minglm.data.sources import synthetic
from minglm.data.sources.files import (
    SYNTHETIC_SOURCES,
    ReadOptions,
    Skipped,
    is_heldout,
    repositories,
    user_files,
)
from minglm.data.store.documents import Document

MAX_FILE_BYTES = 200_000
"""A larger file of the library is taken for data."""

MIN_DOCSTRING_CHARACTERS = 120
"""A shorter docstring is a label and not prose."""

LEFT_OUT_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
}

MACHINE_DEPENDENT = ("config-", "_sysconfigdata")
"""Prefixes of folders and files that differ between machines."""


class Named(Protocol):
    """A document or a file, with the repository it belongs to."""

    @property
    def name(self) -> str:
        """Return its name."""
        ...

    @property
    def repository(self) -> str | None:
        """Return the name of its code base."""
        ...


Item = TypeVar("Item", bound=Named)


@dataclass(frozen=True)
class _LibraryFile:
    name: str
    repository: str | None
    path: Path


def _source_paths(root: Path) -> list[Path]:
    """List the Python files under a folder, in order; folders that are left out are not entered, as they may be large."""
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT_FOLDERS]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths)


def _library_files() -> list[_LibraryFile]:
    """List the files of the running Python's standard library, without its tests, in order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in _source_paths(root):
        inside = path.relative_to(root)
        folders = inside.parts[:-1]
        if any(part.startswith(MACHINE_DEPENDENT) for part in inside.parts):
            continue
        if 0 < path.stat().st_size <= MAX_FILE_BYTES:
            repository = f"python/{folders[0]}" if folders else None
            files.append(_LibraryFile(f"python/{inside.as_posix()}", repository, path))
    return files


def python_library(heldout: float = 0.0, megabytes: float = math.inf) -> Iterator[Document]:
    """Yield documents of source "code": the files of the standard library, in order.

    A package is a repository.

    Args:
        heldout: share of the files that is held out, one by one.
        megabytes: upper bound on what is read, see `bounded`.
    """
    for file in bounded(_library_files(), megabytes, lambda file: file.path.stat().st_size):
        try:
            text = file.path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # a few files show other encodings on purpose
            continue
        yield Document(
            text=text,
            source="code",
            language="python",
            quality=quality.score(text, "python"),
            name=file.name,
            repository=file.repository,
            heldout=is_heldout(file.name, heldout),
        )


def docstrings(files: Iterable[Document]) -> Iterator[Document]:
    """Yield documents of source "prose": the docstrings of Python documents, cleaned, each text once, in order.

    A docstring is held out if every file that it occurs in is held out.
    """
    documents: dict[str, Document] = {}
    training: set[str] = set()  # texts that occur in a training file
    for file in files:
        parsed = outline(file.text)
        if parsed is None:
            continue
        for docstring in parsed.docstrings:
            text = inspect.cleandoc(docstring.text).strip()
            if len(text) < MIN_DOCSTRING_CHARACTERS:
                continue
            if text not in documents:
                name = f"{file.name}:{docstring.line}"
                documents[text] = Document(text, "prose", "en", quality.score(text), name)
            if not file.heldout:
                training.add(text)
    for text, document in documents.items():
        yield replace(document, heldout=text not in training)


def generated(source: str, count: int, seed: int, heldout: float = 0.0) -> Iterator[Document]:
    """Yield `count` documents of a source of synthetic text."""
    for index in range(count):
        text, language = synthetic.document(source, index, seed)
        name = f"{source}/{index}"
        yield Document(
            text=text,
            source=source,
            language=language,
            quality=quality.score(text, language),
            name=name,
            heldout=is_heldout(name, heldout),
        )


def _text_bytes(document: Any) -> int:
    return len(document.text.encode("utf-8", "replace"))


def bounded(
    items: Iterable[Item], megabytes: float, size: Callable[[Item], int] = _text_bytes
) -> list[Item]:
    """Keep at most `megabytes` of the items, in the given order.

    A hash of the repository (or the name, for an item without one) chooses, so that the files of a repository
    are kept or dropped together as far as they fit. An item that does not fit any more is passed over.

    Args:
        size: returns the bytes of an item.
    """

    def rank(item: Item) -> tuple[bytes, str]:
        return hashlib.sha256((item.repository or item.name).encode()).digest(), item.name

    items = list(items)
    room = megabytes * 1e6
    kept = set()
    for item in sorted(items, key=rank):
        if size(item) <= room:
            room -= size(item)
            kept.add(id(item))
    return [item for item in items if id(item) in kept]


def documents(
    config: DataConfig, seed: int = 0, skipped: Skipped | None = None
) -> Iterator[Document]:
    """Yield every document of a config; the same config and seed give the same documents.

    Your own documents come first and are read one at a time. The built-in ones are in memory, as
    `corpus_megabytes` bounds them.

    Args:
        skipped: counts what cannot be used.
    """
    options = ReadOptions(
        heldout=config.heldout,
        megabytes=config.stream_megabytes,
        page_classifier=classifier.fit_pages(config.web_labels, seed)
        if config.web_labels
        else None,
        skipped=skipped or Skipped(),
    )
    yield from user_files(config.files, options)

    megabytes = config.corpus_megabytes
    code = list(python_library(config.heldout, megabytes))
    yield from code
    yield from bounded(docstrings(code), megabytes)
    for source in SYNTHETIC_SOURCES:
        pages = generated(source, config.synthetic_documents, seed, config.heldout)
        yield from bounded(pages, megabytes)
    yield from bounded(repositories(code), megabytes)
