"""The tokenizer: identity on any text, special tokens out of reach of text, exchange with Hugging Face's format."""

import json
import random

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.data import tokenizer as tokenizer_module
from minglm.data.tokenizer import SPECIAL_TOKENS, Tokenizer, _sample
from minglm.testing.data import check_tokenizer
from minglm.testing.strategies import texts

CORPUS = [f"def add_{n}(a, b):\n    return a + b + {n}  # the sum, 总和\n" for n in range(50)] + [
    "Add 12 to 345.\n"
] * 50


TOKENIZER = Tokenizer.train(CORPUS, 512)


@pytest.fixture(scope="module")
def tokenizer():
    """Return a tokenizer of 512 ids."""
    return TOKENIZER


def test_contract_holds(tokenizer):
    """Our tokenizer keeps the contract."""
    check_tokenizer(tokenizer)


class Broken(Tokenizer):
    """Twins that each break the contract in one way people do."""

    @classmethod
    def of(cls, tokenizer, fault):
        twin = cls({**tokenizer._specification, "added_tokens": tokenizer._added_tokens})
        twin.fault = fault
        return twin

    def encode(self, text):
        if self.fault == "text makes special tokens":
            parts = map(super().encode, text.split("<|user|>"))
            return [i for ids in parts for i in [self.special["<|user|>"], *ids]][1:]
        if self.fault == "normalises":
            import unicodedata

            text = unicodedata.normalize("NFC", text)
        if self.fault == "strips":
            text = text.strip()
        return super().encode(text)

    def decode(self, ids, skip_special=False):
        return super().decode(ids, skip_special and self.fault != "keeps special")


@pytest.mark.parametrize(
    "fault", ["text makes special tokens", "normalises", "strips", "keeps special"]
)
def test_contract_rejects_a_broken_twin(tokenizer, fault):
    """Each broken twin fails the contract."""
    with pytest.raises(AssertionError):
        check_tokenizer(Broken.of(tokenizer, fault))


def test_special_tokens_have_the_published_order(tokenizer):
    """The 36 special tokens take the last ids, at the published distances from <|endoftext|>."""
    assert len(SPECIAL_TOKENS) == 36 and tokenizer.vocab_size == 512
    assert [tokenizer.special[name] for name in SPECIAL_TOKENS] == list(range(512 - 36, 512))
    published = {
        "[gMASK]": 151331,
        "<sop>": 151333,
        "<|user|>": 151336,
        "<|observation|>": 151338,
        "<|video|>": 151364,
    }
    for name, released in published.items():
        assert tokenizer.special[name] - tokenizer.end == released - 151329
    assert tokenizer.stop_ids == (
        tokenizer.end,
        tokenizer.special["<|user|>"],
        tokenizer.special["<|observation|>"],
    )


@given(st.integers(0, 10**12))
def test_digits_are_single_tokens(number):
    """A number of n digits is n tokens, the same ten everywhere."""
    tokenizer = Tokenizer.train(["2024 2024 2024 12 12"], 292 + 20)
    assert tokenizer.encode(str(number)) == [tokenizer.encode(digit)[0] for digit in str(number)]


@given(st.lists(texts(), max_size=5))
def test_batch_encoding_is_encoding_one_by_one(some):
    """encode_batch gives what encode gives for each text, and bytes() the exact UTF-8."""
    tokenizer = Tokenizer.train(CORPUS[:5], 400)
    assert tokenizer.encode_batch(some) == [tokenizer.encode(text) for text in some]
    assert [tokenizer.bytes(ids) for ids in tokenizer.encode_batch(some)] == [
        text.encode() for text in some
    ]


def test_training_is_deterministic_in_any_order_of_texts():
    """The same texts, in another order or cut to a sample, give the same merges every time."""
    forwards = Tokenizer.train(CORPUS, 400)
    backwards = Tokenizer.train(reversed(CORPUS), 400)
    assert forwards._specification == backwards._specification
    # Half a character is cut off.
    assert 697 <= sum(len(text.encode()) for text in _sample(CORPUS, 700)) <= 700
    small = [
        Tokenizer.train(some, 330, sample_bytes=700)._specification
        for some in (CORPUS, CORPUS[::-1])
    ]
    assert small[0] == small[1] != forwards._specification


def test_save_and_load(tokenizer, tmp_path):
    """A saved tokenizer loads to the same ids, here and in the tokenizers library."""
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.special == tokenizer.special
    assert loaded.encode(CORPUS[3]) == tokenizer.encode(CORPUS[3])
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.get_vocab_size() == 512
    assert {name: other.token_to_id(name) for name in SPECIAL_TOKENS} == tokenizer.special
    text = "<|user|>\nWhat is 12?<|assistant|>"
    assert other.encode(text).ids == [
        tokenizer.special["<|user|>"],
        *tokenizer.encode("\nWhat is 12?"),
        tokenizer.special["<|assistant|>"],
    ]


