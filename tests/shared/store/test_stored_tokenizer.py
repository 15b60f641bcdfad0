"""A tokenizer that is kept with a store: the same bytes wherever it was loaded from, and the same tokens afterwards."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.core.errors import ConfigError, StoreError
from thresher.shared.store.read.stored_tokenizer import load_stored_tokenizer, serialise_tokenizer
from thresher.shared.store.read.tokenizer_folder import describe_tokenizer, read_tokenizer_files, tokenizer_key

TEXT = "Dust and  grain, größe 😀 <extra> of chaff"


def byte_level(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    made.add_tokens(["<extra>"])
    made.chat_template = "{{ messages[0].content }}"
    made.save_pretrained(folder)


def word_piece(folder):
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dust", "and", "gr", "##ain", "chaff", ",", "of"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


def unigram(folder):
    pieces = [("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "Dustandgrifbhkmcoxe<>"), ("▁and", -1.0)]
    tokenizer = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>").save_pretrained(folder)


FAMILIES = {"byte level": byte_level, "word piece": word_piece, "unigram": unigram}


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    FAMILIES[request.param](tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def write_store(path, files, **metadata):
    metadata = describe_tokenizer(files) | metadata
    with ActivationStoreWriter(path, {"a": 2}, 4, metadata=metadata) as writer:
        for name, content in files.items():
            writer.write_beside(tokenizer_key(name), content)
        writer.append({"a": np.zeros((1, 4, 2), np.float32)})
    return ActivationStore.open(path)


def test_the_files_do_not_depend_on_where_the_tokenizer_was_loaded_from(folder, tmp_path, monkeypatch):
    first = serialise_tokenizer(AutoTokenizer.from_pretrained(folder))
    shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert serialise_tokenizer(AutoTokenizer.from_pretrained("copy")) == first
    assert not any(str(tmp_path).encode() in content or b"elsewhere" in content for content in first.values())


def test_a_stored_tokenizer_reads_and_writes_the_same_tokens(folder, tmp_path):
    original = AutoTokenizer.from_pretrained(folder)
    store = write_store(tmp_path / "store", serialise_tokenizer(original))
    assert store.verify() == []
    stored = load_stored_tokenizer(store)
    assert stored.name_or_path == store.metadata["tokenizer_digest"]
    assert stored.get_vocab() == original.get_vocab()
    assert stored.all_special_ids == original.all_special_ids
    assert stored.chat_template == original.chat_template
    ids = original(TEXT)["input_ids"]
    assert stored(TEXT)["input_ids"] == ids
    assert stored.decode(ids) == original.decode(ids)
    assert serialise_tokenizer(stored) == serialise_tokenizer(original)


def test_a_store_without_a_tokenizer_has_none(tmp_path):
    with ActivationStoreWriter(tmp_path / "store", {"a": 2}, 4) as writer:
        writer.append({"a": np.zeros((1, 4, 2), np.float32)})
    store = ActivationStore.open(tmp_path / "store")
    assert read_tokenizer_files(store.files, store.metadata) is None
    assert load_stored_tokenizer(store) is None


@pytest.mark.parametrize("name", ["../manifest.jsonl", "/etc/hostname", "a/../b", "", 5])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    store = SimpleNamespace(
        metadata={"tokenizer_files": [name], "tokenizer_digest": "0" * 32}, files=SimpleNamespace(location="s")
    )
    with pytest.raises(StoreError, match="cannot be a file of its tokenizer"):
        read_tokenizer_files(store.files, store.metadata)


def test_the_folder_is_no_hook_point(tmp_path):
    with pytest.raises(ConfigError, match="hook point 'tokenizer' cannot name an array"):
        ActivationStoreWriter(tmp_path / "store", {"tokenizer": 2}, 4)


def test_a_tokenizer_of_an_object_store(folder, s3):
    files = serialise_tokenizer(AutoTokenizer.from_pretrained(folder))
    store = write_store(s3(), files)
    assert read_tokenizer_files(store.files, store.metadata) == files
    assert json.loads(files["tokenizer_config.json"])
    assert load_stored_tokenizer(store).get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()
