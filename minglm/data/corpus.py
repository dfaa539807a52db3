"""The documents: where text comes from, under which name, and what is held out (paper 2.2, 2.3).

The toy needs no download. Its code is the standard library of the Python that runs it, its prose the docstrings of
that library, its mathematics, science, questions and long ledgers are written by `synthetic`, its repositories are the
packages of the library, joined by `repository`. Your own files join these or take their place.

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
import json
import math
import sysconfig
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from minglm.data import quality, repository, synthetic
from minglm.data.outline import outline

CODE = {
    **{".py": "python", ".c": "c", ".h": "c", ".cpp": "c++", ".hpp": "c++", ".cu": "cuda", ".java": "java"},
    **{".js": "javascript", ".ts": "typescript", ".go": "go", ".rs": "rust", ".rb": "ruby", ".sh": "shell", ".r": "r"},
}
"""Suffixes read as code, and their languages."""

TEXT = (".txt", ".md", ".rst")
SYNTHETIC = ("math", "science", "qa", "long")
BUILT_IN = ("code", "prose", "repository", *SYNTHETIC)

LARGEST_FILE = 200_000
"""Bytes above which a file of the library is taken for data."""

SHORTEST_DOCSTRING = 120
"""Characters below which a docstring is a label and not prose."""


@dataclass(frozen=True)
class Document:
    """One text. quality: 0 to 1. repository: name of the code base it belongs to. heldout: for validation only."""

    text: str
    source: str
    language: str
    quality: float
    name: str
    repository: str | None = None
    heldout: bool = False


def is_heldout(name, share):
    """Whether the document of this name is among the `share` that is held out; depends on nothing else."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < share * 2**64


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
        if {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"} & set(folders):
            continue
        if any(part.startswith(("config-", "_sysconfigdata")) for part in inside.parts):  # differ between machines
            continue
        if 0 < path.stat().st_size <= LARGEST_FILE:
            files.append(_File(f"python/{inside.as_posix()}", f"python/{folders[0]}" if folders else None, path))
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
                found.setdefault(text, Document(text, "prose", "en", quality.score(text), name, None, True))
                if not file.heldout:
                    training.add(text)
    for text, document in found.items():
        yield replace(document, heldout=text not in training)


def generated(kind, count, seed, share=0.0):
    """`count` documents of a kind of synthetic text: math, science, qa or long."""
    for index in range(count):
        text, language = synthetic.document(kind, index, seed)
        name = f"{kind}/{index}"
        yield Document(text, kind, language, quality.score(text, language), name, None, is_heldout(name, share))


def repositories(files):
    """Documents of source "repository": for each repository its training files, two or more, in dependency order."""
    groups = defaultdict(dict)
    for file in files:
        if file.repository and not file.heldout:
            groups[file.repository][file.name] = file
    for name, members in groups.items():
        if len(members) > 1:
            root = Path(name).parent
            text = repository.concatenate({Path(n).relative_to(root).as_posix(): d.text for n, d in members.items()})
            mean = sum(d.quality for d in members.values()) / len(members)
            yield Document(text, "repository", next(iter(members.values())).language, mean, f"repository/{name}", name)


def user_files(paths, share=0.0):
    """Documents from your own data.

    .txt .md .rst: one document of source "prose" each; a code file: one of source "code"; .jsonl and .parquet: one a
    row, from its "text", with an optional "source" and "language"; a folder: every text and code file under it, as one
    repository. A source that is not built in is named "user:<source>" in a mixture.
    Raises ValueError naming the file, and the line, that cannot be used.
    """
    for given in paths:
        path = Path(given)
        if path.is_dir():
            known = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in (*CODE, *TEXT) and p.is_file()]
            inside = [p for p in known if not any(part.startswith(".") for part in p.relative_to(path).parts)]
            if not inside:
                raise ValueError(f"data.files: the folder {path} holds no text or code files")
            for file in inside:
                yield _whole_file(file, f"{path}", share)
        elif not path.is_file():
            raise ValueError(f"data.files: there is no file or folder {path}")
        elif path.suffix.lower() in (*CODE, *TEXT):
            yield _whole_file(path, None, share)
        elif path.suffix.lower() in (".jsonl", ".parquet"):
            rows = _jsonl(path) if path.suffix.lower() == ".jsonl" else _parquet(path)
            for where, row in rows:
                yield _row(path, where, row, share)
        else:
            raise ValueError(f"data.files: {path} is none of .txt, .md, .jsonl, .parquet, a code file or a folder")


def _read(path):
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"data.files: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"data.files: {path} is not UTF-8 text (byte {error.start}); convert it first") from None


def _whole_file(path, folder, share):
    text, language = _read(path), CODE.get(path.suffix.lower(), "en")
    source = "code" if path.suffix.lower() in CODE else "prose"
    group = folder if source == "code" else None
    return Document(
        text, source, language, quality.score(text, language), f"{path}", group, is_heldout(f"{path}", share)
    )


def _jsonl(path):
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"data.files: {path}, line {number}: not JSON ({error.msg})") from None


def _parquet(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"data.files: {path} needs pyarrow; pip install 'minglm[parquet]'") from None
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"data.files: cannot read {path} after row {number}: {reason}") from None


def _row(path, where, row, share):
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f'data.files: {path}, {where}: needs a string "text"')
    source, language, name = row.get("source") or "prose", row.get("language") or "en", f"{path}/{where}"
    if not isinstance(source, str) or not isinstance(language, str):
        raise ValueError(f'data.files: {path}, {where}: "source" and "language" must be strings')
    if source not in BUILT_IN and not source.startswith("user:"):
        source = f"user:{source}"
    score = quality.score(row["text"], language)
    return Document(row["text"], source, language, score, name, None, is_heldout(name, share))


def _bytes(document):
    return len(document.text.encode("utf-8", "replace"))


def bounded(items, megabytes, size=_bytes):
    """At most `megabytes` of the items, by a hash of name or repository (which so stays together), in the given order.

    items: with `name` and `repository`; size: bytes of an item. An item that does not fit any more is passed over.
    """
    items, room, kept = list(items), megabytes * 1e6, set()
    for item in sorted(items, key=lambda i: (hashlib.sha256((i.repository or i.name).encode()).digest(), i.name)):
        if size(item) <= room:
            room -= size(item)
            kept.add(id(item))
    return [item for item in items if id(item) in kept]


def build(config, seed=0):
    """Every source of a `DataConfig` as a list of Documents; deterministic by config and seed.

    Exact duplicates are dropped, and a held-out document whose text also stands in training is a duplicate.
    """
    share, megabytes = config.heldout, config.corpus_megabytes
    own = list(user_files(config.files, share))
    code = list(python_library(share, megabytes))
    documents = [*own, *code, *bounded(docstrings(code), megabytes)]
    for kind in SYNTHETIC:
        documents += bounded(generated(kind, config.synthetic_documents, seed, share), megabytes)
    documents += bounded(repositories([*own, *code]), megabytes)
    seen = {}
    for document in sorted(documents, key=lambda d: d.heldout):  # stable: training documents first
        seen.setdefault((document.source, document.text), document)
    kept = set(map(id, seen.values()))
    return [document for document in documents if id(document) in kept and document.text.strip()]