def released(tokenizer, folder):
    """Write a file laid out like a released one: more ids, <think> an ordinary added token, a prefix added to every text."""
    specification = {
        **tokenizer._specification,
        "added_tokens": [dict(token) for token in tokenizer._added_tokens],
    }
    for token in specification["added_tokens"]:
        token["special"] = token["content"] not in (
            "<think>",
            "</think>",
            "<tool_call>",
            "/nothink",
        )
    prefix = {"[gMASK]": tokenizer.special["[gMASK]"], "<sop>": tokenizer.special["<sop>"]}
    specification["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            *({"SpecialToken": {"id": n, "type_id": 0}} for n in prefix),
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            name: {"id": name, "ids": [token], "tokens": [name]} for name, token in prefix.items()
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(specification), encoding="utf-8")
    return folder / "tokenizer.json"


def test_a_released_layout_loads(tokenizer, tmp_path):
    """A released file keeps the contract too: ordinary added tokens and a prefix do not leak into text."""
    loaded = Tokenizer.load(released(tokenizer, tmp_path))
    assert loaded.special == tokenizer.special
    check_tokenizer(loaded)


def test_unused_ids_fill_a_vocabulary_the_text_is_too_short_for(tmp_path):
    """Asked for more merges than the text has, training still gives exactly vocab_size ids."""
    tokenizer = Tokenizer.train(["ab ab"], 400)
    assert tokenizer.vocab_size == 400 and tokenizer.end == 400 - 36
    tokenizer.save(tmp_path / "tokenizer.json")
    read = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert read.token_to_id("<|endoftext|>") == 400 - 36


def test_ids_may_be_arrays_and_half_characters_decode(tokenizer):
    """decode takes lists, arrays and tensors; half a character becomes U+FFFD; half a surrogate pair can be read."""
    ids = tokenizer.encode("sum é")
    assert tokenizer.decode(np.array(ids, dtype=np.uint16)) == "sum é"
    assert tokenizer.decode(torch.tensor(ids)) == "sum é"
    assert tokenizer.decode(tokenizer.encode("界")[:1]).startswith("\ufffd")
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_bad_input_is_one_clear_line(tokenizer, tmp_path):
    """What a user can do wrong raises ValueError that names the value and the remedy."""
    with pytest.raises(ValueError, match=r"vocab_size = 100: .* at least 292"):
        Tokenizer.train(CORPUS, 100)
    with pytest.raises(ValueError, match=r"cannot read tokenizer .*absent"):
        Tokenizer.load(tmp_path / "absent.json")
    (tmp_path / "torn.json").write_text('{"model": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"torn\.json"):
        Tokenizer.load(tmp_path / "torn.json")
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"list\.json"):
        Tokenizer.load(tmp_path / "list.json")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(ValueError, match=r"words\.json: not a byte-level"):
        Tokenizer.load(tmp_path / "words.json")
    bare = {**tokenizer._specification, "added_tokens": tokenizer._added_tokens[:3]}
    (tmp_path / "bare.json").write_text(json.dumps(bare), encoding="utf-8")
    with pytest.raises(ValueError, match=r"bare\.json: .*<\|user\|> is missing"):
        Tokenizer.load(tmp_path / "bare.json")
    for token in (512, -1):
        with pytest.raises(ValueError, match=f"token id {token}"):
            tokenizer.decode([1, token])


@given(
    st.lists(st.sampled_from(["word", "Wörter 两个", "12345", "\n", "\r\n\n  ", "  ", "!?", " a"])),
    st.integers(10, 40),
)
def test_pieces_have_the_ids_of_the_whole(parts, size):
    """A long text of words is encoded in pieces, by itself or in a batch, to the ids that it has in one piece."""
    text = " and so on\n".join(parts)
    whole = TOKENIZER.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        # A tenth of a piece is searched for an end, and every eleven characters there is one.
        patch.setattr(tokenizer_module, "PIECE_CHARACTERS", 10 * size + 200)
        assert TOKENIZER.encode(text) == whole
        assert TOKENIZER.encode_batch([text, "x", text]) == [whole, TOKENIZER.encode("x"), whole]


@given(st.text(), st.integers(1, 5))
def test_pieces_of_any_text_decode_to_it(text, size):
    """Also where no word ends in a piece, nothing is lost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "PIECE_CHARACTERS", size)
        ids = TOKENIZER.encode(text)
        assert TOKENIZER.encode_batch([text]) == [ids]
    assert TOKENIZER.decode(ids) == text.encode("utf-8", "replace").decode()


class Watched:
    """The library's tokenizer, which notes the longest word that it is trained on, in characters."""

    from_str = staticmethod(tokenizers.Tokenizer.from_str)
    longest = 0

    def __init__(self, model):
        self.__dict__["backend"] = tokenizers.Tokenizer(model)

    def train_from_iterator(self, texts, trainer):
        texts = list(texts)
        for text in texts:
            words = self.backend.pre_tokenizer.pre_tokenize_str(text)
            longest = max(end - start for _, (start, end) in words)
            Watched.longest = max(Watched.longest, longest)
        self.backend.train_from_iterator(texts, trainer)

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def __setattr__(self, name, value):
        setattr(self.backend, name, value)


