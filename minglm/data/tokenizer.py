"""Text to token ids and back: byte-level byte-pair encoding with GLM-4.5's special tokens (paper 2.2, Figure 4).

A token is a string of bytes. Training starts from the 256 single bytes and joins, again and again, the most frequent
pair of neighbours inside a word; the vocabulary is the 256 bytes, the pairs joined, and 36 special tokens at the end:

    id = byte | merged pair | special        vocab_size = 256 + merges + 36

Choices, and why:
- Bytes, and no Unicode normalisation: decode(encode(text)) == text for every text.
- Every digit is a token of its own, so that numbers have one spelling and arithmetic is about digits. The released
  tokenizer groups up to three digits; a released file keeps its own rule.
- Special tokens live outside the encoder: text can never produce one, whatever it says. Only the chat template, the
  fill-in-the-middle rewriting and the end of a document put them into a sequence. A released file marks some of them
  (`<think>`, `<tool_call>`) as ordinary added tokens that text may produce; here they are special all the same.
- Merges come from the `tokenizers` library, on a bounded sample, so that training takes seconds.

Simplified against the paper: its vocabulary has 151,365 entries, trained on text in many languages.
"""

import json
import zlib
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from minglm.common.files import atomic_path


def _pair(kind):
    return (f"<|begin_of_{kind}|>", f"<|end_of_{kind}|>")


SPECIAL_TOKENS = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *(*_pair("image"), *_pair("video"), *_pair("audio"), *_pair("transcription")),
    *("<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>"),
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink"),
    *(*_pair("box"), "<|image|>", "<|video|>"),
)
"""GLM-4.5's special tokens in the order of their ids, 151329 to 151364 in the released vocabulary."""

REQUIRED = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|observation|>")

SAMPLE_BYTES = 6_000_000
"""Most text, in bytes, that merges are counted on: more text hardly changes 2,000 merges."""

