"""A store is reused and resumed only for the same text, tokenizer, weights and settings, however they are spelled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM

from thresher.harvest import reuse as identity_module
from thresher.harvest import run as run_module
from thresher.harvest import steps as steps_module
from thresher.harvest.config import HarvestConfig
from thresher.harvest.reuse import compare_store, identity, is_complete, sampled_fingerprint
from thresher.harvest.run import harvest
from thresher.shared import ActivationStore
from thresher.shared.core.errors import DataError, StoreBusyError, StoreError
from thresher.shared.store.format.manifest import encode_line, read_manifest
from thresher.shared.store.local.store_folder import StoreFolder

CONTEXT = 8


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr("thresher.shared.store.local.durable.flush", lambda handle: None)
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config(model_folder, text_folder, tmp_path):
    """A harvest of copies that may be changed, with the model's and the data set's folders relative to tmp_path."""
    shutil.copytree(model_folder, tmp_path / "model")
    shutil.copytree(text_folder, tmp_path / "text")
    return HarvestConfig(
        model=str(tmp_path / "model"),
        dataset=str(tmp_path / "text"),
        hook_points=["blocks.1.resid_post"],
        store=str(tmp_path / "store"),
        tokens=60 * CONTEXT,
        context_size=CONTEXT,
        batch_size=5,
        holdout_fraction=0.35,
        dtype="float32",
        chunk_bytes=4 * CONTEXT * 16 * 4,
        shard_bytes=20 * CONTEXT * 16 * 4,
        model_dtype="float32",
        workers=1,
    )


def replaced(config, **changes):
    return msgspec.structs.replace(config, **changes)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def interrupt(config, monkeypatch, after=5):
    """Harvest some batches, so that shards are stored, and stop with an error."""
    with monkeypatch.context() as patch:
        append = steps_module.append
        calls = []

        def failing(*arguments):
            if len(calls) == after:
                raise RuntimeError("interrupted")
            calls.append(append(*arguments))

        patch.setattr(steps_module, "append", failing)
        with pytest.raises(RuntimeError, match="interrupted"):
            harvest(config)


def edit_text(config):
    path = sorted(Path(config.dataset).iterdir())[30]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def rename_text(config):
    path = sorted(Path(config.dataset).iterdir())[30]
    path.rename(path.with_name("zz.txt"))


def edit_tokenizer(config):
    path = Path(config.model) / "tokenizer.json"
    record = json.loads(path.read_text())
    record["added_tokens"][0]["normalized"] = True
    path.write_text(json.dumps(record))


def edit_chat_template(config):
    (Path(config.model) / "chat_template.jinja").write_text("{{ messages }}")


def edit_weights(config):
    """Change one value in the middle of the file, wherever samples might be taken."""
    model = GPT2LMHeadModel.from_pretrained(config.model)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[7, 11] += 1
    model.save_pretrained(config.model)


def edit_model_config(config):
    path = Path(config.model) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_epsilon": 1e-3}))


CHANGES = {
    edit_text: "text",
    rename_text: "text",
    edit_tokenizer: "tokenizer",
    edit_chat_template: "tokenizer",
    edit_weights: "weights",
    edit_model_config: "weights",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_complete_store_of_other_content_is_refused_and_kept(config, change):
    harvest(config)
    before = files_of(config.store)
    change(config)
    with pytest.raises(StoreError) as caught:
        harvest(config)
    (line,) = str(caught.value).splitlines()
    what = CHANGES[change]
    assert f"is of another harvest: it differs in {what} ('" in line
    assert line.endswith("; name another store")
    assert "rm" not in line.split()
    assert files_of(config.store) == before


@pytest.mark.parametrize("change", CHANGES)
def test_an_interrupted_store_of_other_content_is_not_resumed(config, monkeypatch, change):
    interrupt(config, monkeypatch)
    assert read_manifest(Path(config.store)).n_contexts > 0
    before = files_of(config.store)
    change(config)
    monkeypatch.setattr("thresher.harvest.model.plan.load_model", lambda *_: pytest.fail("loaded the model"))
    with pytest.raises(StoreError, match=f"it differs in {CHANGES[change]} \\("):
        harvest(config)
    assert files_of(config.store) == before


def test_all_that_differs_is_named_at_once(config):
    harvest(config)
    edit_text(config)
    edit_weights(config)
    with pytest.raises(StoreError, match=r"differs in seed \(0, now 1\), text \('60 files, .*\), weights \('2 files, "):
        harvest(replaced(config, seed=1))


def test_spelling_and_settings_of_the_machine_make_no_other_harvest(config, tmp_path, monkeypatch, capsys):
    harvest(config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tmp_path / "model", tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to("text")
    before = files_of(config.store)
    monkeypatch.setattr("thresher.harvest.model.plan.load_model", lambda *_: pytest.fail("loaded the model"))
    for changes in (
        {"model": "model", "dataset": "text"},
        {"model": "./model/", "dataset": "../" + tmp_path.name + "/text"},
        {"model": "~/model", "dataset": "~/text"},
        {"model": str(tmp_path / "elsewhere"), "dataset": "link"},
        {"batch_size": 7, "workers": 2, "threads": 1, "device": "cuda", "streaming": True, "cache": "other"},
        {"hook_points": ["blocks.1.hook_resid_post"]},
    ):
        capsys.readouterr()
        harvest(replaced(config, **changes))
        assert capsys.readouterr().err.startswith("reuses store"), changes
    assert files_of(config.store) == before


def test_an_explicit_dtype_is_what_auto_chose(config):
    harvest(replaced(config, model_dtype="auto"))
    chosen = ActivationStore.open(config.store).metadata["model_dtype"]
    harvest(replaced(config, model_dtype=chosen))
    with pytest.raises(StoreError, match=r"differs in model_dtype \('auto', now 'float16'\)"):
        harvest(replaced(config, model_dtype="float16"))


def test_a_resumed_store_keeps_its_spelling_and_its_bytes(config, tmp_path, monkeypatch):
    whole = files_of(harvest(replaced(config, store=str(tmp_path / "whole"))))
    interrupt(config, monkeypatch)
    monkeypatch.chdir(tmp_path)
    harvest(replaced(config, model="model", dataset="./text"))
    for path in (Path("harvest.toml"),):
        del whole[path]
    resumed = files_of(config.store)
    del resumed[Path("harvest.toml")]
    assert resumed == whole


def test_another_batch_size_resumes_to_the_same_rows_and_says_so(config, tmp_path, monkeypatch, capsys):
    whole = ActivationStore.open(harvest(replaced(config, store=str(tmp_path / "whole"))))
    interrupt(config, monkeypatch)
    capsys.readouterr()
    store = ActivationStore.open(harvest(replaced(config, batch_size=3)))
    assert "note: resumes a store of batch_size 5 with batch_size 3" in capsys.readouterr().err
    assert store.verify() == []
    assert torch.equal(store.tokens(0, store.n_rows), whole.tokens(0, whole.n_rows))
    name = "blocks.1.resid_post"
    ours, theirs = (s.read(name, 0, s.n_rows) for s in (store, whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def without_content(store, *, without=(), **changes):
    """Rewrite a store's header as an older version wrote it, `without` some of the metadata."""
    path = Path(store) / "manifest.jsonl"
    manifest = read_manifest(Path(store))
    harvest_record = {key: value for key, value in manifest.header.metadata["harvest"].items() if key != "content"}
    metadata = manifest.header.metadata | {"harvest": harvest_record | changes}
    metadata = {key: value for key, value in metadata.items() if key not in without}
    lines, checksum = [], 0
    for entry in (msgspec.structs.replace(manifest.header, metadata=metadata), *manifest.shards, manifest.completion):
        if entry is not None:
            line, checksum = encode_line(entry, checksum)
            lines.append(line)
    path.write_bytes(b"".join(lines))


