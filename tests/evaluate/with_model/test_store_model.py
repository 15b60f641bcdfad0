"""Which model and tokenizer are used, and that those that do not fit the store are refused before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from thresher.evaluate.command import main
from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.features.files import FeatureIndex
from thresher.evaluate.metrics.held_out import held_out
from thresher.evaluate.with_model import store_model
from thresher.evaluate.with_model.same_model import (
    check_hook_module,
    check_model_folder,
    check_vocabulary,
    check_weights,
    stored_ids,
)
from thresher.harvest.config import HarvestConfig
from thresher.harvest.run import harvest
from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.core.errors import HookPointError, ModelError, StoreError
from thresher.shared.model.capture import resolve_hook_points
from thresher.shared.model.content import model_content
from thresher.shared.model.loading.adapters import ModelParts

from ...tiny_models import build

HOOK = "blocks.1.resid_post"
WORDS = ["<s>", "dust", "grain", "chaff", "husk", "straw", "<unk>"]
SECTION = " (docs/troubleshooting.md#modelerror)"


@pytest.fixture
def loaded(monkeypatch):
    """The arguments with which models and tokenizers would be loaded; none is loaded."""
    seen = []
    fake = SimpleNamespace(config=SimpleNamespace())
    monkeypatch.setattr(store_model, "load_model", lambda *given, **options: seen.append((*given, options)) or fake)
    monkeypatch.setattr(store_model, "load_tokenizer", lambda *given, **options: seen.append((*given, options)) or fake)
    monkeypatch.setattr(store_model, "is_encoder", lambda config: False)
    return seen


def config_of(model=None, **settings):
    return EvaluateConfig(store="s", saes="a", output="o", model=model, **settings)


def test_the_stores_own_model_is_loaded_as_it_was_harvested(loaded):
    harvest = {"revision": "step3000", "attn_implementation": "eager"}
    metadata = {"model": "lab/m", "model_dtype": "float16", "tokenizer": "lab/t", "harvest": harvest}
    store = SimpleNamespace(metadata=metadata, has_tokens=True, files=None)
    store_model.open_model(config_of(), store, "cpu")
    store_model.open_model(config_of("lab/other", attn_implementation="sdpa", trust_remote_code=True), store, "cpu")
    store_model.open_tokenizer(config_of(), store)
    store_model.open_tokenizer(config_of("lab/other"), store)
    options = {"adapter": None, "spread": None, "trust_remote_code": False, "attn_implementation": "eager"}
    other = {"adapter": None, "spread": None, "trust_remote_code": True, "attn_implementation": "sdpa"}
    assert loaded == [
        ("lab/m", "float16", "cpu", "step3000", options),
        ("lab/other", "float16", "cpu", None, other),
        ("lab/t", "step3000", {"trust_remote_code": False}),
        ("lab/other", {"trust_remote_code": False}),
    ]


def test_the_adapter_of_the_harvest_is_never_dropped_in_silence(loaded):
    metadata = {"model": "lab/m", "harvest": {"adapter": "lab/lora"}}
    store = SimpleNamespace(metadata=metadata, has_tokens=True, path="s")
    for config in (config_of(), config_of("lab/m"), config_of(adapter="b"), config_of("c", adapter=False)):
        store_model.open_model(config, store, "cpu")
    assert [options["adapter"] for *_, options in loaded] == ["lab/lora", "lab/lora", "b", None]
    with pytest.raises(ModelError, match="harvested with the adapter 'lab/lora'; set adapter = PATH to merge one into"):
        store_model.open_model(config_of("c"), store, "cpu")


def test_a_hub_model_is_loaded_at_the_commit_that_was_harvested(loaded, monkeypatch):
    monkeypatch.setattr("thresher.shared.model.content.hub_commit", lambda *_: pytest.fail("asked the hub"))
    harvest_record = {"revision": "main", "content": {"weights": "commit abc", "tokenizer": "commit abc"}}
    store = SimpleNamespace(metadata={"model": "lab/m", "harvest": harvest_record}, has_tokens=True, path="s")
    store_model.open_model(config_of(), store, "cpu")
    assert [call[:4] for call in loaded] == [("lab/m", "auto", "cpu", "abc")]


def save_model(folder, words=None, seed=0, family=GPT2LMHeadModel):
    """Write a tiny model with a tokenizer of words."""
    torch.manual_seed(seed)
    if family is GPT2LMHeadModel:
        shape = dict(n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), **shape))
    else:
        shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(vocab_size=len(WORDS), max_position_embeddings=32, bos_token_id=0, eos_token_id=0, **shape)
        )
    model.save_pretrained(folder)
    save_tokenizer(folder, words or WORDS)
    return folder


def save_tokenizer(folder, words):
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)


@pytest.fixture(scope="module")
def harvested(tmp_path_factory, make_sae):
    """A folder with a model, a text, a store that was harvested by relative paths there, and an SAE."""
    folder = tmp_path_factory.mktemp("origin")
    save_model(folder / "model")
    (folder / "text").mkdir()
    for number in range(30):
        words = [WORDS[1 + (number * step) % 5] for step in range(1, 20)]
        (folder / "text" / f"{number}.txt").write_text(" ".join(words))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("THRESHER_CACHE", str(folder / "cache"))
        harvest(
            HarvestConfig(
                model="model",
                dataset="text",
                hook_points=[HOOK],
                store="store",
                tokens=400,
                context_size=8,
                holdout_fraction=0.3,
                dtype="float32",
                model_dtype="float32",
                device="cpu",
            )
        )
    make_sae(d_in=16, hook_point=HOOK).save(folder / "saes" / "sae")
    return folder


@pytest.fixture
def elsewhere(harvested, tmp_path, monkeypatch):
    """A copy of the store in another folder, which is the working folder, and the SAE."""
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(harvested / "store", tmp_path / "store")
    shutil.copytree(harvested / "saes", tmp_path / "saes")
    return tmp_path


def run(*arguments, model=None):
    options = ["--store", "store", "--saes", "saes", "--output", "out", "--bootstrap_samples", "0", *arguments]
    return main([str(option) for option in [*options, *(["--model", model] if model is not None else [])]])


def forget(store, *keys, **harvest_record):
    """Rewrite the header without some metadata, as an earlier version wrote it."""
    from thresher.shared.store.format.manifest import encode_line, read_manifest

    manifest = read_manifest(Path(store))
    metadata = {key: value for key, value in manifest.header.metadata.items() if key not in keys}
    metadata["harvest"] = {key: value for key, value in metadata["harvest"].items() if key not in keys} | harvest_record
    lines, checksum = [], 0
    for entry in (msgspec.structs.replace(manifest.header, metadata=metadata), *manifest.shards, manifest.completion):
        line, checksum = encode_line(entry, checksum)
        lines.append(line)
    (Path(store) / "manifest.jsonl").write_bytes(b"".join(lines))


def refused(capsys, *arguments, model=None):
    """Run the evaluation, which must be refused before any work, and return the error."""
    capsys.readouterr()
    assert run(*arguments, model=model) == 2
    assert not Path("out").exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    return line


def test_a_store_that_was_moved_is_evaluated_with_its_own_tokenizer(harvested, elsewhere):
    assert run(model=harvested / "model") == 0
    (metrics,) = json.loads(Path("out/metrics.json").read_text())
    assert metrics["ce_clean"] > 0
    assert {"dust", "grain"} <= tokens_of_index("out/features/sae.parquet")


def test_a_store_that_was_moved_is_evaluated_without_the_model(elsewhere):
    assert run(model="false") == 0
    assert {"dust", "grain"} <= tokens_of_index("out/features/sae.parquet")


def tokens_of_index(path):
    """Return the texts of the tokens that an index shows."""
    return {text.strip() for text in FeatureIndex.open(path).vocabulary.values()}


def test_a_relative_model_that_is_not_here_is_refused_with_advice(elsewhere, capsys):
    line = refused(capsys)
    assert line.startswith("error: no folder or file 'model' (relative to where it was harvested; here that is '")
    assert line.endswith("give the model's path (--model PATH), or set model = false to evaluate without it" + SECTION)


def test_a_gguf_file_that_is_not_here_is_refused_and_a_present_one_is_not(elsewhere):
    store = ActivationStore.open("store")
    with pytest.raises(ModelError, match=r"no folder or file 'tiny\.gguf' .*give the model's path"):
        check_model_folder("tiny.gguf", store, "model = false")
    Path("tiny.gguf").write_bytes(b"GGUF")
    check_model_folder("tiny.gguf", store, "model = false")


def test_a_package_stands_for_the_file_in_it(elsewhere, monkeypatch):
    info = elsewhere / "site" / "tiny_model-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
    (info / "RECORD").write_text("tiny.gguf,,\n")
    (elsewhere / "site" / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(elsewhere / "site"))
    store = ActivationStore.open("store")
    check_model_folder("package:tiny-model", store, "model = false")
    with pytest.raises(ModelError, match="no package 'other-model' is installed"):
        check_model_folder("package:other-model", store, "model = false")


def test_a_hub_model_of_the_same_name_is_not_taken_for_the_folder(elsewhere, capsys, monkeypatch):
    monkeypatch.setattr(store_model, "load_model", lambda *_: pytest.fail("looked on the hub"))
    refused(capsys)
    forget("store", "content", weights="0" * 32)
    refused(capsys)


def test_the_model_covers_the_tokenizer_of_an_older_store(harvested, elsewhere, capsys):
    forget("store", "tokenizer_files", "tokenizer_digest", "content", weights="0" * 32)
    line = refused(capsys, model="false")
    assert line.startswith("error: no folder or file 'model' (relative to where it was harvested")
    assert line.endswith("or set feature_rows = 0 to leave out the feature index" + SECTION)
    assert run(model=harvested / "model") == 0
    assert {"dust", "grain"} <= tokens_of_index("out/features/sae.parquet")


def test_a_damaged_tokenizer_is_named(harvested, elsewhere, capsys):
    path = Path("store/tokenizer/tokenizer.json")
    path.write_text(path.read_text().replace("dust", "rust"))
    (fault,) = ActivationStore.open("store").verify()
    assert "the files in 'tokenizer' do not have their digest" in fault
    assert "do not have their digest; give the model with its tokenizer" in refused(capsys, model="false")
    path.unlink()
    assert "'tokenizer/tokenizer.json' is missing" in refused(capsys, model="false")
    assert run(model=harvested / "model") == 0


def test_a_model_with_another_tokenizer_is_refused(harvested, elsewhere, capsys):
    other = save_model(elsewhere / "other", words=["<s>", "grain", "dust", *WORDS[3:]])
    line = refused(capsys, model=other)
    assert (
        f"the tokenizer of '{other}' is not that of store 'store': 2 of 6 stored token ids stand for other tokens"
        in line
    )
    assert "such as 1, which is 'dust' in the store and 'grain' in" in line


def test_an_older_stores_tokenizer_is_compared_where_it_is_at_hand(harvested, elsewhere, capsys):
    other = save_model(elsewhere / "other", words=["<s>", "grain", "dust", *WORDS[3:]])
    forget("store", "tokenizer_files", "tokenizer_digest", "content", weights="0" * 32)
    assert run("--feature_rows", 0, model=other) == 0
    assert f"note: the vocabulary of '{other}' could not be compared with the store's" in capsys.readouterr().err
    shutil.rmtree("out")
    shutil.copytree(harvested / "model", "model")
    assert "2 of 6 stored token ids stand for other tokens" in refused(capsys, model=other)


def test_a_tokenizer_that_differs_in_other_tokens_alone_is_accepted(harvested, elsewhere, capsys):
    other = shutil.copytree(harvested / "model", elsewhere / "other")
    save_tokenizer(other, [*WORDS, "oats", "rye"])
    capsys.readouterr()
    assert run("--feature_rows", 0, model=other) == 0
    assert "note:" not in capsys.readouterr().err


def test_other_weights_are_noted_if_asked_for_and_refused_otherwise(harvested, elsewhere, capsys, monkeypatch):
    other = save_model(elsewhere / "model", seed=1)
    line = refused(capsys)
    assert line.startswith("error: the weights of 'model' are not those that store 'store' was harvested with (2 files")
    assert line.endswith("give the model that was harvested, or --model model to run this one" + SECTION)
    assert run("--feature_rows", 0, model=other) == 0
    assert f"note: the weights of '{other}' are not those that store 'store' was harvested" in capsys.readouterr().err


def test_the_weights_of_an_adapters_base_and_the_adapters_own_are_compared(tmp_path, capsys):
    contents = {}
    for name, text in (("base", "1"), ("lora", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(text)
        contents[name] = model_content(str(tmp_path / name))["weights"]
    record = {"content": {"weights": contents["base"], "adapter": contents["lora"]}}
    store = SimpleNamespace(metadata={"harvest": record}, path="s")
    parts = ModelParts(str(tmp_path / "base"), str(tmp_path / "lora"))
    check_weights(store, parts, None, None, asked_for=False)
    (tmp_path / "lora" / "model.safetensors").write_text("3")
    with pytest.raises(ModelError, match=r"the adapter weights of '.*/lora' are not those that store 's'"):
        check_weights(store, parts, None, None, asked_for=False)
    check_weights(store, parts, None, None, asked_for=True)
    assert "note: the adapter weights of" in capsys.readouterr().err


def test_a_model_of_another_class_is_refused(elsewhere, capsys):
    other = save_model(elsewhere / "other", family=GPTNeoXForCausalLM)
    line = refused(capsys, model=other)
    assert "expected a GPT2LMHeadModel, from which store 'store' was harvested; got" in line
    assert "a GPTNeoXForCausalLM" in line


def test_a_model_without_an_embedding_for_a_stored_token_is_refused(harvested, elsewhere):
    rows = held_out(ActivationStore.open("store"))
    assert stored_ids(rows) == [0, 1, 2, 3, 4, 5]
    small = SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=torch.zeros(5, 1)))
    with pytest.raises(ModelError, match="contains token 5, but 'small' has 5 embeddings"):
        check_vocabulary(rows, "small", small, None)


@pytest.mark.parametrize(("shift", "token"), [(45, 94), (-60, -60)])
def test_tokens_that_the_stores_own_model_has_no_embedding_for_are_refused(tiny, sweep, tmp_path, capsys, shift, token):
    path = tmp_path / "store"
    metadata = {"model": str(tiny.root / "model"), "model_dtype": "float32"}
    widths = {name: rows.shape[-1] for name, rows in tiny.activations.items()}
    with ActivationStoreWriter(path, widths, tiny.tokens.shape[1], dtype="float32", metadata=metadata) as writer:
        writer.append(tiny.activations, tokens=tiny.tokens + shift, held_out=tiny.held_out)
    out = tmp_path / "out"
    arguments = ["--store", path, "--saes", sweep, "--output", out, "--feature_rows", 0]
    assert main([str(argument) for argument in arguments]) == 2
    assert f"contains token {token}, " in capsys.readouterr().err
    assert not out.exists()


def test_a_model_of_another_width_is_refused(tiny, sweep, tmp_path, capsys):
    GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(tmp_path / "narrow")
    capsys.readouterr()  # what saving it says
    arguments = ["--store", tiny.store, "--saes", sweep, "--output", tmp_path / "out", "--model", tmp_path / "narrow"]
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "expected a model of width 16" in error
    assert "got GPT2LMHeadModel of width 8" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_store_of_another_tensor_under_the_name_is_refused():
    model = build("bloom")
    found = resolve_hook_points(model, ["blocks.1.mlp_out"])["blocks.1.mlp_out"]

    def store(module, **more):
        modules = {"blocks.1.mlp_out": module}
        metadata = {"model_class": type(model).__name__, "hook_modules": modules} | more
        return SimpleNamespace(path="s", metadata=metadata)

    check_hook_module(store("transformer.h.1.mlp.dense_4h_to_h"), model, found)
    check_hook_module(store("transformer.h.1.mlp", model_class="Another"), model, found)
    check_hook_module(SimpleNamespace(path="s", metadata={}), model, found)
    with pytest.raises(
        StoreError, match=r"contains the activation of 'transformer.h.1.mlp', .* harvest the store again"
    ):
        check_hook_module(store("transformer.h.1.mlp"), model, found)


def test_a_store_without_the_scale_or_the_copy_is_refused():
    for model_type, module in (("granite", "model.layers.1.mlp"), ("falcon", "transformer.h.1.mlp")):
        model = build(model_type)
        found = resolve_hook_points(model, ["blocks.1.mlp_out"])["blocks.1.mlp_out"]
        metadata = {"model_class": type(model).__name__, "hook_modules": {"blocks.1.mlp_out": module}}
        with pytest.raises(StoreError, match="harvest the store again"):
            check_hook_module(SimpleNamespace(path="s", metadata=metadata), model, found)
        check_hook_module(SimpleNamespace(path="s", metadata=metadata | {"certificate": {}}), model, found)


def test_an_sae_where_nothing_can_be_spliced_in_is_refused_before_the_work():
    name = "blocks.1.mlp_in_normalized"
    sae = SimpleNamespace(hook_point=name, target=name)
    store = SimpleNamespace(path="s", metadata={}, d_in=lambda _: 32)
    assert store_model.splice_points(build("gpt2"), [sae], store)
    with pytest.raises(HookPointError, match=f"nothing can be spliced in at '{name}' in GPTJForCausalLM"):
        store_model.splice_points(build("gptj"), [sae], store)
