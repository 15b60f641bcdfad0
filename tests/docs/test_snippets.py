"""Every TOML block in the documents holds keys and values of a configuration, and every Python block is valid."""

from __future__ import annotations

import ast
import tomllib
from importlib import import_module
from importlib.metadata import entry_points

import msgspec
import pytest

from thresher.shared.core.config_values import check_value
from thresher.train.sweep.grids import expand_sweep

from .documents import Block, blocks

CONFIGS = [entry.load().CONFIG for entry in entry_points(group="thresher.commands") if hasattr(entry.load(), "CONFIG")]
NOT_HERE = {"vllm", "nnsight"}


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_toml_holds_keys_and_values_of_one_configuration(block: Block):
    check_toml(block.text)


def check_toml(text: str) -> None:
    """Check that some configuration has all keys of a text, that it takes their values, and that `[[sae]]` expands."""
    table = tomllib.loads(text)
    takes_all = [config for config in CONFIGS if table.keys() <= set(config.__struct_fields__)]
    assert takes_all, f"no configuration has all of {', '.join(table)}"
    fields = {field.name: field.type for field in msgspec.structs.fields(takes_all[0])}
    for key, value in table.items():
        check_value(key, value, fields[key])
    if "sae" in table:
        assert expand_sweep(table["sae"])


@pytest.mark.parametrize(
    "text",
    ["modle = 1", "tokens = 'many'", "[[sae]]\nhook_point = 'a'\nd_sae = 8\nk = 2\nkk = 2", "dataset = 'x'\nk = 1"],
)
def test_toml_that_no_configuration_takes_is_refused(text):
    with pytest.raises((AssertionError, ValueError)):
        check_toml(text)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_is_valid_and_its_imports_exist(block: Block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            module = import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        elif isinstance(node, ast.Import):
            for alias in node.names:
                import_module(alias.name)


def test_there_are_snippets_to_check():
    assert len(blocks("toml")) > 20
    assert len(blocks("python")) > 12
