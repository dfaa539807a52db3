"""Token shards on disk: memory-mapped files with an index and checksums (paper 2.2).

    FOLDER/00003.01.tokens.npy   all ids of one source in chunk 3 of the corpus, one document after the other
    FOLDER/00003.01.ends.npy     the position where each of its documents ends
    FOLDER/00003.json            the shards of chunk 3: source, documents, tokens, bytes of text, checksums
    FOLDER/index.json            written last: the numbers of all chunks; a folder with an index is complete

The shards of a chunk are written by one process that needs nothing from the others. So any number of processes work at
once, a build that was killed continues with the missing chunks, and a file that was cut short is rebuilt alone. Ids
are uint16 if the vocabulary allows it, else uint32.

Choices: .npy files, because every program that knows numpy can memory-map them; a chunk has some megabytes, so there
are few files and each is read in long runs. CRC-32 detects damage, not malice.
"""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minglm.common.files import atomic_path, write_json


class ShardFiles(NamedTuple):
    """The two arrays of one source in one chunk."""

    tokens: np.ndarray
    """uint16 or uint32: the ids of all documents, concatenated; memory-mapped."""
    ends: np.ndarray
    """int64: the position in `tokens` where each document ends."""


class ShardEntry(NamedTuple):
    """What the index of a chunk says of one source."""

    source: str
    name: str
    """The file names without their suffix."""
    documents: int
    tokens: int
    bytes: int
    """Bytes of UTF-8 text that the tokens were made from."""
    crc32: list[int]
    """Checksums of tokens and ends."""


class SourceTotals(NamedTuple):
    """What a complete folder holds of one source."""

    documents: int
    tokens: int
    bytes: int


class Shard(Sequence[np.ndarray]):
    """The documents of one source: a sequence of integer arrays, stored in any number of chunks."""

    def __init__(self, chunks: Sequence[ShardFiles | tuple[np.ndarray, np.ndarray]]):
        self.chunks = [ShardFiles(*chunk) for chunk in chunks]
        counts = [len(chunk.ends) for chunk in self.chunks]
        # first_document[k] is the index of the first document of chunk k; the last entry is the total.
        self.first_document = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self.first_document[-1])

    # One document only: nobody takes a slice of a corpus.
    def __getitem__(self, index: int) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self.first_document, index, side="right")) - 1
        chunk = self.chunks[number]
        inside = int(index - self.first_document[number])
        start = int(chunk.ends[inside - 1]) if inside else 0
        return chunk.tokens[start : int(chunk.ends[inside])]

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each document, int64, without reading a token."""
        lengths = [np.diff(chunk.ends, prepend=0) for chunk in self.chunks]
        return np.concatenate(lengths or [np.zeros(0, np.int64)])


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)


def _entries_path(folder: Path | str, number: int) -> Path:
    return Path(folder) / f"{number:05d}.json"


def _index_path(folder: Path | str) -> Path:
    return Path(folder) / "index.json"


def _save_array(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


def write_chunk(
    folder: Path | str,
    number: int,
    documents_by_source: Mapping[str, Sequence[np.ndarray]],
    key: Any,
    text_bytes: Mapping[str, int] | None = None,
) -> None:
    """Write the shards of one chunk.

    Args:
        documents_by_source: {source: integer arrays, one a document}.
        key: any JSON value that describes what the tokens were made from.
        text_bytes: {source: bytes of text}, for the record.
    """
    folder = Path(folder)
    entries = []
    for place, (source, documents) in enumerate(documents_by_source.items()):
        ends = np.cumsum([len(d) for d in documents], dtype=np.int64)
        tokens = np.concatenate(documents) if len(documents) else np.zeros(0, dtype=np.uint16)
        name = f"{number:05d}.{place:02d}"
        _save_array(folder / f"{name}.tokens.npy", tokens)
        _save_array(folder / f"{name}.ends.npy", ends)
        entry = ShardEntry(
            source=source,
            name=name,
            documents=len(ends),
            tokens=len(tokens),
            bytes=(text_bytes or {}).get(source, 0),
            crc32=[_checksum(tokens), _checksum(ends)],
        )
        entries.append(entry._asdict())
    write_json(_entries_path(folder, number), {"key": key, "shards": entries})


def _same_key(saved: Any, key: Any) -> bool:
    """Compare a key from a file with one that has not been through JSON; None matches every key."""
    return key is None or saved == json.loads(json.dumps(key))


def chunk_entries(folder: Path | str, number: int, key: Any = None) -> list[ShardEntry] | None:
    """Return the entries of a chunk, or None if it is missing or was written under another key."""
    try:
        saved = json.loads(_entries_path(folder, number).read_text())
        if not _same_key(saved["key"], key):
            return None
        return [ShardEntry(**entry) for entry in saved["shards"]]
    except (OSError, ValueError, KeyError, TypeError):  # absent, or cut short
        return None


def write_index(folder: Path | str, numbers: Iterable[int], key: Any) -> None:
    """Declare a folder complete: write the index with the numbers of its chunks."""
    write_json(_index_path(folder), {"key": key, "chunks": list(numbers)})


def chunk_numbers(folder: Path | str, key: Any = None) -> list[int] | None:
    """Return the numbers of a complete folder's chunks, or None without an index or with one of another key."""
    try:
        saved = json.loads(_index_path(folder).read_text())
        return saved["chunks"] if _same_key(saved["key"], key) else None
    except (OSError, ValueError, KeyError):
        return None


