"""Messages of commands: text or JSON on stderr, configured by the command line alone."""

from __future__ import annotations

import ast
import json
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from thresher.shared.core import cli
from thresher.shared.core.config import Config
from thresher.shared.core.terminal.logs import LogSettings, adopt_library_logs, shown_logs, take_log_flags
from thresher.shared.core.terminal.progress import progress
from thresher.shared.core.terminal.results import print_result

ROOT = Path(__file__).parents[4]
PACKAGES = ("shared", "harvest", "train", "evaluate", "thresher")
JSON = LogSettings(log_format="json")
HARVEST = [
    *("harvest", "--model", str(ROOT / "models/stdlib-lm"), "--hook_points", "blocks.0.resid_post"),
    *("--context_size", "16", "--tokens", "64", "--batch_size", "2", "--device", "cpu", "--holdout_fraction", "0"),
]


def objects(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def text_folder(folder: Path) -> str:
    folder.mkdir()
    (folder / "a.txt").write_text("def number():\n    return 1\n" * 40)
    return str(folder)


def test_only_the_command_line_prints():
    """A message of a stage is logged, a result goes through `print_result`; help may be printed."""
    printing = []
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            if file.name.endswith("command.py") or file.name == "cli.py":
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                if called in ("print", "tqdm.write", "sys.stderr.write", "sys.stdout.write", "logging.basicConfig"):
                    printing.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert printing == []


def test_every_line_of_a_stage_is_an_object(tmp_path):
    source = ["--dataset", text_folder(tmp_path / "text"), "--store", str(tmp_path / "store")]
    command = [sys.executable, "-P", "-m", "thresher.harvest", "--log-format", "json", *HARVEST[1:], *source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = objects(done.stderr)
    assert [line["logger"] for line in lines] == [
        "thresher.harvest.documents.tally",
        "thresher.harvest.estimate",
        "thresher.harvest.steps",
    ]
    for line in lines:
        assert list(line) == ["time", "level", "logger", "message"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert line["level"] == "info"
    assert lines[-1]["message"].startswith(f"stored 64 rows at 1 hook point in '{tmp_path / 'store'}'")


def test_quiet_leaves_warnings_errors_and_results(tmp_path, capsys):
    source = ["--dataset", text_folder(tmp_path / "text"), "--store", str(tmp_path / "store")]
    assert cli.main([*HARVEST, *source, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.main(["store", "--quiet", "info", str(tmp_path / "store")]) == 0
    assert "rows        64" in capsys.readouterr().out
    assert cli.main(["store", "info", str(tmp_path / "missing"), "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_errors_are_objects_with_their_class(capsys):
    assert cli.main(["train", "--log_format=json", "--stor", "x"]) == 2
    (line,) = objects(capsys.readouterr().err)
    assert line["level"] == "error"
    assert line["error"] == "ConfigError"
    assert line["message"] == "command line: unknown key 'stor'; did you mean 'store'?"
    assert cli.main(["trian", "--log-format", "json"]) == 2
    assert objects(capsys.readouterr().err)[0]["message"].startswith("no command 'trian'")


def test_a_bug_is_an_object_with_its_traceback(monkeypatch, capsys):
    def fails(arguments):
        raise ZeroDivisionError("a bug\nof two lines")

    monkeypatch.setattr(cli, "_run_command", fails)
    with shown_logs(JSON):
        assert cli.main(["train", "--log_format", "json"]) == 1
    (line,) = objects(capsys.readouterr().err)
    assert (line["level"], line["error"]) == ("critical", "ZeroDivisionError")
    assert line["traceback"].endswith("ZeroDivisionError: a bug\nof two lines")
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def test_a_mistake_in_the_flags_is_an_error(capsys):
    assert cli.main(["train", "--log_format", "yaml"]) == 2
    assert "log_format" in capsys.readouterr().err
    assert cli.main(["train", "--log_format"]) == 2
    assert "--log_format needs a value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "settings", "rest"),
    [
        (["train", "a.toml"], LogSettings(), ["train", "a.toml"]),
        (["--quiet", "train", "a.toml"], LogSettings(quiet=True), ["train", "a.toml"]),
        (["train", "--quiet", "false", "a.toml"], LogSettings(), ["train", "a.toml"]),
        (["train", "--log-format=json", "--k", "1"], JSON, ["train", "--k", "1"]),
        (["--log_format", "json", "--quiet=true"], LogSettings(quiet=True, log_format="json"), []),
    ],
)
def test_flags_stand_anywhere(given, settings, rest):
    assert take_log_flags(given) == (settings, rest)
    assert take_log_flags([*settings.arguments(), *rest]) == (settings, rest)


def test_no_configuration_has_a_key_of_the_same_name():
    for entry in cli.commands().values():
        config = getattr(entry.load(), "CONFIG", None)
        if config is not None:
            assert issubclass(config, Config)
            assert not set(config.__struct_fields__) & set(LogSettings.__struct_fields__)


def test_progress_has_its_fields(monkeypatch, capsys):
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("thresher.shared.core.terminal.progress.time", clock)  # not that of all threads
    with shown_logs(JSON), progress(desc="train", unit="token", total=4000, initial=1000) as bar:
        bar.set_postfix_str("fvu 0.1")
        now[0] += 40
        bar.update(600)
    (line,) = objects(capsys.readouterr().err)
    assert line["message"] == "train: 1.60k of 4.00k tokens (40%), 15.0 tokens/s, 02:40 left, fvu 0.1"
    assert line["progress"] == {
        "name": "train",
        "done": 1600,
        "total": 4000,
        "unit": "token",
        "per_second": 15.0,
        "seconds": 40.0,
        "seconds_left": 160.0,
        "status": "fvu 0.1",
    }


def test_a_terminal_gets_no_bar_when_messages_are_objects_or_quiet(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with shown_logs(JSON):
        assert list(progress(range(3), desc="probe", unit="SAE")) == [0, 1, 2]
    with shown_logs(LogSettings(quiet=True)):
        assert list(progress(range(3), desc="probe", unit="SAE")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_results_stay_on_stdout_and_are_objects_too(capsys):
    print_result("a\nb")
    assert capsys.readouterr() == ("a\nb\n", "")
    with shown_logs(JSON):
        print_result("a\nb")
    (line,) = objects(capsys.readouterr().out)
    assert (line["logger"], line["level"], line["message"]) == ("thresher.results", "info", "a\nb")


def test_what_other_libraries_say_is_an_object(capsys, monkeypatch):
    library = logging.getLogger("some_library")
    handler = logging.StreamHandler()
    library.addHandler(handler)
    library.propagate = False
    try:
        with shown_logs(JSON):
            adopt_library_logs()
            library.warning("from a library")
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn("from Python", UserWarning, stacklevel=1)
    finally:
        library.removeHandler(handler)
    lines = objects(capsys.readouterr().err)
    assert [line["logger"] for line in lines] == ["some_library", "py.warnings"]
    assert lines[0]["message"] == "from a library"


def test_a_rank_says_which_it_is(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    with shown_logs(JSON):
        logging.getLogger("thresher.harvest").info("hello")
    assert objects(capsys.readouterr().err)[0]["rank"] == 3


def test_settings_of_an_inner_block_replace_the_outer_and_end_with_it(capsys):
    log = logging.getLogger("thresher.harvest")
    with shown_logs(LogSettings()):
        with shown_logs(JSON):
            log.info("inner")
        log.info("outer")
        log.warning("careful")
    inner, *outer = capsys.readouterr().err.splitlines()
    assert json.loads(inner)["message"] == "inner"
    assert outer == ["outer", "warning: careful"]


def test_a_program_hears_nothing_but_warnings_unless_it_asks(tmp_path):
    code = (
        "import logging, sys\nfrom thresher import harvest\n"
        f"same = dict(model={str(ROOT / 'models/stdlib-lm')!r}, hook_points=['blocks.0.resid_post'], context_size=16,\n"
        f"    tokens=64, holdout_fraction=0, device='cpu', dataset={text_folder(tmp_path / 'text')!r})\n"
        "harvest(**same, store='quiet')\n"
        "ours = [logger for name, logger in logging.root.manager.loggerDict.items() if name.startswith('thresher')]\n"
        "print(len(ours), [logger for logger in ours if getattr(logger, 'handlers', None)], logging.root.handlers)\n"
        "print('asks', file=sys.stderr)\nlogging.basicConfig(level='INFO', format='%(name)s')\n"
        "harvest(**same, store='loud')\n"
    )
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    n_loggers, _, configured = done.stdout.partition(" ")
    assert int(n_loggers) > 3
    assert configured == "[] []\n"
    first, *others = done.stderr.splitlines()
    assert first == "asks"
    assert "thresher.harvest.steps" in others
