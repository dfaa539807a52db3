"""Your own text: files, folders, rows of JSON lines and parquet, data sets by name; read as a stream (paper 2.2).

    path of                            gives documents of source
    .txt .md .rst                      prose; a file above PIECE comes in pieces that end at line ends
    a code file                        code
    .jsonl .jsonl.zst .parquet         one a row, from its "text"; its "source" and "language", if it names them;
                                       from its "html", if it has no text and the page holds code: see `web_code`
    a folder                           all of these under it; its code, or that of each checkout in it, is a repository
    hf:NAME or hf:NAME:CONFIG          the rows of a Hugging Face data set, as they arrive
    git:CHECKOUT or git:CHECKOUT:ISSUES    repository: issues, pull requests, commits; see `history`

Nothing is held but one piece, row group or repository, so memory does not grow with the corpus.

A row that cannot be used, or a file of a folder that is no text, is skipped, counted, and named in a log with the
reason: one bad line in a million must not end a night's work. A file that was named and cannot be read at all, or in
which no row can be used, is an error: then the mistake is probably in the name. Quality is measured later, by several
processes.
"""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from minglm.data.sources import history, repository, web_code
from minglm.data.sources.rows import dataset, jsonl, parquet

CODE = {
    **{
        ".py": "python",
        ".c": "c",
        ".h": "c",
        ".cpp": "c++",
        ".hpp": "c++",
        ".cu": "cuda",
        ".java": "java",
    },
    **{
        ".js": "javascript",
        ".ts": "typescript",
        ".go": "go",
        ".rs": "rust",
        ".rb": "ruby",
        ".sh": "shell",
        ".r": "r",
    },
}
"""Suffixes read as code, and their languages."""

TEXT = (".txt", ".md", ".rst")
ROWS = (".jsonl", ".jsonl.zst", ".parquet")
SYNTHETIC = ("math", "science", "qa", "long")
BUILT_IN = ("code", "prose", "repository", *SYNTHETIC)

PIECE = 4 * 2**20
"""Bytes above which a text is read in pieces."""

REPOSITORY = 16 * 2**20
"""Bytes above which the files of a repository are not joined."""


@dataclass(frozen=True)
class Document:
    """One text. quality: 0 to 1, None where it was not measured yet. repository: name of the code base it belongs to.
    heldout: for validation only."""

    text: str
    source: str
    language: str
    quality: float | None
    name: str
    repository: str | None = None
    heldout: bool = False


class Skipped:
    """What could not be used: `count` in all, `reasons` with how often each, and a line of JSON for each in the file
    `path`, if there is one."""

    def __init__(self, path=None):
        self.path, self.count, self.reasons = path and Path(path), 0, Counter()
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")

    def add(self, file, where, why):
        """Count one record: where in which file, and why it was skipped."""
        self.count += 1
        self.reasons[why] += 1
        if self.path:
            with open(self.path, "a", encoding="utf-8") as log:
                log.write(
                    json.dumps({"file": str(file), "where": where, "why": why}, ensure_ascii=False)
                    + "\n"
                )


def is_heldout(name, share):
    """Whether the document of this name is among the `share` that is held out; depends on nothing else."""
    return (
        int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:8], "big")
        < share * 2**64
    )


@dataclass(frozen=True)
class Reading:
    """How the sources of a corpus are read; see `user_files`."""

    share: float
    skipped: Skipped
    judge: object


def user_files(paths, share=0.0, skipped=None, megabytes=0.0, judge=None):
    """Documents from your own data, in order, as a stream; see the table above.

    share: how much is held out. skipped: a `Skipped` that counts what cannot be used. megabytes: bound on the text of
    each data set by name (0: none). judge: says which web pages without a code tag teach code (`web_code`). A source
    that is not built in is named "user:<source>" in a mixture.
    Raises ValueError naming the file that cannot be used, and the row.
    """
    how = Reading(share, skipped or Skipped(), judge)
    for given in paths:
        path = Path(given)
        if str(given).startswith("hf:"):
            yield from _rows(str(given), dataset(str(given)), how, megabytes)
        elif str(given).startswith("git:"):
            yield from _history(str(given), share)
        elif path.is_dir():
            yield from _folder(path, how)
        elif not path.is_file():
            raise ValueError(f"data.files: there is no file or folder {path}")
        elif _is(path, CODE, TEXT, ROWS):
            yield from _file(path, None, how)
        else:
            known = ".txt, .md, .jsonl, .jsonl.zst, .parquet, a code file, a folder, hf:NAME or git:CHECKOUT"
            raise ValueError(f"data.files: {path} is none of {known}")


def _history(name, share):
    """Documents of a checkout's history; what changed in files that are held out is no part of them."""
    checkout, _, issues = name.removeprefix("git:").partition(":")

    def hidden(path):
        return is_heldout(f"{Path(checkout) / path}", share)

    for sha, text in history.texts(checkout, issues or None, hidden):
        yield Document(text, "repository", "diff", None, f"{name}@{sha}")


def _is(path, *kinds):
    return path.name.lower().endswith(tuple(suffix for kind in kinds for suffix in kind))


