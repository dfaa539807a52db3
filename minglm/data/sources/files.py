"""Read your own text as a stream: files, folders, rows of JSON lines and parquet, data sets by name (paper 2.2).

    path of                            gives documents of source
    .txt .md .rst                      prose; a file above PIECE_BYTES comes in pieces that end at line ends
    a code file                        code
    .jsonl .jsonl.zst .parquet         one a row, from its "text"; its "source" and "language", if it names them;
                                       from its "html", if it has no text and the page holds code: see `web_code`
    a folder                           all of these under it; its code, or that of each checkout in it, is a repository
    hf:NAME or hf:NAME:CONFIG          the rows of a Hugging Face data set, as they arrive
    git:CHECKOUT or git:CHECKOUT:ISSUES    repository: issues, pull requests, commits; see `history`

Only one piece, row group or repository is in memory, so memory does not grow with the corpus.

A row that cannot be used, or a file in a folder that is not text, is skipped, counted, and named in a log with the
reason: one bad line in a million must not end a night's work. A file that was named and cannot be read at all, or in
which no row can be used, is an error: then the mistake is probably in the name. Quality is measured later, by several
processes.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minglm.data.sources import history, repository, web_code
from minglm.data.sources.rows import Row, Unreadable, dataset, jsonl, parquet
from minglm.data.store.documents import Document

CODE_LANGUAGES = {
    ".py": "python",
    ".c": "c",
    ".h": "c",
    ".cpp": "c++",
    ".hpp": "c++",
    ".cu": "cuda",
    ".java": "java",
    ".js": "javascript",
    ".ts": "typescript",
    ".go": "go",
    ".rs": "rust",
    ".rb": "ruby",
    ".sh": "shell",
    ".r": "r",
}
"""Suffixes read as code, and their languages."""

CODE_SUFFIXES = tuple(CODE_LANGUAGES)
TEXT_SUFFIXES = (".txt", ".md", ".rst")
ROW_SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet")
READABLE_SUFFIXES = (*CODE_SUFFIXES, *TEXT_SUFFIXES, *ROW_SUFFIXES)

SYNTHETIC_SOURCES = ("math", "science", "qa", "long")
BUILT_IN_SOURCES = ("code", "prose", "repository", *SYNTHETIC_SOURCES)

PIECE_BYTES = 4 * 2**20
"""A larger text is read in pieces."""

REPOSITORY_CHARACTERS = 16 * 2**20
"""The files of a larger repository are not joined."""


class Skipped:
    """Count the records that could not be used, and name each in a log.

    Attributes:
        count: how many there are.
        reasons: how often each reason was given.
        path: the log, one line of JSON for each record; None: no log.
    """

    def __init__(self, path: Path | str | None = None):
        self.path = None if path is None else Path(path)
        self.count = 0
        self.reasons: Counter[str] = Counter()
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")

    def add(self, file: Path | str, where: str, why: str) -> None:
        """Count one record.

        Args:
            file: the file it is in.
            where: its place in the file, such as "line 7".
            why: the reason.
        """
        self.count += 1
        self.reasons[why] += 1
        if self.path:
            record = {"file": str(file), "where": where, "why": why}
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
        elif _has_suffix(path, READABLE_SUFFIXES):
            yield from _file_documents(path, None, options)
        else:
            known = ".txt, .md, .jsonl, .jsonl.zst, .parquet, a code file, a folder, hf:NAME or git:CHECKOUT"
            raise ValueError(f"data.files: {path} is none of {known}")


def _has_suffix(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(suffixes)


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
    open_repositories: dict[Path, _OpenRepository] = {}
    empty = True
    for folder_name, subfolders, names in os.walk(top):
        if "log.jsonl" in names and "data" in subfolders:
            # The folder of a run of minglm, perhaps of the one that is reading.
            subfolders.clear()
            continue
        folder = Path(folder_name)
        parents = (folder, *folder.parents)
        is_checkout = ".git" in subfolders or ".git" in names
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))

        # Close the repositories that this folder is not in.
        for root in list(open_repositories):
            if root not in parents:
                yield from open_repositories.pop(root).close(options.skipped)
        if is_checkout or folder == top:
            open_repositories[folder] = _OpenRepository(folder)
        innermost = next(parent for parent in parents if parent in open_repositories)
        current = open_repositories[innermost]

        for name in sorted(names):
            path = folder / name
            readable = _has_suffix(path, READABLE_SUFFIXES) and path.is_file()
            if name.startswith(".") or not readable:
                continue
            empty = False
            try:
                for document in _file_documents(path, f"{current.root}", options):
                    yield document
                    current.add(document)
            except _NotTextError as error:
                options.skipped.add(path, "file", f"not UTF-8 ({error})")
    for current in open_repositories.values():
        yield from current.close(options.skipped)
    if empty:
        raise ValueError(
            f"data.files: the folder {top} holds no text, code, .jsonl, .jsonl.zst or .parquet files"
        )


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


class _NotTextError(ValueError):
    """A file that is not UTF-8."""


def _file_documents(path: Path, repository: str | None, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of one file. Raises ValueError if it cannot be read."""
    suffix = path.suffix.lower()
    if _has_suffix(path, ROW_SUFFIXES):
        rows = parquet(path) if suffix == ".parquet" else jsonl(path)
        yield from _row_documents(f"{path}", rows, options)
        return
    heldout = is_heldout(f"{path}", options.heldout)
    is_code = _has_suffix(path, CODE_SUFFIXES)
    for number, text in enumerate(_pieces(path)):
        if number == 0 and not text.strip():
            options.skipped.add(path, "file", "empty")
        yield Document(
            text=text,
            source="code" if is_code else "prose",
            language=CODE_LANGUAGES.get(suffix, "en"),
            quality=None,
            name=f"{path}/{number}" if number else f"{path}",
            repository=repository if is_code else None,
            heldout=heldout,
        )


