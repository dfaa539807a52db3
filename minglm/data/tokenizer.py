"""Convert text to token ids and back: byte-level BPE with GLM-4.5's special tokens (paper 2.2, Figure 4).

A token is a string of bytes. Training starts from the 256 single bytes and repeatedly merges the most
frequent pair of neighbours inside a word; the vocabulary is the 256 bytes, the merged pairs, and 36 special
tokens at the end:

    id = byte | merged pair | special        vocab_size = 256 + merges + 36

Choices, and why:
- Bytes, and no Unicode normalisation: decode(encode(text)) == text for every text.
- Every digit is one token, so that numbers have one spelling and arithmetic is about digits. The released tokenizer
  groups up to three digits; a released file keeps that rule.
- Special tokens are outside the encoder: no text can produce one. Only the chat template, the fill-in-the-middle
  rewriting and the end of a document put them into a sequence. A released file marks some of them (`<think>`,
  `<tool_call>`) as ordinary added tokens that text may produce; here they are special too.
- Merges come from the `tokenizers` library, on a bounded sample, so that training takes seconds.

Simplified against the paper: its vocabulary has 151,365 entries, trained on text in many languages.
"""

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from minglm.common.files import atomic_path, read_text


class Ids(Protocol):
    """An array or tensor of ids."""

    def tolist(self) -> list[int]:
        """Return the ids as a list."""
        ...


SPECIAL_TOKENS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|begin_of_audio|>",
    "<|end_of_audio|>",
    "<|begin_of_transcription|>",
    "<|end_of_transcription|>",
    "<|code_prefix|>",
    "<|code_middle|>",
    "<|code_suffix|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "/nothink",
    "<|begin_of_box|>",
    "<|end_of_box|>",
    "<|image|>",
    "<|video|>",
)
"""GLM-4.5's special tokens in the order of their ids, 151329 to 151364 in the released vocabulary."""

REQUIRED = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|observation|>")
"""A tokenizer without these is not GLM's."""

LARGEST_ID = 10_000_000
"""Ids stay below, because memory is taken for each up to the largest."""

NOT_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))
"""Bytes that no text holds."""

PROBE = "".join(chr(code) for code in range(1, 128)) + "  Größe café\n\t 汉字 ру عر 🙂\r\n  end "
"""A text that a tokenizer must give back as it is: every ASCII character, spaces, several scripts."""

SAMPLE_BYTES = 6_000_000
"""Text that merges are counted on, at most: more text hardly changes 2,000 merges."""

COUNTED_WORD = 256
"""Characters of a word that merges are counted in, at most. The cost of a merge grows with the square of the
word, and a run of letters without a space, such as a genome, is one word."""

PIECE_CHARACTERS = 250_000
"""A longer text is encoded in pieces, because the encoder takes about 150 bytes of memory for each byte."""

BRIEF_CHARACTERS = 20_000
"""A longer text is encoded as a batch, during which the library lets other Python threads run. It takes a few
milliseconds to encode so many."""

# Between these every tokenizer of this kind begins a new word: after a line break, and before a space between letters.
PIECE_ENDS = re.compile(r"(?<=\n)(?=\S)|(?<=[^\W\d_])(?= [^\W\d_])")

