"""Text that the tokenizer does not know, and tokens that the model does not have, are refused before the model runs."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer, GPT2LMHeadModel

from thresher.harvest.run import harvest
from thresher.harvest.tokens import tokens
from thresher.harvest.tokens.packing import TokenizedDocument
from thresher.harvest.tokens.token_checks import SAMPLE_TOKENS, check_tokens
from thresher.shared import ActivationStore
from thresher.shared.core.errors import DataError, ModelError

CONTEXT = 8


def replaced(config, **changes):
    return msgspec.structs.replace(config, **changes)


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def add_tokens(config, token, special):
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    tokenizer.add_tokens([token], special_tokens=special)
    tokenizer.save_pretrained(config.model)


@pytest.mark.parametrize("special", [True, False])
def test_tokens_beyond_the_embeddings_matter_only_where_text_has_them(config, special, tmp_path, monkeypatch):
    plain = ActivationStore.open(harvest(replaced(config, store=str(tmp_path / "plain"))))
    add_tokens(config, "<image>", special=special)
    store = ActivationStore.open(harvest(config))
    assert torch.equal(store.tokens(0, store.n_rows), plain.tokens(0, plain.n_rows))
    rows = [s.read("blocks.1.resid_post", 0, s.n_rows) for s in (plain, store)]
    assert torch.equal(*rows)
    if special:
        return  # a special token that text spells out is plain text
    texts = ["dust and grain"] * 30 + ["an <image> here"]
    monkeypatch.setattr(tokens, "stack", lambda *_: pytest.fail("made a batch for the model"))
    told = r"document 'row 30' has token 257 \('<image>'\), but the model has embeddings for 257 tokens \(0 to 256\)"
    with pytest.raises(DataError, match=told):
        harvest(replaced(config, dataset=jsonl(tmp_path / "t.jsonl", texts), tokens=10**4, store=str(tmp_path / "a")))


def test_a_first_token_beyond_the_embeddings_is_refused(config):
    add_tokens(config, "<start>", special=True)
    with pytest.raises(ModelError, match=r"'<start>' that starts a document has id 257, but .* has 257 embeddings"):
        harvest(replaced(config, bos_token="<start>"))


def test_the_tokenizer_of_another_model_is_refused(config):
    model = GPT2LMHeadModel.from_pretrained(config.model)
    model.resize_token_embeddings(200)
    model.save_pretrained(config.model)
    with pytest.raises(ModelError, match=r"has a vocabulary of 257, its model 200 embeddings: .* of another model"):
        harvest(config)


def bert(folder, words):
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **shape)).save_pretrained(folder)
    return str(folder)


def test_text_that_the_tokenizer_does_not_know_is_refused(config, tmp_path, monkeypatch):
    config = replaced(config, model=bert(tmp_path / "bert", ["dust", "grain", "chaff"]))
    known = jsonl(tmp_path / "known.jsonl", ["dust grain chaff dust unheard " * (1 + i % 9) for i in range(90)])
    assert ActivationStore.open(harvest(replaced(config, dataset=known))).complete
    monkeypatch.setattr(tokens, "stack", lambda *_: pytest.fail("made a batch for the model"))
    unknown = jsonl(tmp_path / "unknown.jsonl", ["dust grain chaff unheard " * (1 + i % 9) for i in range(90)])
    told = r"bert' does not know the text: 25% of the first 1,800 tokens are \[UNK\] \(id 1\), expected at most 20%"
    with pytest.raises(DataError, match=told):
        harvest(replaced(config, dataset=unknown, store=str(tmp_path / "a")))


class Fake:
    """The part of a tokenizer that the checks use."""

    unk_token, unk_token_id, name_or_path = "?", 0, "fake"

    def convert_ids_to_tokens(self, token):
        return str(token)


def documents(*texts):
    return [TokenizedDocument(i, f"d{i}", i, np.array(ids, np.int32)) for i, ids in enumerate(texts)]


def test_documents_come_through_unchanged_and_only_the_first_are_held_back():
    given = documents([1] * 10, [0, 2], [1] * SAMPLE_TOKENS, [0] * 50, [3])
    assert list(check_tokens(given, Fake(), 4)) == given
    seen = []
    passed = check_tokens((seen.append(document.number) or document for document in given), Fake(), 4)
    assert next(passed) is given[0]
    assert seen == [0, 1, 2]
    assert list(check_tokens([], Fake(), 4)) == []


@pytest.mark.parametrize(("n_unknown", "refused"), [(20, False), (21, True)])
def test_a_fifth_of_unknown_tokens_is_the_limit(n_unknown, refused):
    given = documents([0] * n_unknown + [1] * (100 - n_unknown))
    if not refused:
        assert list(check_tokens(given, Fake())) == given
        return
    with pytest.raises(DataError, match="21% of the first 100 tokens"):
        next(check_tokens(given, Fake()))
