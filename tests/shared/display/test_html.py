"""What notebooks show of stores, SAEs and results: the values, with their text escaped."""

from __future__ import annotations

from html.parser import HTMLParser

import torch

from thresher import ActivationStore, ActivationStoreWriter, Sae
from thresher.evaluate.notebook.metrics_rows import MetricsRows
from thresher.shared.display.html import facts_html, table_html


class Cells(HTMLParser):
    """Collect the rows of a table, and check that every element is closed."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.open = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_texts_are_escaped_and_missing_facts_left_out():
    page = facts_html("<b>", {"a&b": "<script>", "absent": None})
    assert "<script>" not in page
    assert Cells(page).rows == [["a&b", "<script>"]]
    assert Cells(table_html({"<i>": True}, [["&"]])).rows == [["<i>"], ["&"]]


def test_a_store_shows_its_sizes(tmp_path):
    with ActivationStoreWriter(tmp_path / "s", {"layer": 8}, context_size=4, metadata={"model": "m<1>"}) as writer:
        writer.append({"layer": torch.randn(6, 4, 8)}, held_out=[True, *[False] * 5])
    facts = dict(Cells(ActivationStore.open(tmp_path / "s")._repr_html_()).rows)
    assert facts["layer"] == "width 8"
    assert facts["rows"] == "24 in 6 contexts of 4 tokens"
    assert facts["held out"] == "1 contexts"
    assert facts["model"] == "m<1>"


def test_an_sae_shows_what_it_is():
    shapes = {"W_enc": (4, 16), "b_enc": (16,), "W_dec": (16, 4), "b_dec": (4,)}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    sae = Sae("topk", tensors, hook_point="blocks.1.resid_post", config={"k": 3})
    facts = dict(Cells(sae._repr_html_()).rows)
    assert facts["latents"] == "16, chosen by topk"
    assert facts["reads"] == "blocks.1.resid_post"
    assert facts["k"] == "3"


def test_results_are_rows_and_a_table():
    rows = MetricsRows([{"name": "one", "l0": 32.0, "explained_variance": 0.91234}, {"name": "two", "error": "bad"}])
    assert rows[0]["l0"] == 32.0
    head, one, two = Cells(rows._repr_html_()).rows
    assert one[head.index("Explained variance")] == "0.9123"
    assert two[head.index("SAE")] == "two"
    assert two[head.index("L0")] == "\N{EN DASH}"
