"""Rows of JSON lines, parquet files and Hugging Face data sets, as a stream (no counterpart in the paper).

Each reader yields (where, row), or (where, the reason why there is no row); it holds one row group, or a megabyte and
one line. What cannot be read at all is a ValueError that names the file and how far it was read.
"""

import json

LINE = 64 * 2**20
"""Bytes above which a line of JSON is skipped."""


def _chunks(path):
    """The bytes of a file, unpacked where its name ends in .zst, a megabyte at a time."""
    if path.suffix.lower() != ".zst":
        with open(path, "rb") as file:
            yield from iter(lambda: file.read(2**20), b"")
        return
    pyarrow = _pyarrow(path)
    try:
        with pyarrow.CompressedInputStream(pyarrow.OSFile(f"{path}"), "zstd") as file:
            yield from iter(lambda: file.read(2**20), b"")
    except OSError as error:
        raise ValueError(f"data.files: cannot unpack {path}: {error}; get it again") from None


def _pyarrow(path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"data.files: {path} needs pyarrow; pip install 'minglm[data]'") from None
    return pyarrow


def _lines(chunks):
    """(number, line) of a stream of bytes, from 1; None for a line longer than LINE, of which nothing is kept."""
    number, rest, dropped = 0, b"", False
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            number += 1
            yield number, None if dropped or len(line) > LINE else line
            dropped = False
        if len(rest) > LINE:
            rest, dropped = b"", True
    if rest or dropped:
        yield number + 1, None if dropped else rest


def jsonl(path):
    """Rows of JSON lines, plain or packed with zstd."""
    try:
        for number, line in _lines(_chunks(path)):
            where = f"line {number}"
            try:
                if line is None:
                    yield where, f"longer than {LINE} bytes"
                elif line.strip():
                    yield where, json.loads(line)
            except UnicodeDecodeError:
                yield where, "not UTF-8"
            except (json.JSONDecodeError, RecursionError) as error:
                yield where, f"not JSON ({getattr(error, 'msg', 'too deep')})"
    except OSError as error:
        raise ValueError(f"data.files: cannot read {path}: {error.strerror or error}") from None


def parquet(path):
    """Rows of a parquet file, as far as documents need them."""
    pyarrow, number = _pyarrow(path), 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = [
            name
            for name in ("text", "html", "source", "language")
            if name in file.schema_arrow.names
        ]
        for batch in file.iter_batches(256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"data.files: cannot read {path} after row {number}: {reason}") from None


def dataset(name):
    """Rows of a Hugging Face data set, hf:NAME or hf:NAME:CONFIG, its split "train", as they arrive."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"data.files: {name} needs datasets; pip install 'minglm[data]'") from None
    words, number = name.split(":"), 0
    try:
        for row in datasets.load_dataset(*words[1:3], split="train", streaming=True):
            number += 1
            yield f"row {number}", row
    except Exception as error:  # of the network, the hub, the format: of every kind
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"data.files: cannot read {name} after row {number}: {reason}") from None
