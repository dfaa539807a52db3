"""Hold an answer to a grammar, token by token, with the library llguidance (no section in the paper).

    mask_v = whether the text so far + token v can still become a sentence of the grammar

A grammar is written in llguidance's form of Lark: rules, terminals as regular expressions, `%json {schema}`
for the JSON documents of a schema, and `<[151336]>` for one special token by its id. Ordinary tokens match
text and special tokens only their ids, so text that spells `</think>` stays text. Where the grammar is
complete the end of text is allowed too.

    start: "yes" | "no"                      a choice
    start: %json {"type": "object"}          any JSON object
    start: /[0-9]{4}/ <[151336]>             four digits, then the token 151336

`json_rule` writes the `%json` of a schema with bounded whitespace, so that no answer is white forever.

llguidance (https://github.com/guidance-ai/llguidance) needs no compilation per grammar, knows special tokens,
and is what vLLM and SGLang offer as well; it is an optional package, imported with the first grammar.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor


@runtime_checkable
class GrammarTokenizer(Protocol):
    """The part of `minglm.data.tokenizer.Tokenizer` that grammars use."""

    vocab_size: int
    end: int
    special: dict[str, int]

    def bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes that the ids spell."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text."""
        ...


KEPT_GRAMMARS = 64

# Blanks and line breaks between the parts of a document; 32 are enough to indent.
WHITESPACE = r"[ \n]{0,32}"


def json_rule(schema: Any, lenient: bool = False) -> str:
    """Return the rule of the JSON documents of a schema, `true` for any document.

    Of `oneOf` any alternative may hold.

    lenient: skip keywords that llguidance cannot enforce, in place of an error when the grammar is used.
    """
    if not isinstance(schema, dict):
        schema = {} if schema is not False else {"not": {}}
    options = {"whitespace_pattern": WHITESPACE, "coerce_one_of": True, "lenient": lenient}
    return f"%json {json.dumps({'x-guidance': options, **schema})}"


def quoted(text: str) -> str:
    """Return a text as a terminal of a grammar."""
    return json.dumps(text)


class _Vocabulary:
    """A tokenizer as llguidance wants it: the bytes of each id, and which ids are special."""

    def __init__(self, tokenizer: GrammarTokenizer) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id = tokenizer.end
        self.bos_token_id = None
        self.tokens: list[bytes] = []
        special: Mapping[int, str] = {token: name for name, token in tokenizer.special.items()}
        self.special_token_ids: list[int] = []
        for token in range(tokenizer.vocab_size):
            text = tokenizer.bytes([token])
            # Ids that no text produces: holes of a released vocabulary, and the rest of a short one.
            unused = not text or (text.startswith(b"<|unused_") and len(text) > 1)
            if token in special or unused:
                self.special_token_ids.append(token)
                text = text or b"<|hole_%d|>" % token
            self.tokens.append(text)

    def __call__(self, text: str | bytes) -> list[int]:
        """Return the ids of a text."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self.tokenizer.encode(text)


class GrammarCompiler:
    """Makes matchers for one tokenizer. Raises ValueError if llguidance is not installed."""

    def __init__(self, tokenizer: GrammarTokenizer) -> None:
        try:
            import llguidance
        except ImportError:
            message = "a grammar needs llguidance: pip install 'minglm[serve]'"
            raise ValueError(message) from None
        self.library: Any = llguidance
        self.vocab_size = tokenizer.vocab_size
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
        self.tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=tokenizer.vocab_size)

        self.compile = lru_cache(maxsize=KEPT_GRAMMARS)(self._compile)

    def matcher(self, grammar: str) -> "GrammarMatcher":
        """Return a matcher at the beginning of a grammar. Raises ValueError, in one line, if it is not one.

        The grammars used last are kept compiled. Any thread may call this; compiling leaves the others free to run.
        """
        return GrammarMatcher(self.compile(grammar).deep_copy(), self.vocab_size)

    def _compile(self, grammar: str) -> Any:
        text = self.library.LLMatcher.grammar_from_lark(grammar)
        matcher = self.library.LLMatcher(self.tokenizer, text, log_level=0)
        if matcher.is_error():
            # After the message llguidance shows lines of the grammar.
            message, _, _ = " ".join(str(matcher.get_error()).split()).partition(" 1 | ")
            raise ValueError(f"the grammar cannot be used: {message:.200}")
        return matcher


class GrammarMatcher:
    """Where an answer is in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self.matcher = matcher
        self.mask = np.zeros((1, -(-vocab_size // 32)), dtype=np.int32)  # a bit for each id

    def allowed(self, vocab_size: int) -> Tensor:
        """Return which tokens may come next, bool (V,); none after an error."""
        from llguidance.numpy import fill_next_token_bitmask

        allowed_V = torch.zeros(vocab_size, dtype=torch.bool)
        if self.matcher.is_error():
            return allowed_V
        fill_next_token_bitmask(self.matcher, self.mask)
        bits = np.unpackbits(self.mask.view(np.uint8), bitorder="little")[:vocab_size]
        allowed_V[: len(bits)] = torch.from_numpy(bits).bool()
        return allowed_V

    def allows(self, token: int) -> bool:
        """Return whether this token may come next."""
        return not self.matcher.is_error() and self.matcher.validate_tokens([token]) == 1

    def accept(self, token: int) -> bool:
        """Move on by a token; return whether the grammar allowed it."""
        return not self.matcher.is_error() and self.matcher.consume_token(token)
