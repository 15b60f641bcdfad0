"""A model that accelerate spreads over the host's memory and the disk has the activations of one that it does not."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from thresher import Clamp, Sae, SaeModel
from thresher.shared.core.errors import ConfigError, ModelError
from thresher.shared.model.certificate import measure
from thresher.shared.model.language_model import capture, load_model, resolve_hook_points, splice
from thresher.shared.model.loading.placement import Spread, input_device, is_spread, loaded, spread_of

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 257}


def room(folder: Path, dtype: str = "float32") -> dict[str, str]:
    """Return room for about the first half of a model; accelerate keeps some of it for what it loads."""
    n_bytes = (folder / "model.safetensors").stat().st_size * (0.5 if dtype == "bfloat16" else 1)
    return {"cpu": f"{int(0.7 * n_bytes) // 1000}KB"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    experts = Qwen3MoeConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, num_hidden_layers=3, **SIZES
    )
    models = {
        "dense": LlamaForCausalLM(LlamaConfig(intermediate_size=48, num_hidden_layers=3, **SIZES)),
        "experts": Qwen3MoeForCausalLM(experts),
    }
    folders = {}
    for name, model in models.items():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_every_hook_point_of_a_spread_model_has_the_bits_of_a_plain_one(
    folders: dict[str, Path], kind: str, dtype: str
) -> None:
    plain = load_model(str(folders[kind]), dtype)
    spread = load_model(str(folders[kind]), dtype, spread=Spread("auto", room(folders[kind], dtype)))
    assert is_spread(spread)
    assert not is_spread(plain)
    assert input_device(spread) == torch.device("cpu")
    assert {"cpu", "disk"} == set(spread.hf_device_map.values())
    assert all(parameter.is_meta for parameter in spread.get_submodule("model.layers.2").parameters())
    _, findings = measure(spread)
    names = [f"blocks.{layer}.{kind}" for (layer, kind), found in findings.items() if found.place is not None]
    assert len(names) >= 24  # nine kinds in each of three blocks, but for a few that the last ones may lack
    tokens = torch.arange(40).reshape(2, 20)
    points = resolve_hook_points(plain, names)
    found = capture(spread, tokens, resolve_hook_points(spread, names))
    for name, activation in capture(plain, tokens, points).items():
        assert torch.equal(found[name], activation), name


def test_a_norm_on_the_disk_is_read_to_splice_before_its_weight(folders: dict[str, Path]) -> None:
    tokens = torch.arange(20)[None]
    logits = []
    for spread in (None, Spread("auto", room(folders["dense"]))):
        model = load_model(str(folders["dense"]), "float32", spread=spread)
        point = resolve_hook_points(model, ["blocks.2.mlp_in_normalized"])["blocks.2.mlp_in_normalized"]
        norm = model.get_submodule(point.module_path)
        weight = loaded(norm, "weight")
        assert weight is not None
        assert not weight.is_meta
        assert norm.weight.is_meta == (spread is not None)
        with splice(model, point, lambda x: 2 * x):
            logits.append(model(tokens).logits)
    assert torch.equal(*logits)


def test_a_temporary_offload_folder_goes_with_the_model(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = load_model(str(folders["experts"]), "float32", spread=Spread("auto", room(folders["experts"])))
    assert list(tmp_path.iterdir())  # the weights of experts are kept in another form than the checkpoint's
    del model
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ModelError):
        load_model(str(tmp_path / "nothing"), "float32", spread=Spread("auto"))
    assert list(tmp_path.iterdir()) == []


def test_steering_a_spread_model_gives_the_same_logits(folders: dict[str, Path]) -> None:
    torch.manual_seed(1)
    tensors = {
        "W_enc": torch.randn(32, 64),
        "W_dec": torch.randn(64, 32),
        "b_enc": torch.zeros(64),
        "b_dec": torch.ones(32),
    }
    sae = Sae("standard", tensors)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0})))
    logits = []
    for more in ({}, {"device_map": "auto", "max_memory": room(folders["dense"])}):
        lm = SaeModel.open(str(folders["dense"]), {"blocks.2.resid_post": sae}, tokenizer=tokenizer, **more)
        with lm.steer({("blocks.2.resid_post", 3): Clamp(5.0)}):
            logits.append(lm.run([list(range(10))]).logits)
    assert torch.equal(*logits)


def test_settings_that_contradict_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spread_of(None, None, None, "cpu") is None
    with pytest.raises(
        ConfigError, match="max_memory is for a model that is spread; set device_map = 'auto', or leave"
    ):
        spread_of(None, {"cpu": "1GB"}, None, "auto")
    with pytest.raises(ConfigError, match="device is 'cpu', but device_map = 'auto' chooses the devices; leave one of"):
        spread_of("auto", None, None, "cpu")
    for name, size in (("gpu", "1GB"), ("0", "much")):
        with pytest.raises(
            ConfigError, match=f"max_memory has {name} = '{size}'; expected the number of a GPU, or cpu"
        ):
            spread_of("auto", {name: size}, None, "auto")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="spreads the model over all devices of one process, but 2 processes were"):
        spread_of("auto", None, None, "auto")
