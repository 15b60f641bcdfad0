"""The stage itself on a tiny model: values, provenance, resume to the same bytes, reuse, refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    GPT2LMHeadModel,
)

from thresher.harvest import progress
from thresher.harvest.config import HarvestConfig
from thresher.harvest.documents.documents import read_documents
from thresher.harvest.reuse import identity, is_complete
from thresher.harvest.run import harvest
from thresher.harvest.tokens import encode
from thresher.harvest.tokens.holdout import document_hash, is_held_out
from thresher.shared import ActivationStore
from thresher.shared.core.cli import run_stage
from thresher.shared.core.config import to_toml
from thresher.shared.core.errors import ConfigError, DataError, DiskSpaceError, ModelError, NonFiniteError, StoreError
from thresher.shared.model import language_model
from thresher.shared.store import ActivationStoreWriter

CONTEXT = 8
N_CONTEXTS = 83


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def config(model_folder, text_folder, tmp_path):
    return HarvestConfig(
        model=str(model_folder),
        dataset=str(text_folder),
        hook_points=["blocks.1.hook_resid_post", "blocks.0.mlp_out"],
        store=str(tmp_path / "store"),
        tokens=N_CONTEXTS * CONTEXT - 3,
        context_size=CONTEXT,
        batch_size=5,
        holdout_fraction=0.35,
        dtype="float32",
        chunk_bytes=4 * CONTEXT * 16 * 4,
        shard_bytes=20 * CONTEXT * 16 * 4,
        model_dtype="float32",
    )


def replaced(config, **changes):
    return msgspec.structs.replace(config, **changes)


def files_of(folder):
    files = {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    return {path: content for path, content in files.items() if path.name != "harvest.toml"}


def test_the_store_holds_what_the_model_computes(config):
    store = ActivationStore.open(harvest(config))
    assert store.complete
    assert store.hook_points == ("blocks.1.resid_post", "blocks.0.mlp_out")
    assert (store.n_contexts, store.context_size) == (N_CONTEXTS, CONTEXT)
    tokens = store.tokens(0, store.n_rows).reshape(N_CONTEXTS, CONTEXT)
    model = GPT2LMHeadModel.from_pretrained(config.model).eval()
    with torch.no_grad():
        hidden = model(tokens.long(), output_hidden_states=True).hidden_states[2]
    ours = store.read("blocks.1.resid_post", 0, store.n_rows).reshape(N_CONTEXTS, CONTEXT, 16)
    torch.testing.assert_close(ours, hidden, rtol=1e-5, atol=1e-5)


def test_provenance_leads_back_to_the_text(config, text_folder):
    store = ActivationStore.open(harvest(config))
    tokens = store.tokens(0, store.n_rows).numpy()
    documents, positions = store.documents(0, store.n_rows)
    tokenizer = language_model.load_tokenizer(config.model)
    texts = {document.name: document.text for document in read_documents(config)}
    assert np.array_equal(tokens == 0, positions == 0)
    for document in np.unique(documents):
        hash_, name = store.document_info(int(document))
        assert hash_ == document_hash(texts[name])
        mine = (documents == document) & (positions > 0)
        assert positions[mine].tolist() == list(range(1, mine.sum() + 1))
        assert texts[name].encode().startswith(tokenizer.decode(tokens[mine]).replace("\ufffd", "").encode())
        held_out = store.held_out_contexts()[np.flatnonzero(mine) // CONTEXT]
        assert (held_out == is_held_out(hash_, config.holdout_fraction)).all()
    assert np.array_equal(store.row_mask(0, store.n_rows), tokens != 0)
    assert 0 < store.held_out_contexts().sum() < N_CONTEXTS


def test_metadata_and_the_written_configuration(config):
    store = ActivationStore.open(harvest(config))
    assert store.metadata["model"] == config.model
    assert store.metadata["model_dtype"] == "float32"
    assert store.metadata["mask_token_ids"] == [0]
    assert store.metadata["hook_modules"]["blocks.1.resid_post"] == "transformer.h.1"
    written = msgspec.toml.decode((store.path / "harvest.toml").read_bytes(), type=HarvestConfig)
    assert written == config
    assert store.verify() == []


@pytest.mark.parametrize("batches", [1, 3, 9, 16])
def test_an_interrupted_harvest_resumes_to_the_same_bytes(config, tmp_path, monkeypatch, batches, capsys):
    whole = files_of(harvest(replaced(config, store=str(tmp_path / "whole"))))
    (toml := tmp_path / "harvest.toml").write_text(to_toml(config))
    n_updates = 0
    update = progress.HarvestProgress.update

    def interrupt(self, n_contexts):
        nonlocal n_updates
        n_updates += 1
        if n_updates == batches:
            os.kill(os.getpid(), signal.SIGINT if batches % 2 else signal.SIGTERM)
        update(self, n_contexts)

    with monkeypatch.context() as patch:
        patch.setattr(progress.HarvestProgress, "update", interrupt)
        assert run_stage("harvest", HarvestConfig, harvest, "", [str(toml)]) == 130
    assert n_updates == batches
    assert not is_complete(Path(config.store), identity(config))
    harvest(config)
    assert files_of(config.store) == whole


def test_a_harvest_that_ends_at_a_damaged_document_resumes_without_it(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(encode, "MAX_BATCH_CHARACTERS", 2_000)  # several batches of documents before the damage
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(rng.choice(["dust", "grain", "chaff"], 8))}) for _ in range(400)]
    (tmp_path / "text.jsonl").write_text("\n".join([*lines[:300], '{"text": null}', *lines[300:]]))
    config = replaced(config, dataset=str(tmp_path / "text.jsonl"), tokens=16_000, batch_size=50)
    config = replaced(config, shard_bytes=1 << 18, holdout_fraction=0.2)
    with pytest.raises(DataError, match=r"text\.jsonl', line 301 must hold text, .* got null"):
        harvest(config)
    assert not ActivationStore.open(config.store).complete
    harvest(replaced(config, on_bad_document="skip"))
    err = capsys.readouterr().err
    assert err.count("text: read 1 file, ") == 1
    assert "skipped 1 damaged, first" in err
    whole = harvest(replaced(config, on_bad_document="skip", store=str(tmp_path / "whole")))
    assert files_of(config.store) == files_of(whole)
    assert ActivationStore.open(config.store).n_rows == config.tokens


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_workers(config, tmp_path, workers):
    one = files_of(harvest(replaced(config, store=str(tmp_path / "one"), workers=1)))
    torch.set_num_threads(2)
    try:
        assert files_of(harvest(replaced(config, workers=workers))) == one
    finally:
        torch.set_num_threads(1)


def test_a_complete_store_is_reused_without_the_model(config, tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    shutil.copytree(config.model, model)
    config = replaced(config, model=str(model))
    harvest(config)
    before = files_of(config.store)
    monkeypatch.setattr("thresher.harvest.model.plan.load_model", lambda *_: pytest.fail("loaded the model"))
    monkeypatch.setattr("thresher.harvest.model.plan.load_tokenizer", lambda *_: pytest.fail("loaded the tokenizer"))
    harvest(replaced(config, hook_points=["blocks.1.resid_post", "blocks.0.hook_mlp_out"], device="cuda"))
    assert "reuses store" in capsys.readouterr().err
    assert files_of(config.store) == before
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(StoreError, match="differs in weights"):
        harvest(config)
    shutil.rmtree(model)
    harvest(config)


def test_a_store_of_another_harvest_is_refused(config):
    harvest(config)
    with pytest.raises(StoreError, match=r"differs in holdout_fraction \(0.35, now 0.4\), seed \(0, now 1\); name an"):
        harvest(replaced(config, holdout_fraction=0.4, seed=1))
    path = Path(config.store).parent / "own"
    with ActivationStoreWriter(path, {"layer": 4}, CONTEXT) as writer:
        writer.append({"layer": np.zeros((1, CONTEXT, 4), np.float32)})
    with pytest.raises(StoreError, match="was not written by a harvest"):
        harvest(replaced(config, store=str(path)))


def test_text_that_runs_out_is_noted(config, capsys):
    store = ActivationStore.open(harvest(replaced(config, tokens=10**6)))
    assert store.complete
    n_bytes = sum(len(document.text.encode()) for document in read_documents(config))
    assert n_bytes < store.n_rows < 1.4 * n_bytes
    assert f"has text for {store.n_rows:,} of the 1,000,000 tokens requested" in capsys.readouterr().err


def test_too_little_disk(config, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(DiskSpaceError, match=r"needs about 8\d\.\d kB .* has 1 kB free"):
        harvest(config)
    assert not is_complete(Path(config.store), identity(config))


def test_what_is_not_finite_is_named(config, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(config.model)
    model.transformer.wte.weight.data[50:] = float("nan")
    model.save_pretrained(tmp_path / "model")
    for file in Path(config.model).glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    config = replaced(config, model=str(tmp_path / "model"))
    with pytest.raises(NonFiniteError, match=r"hook point 'blocks\.[01]\.\w+', context \d+"):
        harvest(config)
    assert not is_complete(Path(config.store), identity(config))


def test_errors_name_what_to_do(config, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="no text in"):
        harvest(replaced(config, dataset=str(tmp_path / "empty.txt"), store=str(tmp_path / "a")))
    with pytest.raises(DataError, match="no held-out context"):
        harvest(replaced(config, holdout_fraction=1e-9, store=str(tmp_path / "b")))
    with pytest.raises(ModelError, match="beyond the 32 positions"):
        harvest(replaced(config, context_size=64, store=str(tmp_path / "c")))
    with pytest.raises(ConfigError, match="bos_token '<s>' is not in the tokenizer's vocabulary"):
        harvest(replaced(config, bos_token="<s>", store=str(tmp_path / "d")))
    with pytest.raises(ConfigError, match="revision 'main' is for a model on the Hugging Face hub, but"):
        harvest(replaced(config, revision="main", store=str(tmp_path / "f")))
    with pytest.raises(ConfigError, match="no CUDA device"):
        harvest(replaced(config, device="cuda:0", store=str(tmp_path / "e")))


def test_bos_only_between_documents(config):
    store = ActivationStore.open(harvest(replaced(config, bos_every_context=False)))
    tokens = store.tokens(0, store.n_rows).numpy()
    documents, positions = store.documents(0, store.n_rows)
    assert np.array_equal(tokens == 0, positions == 0)
    assert (tokens == 0).sum() == len(np.unique(documents))


@pytest.mark.parametrize("codec", ["none", "zstd", "int8"])
def test_codecs(config, codec):
    plain = ActivationStore.open(harvest(config))
    chunk_bytes = config.chunk_bytes // (4 if codec == "int8" else 1)  # the same rows, and so the same order
    changes = dict(codec=codec, chunk_bytes=chunk_bytes, store=config.store + codec)
    store = ActivationStore.open(harvest(replaced(config, **changes)))
    ours, theirs = (s.read("blocks.0.mlp_out", 0, s.n_rows) for s in (store, plain))
    tolerance = 0.0 if codec != "int8" else float(theirs.abs().max()) / 100
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_an_encoder_is_a_source_too(config, tmp_path):
    folder = tmp_path / "bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dust", "grain", "gr", "##o", "chaff", "<", ">", "bos"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **shape)).save_pretrained(folder)
    store = ActivationStore.open(harvest(replaced(config, model=str(folder), tokens=20 * CONTEXT)))
    tokens = store.tokens(0, store.n_rows).reshape(-1, CONTEXT)
    assert store.metadata["bos_token_id"] == words.index("[CLS]")
    model = BertModel.from_pretrained(folder).eval()
    hidden = model(tokens.long(), output_hidden_states=True).hidden_states[2]
    ours = store.read("blocks.1.resid_post", 0, store.n_rows).reshape(-1, CONTEXT, 16)
    torch.testing.assert_close(ours, hidden, rtol=1e-5, atol=1e-5)
