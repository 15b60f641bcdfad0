"""The report's JavaScript by itself, in Node or else in headless Chromium; skipped where neither is installed."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from thresher.evaluate import report

from ..chromium import CHROMIUM

SCRIPTS = ("dom.js", "axes.js", "pareto.js", "curves.js", "histograms.js", "table.js", "blocks.js", "latent.js")
FOLDER = Path(report.__file__).parent
NODE = shutil.which("node")
DOM = "var document = { getElementById: () => null }, addEventListener = () => {}, location = { hash: '' };\n"
SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--virtual-time-budget=10000",
    "--dump-dom",
)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The function that returns the values of JavaScript expressions, with all of the report's functions known."""
    if NODE is None and CHROMIUM is None:
        pytest.skip("neither Node nor Chromium is installed")
    folder = tmp_path_factory.mktemp("javascript")
    source = "\n".join((FOLDER / name).read_text() for name in (*SCRIPTS, "browser.js"))

    def run(*expressions):
        values = f"JSON.stringify([{', '.join(expressions)}])"
        if NODE is not None:
            (folder / "run.js").write_text(f"{DOM}{source}\nconsole.log({values});")
            done = subprocess.run([NODE, folder / "run.js"], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout)
        page = f"<meta charset=utf-8><pre></pre><script>{source}\ndocument.querySelector('pre').textContent = "
        (folder / "run.html").write_text(f"{page}encodeURIComponent({values});</script>")
        command = [CHROMIUM, *SWITCHES, f"--user-data-dir={folder / 'profile'}", (folder / "run.html").as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return json.loads(unquote(re.search("<pre>(.*?)</pre>", done.stdout)[1]))

    return run


def test_linear_ticks_are_round_and_within_the_ends(evaluated):
    ends = [(0, 1), (-3.2, 7.9), (0.1234, 0.1239), (0, 1e7), (12, 12.5)]
    for (low, high), ticks in zip(
        ends, evaluated(*(f"linearTicks({low}, {high}, 5)" for low, high in ends)), strict=True
    ):
        assert 2 <= len(ticks) <= 6
        assert low <= min(ticks)
        assert max(ticks) <= high
        steps = np.diff(ticks)
        np.testing.assert_allclose(steps, steps[0], rtol=1e-9)
        digits = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
        assert min(abs(digits - round_one) for round_one in (1, 2, 2.5, 5, 10)) < 1e-6


def test_logarithmic_ticks_are_whole_decades_or_their_parts(evaluated):
    wide, narrow, tiny = evaluated("logTicks(1e-6, 1e3, 5)", "logTicks(3, 300, 6)", "logTicks(3, 3.5, 5)")
    assert all(math.log10(tick).is_integer() for tick in wide)
    assert narrow == [5, 10, 20, 50, 100, 200]
    assert len(tiny) >= 2
    assert 3 <= min(tiny) <= max(tiny) <= 3.5


@pytest.mark.parametrize("log", [False, True])
def test_a_scale_and_its_inverse(evaluated, log):
    values, option = [2.0, 30.0, 500.0], json.dumps({"log": log, "room": 0})
    make = f"makeScale({values}, 100, 20, {option})"
    at, back = evaluated(f"{values}.map({make})", f"[100, 60, 20].map({make}.invert)")
    inner = np.log10 if log else np.asarray
    place = (inner(values) - inner(values)[0]) / (inner(values)[-1] - inner(values)[0])
    np.testing.assert_allclose(at, 100 - 80 * place)
    middle = 10 ** np.mean(np.log10([2, 500])) if log else 251
    np.testing.assert_allclose(back, [2, middle, 500])


def test_a_scale_of_nothing_and_of_one_value(evaluated):
    nothing, logarithmic, one, broken = evaluated(
        "makeScale([], 0, 100, { room: 0 })(0.5)",
        "makeScale([0, -1, NaN], 0, 100, { log: true, room: 0 })(Math.sqrt(10))",
        "makeScale([7, 7], 0, 100)(7)",
        "makeScale([1, null, NaN, Infinity, 3], 0, 100, { room: 0 })(2)",
    )
    assert [nothing, logarithmic, one, broken] == pytest.approx([50, 50, 50, 50])


def test_numbers_as_they_are_shown(evaluated):
    shown = evaluated(
        "formatNumber(0.12345)",
        "formatNumber(1234567)",
        "formatNumber(98765)",
        "formatNumber(null)",
        "formatNumber(1e-5)",
        "formatTick(2.5e6, false)",
        "formatTick(1e-4, true)",
        "powerOfTen(-12)",
        "powerOfTen(0)",
    )
    assert shown == ["0.1235", "1.23e6", "98,765", "\u2013", "1.00e-5", "2.5M", "1e-4", "10⁻¹²", "1"]


def test_the_frontier_is_what_no_other_beats(evaluated):
    generator = np.random.default_rng(0)
    points = [{"l0": float(a), "value": float(b)} for a, b in generator.integers(0, 8, (40, 2))]
    (found,) = evaluated(f"paretoFrontier({json.dumps(points)})")
    values = {(p["l0"], p["value"]) for p in points}
    best = {(a, b) for a, b in values if not any((c <= a and d >= b) and (c, d) != (a, b) for c, d in values)}
    assert {(p["l0"], p["value"]) for p in found} == best
    assert len(found) == len(best)


def test_where_no_row_is_an_outlier_all_rows_are_usual(evaluated):
    key, intervals = "explained_variance_without_outliers", {"explained_variance": [0.4, 0.6]}
    without = {"explained_variance": 0.5, "intervals": intervals}
    with_outliers = {"explained_variance": 0.5, key: 0.8, "intervals": intervals | {key: [0.7, 0.9]}}
    plain, same = evaluated(*(f"withUsualRows({json.dumps(sae)})" for sae in (without, with_outliers)))
    assert plain == {"explained_variance": 0.5, key: 0.5, "intervals": intervals | {key: [0.4, 0.6]}}
    assert same == with_outliers


def test_labels_at_the_ends_of_curves_keep_apart(evaluated):
    ys = [50, 52, 53, 10, 199, 198]
    (found,) = evaluated(
        f"(() => {{ const e = {ys}.map((y) => ({{ y }})); spreadLabels(e, 15, 0, 200); return e; }})()"
    )
    places = [end["at"] for end in found]
    assert [end["y"] for end in found] == sorted(ys)
    assert np.diff(places).min() >= 15
    assert places[0] >= 0
    assert places[-1] <= 200


def test_the_nearest_point_of_a_curve(evaluated):
    xs = [0, 1, 4, 9, 16]
    wanted = [-5, 0.4, 0.6, 2.4, 6, 7, 100]
    found = evaluated(*(f"nearestIndex({xs}, {x})" for x in wanted))
    assert found == [int(np.argmin(np.abs(np.array(xs) - x))) for x in wanted]


def test_cells_are_sorted_with_the_empty_ones_last(evaluated):
    cells = ["10", "9", "", "-1", "2.5"]
    sort = "[...{}].sort((a, b) => compareCells(a, b, {}, {}))"
    up, down, text = evaluated(
        sort.format(cells, "true", 1), sort.format(cells, "true", -1), sort.format(["k16", "k8", "K9"], "false", 1)
    )
    assert up == ["-1", "2.5", "9", "10", ""]
    assert down == ["10", "9", "2.5", "-1", ""]
    assert text == ["k8", "K9", "k16"]


def test_a_query_is_a_number_or_text(evaluated):
    queries = {
        "12": (12, "12"),
        "#7": (7, "#7"),
        '"12"': (None, "12"),
        '" in"': (None, " in"),
        "  Über ": (None, "über"),
    }
    found = evaluated(*(f"readQuery({json.dumps(query)})" for query in queries))
    assert [(query["number"], query["text"]) for query in found] == list(queries.values())


def test_latents_are_selected_and_sorted(evaluated):
    summary = json.dumps({"density": [0.5, 0, 0.1, 0.2], "score": [1, 2, 3, 4], "max": [9, 9, 1, 1]})
    texts = '["import os", "import", "def", "class import"]'
    selected = evaluated(
        f"selectLatents({summary}, {texts}, 'import', 'interestingness', false, new Set())",
        f"selectLatents({summary}, {texts}, 'import', 'density', true, new Set([2]))",
        f"selectLatents({summary}, {texts}, '1', 'density', true, new Set())",
        f"selectLatents({summary}, {texts}, '', 'max', false, new Set())",
    )
    assert selected == [[3, 1, 0], [0, 3, 2], [1], [0, 1, 2, 3]]


def test_unseen_characters_are_named(evaluated):
    assert evaluated(r'visible("a\n\tb\u200b")', r'compact("  x      ")', 'visible("")') == [
        "a↵⇥b⟨U+200B⟩",
        "··x·\u00d76",
        "∅",
    ]


def test_the_scripts_keep_one_style():
    for path in FOLDER.glob("*.js"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            where = f"{path.name}:{number}"
            assert len(line) <= 140, where
            assert line == line.rstrip(), where
            assert "\t" not in line, where
            assert (len(line) - len(line.lstrip(" "))) % 2 == 0, where
