"""Read rows of JSON lines, parquet files and Hugging Face data sets, as a stream (no counterpart in the paper).

Each reader yields (where, row), such as ("line 7", {"text": ...}). A row that cannot be read is an
`Unreadable` with the reason. A reader keeps one row group, or a megabyte and one line. A file that cannot be
read, or not to its end, is an `UnusableFile` that names the file and how far it was read. Files may be packed
with gzip, bzip2, xz or zstd.
"""

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 64 * 2**20
"""A longer line of JSON is skipped."""

READ_BYTES = 2**20
ROWS_PER_BATCH = 256
COLUMNS = ("text", "html", "source", "language")
"""Columns of a parquet file that documents need."""

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PACKED_SUFFIXES = (*OPENERS, ".zst")


class Unreadable(Exception):
    """The reason why a row cannot be used."""


class UnusableFile(ValueError):
    """A file that cannot be read, or not to its end, or in which nothing can be used."""


Row = tuple[str, Any]
"""Where it is, and its JSON value or an `Unreadable`."""


def read_unpacked(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file, unpacked if its suffix says so, a megabyte at a time.

    Raises `UnusableFile`.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".zst":
            pyarrow = _import_pyarrow(path)
            file = pyarrow.CompressedInputStream(pyarrow.OSFile(f"{path}"), "zstd")
        else:
            file = OPENERS.get(suffix, open)(path, "rb")
        with file:
            yield from iter(lambda: file.read(READ_BYTES), b"")
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        if suffix in PACKED_SUFFIXES:
            raise UnusableFile(
                f"data.files: cannot unpack {path}: {reason}; get it again"
            ) from None
        raise UnusableFile(f"data.files: cannot read {path}: {reason}") from None


def _import_pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"data.files: {path} needs pyarrow; pip install 'minglm[data]'") from None
    return pyarrow


def _lines(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Yield (number, line) of a stream of bytes, from 1; None for a line longer than MAX_LINE_BYTES."""
    number = 0
    rest = b""  # the beginning of a line that is not complete
    is_too_long = False  # that beginning was longer than the limit and has been dropped
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            number += 1
            yield number, None if is_too_long or len(line) > MAX_LINE_BYTES else line
            is_too_long = False
        if len(rest) > MAX_LINE_BYTES:
            rest = b""
            is_too_long = True
    if rest or is_too_long:
        yield number + 1, None if is_too_long else rest


def jsonl(path: Path) -> Iterator[Row]:
    """Yield the rows of a file of JSON lines, plain or packed."""
    for number, line in _lines(read_unpacked(path)):
        where = f"line {number}"
        if line is None:
            yield where, Unreadable(f"longer than {MAX_LINE_BYTES} bytes")
        elif line.strip():
            yield where, _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        return Unreadable("not UTF-8")
    except json.JSONDecodeError as error:
        return Unreadable(f"not JSON ({error.msg})")
    except ValueError:  # Python reads no number of more than 4,300 digits
        return Unreadable("not JSON (a number of too many digits)")
    except RecursionError:
        return Unreadable("not JSON (too deep)")


def parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a parquet file, with the COLUMNS that it has."""
    pyarrow = _import_pyarrow(path)
    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(ROWS_PER_BATCH, columns=columns):
            for row in _batch_rows(batch):
                number += 1
                yield f"row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UnusableFile(f"data.files: cannot read {path} after row {number}: {reason}") from None


def _batch_rows(batch: Any) -> Iterator[Any]:
    """Yield the rows of a batch of parquet; its strings need not be UTF-8, though they should."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for number in range(len(batch)):
        try:
            (row,) = batch.slice(number, 1).to_pylist()
        except UnicodeDecodeError:
            row = Unreadable("not UTF-8")
        yield row


def dataset(name: str) -> Iterator[Row]:
    """Yield the rows of the split "train" of a Hugging Face data set, hf:NAME or hf:NAME:CONFIG, as they arrive."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]  # optional: the extra "data"
    except ImportError:
        raise ValueError(f"data.files: {name} needs datasets; pip install 'minglm[data]'") from None
    name_and_config = name.split(":")[1:3]
    number = 0
    try:
        for row in datasets.load_dataset(*name_and_config, split="train", streaming=True):
            number += 1
            yield f"row {number}", row
    except Exception as error:  # the network, the hub and the format raise exceptions of every kind
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"data.files: cannot read {name} after row {number}: {reason}") from None