def _read_files(folder: Path | str, entry: ShardEntry) -> ShardFiles:
    path = Path(folder) / f"{entry.name}.tokens.npy"
    try:
        # numpy cannot map an empty file into memory.
        tokens = np.load(path, mmap_mode="r" if entry.tokens else None)
        ends = np.load(path.with_name(f"{entry.name}.ends.npy"))
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"damaged token shard {path}: {error}") from None
    complete = len(tokens) == entry.tokens and len(ends) == entry.documents
    if not complete or (len(ends) and ends[-1] != len(tokens)):
        raise ValueError(f"damaged token shard {path}: its length is not the one that was written")
    return ShardFiles(tokens, ends)


def find_damage(folder: Path | str, verify: bool = False) -> dict[int, str]:
    """Return {chunk number: fault} of a complete folder, for files that are missing or cut short.

    verify: also compare checksums, which reads every file.
    """
    faults = {}
    for number in chunk_numbers(folder) or []:
        entries = chunk_entries(folder, number)
        if entries is None:
            path = _entries_path(folder, number)
            faults[number] = f"damaged token shard {path}: missing or unreadable"
            continue
        for entry in entries:
            try:
                files = _read_files(folder, entry)
            except ValueError as error:
                faults[number] = str(error)
                continue
            if verify and [_checksum(files.tokens), _checksum(files.ends)] != entry.crc32:
                path = Path(folder) / f"{entry.name}.tokens.npy"
                faults[number] = f"damaged token shard {path}: wrong checksum"
    return faults


def discard_chunk(folder: Path | str, number: int) -> None:
    """Remove a chunk from a folder, so that the next build writes it again."""
    _index_path(folder).unlink(missing_ok=True)
    _entries_path(folder, number).unlink(missing_ok=True)


def load_shards(folder: Path | str, key: Any = None) -> dict[str, Shard] | None:
    """Return {source: Shard} of a folder that is complete under `key` (None: any key), or None.

    Tokens are memory-mapped. Raises ValueError naming a file that is missing or cut short.
    """
    numbers = chunk_numbers(folder, key)
    if numbers is None:
        return None
    faults = find_damage(folder)
    if faults:
        first = next(iter(faults.values()))
        raise ValueError(f"{first}; delete {_index_path(folder)} to build it again")
    files: dict[str, list[ShardFiles]] = {}
    for number in numbers:
        for entry in chunk_entries(folder, number) or []:
            files.setdefault(entry.source, []).append(_read_files(folder, entry))
    return {source: Shard(chunks) for source, chunks in files.items()}


def source_totals(folder: Path | str) -> dict[str, SourceTotals]:
    """Return {source: SourceTotals} of a complete folder."""
    totals: dict[str, SourceTotals] = {}
    for number in chunk_numbers(folder) or []:
        for entry in chunk_entries(folder, number) or []:
            total = totals.get(entry.source, SourceTotals(0, 0, 0))
            totals[entry.source] = SourceTotals(
                documents=total.documents + entry.documents,
                tokens=total.tokens + entry.tokens,
                bytes=total.bytes + entry.bytes,
            )
    return totals
