"""Configuration: what is accepted, what is refused, and what the refusal says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import pytest
import torch
from msgspec import Meta

from thresher.shared.core.config import Config, configured, help_text, load_config, parse_arguments, to_config, to_toml
from thresher.shared.core.errors import ConfigError, MissingFileError, ThresherError
from thresher.shared.core.location import StoreUrl, locate
from thresher.shared.core.paths import expand_home


class Part(Config):
    k: int | list[int] = 32


class Example(Config):
    model: Annotated[str, Meta(description="The model.")]
    hook_points: Annotated[list[str], Meta(min_length=1, description="Where to read.")]
    batch_size: Annotated[int, Meta(ge=1, description="Contexts per pass.")] = 8
    fraction: Annotated[float, Meta(ge=0, lt=1, description="Held out.")] = 0.1
    split: Annotated[str | None, Meta(description="Split.")] = None
    saes: Annotated[str | list[str], Meta(description="SAEs.")] = "runs"
    codec: Annotated[Literal["none", "lz4", "zstd"], Meta(description="Codec.")] = "lz4"
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
    assert parse_arguments(Example, arguments) == (None, {key: value})


@pytest.mark.parametrize(
    ("key", "text"), [("part", '[{"k": 3}]'), ("part", "[{ k = 3 }"), ("part", '{"k": 3}'), ("hook_points", "[a, b]")]
)
def test_a_list_that_is_not_toml_is_refused_in_one_line(key, text):
    with pytest.raises(ConfigError) as caught:
        parse_arguments(Example, [f"--{key}", text])
    message = str(caught.value)
    assert message.startswith(f"command line: --{key} '{text}' is not a list in TOML; write")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (REQUIRED | {"hook_point": 1}, "unknown key 'hook_point'; did you mean 'hook_points'?"),
        (REQUIRED | {"zzz": 1}, "unknown key 'zzz'; known keys: "),
        (REQUIRED | {"Model": 1}, "unknown key 'Model'; did you mean 'model'?"),
        (REQUIRED | {"BATCH-SIZE": 1}, "did you mean 'batch_size'?"),
        ({"model": "m"}, "here: 'hook_points' is missing (Where to read); add it"),
        (REQUIRED | {"batch_size": 0}, "here: batch_size: expected an integer of at least 1, got 0"),
        (REQUIRED | {"batch_size": "many"}, "here: batch_size: expected an integer of at least 1, got 'many'"),
        (REQUIRED | {"batch_size": True}, "here: batch_size: expected an integer of at least 1, got true"),
        (REQUIRED | {"fraction": 1}, "here: fraction: expected a number of at least 0 and below 1, got 1"),
        (REQUIRED | {"fraction": float("nan")}, "fraction: expected a number of at least 0 and below 1, got nan"),
        (REQUIRED | {"model": ""}, "here: model: expected text, got ''"),
        (REQUIRED | {"model": 7}, "here: model: expected text, got 7"),
        (REQUIRED | {"saes": ["a", 7]}, "here: saes: expected text or a list (each text), got ['a', 7]"),
        (REQUIRED | {"hook_points": []}, "hook_points: expected a list (at least one item, each text), got []"),
        (REQUIRED | {"hook_points": "a"}, "hook_points: expected a list (at least one item, each text), got 'a'"),
        (REQUIRED | {"dry_run": "yes"}, "here: dry_run: expected true or false, got 'yes'"),
        (REQUIRED | {"part": {"k": 1}}, "write [[part]], with two brackets on either side"),
        (
            REQUIRED | {"codec": "LZ4"},
            "here: codec: expected one of 'lz4', 'none', 'zstd', got 'LZ4'; did you mean 'lz4'?",
        ),
    ],
)
def test_refusals_name_the_key(table, expected):
    with pytest.raises(ConfigError) as caught:
        to_config(Example, table, "here")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--batch_size", "many"], "command line: --batch_size: expected an integer of at least 1, got 'many'"),
        (
            ["--codec=zst"],
            "command line: --codec: expected one of 'lz4', 'none', 'zstd', got 'zst'; did you mean 'zstd'?",
        ),
        (["--dry-run", "other.toml"], "command line: unexpected 'other.toml'"),
        (["--dry-run=maybe"], "command line: --dry_run: expected true or false, got 'maybe'"),
        ([], "c.toml: fraction: expected a number of at least 0 and below 1, got 2"),
    ],
)
def test_each_mistake_is_blamed_on_its_origin(tmp_path, arguments, expected):
    file = tmp_path / "c.toml"
    file.write_text('model = "m"\nhook_points = ["a"]\n' + ("" if arguments else "fraction = 2\n"))
    with pytest.raises(ConfigError) as caught:
        load_config(Example, file, arguments)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [["c.toml", "--dry-run"], ["--dry-run", "c.toml"], ["--dry_run=true", "c.toml"], ["--dry-run", "TRUE", "c.toml"]],
)
def test_a_flag_needs_no_value_and_the_config_file_may_stand_anywhere(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    Path("c.toml").write_text('model = "m"\nhook_points = ["a"]\n')
    assert load_config(Example, None, arguments) == Example(model="m", hook_points=["a"], dry_run=True)


def test_a_missing_key_on_the_command_line_says_how_to_give_it():
    with pytest.raises(
        ConfigError, match=r"command line: 'hook_points' is missing .*; give a config file, or --hook_points"
    ):
        load_config(Example, None, ["--model", "m"])


def test_configurations_made_in_python_are_checked_and_take_paths_and_numpy_numbers():
    config = Example(
        model=Path("a/b"),
        hook_points=("x", Path("y")),
        batch_size=np.int64(4),
        fraction=torch.tensor(0.25),
        saes=np.array(["one", "two"]),
        part=[{"k": np.array([1, 2])}],
    )
    assert config == Example(
        model="a/b", hook_points=["x", "y"], batch_size=4, fraction=0.25, saes=["one", "two"], part=[Part(k=[1, 2])]
    )
    assert (type(config.batch_size), type(config.fraction)) == (int, float)
    assert tomllib.loads(to_toml(config))["model"] == "a/b"
    for wrong in ({"batch_size": 0}, {"batch_size": 4.5}, {"codec": "zip"}, {"fraction": np.float32("inf")}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Example(model="m", hook_points=["a"], **wrong)
    with pytest.raises(ConfigError, match="batch_size"):
        msgspec.structs.replace(config, batch_size=-1)


def test_a_stage_takes_an_object_a_file_or_keywords(tmp_path):
    (tmp_path / "c.toml").write_text('model = "m"\nhook_points = ["h"]\nbatch_size = 2\n')
    of_file = configured(Example, tmp_path / "c.toml", {})
    assert of_file == configured(Example, None, {"model": "m", "hook_points": ["h"], "batch_size": 2})
    assert configured(Example, of_file, {}) is of_file
    changed = configured(Example, of_file, {"split": "all", "saes": tmp_path, "part": [{"k": 4}]})
    assert (changed.batch_size, changed.split, changed.saes) == (2, "all", str(tmp_path))
    assert changed.part == [Part(k=4)]
    assert configured(Example, str(tmp_path / "c.toml"), {"batch_size": 3}).batch_size == 3


@pytest.mark.parametrize(
    ("config", "settings", "expected"),
    [
        (None, REQUIRED | {"batchsize": 1}, "keywords: unknown key 'batchsize'; did you mean 'batch_size'?"),
        (None, {"model": "m"}, "keywords: 'hook_points' is missing"),
        (None, REQUIRED | {"batch_size": 0}, "keywords: batch_size: expected an integer of at least 1, got 0"),
        (Part(), {}, "expected Example(...), the path of a TOML file, or keywords; got Part"),
    ],
)
def test_keywords_are_refused_as_keys_are(config, settings, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        configured(Example, config, settings)


def test_unknown_nested_key_is_refused():
    with pytest.raises(ConfigError, match=r"here: \[\[part\]\], table 2: unknown key 'kk'; did you mean 'k'\?"):
        to_config(Example, REQUIRED | {"part": [{"k": 1}, {"kk": 1}]}, "here")


@pytest.mark.parametrize("arguments", [["stray"], ["--batch_size"], ["--bach_size", "1"]])
def test_bad_command_lines(arguments):
    with pytest.raises(ConfigError, match="command line"):
        load_config(Example, "c.toml", arguments)


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
    text = help_text(Example)
    assert "--model" in text
    assert "Contexts per pass. (default 8)" in text
    assert "The model. (required)" in text


def test_help_lists_the_choices_that_the_sentence_does_not_name():
    assert "Codec. (choices: lz4, none, zstd; default 'lz4')" in help_text(Example, ["codec"])

    class Stored(Config):
        codec: Annotated[Literal["none", "lz4"] | None, Meta(description="lz4 or none.")] = None
        roles: Annotated[list[Literal["user", "tool"]], Meta(description="Roles of users.")] = []

    lines = help_text(Stored).splitlines()
    assert lines[0].endswith("  lz4 or none. (optional)")
    assert lines[1].endswith("  Roles of users. (choices: tool, user; default [])")


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


@pytest.mark.parametrize("name", ["model", "hook_points"])
def test_text_that_is_not_utf8_is_one_line(name):
    text = b"caf\xe9".decode("utf-8", "surrogateescape")
    given = {"model": "m", "hook_points": ["h"]} | {name: [text] if name == "hook_points" else text}
    with pytest.raises(ConfigError, match=rf"{name}: 'caf\\xe9' is not UTF-8.*rename"):
        Example(**given)