# Words carry the space before them; runs of spaces (indentation) and of line breaks are words; a digit is one word.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_alphabet() -> dict[str, int]:
    """Return the 256 printable characters that a tokenizer.json writes for bytes, {character: byte}.

    Visible Latin-1 characters are written as themselves; the other bytes take the code points from 256 on, in order.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    alphabet = {chr(byte): byte for byte in visible}
    for n, byte in enumerate(hidden):
        alphabet[chr(256 + n)] = byte
    return alphabet


_BYTE_OF_CHARACTER = _byte_alphabet()


class Tokenizer:
    """A byte-level tokenizer; `train` or `load` makes one.

    Attributes:
        special: {name: id} of the special tokens.
        vocab_size: number of ids.
        longest_token: bytes of the longest one that a text can produce.
        end, pad: the id of `<|endoftext|>`.
        stop_ids: the ids that end an assistant turn. GLM has no end-of-turn token; the next role token ends it.
    """

    def __init__(self, specification: Mapping[str, Any]):
        """Build a tokenizer from a parsed tokenizer.json.

        Raises ValueError if it is not byte-level, lacks GLM's roles, changes text, or cannot be used at all.
        """
        specification = _checked(specification)
        # Special tokens are taken out of the specification, so that text can never produce one. Nothing cuts a text, fills
        # it up, or splits it by chance, whatever a file was used for before.
        model = {**specification["model"], "dropout": None}
        unchanged = {"added_tokens": [], "truncation": None, "padding": None}
        self._specification = {**specification, **unchanged, "model": model}
        self._added_tokens: list[dict] = specification["added_tokens"]
        self.special: dict[str, int] = {t["content"]: t["id"] for t in self._added_tokens}
        missing = [name for name in REQUIRED if name not in self.special]
        if missing:
            raise ValueError(f"not a GLM tokenizer: special token {missing[0]} is missing")

        words: dict[str, int] = model["vocab"]
        self.vocab_size: int = 1 + max(max(words.values()), max(self.special.values()))
        # The bytes of each id. Special tokens come last: one may also be listed as a word.
        self._bytes_of_id = [b""] * self.vocab_size
        for word, token in words.items():
            if self.special.get(word) == token:
                continue
            try:
                self._bytes_of_id[token] = bytes(_BYTE_OF_CHARACTER[c] for c in word)
            except KeyError as error:
                raise ValueError(
                    f"not a byte-level tokenizer: the word {word!r} holds {error}"
                ) from None
        for name, token in self.special.items():
            self._bytes_of_id[token] = name.encode()
        self._special_ids = frozenset(self.special.values())
        ordinary = [
            data for token, data in enumerate(self._bytes_of_id) if token not in self._special_ids
        ]
        self.longest_token: int = max(map(len, ordinary))
        try:
            self._backend = Backend.from_str(json.dumps(self._specification))
        except Exception as error:  # the library raises nothing more special
            raise ValueError(str(error).splitlines()[0]) from None
        missing = [n for c, n in _BYTE_OF_CHARACTER.items() if c not in words and n not in NOT_UTF8]
        if missing:
            raise ValueError(f"not a byte-level tokenizer: no token for the byte {missing[0]}")
        ids = self._backend.encode(PROBE, add_special_tokens=False).ids
        if self.bytes(ids) != PROBE.encode():
            raise ValueError("changes the text that it encodes: by a normalizer or a prefix")

        self.end: int = self.special["<|endoftext|>"]
        self.pad: int = self.end
        self.stop_ids: tuple[int, int, int] = (
            self.end,
            self.special["<|user|>"],
            self.special["<|observation|>"],
        )

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, sample_bytes: int = SAMPLE_BYTES
    ) -> "Tokenizer":
        """Learn merges from texts. The same texts in any order give the same tokenizer.

        Args:
            vocab_size: bytes, merges and the 36 special tokens, which take the last ids. Text too short for that many
                merges leaves unused ids before them. Raises ValueError below 292 (256 bytes and 36 special tokens).
            sample_bytes: merges are counted on a sample of this size.
        """
        words_size = vocab_size - len(SPECIAL_TOKENS)
        if words_size < len(_BYTE_OF_CHARACTER):
            raise ValueError(
                f"vocab_size = {vocab_size}: 256 bytes and 36 special tokens need at least 292"
            )
        words_of_text = pre_tokenizers.Split(Regex(WORDS), "isolated")
        pieces_of_word = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{COUNTED_WORD}}}"), "isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        counting = pre_tokenizers.Sequence([words_of_text, pieces_of_word, as_bytes])
        encoding = pre_tokenizers.Sequence([words_of_text, as_bytes])
        backend = Backend(models.BPE())
        # The stubs of `tokenizers` declare these two as read-only.
        backend.pre_tokenizer = counting  # pyright: ignore[reportAttributeAccessIssue]
        backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        trainer = trainers.BpeTrainer(
            vocab_size=words_size,
            initial_alphabet=sorted(_BYTE_OF_CHARACTER),
            show_progress=False,
        )
        backend.train_from_iterator(_sample(texts, sample_bytes), trainer)
        backend.pre_tokenizer = encoding  # pyright: ignore[reportAttributeAccessIssue]

        specification = json.loads(backend.to_str())
        words = specification["model"]["vocab"]
        # No merge leads to an unused word, so no text produces it.
        for token in range(len(words), words_size):
            words[f"<|unused_{token}|>"] = token
        specification["added_tokens"] = [
            _added_token(words_size + n, name) for n, name in enumerate(SPECIAL_TOKENS)
        ]
        return cls(specification)

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a tokenizer.json, ours or a released one. Raises ValueError naming the file and the fault."""
        try:
            return cls(json.loads(read_text(path)))
        except OSError as error:
            raise ValueError(
                f"cannot read tokenizer {path}: {error.strerror}; give a tokenizer.json"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tokenizer {path}: {error}; give a tokenizer.json of GLM") from error

    def save(self, path: Path | str) -> None:
        """Write a tokenizer.json that `load` and the Hugging Face libraries read, atomically."""
        specification = {**self._specification, "added_tokens": self._added_tokens}
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(specification, ensure_ascii=False), encoding="utf-8")

    def same_ids(self, other: "Tokenizer") -> bool:
        """Return True if the other tokenizer gives every text and every special token the same ids."""
        ours = (self._specification, self.special)
        return ours == (other._specification, other.special)

    @property
    def fingerprint(self) -> str:
        """The CRC-32 of everything that `same_ids` compares, 8 hexadecimal digits."""
        text = json.dumps([self._specification, self.special], sort_keys=True)
        return f"{zlib.crc32(text.encode()):08x}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process as the table of a tokenizer.json."""
        return Tokenizer, ({**self._specification, "added_tokens": self._added_tokens},)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, never a special one.

        Half a surrogate pair, which Python strings may hold and UTF-8 may not, is read as U+FFFD.
        """
        if len(text) > BRIEF_CHARACTERS:
            return self.encode_batch([text])[0]
        return self._backend.encode(_valid_utf8(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, computed on all cores."""
        ids: list[list[int]] = [[] for _ in texts]
        for batch in _batches(texts):
            pieces = [piece for _, piece in batch]
            encodings = self._backend.encode_batch_fast(pieces, add_special_tokens=False)
            for (n, _), encoding in zip(batch, encodings, strict=True):
                ids[n] += encoding.ids
        return ids

    def bytes(self, ids: Sequence[int] | Ids, skip_special: bool = False) -> bytes:
        """Return the exact bytes of the ids; special tokens as their names unless skipped.

        Raises ValueError for an id outside the vocabulary.
        """
        tokens = list(ids) if isinstance(ids, Sequence) else ids.tolist()
        for token in (min(tokens, default=0), max(tokens, default=0)):
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token id {token}: this tokenizer has the ids 0 to {self.vocab_size - 1}"
                )
        if skip_special:
            tokens = [token for token in tokens if token not in self._special_ids]
        return b"".join([self._bytes_of_id[token] for token in tokens])

    def decode(self, ids: Sequence[int] | Ids, skip_special: bool = False) -> str:
        """Return the text of the ids.

        Bytes that are not valid UTF-8, such as half a character, become U+FFFD.
        """
        return self.bytes(ids, skip_special).decode("utf-8", errors="replace")


