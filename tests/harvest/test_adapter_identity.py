"""A harvest with an adapter is another one than without it, or with an adapter of other weights or settings."""

from __future__ import annotations

import json
import shutil

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from thresher.harvest.reuse import identity, is_complete
from thresher.harvest.run import harvest
from thresher.shared import ActivationStore
from thresher.shared.core.errors import StoreError

CONTEXT = 8


@pytest.fixture
def adapter(config, tmp_path):
    """LoRA on the first two blocks' projections into the MLP, its product B A given in closed form below."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["mlp.c_fc"], "fan_in_fan_out": True}
    settings |= {"base_model_name_or_path": config.model, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(1)
    weights = {
        f"base_model.model.transformer.h.{layer}.mlp.c_fc.lora_{part}.weight": torch.randn(shape, generator=generator)
        for layer in range(3)
        for part, shape in (("A", (2, 16)), ("B", (64, 2)))
    }
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def replaced(config, **changes):
    return msgspec.structs.replace(config, **changes)


def merged(config, adapter):
    """The model with the adapter's product added to its weights by hand."""
    model = GPT2LMHeadModel.from_pretrained(config.model, adapter_kwargs={"subfolder": "-"}).eval()
    weights = load_file(adapter / "adapter_model.safetensors")
    for layer, block in enumerate(model.transformer.h):
        a, b = (weights[f"base_model.model.transformer.h.{layer}.mlp.c_fc.lora_{part}.weight"] for part in "AB")
        block.mlp.c_fc.weight.data += (b @ a).T * 6 / 2
    return model


def move_into(folder, adapter):
    for file in list(adapter.iterdir()):
        shutil.copy(file, folder)


@pytest.mark.parametrize("where", ["named", "in the model's folder", "as the model"])
def test_the_store_holds_what_the_adapted_model_computes(config, adapter, where):
    expected = merged(config, adapter)
    if where == "named":
        config = replaced(config, adapter=str(adapter))
    elif where == "as the model":
        config = replaced(config, model=str(adapter))
    else:
        move_into(config.model, adapter)
    store = ActivationStore.open(harvest(config))
    tokens = store.tokens(0, store.n_rows).reshape(-1, CONTEXT)
    with torch.no_grad():
        hidden = expected(tokens.long(), output_hidden_states=True).hidden_states[2]
    found = store.read("blocks.1.resid_post", 0, store.n_rows).reshape(-1, CONTEXT, 16)
    torch.testing.assert_close(found, hidden, rtol=1e-5, atol=1e-5)
    assert store.metadata["adapter"] == (config.model if where == "in the model's folder" else str(adapter))
    assert is_complete(store.path, identity(config))


def test_a_store_without_an_adapter_is_not_that_with_it(config, adapter):
    harvest(config)
    assert "adapter" not in identity(config)
    assert "adapter" not in identity(config)["content"]
    with pytest.raises(StoreError, match=r"of another harvest: it differs in adapter \(None, now '.*adapter'\)"):
        harvest(replaced(config, adapter=str(adapter)))
    move_into(config.model, adapter)
    with pytest.raises(StoreError, match="of another harvest: it differs in weights"):
        harvest(config)


@pytest.mark.parametrize("as_model", [False, True])
def test_an_adapter_that_was_changed_is_another_one(config, adapter, as_model, monkeypatch):
    base = config.model
    config = replaced(config, model=str(adapter)) if as_model else replaced(config, adapter=str(adapter))
    harvest(config)
    monkeypatch.chdir(adapter.parent)
    respelled = {"model": "./adapter"} if as_model else {"adapter": "./adapter"}
    assert is_complete(ActivationStore.open(config.store).path, identity(replaced(config, **respelled)))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 3}))
    with pytest.raises(StoreError, match="of another harvest: it differs in adapter"):
        harvest(config)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert is_complete(ActivationStore.open(config.store).path, identity(config))
    weights = load_file(adapter / "adapter_model.safetensors")
    weights["base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight"][0, 0] += 1e-6
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(StoreError, match="of another harvest: it differs in adapter"):
        harvest(config)
    model = GPT2LMHeadModel.from_pretrained(base)
    model.transformer.wte.weight.data[0, 0] += 1
    model.save_pretrained(base)
    with pytest.raises(StoreError, match=r"of another harvest: it differs in adapter .*, weights "):
        harvest(config)