def test_a_store_of_an_older_version_is_reused_with_a_note(config, tmp_path, monkeypatch, capsys):
    harvest(config)
    without_content(config.store, weights=sampled_fingerprint(Path(config.model)))
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    harvest(replaced(config, model="model"))
    note, reuse = capsys.readouterr().err.splitlines()
    assert note.startswith("note: the store was written by a version of Thresher that did not record the content")
    assert reuse.startswith("reuses store")
    with pytest.raises(StoreError, match=r"differs in dataset \("):
        harvest(replaced(config, dataset=str(tmp_path / "model")))
    edit_model_config(config)
    with pytest.raises(StoreError, match="differs in weights"):
        harvest(config)


def test_an_interrupted_store_of_an_older_version_is_resumed_with_a_note(config, tmp_path, monkeypatch, capsys):
    whole = ActivationStore.open(harvest(replaced(config, store=str(tmp_path / "whole"))))
    interrupt(config, monkeypatch)
    without_content(config.store)
    capsys.readouterr()
    store = ActivationStore.open(harvest(config))
    assert "only names and settings were compared" in capsys.readouterr().err
    assert store.complete
    assert torch.equal(store.tokens(0, store.n_rows), whole.tokens(0, whole.n_rows))
    assert "content" not in store.metadata["harvest"]


