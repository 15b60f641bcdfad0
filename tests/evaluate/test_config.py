"""The shipped configurations: each loads, and evaluates what the earlier stages wrote."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from thresher.evaluate.config import EvaluateConfig
from thresher.shared.core.config import help_text, load_config, to_toml
from thresher.shared.core.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.name for path in (CONFIGS / "evaluate").glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_stages_hand_over(name):
    config = load_config(EvaluateConfig, CONFIGS / "evaluate" / name, [])
    harvest = tomllib.loads((CONFIGS / "harvest" / name).read_text())
    train = tomllib.loads((CONFIGS / "train" / name).read_text())
    assert config.store == harvest["store"] == train["store"]
    assert config.saes == train["output"]
    assert config.model is None
    for table in train["sae"]:
        for key in {"hook_point", "reads", "writes"} & table.keys():
            hook_points = table[key] if isinstance(table[key], list) else [table[key]]
            assert set(hook_points) <= set(harvest["hook_points"])


def test_every_model_has_an_evaluation():
    assert set(NAMES) == {path.name for path in (CONFIGS / "harvest").glob("*.toml")}


@pytest.mark.parametrize(("text", "expected"), [("false", False), ("none", "none"), ("gpt2", "gpt2")])
def test_model_on_the_command_line(text, expected):
    arguments = ["--store", "a", "--saes", "b,c", "--output", "d", "--model", text]
    config = load_config(EvaluateConfig, None, arguments)
    assert config.model == expected
    assert config.saes == ["b", "c"]


def test_a_resolved_configuration_reads_back(tmp_path):
    config = load_config(EvaluateConfig, CONFIGS / "evaluate" / "demo.toml", ["--max_rows", "5", "--model", "false"])
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_config(EvaluateConfig, tmp_path / "config.toml", []) == config
    assert "--bootstrap_samples" in help_text(EvaluateConfig)


@pytest.mark.parametrize(("key", "value"), [("batch_size", "0"), ("max_rows", "0"), ("model_dtype", "int4")])
def test_values_out_of_range(key, value):
    with pytest.raises(ConfigError, match=key):
        load_config(EvaluateConfig, None, ["--store", "a", "--saes", "b", "--output", "c", f"--{key}", value])
