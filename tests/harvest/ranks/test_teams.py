"""Processes that hold one model together write the rows of a single process, up to rounding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MixtralConfig, MixtralForCausalLM

from thresher.harvest.config import HarvestConfig
from thresher.harvest.run import harvest
from thresher.shared.core.errors import ConfigError, ModelError
from thresher.shared.model.loading.tensor_parallel import check_divides
from thresher.shared.store import ActivationStore

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def mixture_folder(model_folder: Path, tmp_path: Path) -> Path:
    """A mixture of experts of random weights, with the tokenizer of the tests."""
    folder = tmp_path / "mixture"
    shutil.copytree(model_folder, folder)
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=257, num_key_value_heads=2, num_local_experts=4, **SIZES)
    config.bos_token_id = config.eos_token_id = 0
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def test_teams_of_two_processes_write_the_rows_of_one(
    mixture_folder: Path,
    text_folder: Path,
    ranks_config: Callable[[Path, Path], Path],
    play_ranks: Callable[..., dict[str, Any]],
) -> None:
    toml = ranks_config(mixture_folder, text_folder)
    result = play_ranks(toml, "teams")
    assert result["problems"] == []
    plain = ActivationStore.open(toml.parent / "plain" / "store")
    for name in ("four processes", "a follower is killed"):
        found = ActivationStore.open(toml.parent / name / "store")
        assert found.n_rows == plain.n_rows
        assert torch.equal(
            torch.as_tensor(found.tokens(0, found.n_rows)), torch.as_tensor(plain.tokens(0, plain.n_rows))
        )
        for hook_point in plain.hook_points:
            ours, theirs = (store.read(hook_point, 0, plain.n_rows).double() for store in (found, plain))
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_team_needs_its_processes(config: HarvestConfig) -> None:
    with pytest.raises(
        ConfigError, match="tensor_parallel = 2 needs that many processes, or a multiple: start them with"
    ):
        harvest(msgspec.structs.replace(config, tensor_parallel=2))


def test_models_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(
        ModelError, match="no plan of tensor parallelism for models of type gpt2; leave tensor_parallel"
    ):
        check_divides(GPT2Config(), "MODEL", 2)
    check_divides(LlamaConfig(hidden_size=24, num_attention_heads=6, num_key_value_heads=2), "MODEL", 2)
    with pytest.raises(ModelError, match="'MODEL' has 3 key value heads, which 2 processes cannot share evenly"):
        check_divides(LlamaConfig(hidden_size=24, num_attention_heads=6, num_key_value_heads=3), "MODEL", 2)