def _folder(top, how):
    """Documents of all files below a folder, in order of their paths; each repository after its last file."""
    repositories_open, found = (
        {},
        False,
    )  # {folder of the repository: [bytes so far, its code files]}
    for folder, below, names in os.walk(top):
        if "log.jsonl" in names and "data" in below:  # a run of minglm, perhaps the one that reads
            below.clear()
            continue
        folder, checkout = Path(folder), ".git" in below or ".git" in names
        below[:] = sorted(name for name in below if not name.startswith("."))
        for root in [root for root in repositories_open if root not in (folder, *folder.parents)]:
            yield from _join(root, *repositories_open.pop(root), how.skipped)
        if checkout or folder == top:
            repositories_open[folder] = [0, []]
        root = next(r for r in (folder, *folder.parents) if r in repositories_open)
        for path in [folder / name for name in sorted(names) if not name.startswith(".")]:
            if _is(path, CODE, TEXT, ROWS) and path.is_file():
                found = True
                try:
                    for document in _file(path, f"{root}", how):
                        yield document
                        _hold(repositories_open[root], document)
                except _NotText as error:
                    how.skipped.add(path, "file", f"not UTF-8 ({error})")
    for root, held in repositories_open.items():
        yield from _join(root, *held, how.skipped)
    if not found:
        raise ValueError(
            f"data.files: the folder {top} holds no text, code, .jsonl, .jsonl.zst or .parquet files"
        )


def _hold(held, document):
    """Keep a code file for its repository, or none at all once they are too long."""
    if document.repository:
        held[0] += len(document.text)
        held[1].append(document)
        if held[0] > REPOSITORY:
            held[1].clear()


def _join(root, size, members, skipped):
    if size > REPOSITORY:
        skipped.add(
            root,
            "repository",
            f"more than {REPOSITORY} characters of code: not joined, its files stand alone",
        )
    yield from repositories(members)


def repositories(files):
    """Documents of source "repository": for each repository its training files, two or more, in dependency order."""
    groups = {}
    for file in files:
        if file.repository and not file.heldout:
            groups.setdefault(file.repository, {})[file.name] = file
    for name, members in groups.items():
        if len(members) > 1:
            root, scores = Path(name).parent, [d.quality for d in members.values()]
            text = repository.concatenate(
                {Path(n).relative_to(root).as_posix(): d.text for n, d in members.items()}
            )
            mean = None if None in scores else sum(scores) / len(scores)
            yield Document(
                text,
                "repository",
                next(iter(members.values())).language,
                mean,
                f"repository/{name}",
                name,
            )


class _NotText(ValueError):
    """A file that is not UTF-8."""


def _file(path, folder, how):
    """Documents of one file. Raises ValueError where it cannot be read."""
    if _is(path, ROWS):
        rows = parquet(path) if path.suffix.lower() == ".parquet" else jsonl(path)
        yield from _rows(f"{path}", rows, how)
        return
    language, heldout = CODE.get(path.suffix.lower(), "en"), is_heldout(f"{path}", how.share)
    source, group = ("code", folder) if _is(path, CODE) else ("prose", None)
    for number, text in enumerate(_pieces(path)):
        name = f"{path}" if not number else f"{path}/{number}"
        if not number and not text.strip():
            how.skipped.add(path, "file", "empty")
        yield Document(text, source, language, None, name, group, heldout)


def _pieces(path):
    """The text of a file, in pieces of about PIECE bytes that end at line ends."""
    try:
        with open(path, "rb") as file:
            at, rest = 0, b""
            while True:
                chunk = file.read(PIECE)
                piece, rest = rest + chunk, b""
                if (
                    len(chunk) == PIECE
                ):  # there may be more: end at a line end, or where a character can begin
                    cut = piece.rfind(b"\n") + 1 or len(piece) - 4
                    while cut < len(piece) and piece[cut] & 0xC0 == 0x80:
                        cut += 1
                    piece, rest = piece[:cut], piece[cut:]
                try:
                    text = piece.decode("utf-8")
                except UnicodeDecodeError as error:
                    where = f"(byte {at + error.start}); convert it first"
                    raise _NotText(f"data.files: {path} is not UTF-8 text {where}") from None
                if piece or not at:
                    yield text.replace("\r\n", "\n").replace("\r", "\n")
                at += len(piece)
                if len(chunk) < PIECE:
                    return
    except OSError as error:
        raise ValueError(f"data.files: cannot read {path}: {error.strerror}") from None


def _rows(name, rows, how, megabytes=0.0):
    """Documents of rows, pairs of (where, row or the reason why there is none)."""
    good, bad, left = 0, None, megabytes * 1e6 or float("inf")
    for where, row in rows:
        document = row if isinstance(row, str) else _document(name, where, row, how)
        if isinstance(document, str):
            bad = bad or f"{where}: {document}"
            how.skipped.add(name, where, document)
            continue
        good += 1
        yield document
        left -= len(document.text.encode("utf-8", "replace"))
        if left < 0:
            break
    if bad and not good:
        raise ValueError(f"data.files: nothing in {name} can be used; {bad}")


def _document(name, where, row, how):
    """The Document of a row, or the reason why there is none."""
    row, web = (row, row.get("html")) if isinstance(row, dict) else ({}, None)
    if row.get("text") is None and isinstance(web, str):
        if not web_code.is_candidate(web, how.judge):
            return "a web page without code"
        row = {"language": "web", **row, "text": web_code.parse(web)}
    if not isinstance(row.get("text"), str):
        return 'needs a string "text"'
    if not row["text"].strip():
        return "empty text"
    source, language = row.get("source") or "prose", row.get("language") or "en"
    if not isinstance(source, str) or not isinstance(language, str):
        return '"source" and "language" must be strings'
    if source not in BUILT_IN and not source.startswith("user:"):
        source = f"user:{source}"
    place = f"{name}/{where}"
    return Document(row["text"], source, language, None, place, None, is_heldout(place, how.share))
