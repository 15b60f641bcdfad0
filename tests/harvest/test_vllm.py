"""`engine = "vllm"` writes the store that vLLM's hidden states are, from files of the layout that its connector writes.

vLLM itself needs a GPU. In its place stands a module of its name whose engine runs the model with transformers, and
writes the residual stream of the layers that it was asked for as vLLM's connector does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from thresher.harvest.config import HarvestConfig
from thresher.harvest.model.vllm_engine import describe_model, engine_settings, stream_points
from thresher.harvest.run import harvest
from thresher.shared.core.errors import ConfigError, HookPointError, ModelError, StoreError
from thresher.shared.store import ActivationStore

POINTS = ["blocks.0.resid_pre", "blocks.0.resid_post", "blocks.1.resid_pre"]


class Engine:
    """As much of `vllm.LLM` as a harvest uses."""

    spoilt: dict[str, Any] = {}

    def __init__(self, model: str, **settings: Any) -> None:
        assert not settings["enable_prefix_caching"]
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, settings["dtype"])).eval()
        self.ids = settings["speculative_config"]["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"]
        self.folder = Path(settings["kv_transfer_config"]["kv_connector_extra_config"]["shared_storage_path"])
        self.room, self.n = settings["max_model_len"], 0

    @torch.no_grad()
    def generate(self, prompts: list[dict[str, list[int]]], parameters: Any, use_tqdm: bool) -> list[Any]:
        assert parameters.max_tokens == 1
        outputs = []
        for prompt in prompts:
            tokens = torch.tensor(prompt["prompt_token_ids"])
            assert len(tokens) + 1 <= self.room
            states = self.model(tokens[None], output_hidden_states=True).hidden_states
            path = self.folder / f"{self.n}.safetensors"
            tensors = {"hidden_states": torch.stack([states[i][0] for i in self.ids], dim=1), "token_ids": tokens}
            save_file(tensors | self.spoilt, path)
            outputs.append(SimpleNamespace(kv_transfer_params={"hidden_states_path": str(path)}))
            self.n += 1
        return outputs


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    """A module named `vllm`, with the places of what a harvest imports."""
    connector = "vllm.distributed.kv_transfer.kv_connector.v1"
    for name in ("vllm", "vllm.distributed", "vllm.distributed.kv_transfer", connector.rpartition(".")[0], connector):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm"].LLM = Engine  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules["vllm"].SamplingParams = SimpleNamespace  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules[connector].example_hidden_states_connector = ModuleType("c")  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(Engine, "spoilt", {})
    return Engine


def with_vllm(config: HarvestConfig, **changes: Any) -> HarvestConfig:
    settings = {"engine": "vllm", "workers": None, "hook_points": POINTS}
    return msgspec.structs.replace(config, **settings | changes)


def test_the_store_is_that_of_transformers(config: HarvestConfig, vllm: type[Engine], tmp_path: Path) -> None:
    found = ActivationStore.open(harvest(with_vllm(config)))
    plain = msgspec.structs.replace(config, hook_points=POINTS, store=str(tmp_path / "plain"))
    expected = ActivationStore.open(harvest(plain))
    n = expected.n_rows
    assert found.n_rows == n
    assert (found.tokens(0, n) == expected.tokens(0, n)).all()
    assert (found.held_out_contexts() == expected.held_out_contexts()).all()
    for name in POINTS:
        ours, theirs = found.read(name, 0, n), expected.read(name, 0, n)
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        assert theirs.abs().max() > 0.01
    assert found.metadata["hook_modules"] == expected.metadata["hook_modules"]
    assert found.metadata["model_class"] == expected.metadata["model_class"]
    assert found.metadata["harvest"]["engine"] == "vllm"
    with pytest.raises(StoreError, match="differs in engine"):
        harvest(msgspec.structs.replace(plain, store=str(found.path)))


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ({"token_ids": torch.zeros(8, dtype=torch.long)}, "holds the hidden states of other tokens than those of its"),
        ({"hidden_states": torch.zeros(8, 3, 16)}, "holds 3 layers; 2 were asked for"),
        ({"hidden_states": torch.zeros(8, 16)}, r"expected \[tokens, layers, hidden\] and \[tokens\]"),
    ],
)
def test_files_that_are_not_what_was_asked_for_are_refused(
    config: HarvestConfig, vllm: type[Engine], spoilt: dict[str, torch.Tensor], message: str
) -> None:
    vllm.spoilt = spoilt
    with pytest.raises(StoreError, match=message):
        harvest(with_vllm(config))


def test_what_vllm_does_not_give_is_refused(config: HarvestConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_vllm(config)
    model = describe_model(config)
    for name in ("blocks.0.mlp_out", "blocks.3.resid_post", "transformer.h.0"):
        with pytest.raises(HookPointError, match=f"gives the residual stream alone, not '{name}'.*with N from 0 to 2"):
            stream_points(model, [name])
    for changes, named in (({"workers": 2, "adapter": "a"}, "adapter, workers"), ({"device": "cpu"}, "device")):
        with pytest.raises(ConfigError, match=f"{named}: expected none of these with engine = 'vllm'"):
            describe_model(msgspec.structs.replace(config, **changes))
    with pytest.raises(ModelError, match=r"needs vLLM, which is not installed: pip install 'thresher\[vllm\]'"):
        harvest(config)
    assert not Path(config.store).exists()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were started, but engine = 'vllm' runs in one"):
        harvest(config)


def test_the_engine_s_settings(config: HarvestConfig, tmp_path: Path) -> None:
    settings = engine_settings(with_vllm(config, tensor_parallel=2, batch_size=32), [0, 1], torch.bfloat16, tmp_path)
    assert settings["tensor_parallel_size"] == 2
    assert settings["dtype"] == "bfloat16"
    assert settings["max_num_batched_tokens"] >= 32 * config.context_size
    assert not settings["enable_chunked_prefill"]
