"""Read your own text as a stream: files, folders, rows of JSON lines and parquet, data sets by name (paper 2.2).

    path of                            gives documents of source
    .txt .md .rst                      prose; a text above PIECE_CHARACTERS comes in pieces that end at line ends
    a code file                        code; `languages` lists the suffixes
    .jsonl .ndjson .parquet            one a row, from its "text"; its "source" and "language", if it names them;
                                       from its "html", if it has no text and the page holds code: see `web_code`
    any but .parquet, and .gz .bz2 .xz .zst     the same, unpacked
    a folder                           all of these under it; its code, or that of each checkout in it, is a repository
    hf:NAME or hf:NAME:CONFIG          the rows of a Hugging Face data set, as they arrive
    git:CHECKOUT or git:CHECKOUT:ISSUES    repository: issues, pull requests, commits; see `history`

Only one piece, row group or repository is in memory, so memory does not grow with the corpus. Hidden files
and folders are no part of a folder.

A row that cannot be used, or a file or folder in a folder that cannot be read, is skipped, counted, and named
in a log with the reason: one bad line in a million must not end a night's work. Files of a kind that is not
read are counted by their suffix. A file that was named and cannot be read, or a file or folder in which
nothing can be used, is an error: then the mistake is probably in the name. Quality is measured later, by
several processes.
"""

import codecs
import hashlib
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minglm.data.languages import CODE_SUFFIXES, LANGUAGE_OF_SUFFIX
from minglm.data.sources import history, repository, web_code
from minglm.data.sources.rows import (
    PACKED_SUFFIXES,
    Row,
    Unreadable,
    UnusableFile,
    dataset,
    jsonl,
    parquet,
    read_unpacked,
)
from minglm.data.sources.synthetic import WRITERS
from minglm.data.store.documents import Document

TEXT_SUFFIXES = (".txt", ".md", ".rst")
ROW_SUFFIXES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
PACKABLE_SUFFIXES = (*CODE_SUFFIXES, *TEXT_SUFFIXES, *ROW_SUFFIXES)

SYNTHETIC_SOURCES = tuple(WRITERS)
BUILT_IN_SOURCES = ("code", "prose", "repository", *SYNTHETIC_SOURCES)

PIECE_CHARACTERS = 4 * 2**20
"""A longer text comes in pieces, so that what is done to one document needs little memory."""

REPOSITORY_CHARACTERS = 16 * 2**20
"""The files of a larger repository are not joined."""


NAMED_RECORDS = 1000
"""Records of a file that are named in the log; the rest is counted."""


def printable(path: Path | str) -> str:
    """Return a path as text that can be written; bytes of its name that are not UTF-8 are written as escapes."""
    return f"{path}".encode("utf-8", "backslashreplace").decode()


class Skipped:
    """Count what could not be used, and name it in a log.

    Attributes:
        count: how many records there are.
        reasons: how often each reason was given.
        not_read: how many files of a kind that is not read there are, by suffix.
        path: the log, one line of JSON for each record, at most NAMED_RECORDS for a file; None: no log.
    """

    def __init__(self, path: Path | str | None = None):
        self.path = None if path is None else Path(path)
        self.count = 0
        self.reasons: Counter[str] = Counter()
        self.not_read: Counter[str] = Counter()
        self._of_file: Counter[str] = Counter()
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("", encoding="utf-8")

    def add(self, file: Path | str, where: str, why: str) -> None:
        """Count one record.

        Args:
            file: the file it is in.
            where: its place in the file, such as "line 7".
            why: the reason, one of a few.
        """
        name = printable(file)
        self.count += 1
        self.reasons[why] += 1
        self._of_file[name] += 1
        if self.path is None or self._of_file[name] > NAMED_RECORDS:
            return
        if self._of_file[name] == NAMED_RECORDS:
            why = f"{why}; further records of this file are only counted"
        record = {"file": name, "where": where, "why": why}
        with open(self.path, "a", encoding="utf-8") as log:
            log.write(json.dumps(record, ensure_ascii=False) + "\n")


