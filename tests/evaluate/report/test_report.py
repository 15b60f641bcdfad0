"""The report file: complete without a network, honest about what is missing, safe with any name."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from thresher.evaluate.report import write_report
from thresher.evaluate.report.definitions import NOT_MEASURED, columns, format_value
from thresher.evaluate.report.labels import point_labels
from thresher.evaluate.report.write import json_for_script, thin_curve


def sae_row(name="topk-32", **changes):
    row = {
        "name": name,
        "architecture": "topk",
        "hook_point": "blocks.2.resid_post",
        "d_sae": 2048,
        "k": 32,
        "l1_coefficient": None,
        "l0": 31.5,
        "explained_variance": 0.9031,
        "dead_fraction": 0.25,
        "density_histogram": {"edges": [-3.0, -2.0, -1.0], "counts": [5, 9]},
        "n_rows": 81920,
        "ce_loss_score": 0.98,
        "confidence_95": {"explained_variance": [0.9, 0.91]},
    }
    return row | changes


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, the table's cells and the data block."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.heads, self.data = [], [], [], ""
        self._inside = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self._inside.append((tag, attributes))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        while self._inside and self._inside.pop()[0] != tag:
            pass

    def handle_data(self, data):
        open_tags = [tag for tag, _ in self._inside]
        if "td" in open_tags or "th" in open_tags:
            self.cells[-1][-1] += data.strip()
        if self._inside and self._inside[-1][1].get("id") == "data":
            self.data += data


def render(tmp_path, *args, **kwargs):
    path = write_report(tmp_path / "deep" / "report.html", *args, **kwargs)
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_asks_nothing_of_a_network(tmp_path):
    page = render(tmp_path, [sae_row()], {"topk-32": [{"step": 1, "tokens": 10, "loss": 2.0}]})
    loading = {"src", "srcset", "poster", "background", "action", "formaction"}
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base"), tag
        assert not loading & set(attributes)
        assert attributes.get("href", "#").startswith("#")
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_the_table_holds_every_metric_without_any_script(tmp_path):
    page = render(tmp_path, [sae_row(), sae_row("relu", architecture="standard", k=None, l1_coefficient=3e-3)])
    heads, first, second = page.cells
    assert heads[0] == "SAE"
    by_name = dict(zip(heads, first, strict=True))
    assert by_name["Explained variance"] == "0.9031"
    assert by_name["Dead"] == "25.0%"
    assert by_name["Tokens"] == "81,920"
    assert dict(zip(heads, second, strict=True))["k"] == NOT_MEASURED


def test_missing_model_metrics_are_dashes_and_a_sentence(tmp_path):
    rows = [sae_row(ce_loss_score=None), sae_row("other", ce_loss_score=None, l0=float("nan"))]
    page = render(tmp_path, rows)
    assert page.cells[1][page.cells[0].index("CE loss score")] == NOT_MEASURED
    assert "pareto-loss" not in [attributes.get("id") for _, attributes in page.tags]
    data = json.loads(page.data)
    assert data["saes"][1]["l0"] is None
    assert data["saes"][0]["intervals"] == {"explained_variance": [0.9, 0.91]}


@pytest.mark.parametrize("name", ["</script><script>alert(1)</script>", 'a"b<c>&d', "λ \u2028 line"])
def test_no_name_escapes_into_markup(tmp_path, name):
    page = render(tmp_path, [sae_row(name)], {name: [{"step": 0, "loss": 1.0}]}, title=name, provenance={"model": name})
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert page.cells[1][0] == name.strip()
    assert json.loads(page.data)["saes"][0]["name"] == name


def test_every_id_is_unique_and_every_reference_to_one_exists(tmp_path):
    page = render(tmp_path, [sae_row()])
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert set((attributes.get(name) or "").split()) <= set(ids)
        assert attributes.get("href", "#")[1:] in ("", *ids)


def test_the_scripts_only_name_elements_that_the_page_has(tmp_path):
    path = write_report(tmp_path / "report.html", [sae_row()], {})
    text = path.read_text(encoding="utf-8")
    ids = {attributes["id"] for _, attributes in Page(text).tags if "id" in attributes}
    script = text[text.index('<script type="module">') :]
    made = set(re.findall(r'id: "([^"]+)"', script))
    assert set(re.findall(r'getElementById\("([^"]+)"\)', script)) <= ids | made


def test_an_empty_sweep_still_has_a_page(tmp_path):
    page = render(tmp_path, [])
    assert len(page.cells) == 1


def test_a_long_curve_is_thinned_but_keeps_its_ends():
    lines = [{"step": i, "loss": 1.0 / (i + 1), "note": "x", "nan": float("nan")} for i in range(10_001)]
    curve = thin_curve(lines, 100)
    assert 90 <= len(curve["step"]) <= 102
    assert (curve["step"][0], curve["step"][-1]) == (0, 10_000)
    assert "note" not in curve
    assert set(curve["nan"]) == {None}
    assert len(thin_curve(lines[:1])["loss"]) == 1


def test_script_json_reads_back():
    value = {"a": [1.5, float("inf"), None, "</script>&\u2029"], "b": {"c": True}}
    text = str(json_for_script(value))
    assert not set("<>&\u2029") & set(text)
    assert json.loads(text) == {"a": [1.5, None, None, "</script>&\u2029"], "b": {"c": True}}


def test_point_labels_show_the_settings_that_differ():
    assert point_labels([sae_row(), sae_row(k=64)]) == ["k=32", "k=64"]
    assert point_labels([sae_row(), sae_row(d_sae=3000)]) == ["k=32 · 2k", "k=32 · 3,000"]
    other = sae_row(hook_point="blocks.1.resid_post")
    assert point_labels([sae_row(), sae_row(k=64), other]) == ["k=32", "k=64", "k=32 · blocks.1"]
    assert point_labels([sae_row(), sae_row(k=64), sae_row(d_sae=4096)]) == ["k=32", "k=64", "k=32 · 4k"]
    both = sae_row(hook_point="blocks.1.resid_post + blocks.2.resid_post")
    assert point_labels([sae_row(), sae_row(k=64), both]) == ["k=32", "k=64", "k=32 · blocks.1 + blocks.2"]
    assert point_labels([sae_row("a"), sae_row("b")]) == ["a", "b"]
    assert point_labels([sae_row(k=None, l1_coefficient=0.003)]) == ["λ=0.003"]
    assert point_labels([sae_row(k=None, l0_coefficient=0.5)]) == ["λ=0.5"]
    assert point_labels([sae_row(k=None, l0_coefficient=1.0, target_l0=20.0)]) == ["L0→20"]


def test_a_crosscoder_has_a_line_for_each_of_its_hook_points(tmp_path):
    parts = [
        {"hook_point": f"blocks.{i}.resid_post", "l0": 20.0 + i, "explained_variance": 0.8125, "mse": 7.5}
        for i in (1, 2)
    ]
    joined = "blocks.1.resid_post + blocks.2.resid_post"
    row = sae_row("cross", architecture="crosscoder", hook_point=joined, ce_loss_score=None, per_hook=parts)
    page = write_report(tmp_path / "a.html", [sae_row(), row], {}).read_text()
    lines = page.split('<table id="across">')[1].split("</table>")[0].split("<tr>")[2:]
    cells = [re.findall(r"<t[hd][^>]*>([^<]*)<", line) for line in lines]
    assert cells[0][:5] == ["cross", "blocks.1.resid_post", "21", "0.8125", "7.5"]
    assert [line[1] for line in cells] == ["blocks.1.resid_post", "blocks.2.resid_post"]
    assert set(cells[0][5:]) == {NOT_MEASURED}
    assert 'id="across"' not in write_report(tmp_path / "b.html", [sae_row()], {}).read_text()
    assert "ran without the language model" not in write_report(tmp_path / "c.html", [row], {}).read_text()


def test_columns_put_unknown_numbers_last():
    found = [metric.key for metric in columns([sae_row(probe_accuracy=0.7, mask="all", flag=True)])]
    assert found[-1] == "probe_accuracy"
    assert not {"mask", "flag", "density_histogram", "confidence_95"} & set(found)
    assert found[0] == "name"


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [
        (None, "number", NOT_MEASURED),
        (float("nan"), "fraction", NOT_MEASURED),
        (0.12345, "fraction", "0.1235"),
        (1234567.0, "number", "1,234,567"),
        (3e-5, "number", "3e-05"),
        ([1, 2], "integer", "1, 2"),
        (0.5, "percent", "50.0%"),
    ],
)
def test_format_value(value, style, text):
    assert format_value(value, style) == text
