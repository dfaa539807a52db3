"""Turn documents into token arrays, and a chunk of documents into its shards (paper 2.2).

    document of source "code"     with probability fim_rate, spans of it are rewritten for fill-in-the-middle
    every other document          its ids, then <|endoftext|>

The result depends only on the seed and on the position of each document in the corpus, so every process gets the same.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from minglm.data.fim import rewrite
from minglm.data.store.documents import Document, read_documents
from minglm.data.store.shards import write_chunk
from minglm.data.tokenizer import Tokenizer

BATCH = 256
"""Documents that the tokenizer encodes at once, on all threads."""


@dataclass(frozen=True)
class FimOptions:
    """How code is rewritten for fill-in-the-middle."""

    rate: float = 0.0
    """Share of the spans of the source "code" that are rewritten."""
    characters: int = 600
    """Length of a span in characters; 0: the whole file. A span should fit into a row, at two to four characters a token."""
    seed: int = 0


def token_dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    """Return the smallest of uint16 and uint32 that holds every id of the tokenizer."""
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def tokenize(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    fim: FimOptions = FimOptions(),
    first: int = 0,
) -> dict[str, list[np.ndarray]]:
    """Convert documents to {source: arrays of ids}, each array ending with `<|endoftext|>`.

    A file with rewritten spans becomes several arrays. The arrays are uint16, or uint32 for a large vocabulary.

    Args:
        first: position of the first document in the whole corpus. It seeds the rewriting of each document.
    """
    dtype = token_dtype(tokenizer)
    arrays: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(documents), BATCH):
        batch = documents[start : start + BATCH]
        rewritten = [document.source == "code" and fim.rate > 0 for document in batch]
        texts = [document.text for document, is_fim in zip(batch, rewritten) if not is_fim]
        encoded = iter(tokenizer.encode_batch(texts))
        for position, (document, is_fim) in enumerate(zip(batch, rewritten), first + start):
            if is_fim:
                rng = np.random.default_rng([fim.seed, position])
                sequences = rewrite(document.text, tokenizer, rng, fim.rate, fim.characters)
            else:
                sequences = [next(encoded)]
            of_source = arrays.setdefault(document.source, [])
            for sequence in sequences:
                if sequence:
                    of_source.append(np.array([*sequence, tokenizer.end], dtype=dtype))
    return arrays


@dataclass(frozen=True)
class ShardTask:
    """Everything a process needs to write the training and held-out shards of one chunk."""

    path: str
    """The chunk of documents."""
    number: int
    """Its number."""
    repeats: list[int]
    """How often each of its documents is used."""
    first: int
    """Position of its first training document among all that are used."""
    folder: str
    """The shards are written to `train` and `heldout` in it."""
    key: Any
    """What the shards are made from; see `minglm.data.store.shards`."""
    tokenizer: str
    """Path of the tokenizer."""
    fim: FimOptions


def write_shards(task: ShardTask) -> None:
    """Write the training and held-out shards of one chunk."""
    training = []
    heldout = []
    for document, count in zip(read_documents(task.path), task.repeats, strict=True):
        if not document.heldout:
            training.extend(repeat(document, count))
        elif count:
            heldout.append(document)
    tokenizer = Tokenizer.load(task.tokenizer)
    folder = Path(task.folder)
    arrays = tokenize(training, tokenizer, task.fim, task.first)
    write_chunk(folder / "train", task.number, arrays, task.key, _text_bytes(training))
    arrays = tokenize(heldout, tokenizer)
    write_chunk(folder / "heldout", task.number, arrays, task.key, _text_bytes(heldout))


def _text_bytes(documents: Sequence[Document]) -> Counter[str]:
    sizes = Counter()
    for document in documents:
        sizes[document.source] += len(document.text.encode("utf-8", "replace"))
    return sizes
