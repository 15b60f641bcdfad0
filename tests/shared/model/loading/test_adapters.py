"""An adapter in, as or beside the model's folder is applied as PEFT applies it, or refused."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from thresher.shared.core.errors import ModelError
from thresher.shared.model.capture import capture, resolve_hook_points
from thresher.shared.model.language_model import load_model
from thresher.shared.model.loading.adapters import model_parts

# PEFT's own warnings, as it makes and saves the adapters of these tests
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

TOKENS = torch.tensor([[5, 6, 7, 8, 9]])
NAMES = ["blocks.0.attn_out", "blocks.0.attn_z", "blocks.1.mlp_out", "blocks.1.resid_post"]


def llama(hidden_size=16):
    torch.manual_seed(0)
    shape = dict(hidden_size=hidden_size, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return LlamaForCausalLM(LlamaConfig(vocab_size=37, max_position_embeddings=20, bos_token_id=0, **shape))


def lora(**more):
    return LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM", **more
    )


def save_adapter(base, config, folder, model=None):
    """Save an adapter of random weights, as its training would leave it."""
    wrapped = get_peft_model(model or llama(), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "ia3" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder)


@pytest.fixture
def base(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def unmerged(base, adapter):
    """The residual stream after the last block, by PEFT's own forward pass."""
    model = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(base, adapter_kwargs={"subfolder": "-"}), adapter
    )
    found = []
    layer = model.get_base_model().model.layers[1]
    with torch.no_grad(), layer.register_forward_hook(lambda *given: found.append(given[2])):
        model.eval()(TOKENS)
    return found[0]


def ours(*given, **options):
    model = load_model(*map(str, given), "float32", **options)
    return capture(model, TOKENS, resolve_hook_points(model, NAMES))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(lora(), id="lora"),
        pytest.param(lora(use_dora=True), id="dora"),
        pytest.param(lora(use_rslora=True), id="rslora"),
        pytest.param(lora(modules_to_save=["embed_tokens"]), id="with embeddings"),
        pytest.param(
            IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
            id="ia3",
        ),
    ],
)
def test_an_adapter_is_applied_as_peft_applies_it(config, base, tmp_path):
    save_adapter(base, config, tmp_path / "adapter")
    expected = unmerged(base, tmp_path / "adapter")
    plain = ours(base)
    adapted = ours(base, adapter=str(tmp_path / "adapter"))
    torch.testing.assert_close(adapted["blocks.1.resid_post"], expected, rtol=1e-5, atol=1e-5)
    assert (adapted["blocks.1.resid_post"] - plain["blocks.1.resid_post"]).norm() > 1e-3
    for found in (ours(tmp_path / "adapter"), adapted):  # the adapter's folder as the model
        assert {name: value.shape for name, value in found.items()} == {name: x.shape for name, x in plain.items()}
        torch.testing.assert_close(found["blocks.1.resid_post"], adapted["blocks.1.resid_post"], rtol=0, atol=0)


def test_an_adapter_in_the_model_s_folder_is_applied(base, tmp_path):
    save_adapter(base, lora(), tmp_path / "adapter")
    expected = unmerged(base, tmp_path / "adapter")
    for file in (tmp_path / "adapter").iterdir():
        file.rename(base / file.name)
    torch.testing.assert_close(ours(base)["blocks.1.resid_post"], expected, rtol=1e-5, atol=1e-5)
    assert model_parts(str(base), str(base)) == (str(base), str(base), None)
    with pytest.raises(ModelError, match="expected one adapter, got two"):
        load_model(str(base), "float32", adapter=str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    with pytest.raises(ModelError, match="expected one adapter, got two"):
        load_model(str(tmp_path / "adapter"), "float32")


def test_weights_of_the_base_model_are_checked_beneath_an_adapter(base):
    save_adapter(base, lora(), base)
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing: model\.layers\.0\.mlp\.up_proj\.weight"):
        load_model(str(base), "float32")


def test_without_peft_an_adapter_is_refused(base, monkeypatch):
    save_adapter(base, lora(), base)
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("transformers.models.auto.auto_factory.is_peft_available", lambda: False)
    with pytest.raises(ModelError, match=r"needs PEFT, which is not installed: pip install 'thresher\[adapters\]'"):
        load_model(str(base), "float32")


def test_an_adapter_that_does_not_fit_is_refused(base, tmp_path):
    adapter = tmp_path / "adapter"
    save_adapter(base, lora(), adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    for change, told in (
        (lambda key: key.replace(".layers.", ".blocks."), r"have no counterpart, such as base_model"),
        (lambda key: None if "layers.1" in key else key, r"6 of its weights have no counterpart"),
    ):
        changed = {change(key): value for key, value in weights.items() if change(key)}
        save_file(changed, adapter / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=told):
            load_model(str(base), "float32", adapter=str(adapter))
    save_adapter(base, lora(), adapter, llama(hidden_size=8))
    with pytest.raises(ModelError, match=r"cannot apply the adapter .* size mismatch"):
        load_model(str(base), "float32", adapter=str(adapter))
    save_adapter(base, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), tmp_path / "prompt")
    with pytest.raises(ModelError, match="adds tokens to the text; expected one that changes weights"):
        load_model(str(base), "float32", adapter=str(tmp_path / "prompt"))
    with pytest.raises(ModelError, match="cannot apply the adapter"):
        load_model(str(base), "float32", adapter=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"base_model_name_or_path": None})])
def test_an_adapter_without_a_base_model_is_refused(text, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match="names no base model"):
        load_model(str(tmp_path))


def test_an_adapter_of_the_hub_is_applied_to_the_model_that_it_names(base, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    save_adapter("lab/base", lora(), tmp_path / "adapter")
    expected = ours(base, adapter=str(tmp_path / "adapter"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name, folder in (("lora", tmp_path / "adapter"), ("base", base)):
        repository = tmp_path / f"models--lab--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"revision": commit}))
    (tmp_path / "models--lab--base" / "refs" / "main").write_text("f" * 40)  # later than what the adapter is for
    for found in (ours(tmp_path / "adapter"), ours("lab/base", revision=commit, adapter="lab/lora")):
        torch.testing.assert_close(found["blocks.1.resid_post"], expected["blocks.1.resid_post"], rtol=0, atol=0)
    (tmp_path / "models--lab--base" / "refs" / "main").write_text(commit)
    for found in (ours("lab/lora"), ours("lab/lora", revision="main"), ours("lab/base", adapter="lab/lora")):
        torch.testing.assert_close(found["blocks.1.resid_post"], expected["blocks.1.resid_post"], rtol=0, atol=0)
