"""Read rows of JSON lines, parquet files and Hugging Face data sets, as a stream (no counterpart in the paper).

Each reader yields (where, row), such as ("line 7", {"text": ...}). A row that cannot be read is an `Unreadable` with the
reason. A reader keeps one row group, or a megabyte and one line. A file that cannot be read at all is a ValueError that
names the file and how far it was read.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 64 * 2**20
"""A longer line of JSON is skipped."""

READ_BYTES = 2**20
ROWS_PER_BATCH = 256
COLUMNS = ("text", "html", "source", "language")
"""Columns of a parquet file that documents need."""


class Unreadable(Exception):
    """The reason why a row cannot be used."""


Row = tuple[str, Any]
"""Where it is, and its JSON value or an `Unreadable`."""


def _chunks(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file, unpacked if its name ends in .zst, a megabyte at a time."""
    if path.suffix.lower() != ".zst":
        with open(path, "rb") as file:
            yield from iter(lambda: file.read(READ_BYTES), b"")
        return
    pyarrow = _import_pyarrow(path)
    try:
        with pyarrow.CompressedInputStream(pyarrow.OSFile(f"{path}"), "zstd") as file:
            yield from iter(lambda: file.read(READ_BYTES), b"")
    except OSError as error:
        raise ValueError(f"data.files: cannot unpack {path}: {error}; get it again") from None


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
    """Yield the rows of a file of JSON lines, plain or packed with zstd."""
    try:
        for number, line in _lines(_chunks(path)):
            where = f"line {number}"
            if line is None:
                yield where, Unreadable(f"longer than {MAX_LINE_BYTES} bytes")
            elif line.strip():
                yield where, _parse(line)
    except OSError as error:
        raise ValueError(f"data.files: cannot read {path}: {error.strerror or error}") from None


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        return Unreadable("not UTF-8")
    except json.JSONDecodeError as error:
        return Unreadable(f"not JSON ({error.msg})")
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
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"data.files: cannot read {path} after row {number}: {reason}") from None


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
