"""Token shards on disk: arrays with an index and checksums (paper 2.2).

    FOLDER/00003.01.tokens.npy   all ids of one source in chunk 3 of the corpus, one document after the other
    FOLDER/00003.01.ends.npy     the position where each of its documents ends
    FOLDER/00003.01.targets.npy  which of the ids are trained on; only for sources where not all are
    FOLDER/00003.json            the shards of chunk 3: source, documents, tokens, bytes of text, files, checksums
    FOLDER/index.json            written last: the numbers of all chunks; a folder with an index is complete

The shards of a chunk are written by one process that needs nothing from the others. So any number of
processes work at once, a build that was killed continues with the missing chunks, and a file that was damaged
is rebuilt alone. Ids are uint16 if the vocabulary allows it, else uint32.

Choices:
- .npy files, because every program that knows numpy can read them; a chunk has some megabytes, so there are few files
  and each is read in long runs.
- A file is open only while it is read, so the number of chunks is not bounded by that of open files.
- A file is compared with its checksum when it is first read from. So no damaged token is trained on, and opening a
  large folder stays cheap. CRC-32 detects damage, not malice.
"""

import io
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minglm.common.files import atomic_path
from minglm.data.store.sealed import read_sealed, write_sealed

VERIFIED_BYTES = 2**30
"""The files of a smaller folder are compared with their checksums each time it is opened."""


class DamagedShard(ValueError):
    """A file of token shards that is missing or is not as it was written."""

    def __init__(self, path: Path, why: str):
        self.fault = f"damaged token shard {path}: {why}"
        super().__init__(f"{self.fault}; minglm data CONFIG --verify builds it again")


class FileSeal(NamedTuple):
    """What a file had when it was written."""

    dtype: str
    size: int
    """Bytes, the header of numpy included."""
    crc32: int


class ShardEntry(NamedTuple):
    """What the index of a chunk says of one source."""

    source: str
    name: str
    """The file names without their suffix."""
    documents: int
    tokens: int
    bytes: int
    """Bytes of UTF-8 text that the tokens were made from."""
    files: dict[str, FileSeal]
    """By the middle of their name: tokens, ends, and perhaps targets."""


class SourceTotals(NamedTuple):
    """What a complete folder holds of one source."""

    documents: int
    tokens: int
    bytes: int


class ArrayFile:
    """A one-dimensional array in an .npy file, of which slices are read."""

    def __init__(self, path: Path, length: int, seal: FileSeal):
        self.path = path
        self.length = length
        self.seal = seal
        self.dtype = np.dtype(seal.dtype)
        self._is_verified = False

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return a slice. Raises `DamagedShard` if the file is not as it was written."""
        if not self._is_verified:
            self.verify()
        start, stop, step = part.indices(self.length)
        assert step == 1, "an array in a file is read in order"
        # The header has never to be understood: what the file holds is known.
        header = self.seal.size - self.length * self.dtype.itemsize
        offset = header + start * self.dtype.itemsize
        try:
            return np.fromfile(self.path, self.dtype, max(0, stop - start), offset=offset)
        except OSError as error:
            raise DamagedShard(self.path, error.strerror or str(error)) from None

    def check_size(self) -> None:
        """Raise `DamagedShard` if the file is missing or has another size; nothing is read."""
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise DamagedShard(self.path, error.strerror or str(error)) from None
        if size != self.seal.size:
            why = f"it has {size:,} bytes and was written with {self.seal.size:,}"
            raise DamagedShard(self.path, why)

    def verify(self) -> None:
        """Read the whole file. Raises `DamagedShard` if its checksum is another one."""
        self.check_size()
        try:
            checksum = zlib.crc32(self.path.read_bytes())
        except OSError as error:
            raise DamagedShard(self.path, error.strerror or str(error)) from None
        if checksum != self.seal.crc32:
            raise DamagedShard(self.path, "wrong checksum")
        self._is_verified = True


class ShardFiles(NamedTuple):
    """The arrays of one source in one chunk."""

    tokens: np.ndarray | ArrayFile
    """uint16 or uint32: the ids of all documents, concatenated."""
    ends: np.ndarray
    """int64: the position in `tokens` where each document ends."""
    targets: np.ndarray | ArrayFile | None = None
    """bool: the ids that are trained on; None: all."""


class Shard(Sequence[np.ndarray]):
    """The documents of one source: a sequence of integer arrays, stored in any number of chunks."""

    def __init__(self, chunks: Sequence[ShardFiles]):
        self.chunks = list(chunks)
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

    @property
    def masks(self) -> "Shard | None":
        """Return for each document which of its tokens are trained on, or None where all are."""
        chunks = [
            ShardFiles(chunk.targets, chunk.ends)
            for chunk in self.chunks
            if chunk.targets is not None
        ]
        return Shard(chunks) if chunks and len(chunks) == len(self.chunks) else None


def _entries_path(folder: Path | str, number: int) -> Path:
    return Path(folder) / f"{number:05d}.json"


def _index_path(folder: Path | str) -> Path:
    return Path(folder) / "index.json"


def _save_array(path: Path, array: np.ndarray) -> FileSeal:
    buffer = io.BytesIO()
    np.save(buffer, array)
    data = buffer.getvalue()
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return FileSeal(array.dtype.str, len(data), zlib.crc32(data))


def write_chunk(
    folder: Path | str,
    number: int,
    documents_by_source: Mapping[str, Sequence[np.ndarray]],
    key: Any,
    text_bytes: Mapping[str, int] | None = None,
    masks_by_source: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> None:
    """Write the shards of one chunk.

    Args:
        documents_by_source: {source: integer arrays, one a document}.
        key: any JSON value that describes what the tokens were made from.
        text_bytes: {source: bytes of text}, for the record.
        masks_by_source: {source: boolean arrays, one a document}, False for tokens that are not trained on; in a source
            without masks all are.
    """
    folder = Path(folder)
    entries = []
    for place, (source, documents) in enumerate(documents_by_source.items()):
        ends = np.cumsum([len(d) for d in documents], dtype=np.int64)
        tokens = np.concatenate(documents) if len(documents) else np.zeros(0, dtype=np.uint16)
        arrays = {"tokens": tokens, "ends": ends}
        masks = (masks_by_source or {}).get(source)
        if masks:
            arrays["targets"] = np.concatenate(masks)
        name = f"{number:05d}.{place:02d}"
        seals = {
            kind: _save_array(folder / f"{name}.{kind}.npy", array)
            for kind, array in arrays.items()
        }
        entry = ShardEntry(
            source=source,
            name=name,
            documents=len(ends),
            tokens=len(tokens),
            bytes=(text_bytes or {}).get(source, 0),
            files=seals,
        )
        entries.append(entry._asdict())
    write_sealed(_entries_path(folder, number), {"key": key, "shards": entries})


def _same_key(saved: Any, key: Any) -> bool:
    """Compare a key from a file with one that has not been through JSON; None matches every key."""
    return key is None or saved == json.loads(json.dumps(key))


def chunk_entries(folder: Path | str, number: int, key: Any = None) -> list[ShardEntry] | None:
    """Return the entries of a chunk, or None if it is missing, damaged, or was written under another key."""
    saved = read_sealed(_entries_path(folder, number))
    try:
        if not _same_key(saved["key"], key):
            return None
        entries = []
        for values in saved["shards"]:
            seals = {kind: FileSeal(*seal) for kind, seal in values["files"].items()}
            entries.append(ShardEntry(**{**values, "files": seals}))
        return entries
    except (KeyError, TypeError, AttributeError):  # absent, or of another format
        return None


def write_index(folder: Path | str, numbers: Iterable[int], key: Any) -> None:
    """Declare a folder complete: write the index with the numbers of its chunks."""
    write_sealed(_index_path(folder), {"key": key, "chunks": list(numbers)})


def chunk_numbers(folder: Path | str, key: Any = None) -> list[int] | None:
    """Return the numbers of a complete folder's chunks, or None without an index or with one of another key."""
    saved = read_sealed(_index_path(folder))
    try:
        return saved["chunks"] if _same_key(saved["key"], key) else None
    except (KeyError, TypeError):
        return None


