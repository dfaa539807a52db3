"""Tokens on disk, stored once and read as they are needed: memory-mapped files, an index, checksums (paper 2.2).

    FOLDER/00003.01.tokens.npy   all ids of one source in one part of the corpus, one document after the other
    FOLDER/00003.01.ends.npy     where each of its documents ends
    FOLDER/00003.json            what part 3 is made of: source, documents, tokens, bytes of text, checksums
    FOLDER/index.json            written last: the numbers of all parts; a folder with an index is complete

Each part is written by one process and knows nothing of the others, so any number of them work at once, a build that
was killed goes on with the parts that are missing, and a file that was cut short is rebuilt without the rest. Ids are
uint16 where the vocabulary allows, else uint32.

Choices: .npy files, which every program that knows numpy maps into memory; a part is some megabytes, so the files are
few and each is read from disk in long runs. CRC-32 finds damage, not malice.
"""

import json
import zlib
from pathlib import Path

import numpy as np

from minglm.common.files import atomic_path, write_json


class Shard:
    """Documents of one source: a sequence of integer arrays. parts: pairs of flat tokens and ends, each an array."""

    def __init__(self, parts):
        self.parts = parts
        self.firsts = np.cumsum([0, *(len(ends) for _, ends in parts)])

    def __len__(self):
        return int(self.firsts[-1])

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self.firsts, index, side="right")) - 1
        (tokens, ends), inside = self.parts[part], int(index - self.firsts[part])
        return tokens[int(ends[inside - 1]) if inside else 0 : int(ends[inside])]

    @property
    def lengths(self):
        """Tokens of each document, int64."""
        return np.concatenate(
            [np.diff(ends, prepend=0) for _, ends in self.parts] or [np.zeros(0, np.int64)]
        )


def _checksum(array):
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)


def write_part(folder, number, shards, key, sizes=None):
    """Write one part, {source: list of integer arrays}, of the shards that `key` describes.

    key: any JSON value that says what the tokens were made from. sizes: {source: bytes of text}, for the record.
    """
    folder, entries = Path(folder), []
    for place, (source, documents) in enumerate(shards.items()):
        ends = np.cumsum([len(d) for d in documents], dtype=np.int64)
        tokens = np.concatenate(documents) if len(documents) else np.zeros(0, dtype=np.uint16)
        name = f"{number:05d}.{place:02d}"
        for kind, array in (("tokens", tokens), ("ends", ends)):
            with (
                atomic_path(folder / f"{name}.{kind}.npy") as temporary,
                open(temporary, "wb") as file,
            ):
                np.save(file, array)
        entries.append(
            {"source": source, "name": name, "documents": len(ends), "tokens": len(tokens)}
            | {"bytes": (sizes or {}).get(source, 0), "crc32": [_checksum(tokens), _checksum(ends)]}
        )
    write_json(folder / f"{number:05d}.json", {"key": key, "shards": entries})


def _plain(key):
    return json.loads(json.dumps(key))


def part(folder, number, key=None):
    """The entries of a part, or None where it is not there or was written under another key."""
    try:
        found = json.loads((Path(folder) / f"{number:05d}.json").read_text())
        return found["shards"] if key is None or found["key"] == _plain(key) else None
    except (OSError, ValueError, KeyError, TypeError):  # absent, or cut short
        return None


def finish(folder, numbers, key):
    """Declare a folder complete: write its index."""
    write_json(Path(folder) / "index.json", {"key": key, "parts": list(numbers)})


def save_shards(folder, shards, key):
    """Write {source: arrays} as the one part of a folder."""
    (Path(folder) / "index.json").unlink(missing_ok=True)
    write_part(folder, 0, shards, key)
    finish(folder, [0], key)


def index(folder, key=None):
    """The numbers of a complete folder's parts, or None where there is no index or one of another key."""
    try:
        found = json.loads((Path(folder) / "index.json").read_text())
        return found["parts"] if key is None or found["key"] == _plain(key) else None
    except (OSError, ValueError, KeyError):
        return None


def _read(folder, entry):
    path = Path(folder) / f"{entry['name']}.tokens.npy"
    try:
        tokens = np.load(path, mmap_mode="r" if entry["tokens"] else None)
        ends = np.load(path.with_name(f"{entry['name']}.ends.npy"))
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"damaged token shard {path}: {error}") from None
    if (len(tokens), len(ends)) != (entry["tokens"], entry["documents"]) or (
        len(ends) and ends[-1] != len(tokens)
    ):
        raise ValueError(f"damaged token shard {path}: not as long as what was written")
    return tokens, ends


def damaged(folder, verify=False):
    """{number of a part: what is wrong} of a complete folder: files missing or cut short; with verify, also changed."""
    found = {}
    for number in index(folder) or []:
        entries = part(folder, number)
        if entries is None:
            found[number] = (
                f"damaged token shard {Path(folder)}/{number:05d}.json: missing or unreadable"
            )
        for entry in entries or []:
            try:
                tokens, ends = _read(folder, entry)
                if verify and [_checksum(tokens), _checksum(ends)] != entry["crc32"]:
                    raise ValueError(
                        f"damaged token shard {Path(folder)}/{entry['name']}.tokens.npy: wrong checksum"
                    )
            except ValueError as error:
                found[number] = str(error)
    return found


def forget(folder, number):
    """Take a part out of a folder, so that a build makes it again."""
    (Path(folder) / "index.json").unlink(missing_ok=True)
    (Path(folder) / f"{number:05d}.json").unlink(missing_ok=True)


def load_shards(folder, key=None):
    """{source: Shard} as saved under `key` (None: whatever is there), or None where nothing complete was.

    Tokens are memory-mapped. Raises ValueError naming a file that is missing or cut short.
    """
    numbers = index(folder, key)
    if numbers is None:
        return None
    wrong = damaged(folder)
    if wrong:
        raise ValueError(
            f"{next(iter(wrong.values()))}; delete {folder}/index.json to build it again"
        )
    shards = {}
    for number in numbers:
        for entry in part(folder, number):
            shards.setdefault(entry["source"], []).append(_read(folder, entry))
    return {source: Shard(parts) for source, parts in shards.items()}


def totals(folder):
    """{source: {"documents", "tokens", "bytes"}} of a complete folder."""
    found = {}
    for number in index(folder) or []:
        for entry in part(folder, number):
            row = found.setdefault(
                entry["source"], dict.fromkeys(("documents", "tokens", "bytes"), 0)
            )
            for name in row:
                row[name] += entry[name]
    return found