def test_text_that_changes_while_it_is_harvested(config, monkeypatch):
    run_model = run_module.run_model

    def changing(*arguments):
        run_model(*arguments)
        edit_text(config)

    monkeypatch.setattr(run_module, "run_model", changing)
    with pytest.raises(DataError, match="changed while it was harvested"):
        harvest(config)
    assert not ActivationStore.open(config.store).complete


@pytest.mark.parametrize("multiplier", [0.25, 1.0])
def test_a_store_from_before_hook_points_were_measured(config, monkeypatch, capsys, multiplier):
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    granite = GraniteConfig(vocab_size=257, num_key_value_heads=2, residual_multiplier=multiplier, **shape)
    GraniteForCausalLM(granite).save_pretrained(config.model)
    config = replaced(config, hook_points=["blocks.0.attn_out"])
    interrupt(config, monkeypatch)
    without_content(config.store, without=("certificate",))
    before = files_of(config.store)
    if multiplier == 1:  # the version before took the same tensor
        assert ActivationStore.open(harvest(config)).complete
    else:
        with pytest.raises(StoreError, match=r"attn_out' .* taken as .* times residual_multiplier, and .* mix both"):
            harvest(config)
        assert files_of(config.store) == before
    assert "note: the store was written by a version of Thresher that did not measure" in capsys.readouterr().err


def test_settings_that_an_older_version_did_not_have_had_their_default(config):
    harvest(config)
    wanted = identity(config)
    found = {key: value for key, value in wanted.items() if key != "text_column"}
    assert not identity_module._differing_settings(found, wanted, {})
    assert identity_module._differing_settings(found, wanted | {"text_column": "body"}, {}) == {
        "text_column": ("text", "body")
    }


@pytest.mark.parametrize("gone", ["model", "text"])
def test_a_complete_store_can_be_reused_when_its_sources_are_gone(config, tmp_path, capsys, gone):
    harvest(config)
    shutil.rmtree(tmp_path / gone)
    capsys.readouterr()
    harvest(config)
    note, reuse = capsys.readouterr().err.splitlines()
    assert note.startswith("note: the content of ")
    assert reuse.startswith("reuses store")


def test_a_moved_hub_revision_is_refused_with_the_earlier_commit(config, monkeypatch):
    harvest(config)
    found = identity(config)
    found |= {"model": "lab/m", "content": found["content"] | {"weights": "commit a1", "tokenizer": "commit a1"}}
    now = found | {"content": found["content"] | {"weights": "commit b2", "tokenizer": "commit b2"}}
    without_content(config.store, content=found["content"], model="lab/m")
    with pytest.raises(StoreError, match=r"(?m)weights \('commit a1', now 'commit b2'\); .* revision = 'a1'$"):
        compare_store(Path(config.store), now)
    assert is_complete(Path(config.store), found | {"revision": "a1"})


def test_a_hub_dataset_is_identified_by_its_fingerprint(config, monkeypatch):
    monkeypatch.setattr(identity_module, "source_files", lambda config: None)
    monkeypatch.setattr(identity_module, "hub_fingerprint", lambda config: f"of {config.dataset_revision}")
    assert identity_module.text_content(config) == "revision of None"
    harvested = replaced(config, dataset_revision="v1")
    assert identity(harvested)["content"]["text"] == "revision of v1"


def test_a_second_harvest_of_a_store_is_refused_in_one_line(config, monkeypatch):
    interrupt(config, monkeypatch)
    header = read_manifest(Path(config.store)).header
    writing = StoreFolder.open(Path(config.store), header, resume=True, any_level=False)
    try:
        with pytest.raises(
            StoreBusyError, match=r"another process is writing to the store '.*'; wait until it ends, or"
        ):
            harvest(config)
    finally:
        writing.close()
    harvest(config)
