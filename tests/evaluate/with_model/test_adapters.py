"""A store that was harvested with an adapter is evaluated with that adapter, and no other model or adapter unasked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from thresher.evaluate.command import main
from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.with_model import store_model
from thresher.harvest.config import HarvestConfig
from thresher.harvest.run import harvest
from thresher.shared import ActivationStore

HOOK = "blocks.1.resid_post"
WORDS = ["<s>", "dust", "grain", "chaff", "husk", "straw"]


@pytest.fixture
def folder(tmp_path, monkeypatch, make_sae):
    """A working folder with a model, a LoRA adapter of all its MLPs, a text and an SAE."""
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    shape = dict(n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), **shape)).save_pretrained("model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained("model")
    Path("adapter").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["mlp.c_fc"], "fan_in_fan_out": True}
    Path("adapter/adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "model"}))
    weights = {
        f"base_model.model.transformer.h.{layer}.mlp.c_fc.lora_{part}.weight": torch.randn(size)
        for layer in range(2)
        for part, size in (("A", (2, 16)), ("B", (64, 2)))
    }
    save_file(weights, "adapter/adapter_model.safetensors", {"format": "pt"})
    Path("text").mkdir()
    for number in range(30):
        words = [WORDS[1 + (number * step) % 5] for step in range(1, 20)]
        (tmp_path / "text" / f"{number}.txt").write_text(" ".join(words))
    make_sae(d_in=16, hook_point=HOOK).save(tmp_path / "saes" / "sae")
    return tmp_path


def harvested(model="model", adapter=None):
    return harvest(
        HarvestConfig(
            model=model,
            adapter=adapter,
            dataset="text",
            hook_points=[HOOK],
            store="store",
            tokens=400,
            context_size=8,
            holdout_fraction=0.3,
            dtype="float32",
            model_dtype="float32",
        )
    )


def evaluate(*arguments):
    common = [
        "--store",
        "store",
        "--saes",
        "saes",
        "--output",
        "out",
        "--bootstrap_samples",
        "0",
        "--feature_rows",
        "0",
    ]
    return main([*common, *arguments])


@pytest.mark.parametrize("given", [("model", "adapter"), ("adapter", None)])
def test_the_model_that_is_evaluated_is_the_one_harvested(folder, given):
    store = ActivationStore.open(harvested(*given))
    config = EvaluateConfig(store="store", saes="saes", output="out")
    model = store_model.open_model(config, store, "cpu")
    expected = GPT2LMHeadModel.from_pretrained("model")
    weights = load_file("adapter/adapter_model.safetensors")
    for layer, block in enumerate(expected.transformer.h):
        a, b = (weights[f"base_model.model.transformer.h.{layer}.mlp.c_fc.lora_{part}.weight"] for part in "AB")
        block.mlp.c_fc.weight.data += (b @ a).T
    tokens = store.tokens(0, store.n_rows).reshape(-1, 8).long()
    torch.testing.assert_close(model(tokens).logits, expected.eval()(tokens).logits, rtol=1e-4, atol=1e-5)


def test_a_changed_adapter_is_refused_unless_it_is_asked_for(folder, capsys):
    harvested("model", "adapter")
    weights = load_file("adapter/adapter_model.safetensors")
    weights["base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight"][0, 0] += 1
    save_file(weights, "adapter/adapter_model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert evaluate() == 2
    error = capsys.readouterr().err
    assert "adapter weights of 'adapter' are not those that store 'store' was harvested with" in error
    assert "give the model that was harvested, or --model model to run this one" in error
    assert not Path("out").exists()
    assert evaluate("--model", "model") == 0
    assert "note: the adapter weights of 'adapter' are not those" in capsys.readouterr().err