@pytest.mark.parametrize("letters", ["ACGT", "01", "两个词", "!?-", " "])
@pytest.mark.parametrize("counted", [tokenizer_module.COUNTED_WORD, 5000])
def test_training_is_linear_in_a_run_of_letters(letters, counted, monkeypatch):
    """A run without a word's end is counted in short words, whose cost is quadratic; a twin takes it whole."""
    monkeypatch.setattr(tokenizer_module, "Backend", Watched)
    monkeypatch.setattr(tokenizer_module, "COUNTED_WORD", counted)
    monkeypatch.setattr(Watched, "longest", 0)
    text = "".join(random.Random(0).choices(letters, k=2000))
    Tokenizer.train([text], 400)
    is_split = letters == "01"  # a digit is a word
    assert (Watched.longest <= 256) == (counted <= 256 or is_split)


# Files of others


def changed(tokenizer, **parts):
    """Return our tokenizer.json with other parts; those of the model are named model_PART."""
    specification = {**tokenizer._specification, "added_tokens": tokenizer._added_tokens}
    model = dict(specification["model"])
    for name, value in parts.items():
        if name.startswith("model_"):
            model[name.removeprefix("model_")] = value
        else:
            specification[name] = value
    specification.setdefault("model", {})
    return {**specification, "model": parts.get("model", model)}


USED_BEFORE = {
    "truncation": {
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    },
    "padding": {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    },
    "model_dropout": 0.5,
}


@given(text=texts(), parts=st.sets(st.sampled_from(sorted(USED_BEFORE)), min_size=1))
def test_what_a_file_was_used_for_changes_no_text(tokenizer, text, parts):
    """A file saved with truncation, padding or dropout in force gives every text the same ids as without."""
    loaded = Tokenizer(changed(tokenizer, **{part: USED_BEFORE[part] for part in parts}))
    long = 20 * text
    assert loaded.encode(long) == tokenizer.encode(long)
    assert loaded.encode_batch([long, "a"]) == tokenizer.encode_batch([long, "a"])
    assert loaded.same_ids(tokenizer)


def broken_files(tokenizer):
    """Yield (what the line names, a tokenizer.json) of each way in which a file cannot be used."""
    words = tokenizer._specification["model"]["vocab"]
    merges = tokenizer._specification["model"]["merges"]
    added = tokenizer._added_tokens
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    yield "parenthesis", changed(tokenizer, pre_tokenizer={**split, "pattern": {"Regex": "(("}})
    yield "vocabulary", changed(tokenizer, model_merges=[*merges, ["zz", "qq"]])
    yield "byte-level", changed(tokenizer, model={"type": "Unigram", "vocab": [["a", 0.0]]})
    yield "byte-level", changed(tokenizer, model_type="WordPiece")
    yield "byte-level", changed(tokenizer, model_vocab=[["a", 1]])
    yield "byte-level", changed(tokenizer, model=3)
    yield "byte-level", changed(tokenizer, decoder=None)
    yield "byte-level", changed(tokenizer, decoder=["ByteLevel"])
    for token in (2**31, 2**33, 10**30, -1):
        yield f"has the id {token}", changed(tokenizer, model_vocab={**words, "aaa": token})
    for token in (1.5, "1", None, True, [1]):
        yield (
            "must be a text and an integer",
            changed(tokenizer, model_vocab={**words, "aaa": token}),
        )
    yield "have one id", changed(tokenizer, model_vocab={**words, "aaa": 5})
    yield "have one id", changed(tokenizer, added_tokens=[*added, {**added[0], "content": "<x>"}])
    yield "names a token twice", changed(tokenizer, added_tokens=[*added, {**added[0], "id": 900}])
    yield "must be a text", changed(tokenizer, added_tokens=[*added, {"id": 900}])
    yield "must be a text", changed(tokenizer, added_tokens=[*added, {"content": "<x>"}])
    yield "added_tokens", changed(tokenizer, added_tokens={"a": 1})
    yield "added_tokens", changed(tokenizer, added_tokens=["<x>"])
    yield "changes the text", changed(tokenizer, normalizer={"type": "Lowercase"})
    yield "changes the text", changed(tokenizer, pre_tokenizer=None)
    prefixed = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    yield "changes the text", changed(tokenizer, pre_tokenizer={**prefixed, "use_regex": True})
    yield (
        "no token for the byte 97",
        changed(
            tokenizer,
            model_vocab={word: token for word, token in words.items() if "a" not in word},
            model_merges=[],
        ),
    )
    for value in ([], 3, "x", None, {}, {"model": {}}):
        yield "", value


def test_a_file_that_cannot_be_used_is_one_line(tokenizer, tmp_path):
    """Of every kind: the line names the file and what is wrong in it."""
    path = tmp_path / "tokenizer.json"
    for words, specification in broken_files(tokenizer):
        path.write_text(json.dumps(specification), encoding="utf-8")
        with pytest.raises(ValueError, match=r"tokenizer\.json: ") as error:
            Tokenizer.load(path)
        assert words in str(error.value), (words, str(error.value))
        assert "\n" not in str(error.value)
    for text in ("", "{", "[" * 100_000, '{"a": 1' + "0" * 5000 + "}"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"tokenizer\.json: "):
            Tokenizer.load(path)