def _pieces(path: Path) -> Iterator[str]:
    """Yield the text of a file in pieces of about PIECE_BYTES, which end at line ends."""
    try:
        with open(path, "rb") as file:
            start = 0  # of the piece in the file, for error messages
            rest = b""
            while True:
                chunk = file.read(PIECE_BYTES)
                piece = rest + chunk
                rest = b""
                is_last = len(chunk) < PIECE_BYTES
                if not is_last:
                    cut = _cut(piece)
                    piece, rest = piece[:cut], piece[cut:]
                try:
                    text = piece.decode("utf-8")
                except UnicodeDecodeError as error:
                    where = f"(byte {start + error.start}); convert it first"
                    raise _NotTextError(f"data.files: {path} is not UTF-8 text {where}") from None
                if piece or start == 0:
                    yield text.replace("\r\n", "\n").replace("\r", "\n")
                start += len(piece)
                if is_last:
                    return
    except OSError as error:
        raise ValueError(f"data.files: cannot read {path}: {error.strerror}") from None


def _cut(piece: bytes) -> int:
    """Return where to cut: after the last line end, or near the end where a UTF-8 character begins."""
    after_line = piece.rfind(b"\n") + 1
    cut = after_line or len(piece) - 4
    # Bytes 10xxxxxx continue a character.
    while cut < len(piece) and piece[cut] & 0xC0 == 0x80:
        cut += 1
    return cut


# Rows


def _row_documents(
    name: str, rows: Iterable[Row], options: ReadOptions, megabytes: float = 0.0
) -> Iterator[Document]:
    """Convert rows to documents, up to `megabytes` of text (0: all). Skip and count the rows that cannot be used.

    Raises ValueError if there are rows and none of them can be used.
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
        yield document
        room -= len(document.text.encode("utf-8", "replace"))
        if room < 0:
            break
    if first_fault and not usable:
        raise ValueError(f"data.files: nothing in {name} can be used; {first_fault}")


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
    if source not in BUILT_IN_SOURCES and not source.startswith("user:"):
        source = f"user:{source}"
    row_name = f"{name}/{where}"
    heldout = is_heldout(row_name, options.heldout)
    return Document(text, source, language, None, row_name, None, heldout)
