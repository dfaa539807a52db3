"""A document, and documents on disk: JSON lines in chunks of about 16 MB (paper 2.2).

    FOLDER/00003.documents     chunk 3: one document a line, as a list of the fields of `Document`

A corpus is written once, as a stream, and then read chunk by chunk: one process has the text of one chunk in
memory, so memory does not grow with the length of the corpus. Chunks are also the unit of work for several
processes (`minglm.data.workers`). The suffix is not one that is read as a source of text.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from minglm.common.files import atomic_path

CHUNK_CHARACTERS = 16_000_000
"""A chunk is closed once it has this many characters."""


@dataclass(frozen=True)
class Document:
    """One text of the corpus."""

    text: str
    source: str
    """Name in a mixture: a built-in one (`sources/files.py`), or user:NAME."""
    language: str
    """en, zh, python and so on; "web" for pages, "diff" for the history of a repository."""
    quality: float | None
    """0 to 1; None if it was not measured yet."""
    name: str
    repository: str | None = None
    """Name of the code base that the document belongs to."""
    heldout: bool = False
    """True for validation only."""


def chunk_path(folder: Path, number: int) -> Path:
    """Return the path of a chunk of documents."""
    return folder / f"{number:05d}.documents"


def write_documents(documents: Iterable[Document], folder: Path | str) -> list[Path]:
    """Write a stream of documents in chunks of CHUNK_CHARACTERS or more, and return their paths.

    Empty documents are left out. There is always at least one chunk.
    """
    folder = Path(folder)
    paths = []
    chunk = []
    length = 0
    for document in documents:
        if not document.text.strip():
            continue
        chunk.append(document)
        length += len(document.text)
        if length >= CHUNK_CHARACTERS:
            paths.append(_write_chunk(folder, len(paths), chunk))
            chunk = []
            length = 0
    if chunk or not paths:
        paths.append(_write_chunk(folder, len(paths), chunk))
    return paths


def _write_chunk(folder: Path, number: int, documents: list[Document]) -> Path:
    path = chunk_path(folder, number)
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(astuple(document)) + "\n")
    return path


def read_documents(path: Path | str) -> Iterator[Document]:
    """Yield the documents of a chunk in order. Raises ValueError if the file is damaged."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                yield Document(*json.loads(line))
            except (ValueError, TypeError):
                raise ValueError(
                    f"damaged documents {path}; delete its folder to read the sources again"
                ) from None