def _array_file(folder: Path | str, entry: ShardEntry, kind: str) -> ArrayFile:
    length = entry.documents if kind == "ends" else entry.tokens
    return ArrayFile(Path(folder) / f"{entry.name}.{kind}.npy", length, entry.files[kind])


def _open_files(folder: Path | str, entry: ShardEntry) -> ShardFiles:
    """Open the arrays of one source in one chunk.

    Raises `DamagedShard` for ends that changed, or another size.
    """
    arrays = {kind: _array_file(folder, entry, kind) for kind in entry.files}
    for array in arrays.values():
        array.check_size()
    return ShardFiles(arrays["tokens"], arrays["ends"][:], arrays.get("targets"))


def _written_numbers(folder: Path | str) -> list[int]:
    """Return the numbers of the chunks that are there or should be."""
    paths = Path(folder).glob("[0-9]*.json")
    there = {int(path.stem) for path in paths if path.stem.isdigit()}
    return sorted({*there, *(chunk_numbers(folder) or [])})


def find_damage(folder: Path | str, verify: bool = False) -> dict[int, str]:
    """Return {chunk number: fault} for files that are missing or are not as they were written.

    Checksums of tokens are compared where the folder has no more than VERIFIED_BYTES, or if `verify` asks for
    it; otherwise only sizes.
    """
    faults = {}
    entries_of = {}
    size = 0
    for number in _written_numbers(folder):
        entries = chunk_entries(folder, number)
        if entries is None:
            faults[number] = DamagedShard(_entries_path(folder, number), "unreadable").fault
            continue
        entries_of[number] = entries
        size += sum(seal.size for entry in entries for seal in entry.files.values())
    for number, entries in entries_of.items():
        try:
            for entry in entries:
                for kind in entry.files:
                    array = _array_file(folder, entry, kind)
                    if verify or size <= VERIFIED_BYTES or kind == "ends":
                        array.verify()
                    else:
                        array.check_size()
        except DamagedShard as error:
            faults[number] = error.fault
    return faults


def discard_chunk(folder: Path | str, number: int) -> None:
    """Remove a chunk from a folder, so that the next build writes it again."""
    _index_path(folder).unlink(missing_ok=True)
    _entries_path(folder, number).unlink(missing_ok=True)


def load_shards(folder: Path | str, key: Any = None) -> dict[str, Shard] | None:
    """Return {source: Shard} of a folder that is complete under `key` (None: any key), or None.

    Tokens are read when they are asked for. Raises `DamagedShard` naming a file that is missing or cut short.
    """
    numbers = chunk_numbers(folder, key)
    if numbers is None:
        return None
    files: dict[str, list[ShardFiles]] = {}
    for number in numbers:
        entries = chunk_entries(folder, number)
        if entries is None:
            raise DamagedShard(_entries_path(folder, number), "unreadable")
        for entry in entries:
            files.setdefault(entry.source, []).append(_open_files(folder, entry))
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