# Words carry the space before them; runs of spaces (indentation) and of line breaks are words; a digit stands alone.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_alphabet():
    """The 256 printable characters that stand for bytes in a tokenizer.json, as {character: byte}.

    Visible Latin-1 characters stand for themselves; the other bytes take the code points from 256 on, in order.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(256 + n): byte for n, byte in enumerate(hidden)
    }


_BYTES = _byte_alphabet()


class Tokenizer:
    """A byte-level tokenizer. Build one with `train` or `load`.

    special: {name: id} of the special tokens. vocab_size: number of ids. end, pad: id of `<|endoftext|>`.
    stop_ids: the ids that end an assistant turn; GLM has no end-of-turn token, the next role token ends it.
    """

    def __init__(self, specification):
        """specification: a parsed tokenizer.json. Raises ValueError where it is not byte-level or lacks GLM's roles."""
        specification = dict(specification)
        self._added = specification.pop("added_tokens", None) or []
        specification["added_tokens"] = []
        if (specification.get("decoder") or {}).get(
            "type"
        ) != "ByteLevel" or "vocab" not in specification["model"]:
            raise ValueError(
                "not a byte-level tokenizer: minglm needs a BPE model with a ByteLevel decoder"
            )
        self._specification = specification
        self._backend = Backend.from_str(json.dumps(specification))
        self.special = {token["content"]: token["id"] for token in self._added}
        missing = [name for name in REQUIRED if name not in self.special]
        if missing:
            raise ValueError(f"not a GLM tokenizer: special token {missing[0]} is missing")
        words = specification["model"]["vocab"]
        self.vocab_size = 1 + max(max(words.values()), max(self.special.values()))
        self._pieces = [b""] * self.vocab_size
        try:
            for word, token in words.items():
                self._pieces[token] = bytes(_BYTES[character] for character in word)
        except KeyError as error:
            raise ValueError(
                f"not a byte-level tokenizer: the word {word!r} holds {error}"
            ) from None
        for (
            name,
            token,
        ) in self.special.items():  # after the words: a special token may also be listed as a word
            self._pieces[token] = name.encode()
        self._special_ids = frozenset(self.special.values())
        self.end = self.pad = self.special["<|endoftext|>"]
        self.stop_ids = (self.end, self.special["<|user|>"], self.special["<|observation|>"])

    @classmethod
    def train(cls, texts, vocab_size, sample_bytes=SAMPLE_BYTES):
        """Learn merges from an iterable of texts; deterministic for given texts, in whatever order they come.

        vocab_size counts bytes, merges and the 36 special tokens, which take the last ids. Text too short for so many
        merges leaves unused ids before them. Raises ValueError below 292 ids (256 bytes and 36 special tokens).
        """
        room = vocab_size - len(SPECIAL_TOKENS)
        if room < len(_BYTES):
            raise ValueError(
                f"vocab_size = {vocab_size}: 256 bytes and 36 special tokens need at least 292"
            )
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), "isolated"),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=room, initial_alphabet=sorted(_BYTES), show_progress=False
        )
        backend.train_from_iterator(_sample(texts, sample_bytes), trainer)
        specification = json.loads(backend.to_str())
        words = specification["model"]["vocab"]
        for token in range(len(words), room):  # no merge leads to these, so no text gives them
            words[f"<|unused_{token}|>"] = token
        specification["added_tokens"] = [
            _added_token(room + n, name) for n, name in enumerate(SPECIAL_TOKENS)
        ]
        return cls(specification)

    @classmethod
    def load(cls, path):
        """Read a tokenizer.json, ours or a released one. Raises ValueError naming the file and the fault."""
        try:
            return cls(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise ValueError(
                f"cannot read tokenizer {path}: {error.strerror}; give a tokenizer.json"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"tokenizer {path}: {error}") from error

    def save(self, path):
        """Write a tokenizer.json that `load` and the Hugging Face libraries read, atomically."""
        with atomic_path(path) as temporary:
            text = json.dumps(
                {**self._specification, "added_tokens": self._added}, ensure_ascii=False
            )
            temporary.write_text(text, encoding="utf-8")

    def encode(self, text):
        """The ids of a text, as a list of ints. Never contains a special id.

        Half a surrogate pair, which Python strings may hold and UTF-8 may not, is read as U+FFFD.
        """
        return self._backend.encode(_valid(text), add_special_tokens=False).ids

    def encode_batch(self, texts):
        """The ids of each text of a list, on all cores: a list of lists of ints."""
        texts = [_valid(text) for text in texts]
        return [
            encoding.ids
            for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def bytes(self, ids, skip_special=False):
        """The bytes that the ids stand for, exactly; special tokens as their names unless skipped.

        Raises ValueError for an id outside the vocabulary.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        for token in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token id {token}: this tokenizer has the ids 0 to {self.vocab_size - 1}"
                )
        return b"".join(
            [
                self._pieces[token]
                for token in ids
                if not (skip_special and token in self._special_ids)
            ]
        )

    def decode(self, ids, skip_special=False):
        """The text of the ids. Bytes that are no valid UTF-8, such as half a character, become U+FFFD."""
        return self.bytes(ids, skip_special).decode("utf-8", errors="replace")


def _valid(text):
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _added_token(token, name):
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {"id": token, "content": name, **flags}


def _sample(texts, limit):
    """A bounded, repeatable sample: texts in the order of a checksum, until `limit` bytes are reached. Holds no more
    than twice as much at any time."""
    kept, size = [], 0
    for text in texts:
        kept.append(_valid(text).encode())
        size += len(kept[-1])
        if size > 2 * limit:
            kept = _first(kept, limit)
            size = sum(map(len, kept))
    for data in _first(kept, limit):
        yield data[:limit].decode("utf-8", errors="ignore")
        limit -= len(data)


def _first(some, limit):
    """The texts in the order of their checksum, until `limit` bytes are reached."""
    size, first = 0, []
    for data in sorted(some, key=lambda data: (zlib.crc32(data), data)):
        if size >= limit:
            break
        first.append(data)
        size += len(data)
    return first
