"""The text of tokens against the text that was tokenized, for every kind of tokenizer, and by whole characters."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from thresher.evaluate.features.token_text import TokenTexts, token_bytes, whole_characters

BUNDLED = Path(__file__).parents[3] / "models" / "stdlib-lm"
TEXTS = ["the cat  and the hat", "x = 'é' # 😀", "مرحبا بالعالم", "日本語\tok\n", "👩‍👧 zero\u200bwidth \u202eturned"]
SAMPLE = " ".join(TEXTS)


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS[:1] * 9, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece(strips: bool):
    """As Llama 2 (which strips the first space) or Gemma have it: bytes where a character has no token."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", *"thecadnx='#"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    for first, second in merges:
        vocabulary.setdefault(first + second, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True))
    prepend = [normalizers.Prepend("▁")] if strips else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if strips else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def texts_of(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids, TokenTexts.of(tokenizer, ids).in_context(ids)


@pytest.mark.parametrize("text", [*TEXTS, SAMPLE])
@pytest.mark.parametrize(
    ("make", "begins"),
    [
        (byte_level, ""),
        (lambda: sentencepiece(strips=True), " "),
        (lambda: sentencepiece(strips=False), ""),
        (lambda: AutoTokenizer.from_pretrained(BUNDLED), ""),
    ],
    ids=["byte level", "SentencePiece that strips", "SentencePiece", "bundled"],
)
def test_the_tokens_of_a_text_spell_it(make, begins, text):
    """A Llama 2 text begins with a space of the tokenizer's own."""
    ids, texts = texts_of(make(), text)
    assert "".join(texts) == begins + text
    assert len(texts) == len(ids)
    assert "\ufffd" not in "".join(texts)


@pytest.mark.parametrize("strips", [True, False])
def test_a_leading_space_tells_tokens_apart(strips):
    tokenizer = sentencepiece(strips)
    words = {tokenizer.convert_tokens_to_ids(piece): text for piece, text in (("▁the", " the"), ("the", "the"))}
    assert token_bytes(tokenizer, words) == {token: text.encode() for token, text in words.items()}
    assert {tokenizer.decode([token]) for token in words} == {" the", "the"} if not strips else {"the"}


def test_wordpieces_join_and_added_tokens_are_as_written():
    vocabulary = {piece: number for number, piece in enumerate(["[UNK]", "cat", "##s", "the", "."])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", extra_special_tokens=["<|im_end|>"])
    _, texts = texts_of(fast, "the cats. zebra<|im_end|>")
    assert texts == [" the", " cat", "s", ".", "[UNK]", "<|im_end|>"]


def test_unknown_ids_have_no_bytes():
    tokenizer = byte_level()
    assert token_bytes(tokenizer, [-1, len(tokenizer), 1 << 20]) == {}
    assert TokenTexts.of(tokenizer, [1 << 20]).in_context([1 << 20]) == [f"⟨{1 << 20}⟩"]


def test_a_split_character_is_at_the_token_where_it_begins():
    smile = "😀".encode()
    assert whole_characters([b"a ", smile[:1], smile[1:3], smile[3:] + b"!", b"b"]) == ["a ", "😀", "", "!", "b"]
    assert whole_characters([b"x" + smile[:2], smile[2:]]) == ["x😀", ""]


def test_what_is_cut_off_is_written_as_bytes():
    smile = "😀".encode()
    assert whole_characters([smile[2:], b"a", smile[:2]]) == ["\\x98\\x80", "a", "\\xf0\\x9f"]
    assert whole_characters([]) == []


@given(st.text(), st.lists(st.integers(0, 40)))
def test_any_cut_of_any_text_gives_each_character_to_the_token_where_it_begins(text, cuts):
    content = text.encode("utf-8", "replace")
    edges = sorted({0, len(content), *(cut for cut in cuts if cut <= len(content))})
    pieces = [content[start:stop] for start, stop in pairwise(edges)]
    begins = [len(content.decode()[:n].encode()) for n in range(len(content.decode()))]
    expected = [
        "".join(c for c, at in zip(content.decode(), begins, strict=True) if start <= at < stop)
        for start, stop in pairwise(edges)
    ]
    assert whole_characters(pieces) == expected
