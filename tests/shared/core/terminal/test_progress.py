"""A bar on a terminal and in a notebook, and lines where there is neither."""

import io
import re
import sys
from types import SimpleNamespace

import pytest
from tqdm import tqdm
from tqdm.auto import tqdm as auto_bar

from thresher.shared.core.terminal import progress as progress_module
from thresher.shared.core.terminal.logs import LogSettings, shown_logs
from thresher.shared.core.terminal.progress import library_bars, progress


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose one number is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now[0]))  # not that of all threads
    return now


def as_terminal(monkeypatch):
    """Put a terminal in the place of stderr, and return it."""
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_without_a_terminal_a_line_comes_every_half_minute(clock, capsys):
    with progress(desc="train", unit="token", total=1_000_000, initial=100_000, unit_scale=True) as bar:
        for second in range(1, 101):
            clock[0] += 1.0
            bar.set_postfix_str(f"step {second}", refresh=False)
            bar.update(1000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0] == "train: 130k of 1.00M tokens (13%), 1.00k tokens/s, 14:30 left, step 30"
    assert re.match(r"train: 190k of 1\.00M tokens \(19%\), .* 13:30 left, step 90$", lines[2])


def test_what_is_quick_prints_nothing(clock, capsys):
    assert list(progress(["a", "b"], desc="probe", unit="SAE")) == ["a", "b"]
    assert capsys.readouterr().err == ""
    for _ in progress(range(4), desc="probe", unit="SAE"):
        clock[0] += 31
    assert capsys.readouterr().err.splitlines()[0] == "probe: 1.00 of 4.00 SAEs (25%), 0.03 SAEs/s, 01:33 left"


def test_a_terminal_gets_a_bar_and_disabled_is_silent(clock, monkeypatch):
    terminal = as_terminal(monkeypatch)
    for _ in progress(range(4), desc="probe", unit="SAE", disable=True):
        clock[0] += 31
    assert terminal.getvalue() == ""
    bar = progress(desc="train", unit="token", total=10)
    assert isinstance(bar, tqdm)
    bar.close()


@pytest.mark.parametrize("bar", [tqdm, auto_bar])
def test_other_libraries_show_bars_only_where_ours_are(bar, monkeypatch):
    terminal = as_terminal(monkeypatch)

    def shown(**options):
        terminal.seek(0)
        terminal.truncate()
        with library_bars():
            assert list(bar(range(3), desc="theirs", **options)) == [0, 1, 2]
        return "theirs: 100%" in terminal.getvalue()

    assert shown()
    monkeypatch.setenv("RANK", "1")
    assert not shown()
    monkeypatch.setenv("RANK", "0")
    assert shown()
    with shown_logs(LogSettings(quiet=True)):
        assert not shown()
        with library_bars():
            assert not shown(disable=False)
            assert not shown()  # a block inside another ended, and the outer one still holds
    assert shown()
    terminal.isatty = lambda: False
    assert not shown()
    list(bar(range(3), desc="of the program itself"))
    assert "of the program itself: 100%" in terminal.getvalue()


def test_a_kernel_gets_a_bar_also_without_widgets(monkeypatch, capsys):
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(progress_module, "find_spec", lambda name: None)
    for _ in progress(range(4), desc="probe", unit="SAE"):
        pass
    assert "probe: 100%" in capsys.readouterr().err
    shell.config.clear()  # IPython in a terminal, or in a script
    assert list(progress(range(4), desc="probe", unit="SAE")) == [0, 1, 2, 3]
    assert capsys.readouterr().err == ""
