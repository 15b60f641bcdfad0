"""Configuration: what is accepted, what is refused, and what the refusal says."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import pytest
from msgspec import Meta

from thresher.shared.config import Config, describe, load_config, parse_overrides, to_config, to_toml
from thresher.shared.errors import ConfigError, MissingFileError, ThresherError
from thresher.shared.paths import expand_home
from thresher.shared.store.location import StoreUrl, locate


class Part(Config):
    k: int | list[int] = 32


class Example(Config):
    model: Annotated[str, Meta(description="The model.")]
    hook_points: Annotated[list[str], Meta(min_length=1, description="Where to read.")]
    batch_size: Annotated[int, Meta(ge=1, description="Contexts per pass.")] = 8
    fraction: Annotated[float, Meta(ge=0, lt=1, description="Held out.")] = 0.1
    split: Annotated[str | None, Meta(description="Split.")] = None
    saes: Annotated[str | list[str], Meta(description="SAEs.")] = "runs"
    dry_run: Annotated[bool, Meta(description="Plan only.")] = False
    part: list[Part] = []


REQUIRED = {"model": "m", "hook_points": ["blocks.0.resid_post"]}


def test_file_and_overrides_merge(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('model = "m"\nhook_points = ["a", "b"]\n[[part]]\nk = [1, 2]\n')
    config = load_config(Example, file, ["--batch-size", "16", "--fraction=0.5", "--dry_run", "true"])
    assert config.batch_size == 16
    assert config.fraction == 0.5
    assert config.dry_run is True
    assert config.hook_points == ["a", "b"]
    assert config.part[0].k == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--hook_points", "a,b"], "hook_points", ["a", "b"]),
        (["--hook_points", '["a", "b"]'], "hook_points", ["a", "b"]),
        (["--hook_points", "a"], "hook_points", ["a"]),
        (["--model", "7"], "model", "7"),
        (["--model=a=b"], "model", "a=b"),
        (["--batch_size", "2_000"], "batch_size", 2000),
        (["--saes", "one"], "saes", "one"),
        (["--saes", "one,two"], "saes", ["one", "two"]),
        (["--split", "train"], "split", "train"),
    ],
)
def test_override_values(arguments, key, value):
    assert parse_overrides(Example, arguments) == {key: value}


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (REQUIRED | {"hook_point": 1}, "unknown key 'hook_point'; did you mean 'hook_points'?"),
        (REQUIRED | {"zzz": 1}, "unknown key 'zzz'; known keys: "),
        ({"model": "m"}, "missing required field `hook_points`"),
        (REQUIRED | {"batch_size": 0}, "Expected `int` >= 1 at `batch_size`"),
        (REQUIRED | {"batch_size": "many"}, "Expected `int`, got `str` at `batch_size`"),
    ],
)
def test_refusals_name_the_key(table, expected):
    with pytest.raises(ConfigError) as caught:
        to_config(Example, table, "here")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_nested_key_is_refused():
    with pytest.raises(ConfigError, match=r"here: \[\[part\]\], table 2: unknown key 'kk'; did you mean 'k'\?"):
        to_config(Example, REQUIRED | {"part": [{"k": 1}, {"kk": 1}]}, "here")


@pytest.mark.parametrize("arguments", [["stray"], ["--batch_size"], ["--bach_size", "1"]])
def test_bad_command_lines(arguments):
    with pytest.raises(ConfigError, match="command line"):
        parse_overrides(Example, arguments)


def test_missing_and_malformed_files(tmp_path):
    with pytest.raises(MissingFileError, match="no config file"):
        load_config(Example, tmp_path / "none.toml", [])
    with pytest.raises(MissingFileError, match="is a folder"):
        load_config(Example, tmp_path, [])
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(Example, tmp_path / "bad.toml", [])


def test_resolved_config_reads_back():
    config = to_config(Example, REQUIRED | {"part": [{"k": [4, 8]}]}, "here")
    assert to_config(Example, tomllib.loads(to_toml(config)), "again") == config


def test_help_has_a_sentence_and_default_for_every_key():
    text = describe(Example)
    assert "--model" in text
    assert "Contexts per pass. (default 8)" in text
    assert "The model. (required)" in text


def test_every_error_is_also_a_builtin():
    for error in ThresherError.__subclasses__():
        assert len(error.__bases__) == 2
        assert error.__bases__[1].__module__ == "builtins"


def test_home_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.toml").write_text('model = "~/m"\nhook_points = ["h"]\nsaes = ["~/a", "b", "s3://bucket/~/c"]\n')
    config = load_config(Example, "~/c.toml", ["--split=~"])
    assert (config.model, config.saes, config.split) == (
        f"{tmp_path}/m",
        [f"{tmp_path}/a", "b", "s3://bucket/~/c"],
        "~",
    )
    assert Example(model="~/m", hook_points=["h"]).model == f"{tmp_path}/m"
    with pytest.raises(ConfigError, match="no home folder is known for '~nobody-of-this-name/m'"):
        Example(model="~nobody-of-this-name/m", hook_points=["h"])
    with pytest.raises(ConfigError, match="no home folder is known"):
        to_config(Example, REQUIRED | {"model": "~nobody-of-this-name/m"}, "table")


def test_home_in_grids_of_tables(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home([{"init_from": ["~/a", "~b"], "k": (1, "~/c")}]) == [
        {"init_from": [f"{tmp_path}/a", "~b"], "k": (1, f"{tmp_path}/c")}
    ]
    assert locate("~/store") == locate(Path("~/store")) == tmp_path / "store"
    assert locate("s3://bucket/~/store") == StoreUrl("s3", "bucket", "~/store")