def is_heldout(name: str, share: float) -> bool:
    """Return True if the document of this name is among the `share` that is held out; nothing else decides it."""
    digest = hashlib.sha256(name.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


@dataclass(frozen=True)
class ReadOptions:
    """How your own data is read."""

    heldout: float = 0.0
    """Share of the documents that is held out."""
    megabytes: float = 0.0
    """Upper bound on the text of each data set by name; 0: all of it."""
    page_classifier: web_code.PageClassifier | None = None
    """Says which web pages without a code tag teach code; see `web_code`."""
    skipped: Skipped = field(default_factory=Skipped)


def user_files(
    paths: Iterable[Path | str], options: ReadOptions | None = None
) -> Iterator[Document]:
    """Yield documents from your own data, in order; see the table above.

    A source that is not built in is named "user:<source>" in a mixture.

    Raises:
        ValueError: naming the file that cannot be used, and the row.
    """
    options = options or ReadOptions()
    for given in paths:
        path = Path(given)
        name = str(given)
        if name.startswith("hf:"):
            yield from _row_documents(name, dataset(name), options, options.megabytes)
        elif name.startswith("git:"):
            yield from _history_documents(name, options.heldout)
        elif path.is_dir():
            yield from _folder_documents(path, options)
        elif not path.is_file():
            raise ValueError(f"data.files: there is no file or folder {path}")
        elif _kind(path):
            yield from _file_documents(path, None, options)
        else:
            known = ".txt, .md, .jsonl, .parquet, a code file, one of these packed (.gz, .zst), a folder, hf:NAME or git:CHECKOUT"
            raise ValueError(f"data.files: {path} is none of {known}")


def _kind(path: Path) -> str | None:
    """Return the suffix that says how a file is read, without that of its packing; None for a file that is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes[-1:] == [PARQUET]:
        return PARQUET
    if suffixes and suffixes[-1] in PACKED_SUFFIXES:
        del suffixes[-1]
    return suffixes[-1] if suffixes and suffixes[-1] in PACKABLE_SUFFIXES else None


def _history_documents(name: str, heldout: float) -> Iterator[Document]:
    """Yield documents of a checkout's history, without the changes in files that are held out."""
    checkout, _, issues = name.removeprefix("git:").partition(":")

    def is_hidden(path: str) -> bool:
        return is_heldout(f"{Path(checkout) / path}", heldout)

    for sha, text in history.texts(checkout, issues or None, is_hidden):
        yield Document(text, "repository", "diff", None, f"{name}@{sha}")


# Folders and repositories


@dataclass
class _OpenRepository:
    """The code files of a repository whose folder is being read."""

    root: Path
    characters: int = 0
    files: list[Document] = field(default_factory=list)

    def add(self, document: Document) -> None:
        """Keep a code file, or drop them all once they are too long."""
        if not document.repository:
            return
        self.characters += len(document.text)
        self.files.append(document)
        if self.characters > REPOSITORY_CHARACTERS:
            self.files.clear()

    def close(self, skipped: Skipped) -> Iterator[Document]:
        """Yield the document of the joined files."""
        if self.characters > REPOSITORY_CHARACTERS:
            why = f"more than {REPOSITORY_CHARACTERS} characters of code: not joined, its files are documents"
            skipped.add(self.root, "repository", why)
        yield from repositories(self.files)


def _folder_documents(top: Path, options: ReadOptions) -> Iterator[Document]:
    """Yield documents of all files below a folder, in order of their paths; each repository after its last file."""
    skipped = options.skipped
    open_repositories: dict[Path, _OpenRepository] = {}
    usable = False
    first_fault = ""
    for folder, subfolders, names in _walk(top, skipped):
        parents = (folder, *folder.parents)
        # Close the repositories that this folder is not in.
        for root in list(open_repositories):
            if root not in parents:
                yield from open_repositories.pop(root).close(skipped)
        is_checkout = ".git" in subfolders or ".git" in names
        if is_checkout or folder == top:
            open_repositories[folder] = _OpenRepository(folder)
        innermost = next(parent for parent in parents if parent in open_repositories)
        current = open_repositories[innermost]

        for name in sorted(names):
            path = folder / name
            if name.startswith("."):
                continue
            if _kind(path) is None:
                skipped.not_read["".join(path.suffixes[-1:]).lower() or "no suffix"] += 1
                continue
            try:
                for document in _file_documents(path, printable(current.root), options):
                    usable = True
                    yield document
                    current.add(document)
            except UnusableFile as fault:
                first_fault = first_fault or f"; {fault}"
                skipped.add(path, "file", f"{fault}".removeprefix("data.files: "))
    for current in open_repositories.values():
        yield from current.close(skipped)
    if not usable:
        raise ValueError(
            f"data.files: the folder {top} holds no text, code, .jsonl or .parquet files that can be used{first_fault}"
        )


def _walk(top: Path, skipped: Skipped) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield (folder, names of its folders, names of its files) in order; count the folders that are passed over."""

    def unreadable(error: OSError) -> None:
        skipped.add(error.filename, "folder", f"cannot be read ({error.strerror})")

    for folder_name, subfolders, names in os.walk(top, onerror=unreadable):
        folder = Path(folder_name)
        if "log.jsonl" in names and "data" in subfolders:
            # Perhaps of the run that is reading.
            skipped.add(folder, "folder", "holds a run of minglm")
            subfolders.clear()
            continue
        found = list(subfolders)
        subfolders[:] = sorted(name for name in found if not name.startswith("."))
        for name in subfolders:
            if (folder / name).is_symlink():
                skipped.add(folder / name, "folder", "a link to a folder, not followed")
        yield folder, found, names


def repositories(files: Iterable[Document]) -> Iterator[Document]:
    """Yield one document of source "repository" for each repository with two or more training files.

    Its files are in dependency order.
    """
    by_repository: dict[str, dict[str, Document]] = {}
    for file in files:
        if file.repository and not file.heldout:
            by_repository.setdefault(file.repository, {})[file.name] = file
    for name, members in by_repository.items():
        if len(members) < 2:
            continue
        parent = Path(name).parent
        text = repository.concatenate(
            {Path(n).relative_to(parent).as_posix(): d.text for n, d in members.items()}
        )
        scores = [document.quality for document in members.values()]
        measured = [score for score in scores if score is not None]
        quality = sum(measured) / len(scores) if len(measured) == len(scores) else None
        language = next(iter(members.values())).language
        yield Document(text, "repository", language, quality, f"repository/{name}", name)


# Single files


def _file_documents(path: Path, repository: str | None, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of one file. Raises `UnusableFile` if it cannot be read."""
    kind = _kind(path)
    name = printable(path)
    if not path.is_file():
        raise UnusableFile(f"data.files: {name} is not a file")
    if kind == PARQUET or kind in ROW_SUFFIXES:
        rows = parquet(path) if kind == PARQUET else jsonl(path)
        yield from _row_documents(name, rows, options)
        return
    language = LANGUAGE_OF_SUFFIX.get(kind or "")
    heldout = is_heldout(name, options.heldout)
    for number, text in enumerate(_pieces(path)):
        if number == 0 and not text.strip():
            options.skipped.add(path, "file", "empty")
        yield Document(
            text=text,
            source="code" if language else "prose",
            language=language or "en",
            quality=None,
            name=f"{name}/{number}" if number else name,
            repository=repository if language else None,
            heldout=heldout,
        )


def _pieces(path: Path) -> Iterator[str]:
    """Yield the text of a file in pieces of about PIECE_CHARACTERS, which end at line ends."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    ends = io.IncrementalNewlineDecoder(None, translate=True)
    read = 0
    rest = ""
    is_first = True
    for chunk in itertools.chain(read_unpacked(path), [None]):
        try:
            rest += ends.decode(decoder.decode(chunk or b"", final=chunk is None), chunk is None)
        except UnicodeDecodeError as error:
            # A character may have begun in the chunk before.
            byte = read + error.start - (len(error.object) - len(chunk or b""))
            where = f"(byte {byte}); convert it first"
            raise UnusableFile(f"data.files: {path} is not UTF-8 text {where}") from None
        read += len(chunk or b"")
        while len(rest) > PIECE_CHARACTERS:
            cut = _cut(rest)
            yield rest[:cut]
            is_first = False
            rest = rest[cut:]
    if rest or is_first:
        yield rest


def _cut(text: str) -> int:
    """Return where to cut a text that is too long: after the last line end in a piece of it, or at its end."""
    return text.rfind("\n", 0, PIECE_CHARACTERS) + 1 or PIECE_CHARACTERS


# Rows


def _row_documents(
    name: str, rows: Iterable[Row], options: ReadOptions, megabytes: float = 0.0
) -> Iterator[Document]:
    """Convert rows to documents, up to `megabytes` of text (0: all).

    Skip and count the rows that cannot be used.

    Raises `UnusableFile` if there are rows and none of them can be used.
    """
    usable = 0
    first_fault = None
    room = megabytes * 1e6 or float("inf")
    for where, row in rows:
        try:
            document = _row_document(name, where, row, options)
        except Unreadable as fault:
            first_fault = first_fault or f"{where}: {fault}"
            options.skipped.add(name, where, str(fault))
            continue
        usable += 1
        yield from _document_pieces(document)
        room -= len(document.text.encode("utf-8", "replace"))
        if room < 0:
            break
    if first_fault and not usable:
        raise UnusableFile(f"data.files: nothing in {name} can be used; {first_fault}")


def _document_pieces(document: Document) -> Iterator[Document]:
    """Yield a document in pieces of about PIECE_CHARACTERS, which end at line ends."""
    rest = document.text
    number = 0
    while len(rest) > PIECE_CHARACTERS:
        cut = _cut(rest)
        name = f"{document.name}/{number}" if number else document.name
        yield replace(document, text=rest[:cut], name=name)
        rest = rest[cut:]
        number += 1
    yield replace(document, text=rest, name=f"{document.name}/{number}") if number else document


def _row_document(name: str, where: str, row: Any, options: ReadOptions) -> Document:
    """Convert one row. Raises `Unreadable` with the reason if it is not a document."""
    if isinstance(row, Unreadable):
        raise row
    if not isinstance(row, dict):
        row = {}
    html = row.get("html")
    if row.get("text") is None and isinstance(html, str):
        if not web_code.is_candidate(html, options.page_classifier):
            raise Unreadable("a web page without code")
        row = {"language": "web", **row, "text": web_code.parse(html)}
    text = row.get("text")
    if not isinstance(text, str):
        raise Unreadable('needs a string "text"')
    if not text.strip():
        raise Unreadable("empty text")
    source = row.get("source") or "prose"
    language = row.get("language") or "en"
    if not isinstance(source, str) or not isinstance(language, str):
        raise Unreadable('"source" and "language" must be strings')
    for field_name, value in (("text", text), ("source", source), ("language", language)):
        if not _is_unicode(value):
            raise Unreadable(f'"{field_name}" holds half a surrogate pair, which is no character')
    if source not in BUILT_IN_SOURCES and not source.startswith("user:"):
        source = f"user:{source}"
    row_name = f"{name}/{where}"
    heldout = is_heldout(row_name, options.heldout)
    return Document(text, source, language, None, row_name, None, heldout)


def _is_unicode(text: str) -> bool:
    """Return whether a text can be written as UTF-8; JSON may escape half a surrogate pair, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