def _checked(specification: Any) -> dict[str, Any]:
    """Return a parsed tokenizer.json whose parts have the types that `Tokenizer` uses, `added_tokens` included.

    Raises ValueError for another kind of tokenizer, and for ids that no table can hold or that two tokens share.
    """
    if not isinstance(specification, Mapping):
        raise ValueError("not a table of names and values")
    model = specification.get("model")
    decoder = specification.get("decoder")
    if not (
        isinstance(model, Mapping)
        and model.get("type", "BPE") == "BPE"
        and isinstance(model.get("vocab"), Mapping)
        and isinstance(decoder, Mapping)
        and decoder.get("type") == "ByteLevel"
    ):
        raise ValueError(
            "not a byte-level tokenizer: minglm needs a BPE model with a ByteLevel decoder"
        )
    added = specification.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, Mapping) for token in added):
        raise ValueError("added_tokens is not a list of tables")
    tokens = [(token.get("content"), token.get("id")) for token in added]
    named: dict[int, str] = {}
    for name, token in [*model["vocab"].items(), *tokens]:
        if not isinstance(name, str) or type(token) is not int:
            raise ValueError(f"token {name!r} with the id {token!r}: must be a text and an integer")
        if not 0 <= token < LARGEST_ID:
            raise ValueError(
                f"token {name!r} has the id {token}: must be from 0 to {LARGEST_ID - 1}"
            )
        if named.setdefault(token, name) != name:
            raise ValueError(f"tokens {named[token]!r} and {name!r} have one id, {token}")
    if len(dict(tokens)) < len(tokens):
        raise ValueError("added_tokens names a token twice")
    return {**specification, "added_tokens": list(added)}


def _valid_utf8(text: str) -> str:
    """Return the text with every half of a surrogate pair replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces of about PIECE_CHARACTERS, whose ids join to those of the text.

    They end where words end. In a run of letters without an end they end anywhere, and a word is cut in two.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        last = start + PIECE_CHARACTERS
        end = PIECE_ENDS.search(text, last - PIECE_CHARACTERS // 10, last)
        # The search begins inside the piece, so it never ends at its start.
        stop = end.start() if end else last
        yield text[start:stop]
        start = stop
    yield text[start:]


def _batches(texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """Yield batches of about PIECE_CHARACTERS from all texts, as (number of the text, piece of it), in order."""
    batch = []
    size = 0
    for n, text in enumerate(texts):
        for piece in _pieces(_valid_utf8(text)):
            batch.append((n, piece))
            size += len(piece)
            if size >= PIECE_CHARACTERS:
                yield batch
                batch = []
                size = 0
    if batch:
        yield batch


def _added_token(token: int, name: str) -> dict[str, Any]:
    """Return the entry of a special token in a tokenizer.json."""
    return {
        "id": token,
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _sample(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Yield texts in the order of a checksum, until `limit` bytes are reached; the order of the texts does not matter.

    At most about twice the limit is in memory.
    """
    kept: list[bytes] = []
    size = 0
    for text in texts:
        kept.append(_valid_utf8(text).encode())
        size += len(kept[-1])
        if size > 2 * limit:
            kept = _first_by_checksum(kept, limit)
            size = sum(len(data) for data in kept)
    for data in _first_by_checksum(kept, limit):
        yield data[:limit].decode("utf-8", errors="ignore")
        limit -= len(data)


def _first_by_checksum(texts: Iterable[bytes], limit: int) -> list[bytes]:
    """Return the texts in the order of their checksum, until `limit` bytes are reached."""
    size = 0
    first = []
    for data in sorted(texts, key=lambda data: (zlib.crc32(data), data)):
        if size >= limit:
            break
        first.append(data)
        size += len(data)
    return first
