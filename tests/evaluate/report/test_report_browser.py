"""The report in headless Chromium; skipped without Chromium."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from thresher.evaluate.features.build import FeatureSettings, build_feature_index
from thresher.evaluate.report import feature_blocks, write_report
from thresher.evaluate.report.definitions import METRICS
from thresher.shared.store import ActivationStore, ActivationStoreWriter

NAMES = ("topk-k4", "topk-k2", "relu <b>&amp;")


@pytest.fixture(scope="module")
def indexes(tiny, make_sae, words, tmp_path_factory):
    made = (
        (make_sae(k=4, d_sae=300), "blocks.1.resid_post"),
        (make_sae(k=2, seed=1), "blocks.1.resid_post"),
        (make_sae("standard", seed=2), "blocks.0.resid_post"),
    )
    saes = [
        SimpleNamespace(name=name, sae=sae, hook_point=place, target=place)
        for name, (sae, place) in zip(NAMES, made, strict=True)
    ]
    settings = FeatureSettings(n_top=4, n_sampled=4, window=8)
    output = tmp_path_factory.mktemp("indexes")
    store = ActivationStore.open(tiny.store)
    return build_feature_index(store, saes, output, model=tiny.model, tokenizer=words, settings=settings)


def sweep_metrics():
    edges = np.linspace(-4, 0, 9).tolist()
    return [
        {
            "name": name,
            "architecture": "standard" if "relu" in name else "topk",
            "hook_point": f"blocks.{int('relu' not in name)}.resid_post",
            "d_sae": 32,
            "k": k,
            "l0": l0,
            "explained_variance": variance,
            "ce_loss_score": score,
            "dead_fraction": 0.1,
            "density_histogram": {"edges": edges, "counts": [0, 1, 4, 9, 8, 3, 2, 0]},
        }
        for name, k, l0, variance, score in zip(
            NAMES, (4, 2, None), (4.0, 2.0, 11.5), (0.8, 0.6, 0.7), (0.9, 0.7, None), strict=True
        )
    ]


@pytest.fixture(scope="module")
def report(indexes, tmp_path_factory):
    curves = {name: [{"tokens": 100 * i, "loss": 5 / (i + 1)} for i in range(30)] for name in NAMES}
    return write_report(tmp_path_factory.mktemp("report") / "report.html", sweep_metrics(), curves, indexes)


def test_overview_draws_every_plot_and_asks_no_network(browser, report):
    browser.open(report)
    browser.wait("document.querySelectorAll('#pareto-variance .mark').length === 3")
    assert len(browser.texts("#pareto-loss .mark")) == 2
    assert browser.texts("#pareto-variance .point-label") == ["k=4", "k=2", NAMES[2]]
    assert len(browser.texts("#curves-chart .curve")) == 3
    assert len(browser.texts("#density-charts svg")) == 3
    assert browser.faults == []


def test_sorting_the_table(browser, report):
    browser.open(report)
    head = "[...document.querySelectorAll('#metrics th button')].find((b) => b.textContent === 'Explained variance')"
    browser.evaluate(f"{head}.click()")
    assert browser.texts("#metrics tbody th") == [NAMES[0], NAMES[2], NAMES[1]]
    assert browser.evaluate(f"{head}.parentElement.ariaSort") == "descending"
    browser.evaluate(f"{head}.click()")
    assert browser.texts("#metrics tbody th") == [NAMES[1], NAMES[2], NAMES[0]]
    browser.evaluate(
        "[...document.querySelectorAll('#metrics th button')].find((b) => b.textContent === 'CE loss score').click()"
    )
    assert browser.texts("#metrics tbody th")[-1] == NAMES[2], "what was not measured sorts last"
    browser.type("#table-filter", "relu")
    assert browser.evaluate("[...document.querySelectorAll('#metrics tbody tr')].filter((r) => !r.hidden).length") == 1


def test_hovering_a_point_explains_it(browser, report):
    browser.open(report)
    browser.wait("document.querySelector('#pareto-variance .mark')")
    browser.hover("#pareto-variance g[tabindex]")
    assert browser.texts("#tooltip")[0].startswith(f"{NAMES[0]}\ntopk at blocks.1.resid_post\nL0 4")
    browser.press("Escape")
    assert browser.evaluate("document.getElementById('tooltip').hidden")


def test_the_keyboard_reads_the_loss_curves(browser, report):
    browser.open(report)
    browser.wait("document.querySelector('#curves-chart svg')")
    browser.evaluate("document.querySelector('#curves-chart svg').focus()")
    browser.press("Home")
    assert "0 tokens" in browser.texts("#curves [role=status]")[0]
    browser.press("ArrowRight")
    assert "100 tokens" in browser.texts("#curves [role=status]")[0]


def test_searching_and_sorting_latents(browser, report, indexes):
    lines = [line for batch in indexes[NAMES[0]].batches() for line in batch]
    alive = [line for line in lines if line["firings"]]
    browser.open(report, "#sae=topk-k4")
    browser.wait("document.querySelectorAll('#browser-list li').length")
    assert browser.texts("#browser-status") == [f"{len(alive)} of 300 latents"]
    browser.evaluate(
        "(s => { s.value = 'density'; s.dispatchEvent(new Event('change')); })(document.getElementById('browser-sort'))"
    )
    first = [int(text) for text in browser.texts("#browser-list .number")][:10]
    densest = sorted(alive, key=lambda line: (-float(f"{line['density']:.3g}"), line["latent"]))[:10]
    assert first == [line["latent"] for line in densest]
    token = densest[0]["top"][0]["tokens"][densest[0]["top"][0]["peak"]]
    browser.type("#browser-search", f"WORD{token} ")
    found = [int(text) for text in browser.texts("#browser-list .number")]
    assert densest[0]["latent"] in found
    assert len(found) < len(alive)
    browser.type("#browser-search", "17")
    assert browser.texts("#browser-list .number")[0] == "17"


def test_a_search_reads_the_text_of_the_contexts(browser, report, indexes):
    lines = [line for batch in indexes[NAMES[0]].batches() for line in batch if line["firings"]]
    wanted = "".join(f" word{token}" for token in lines[-1]["top"][0]["tokens"][:3])
    expected = {
        line["latent"]
        for line in lines
        for context in line["top"] + line["sampled"]
        if wanted in "".join(f" word{token}" for token in context["tokens"])
    }
    assert lines[-1]["latent"] in expected
    browser.open(report, "#sae=topk-k4")
    browser.wait("document.querySelectorAll('#browser-list li').length")
    browser.type("#browser-search", f'"{wanted.upper()}"')
    browser.wait(f"document.querySelectorAll('#browser-list li').length === {len(expected)}")
    assert {int(text) for text in browser.texts("#browser-list .number")} == expected
    browser.type("#browser-search", "word no latent reads")
    browser.wait("document.querySelectorAll('#browser-list li').length === 0")
    assert browser.faults == []


@pytest.mark.parametrize("fragment", ["", "#sae=topk-k4&latent=3"])
def test_no_page_scrolls_sideways_on_a_laptop(browser, report, fragment):
    browser.open(report, fragment, width=1300, height=900)
    browser.wait("document.querySelector('#pareto-variance svg, #latent-heading')")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 1300


def test_a_table_wider_than_the_page_scrolls_in_its_own_box(browser, tmp_path):
    wide = [{metric.key: 0.5 for metric in METRICS} | row for row in sweep_metrics()]
    wide = [row | {"confidence_95": {metric.key: [0.4, 0.6] for metric in METRICS}} for row in wide]
    browser.open(write_report(tmp_path / "report.html", wide, {}), width=1300, height=900)
    assert browser.evaluate(
        "(({scrollWidth, clientWidth}) => scrollWidth > clientWidth)(document.querySelector('.scroll'))"
    )
    assert browser.evaluate("document.documentElement.scrollWidth") <= 1300


def test_a_latent_shows_its_contexts_and_activations_on_hover(browser, report, indexes):
    lines = [line for batch in indexes[NAMES[0]].batches() for line in batch]
    line = max(lines[130:], key=lambda line: line["firings"])
    browser.open(report, f"#sae=topk-k4&latent={line['latent']}")
    browser.wait("document.querySelector('.context')")
    assert browser.texts("#latent-heading") == [f"Latent {line['latent']}"]
    assert len(browser.texts(".context-group:first-of-type .context")) == len(line["top"])
    best = line["top"][0]
    assert browser.texts("mark")[0] == f"word{best['tokens'][best['peak']]}"
    browser.hover("mark")
    peak = float(f"{best['activations'][best['peak']]:.3g}")
    assert browser.texts("#tooltip")[0].endswith(f"activation {peak:g}")
    promoted = [f"·word{effect['token']}" for effect in line["promoted"]]
    assert browser.texts(".effects")[0].startswith(promoted[0])
    assert len(browser.texts(".neighbours li")) == len(line["neighbours"])
    browser.evaluate("document.querySelector('[aria-label=\"Next latent\"]').click()")
    browser.wait(f"document.getElementById('latent-heading').textContent === 'Latent {line['latent'] + 1}'")
    browser.evaluate("document.querySelector('.back').click()")
    browser.wait("document.getElementById('browser-page').hidden")
    assert browser.faults == []


@pytest.mark.parametrize(
    "fragment", ["#sae=nobody&latent=3", "#sae=topk-k4&latent=99999", "#sae=topk-k4&latent=x", "#table"]
)
def test_a_wrong_address_does_no_harm(browser, report, fragment):
    browser.open(report, fragment)
    assert browser.faults == []
    assert browser.evaluate("document.getElementById('browser-page').hidden") == ("topk" not in fragment)


def test_large_data_lies_beside_the_page(browser, indexes, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_blocks, "INLINE_BYTES", 0)
    report = write_report(tmp_path / "wide report.html", sweep_metrics(), {}, indexes)
    folder = tmp_path / "wide report_features"
    assert len(list(folder.iterdir())) == 5
    browser.open(report, "#sae=topk-k4&latent=299")
    browser.wait("document.querySelector('#latent-heading')")
    assert browser.faults == []
    (folder / "sae0-0.js").unlink()
    browser.evaluate("location.hash = 'sae=topk-k4&latent=1'")
    browser.wait("document.querySelector('[role=alert]')")
    assert "keep that folder" in browser.texts("[role=alert]")[0]
    assert write_report(report, sweep_metrics(), {}, None) == report


@pytest.mark.parametrize("fragment", ["", "#sae=topk-k4&latent=3"])
def test_a_phone_does_not_scroll_sideways(browser, report, fragment):
    browser.open(report, fragment, width=360, height=700)
    browser.wait("document.querySelector('#pareto-variance svg, #latent-heading')")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360


SCRIPTS_TEXT = "cat 😀 sat 42 مرحبا 日本 zero\u200bwidth\u202e é"


@pytest.fixture(scope="module")
def scripts_report(make_sae, tmp_path_factory):
    """A report on text of several scripts, in tokens of a byte each; every latent fires on all rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokens = np.array([fast(SCRIPTS_TEXT)["input_ids"]] * 2)
    folder = tmp_path_factory.mktemp("scripts")
    generator = np.random.default_rng(0)
    with ActivationStoreWriter(
        folder / "store", {"blocks.1.resid_post": 16}, tokens.shape[1], dtype="float32"
    ) as writer:
        rows = generator.normal(size=(*tokens.shape, 16)).astype(np.float32)
        writer.append({"blocks.1.resid_post": rows}, tokens=tokens)
    sae = SimpleNamespace(name="a", sae=make_sae(k=32), hook_point="blocks.1.resid_post", target="blocks.1.resid_post")
    settings = FeatureSettings(n_top=2, n_sampled=1, window=tokens.shape[1])
    store = ActivationStore.open(folder / "store")
    indexes = build_feature_index(store, [sae], folder / "index", tokenizer=fast, settings=settings)
    rows = [{"name": "a", "architecture": "topk", "hook_point": "blocks.1.resid_post", "l0": 1.0}]
    return write_report(folder / "report.html", rows, {}, indexes)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        *(("😀", True), ("😁", False), ("مرحبا", True), ("本", True), ('"42"', True), ('"43"', False), ("é", True)),
        *(("e\u0301", True), ("c", True), ("CAT", True), ('" sat "', True), ('"sat  "', False)),
    ],
)
def test_a_search_finds_any_script_one_character_and_quoted_digits(browser, scripts_report, query, found):
    browser.open(scripts_report, "#sae=a")
    browser.wait("document.querySelectorAll('#browser-list li').length")
    browser.type("#browser-search", query)
    wanted = "> 0" if found else "=== 0"
    browser.wait(f"document.querySelectorAll('#browser-list li').length {wanted}")
    browser.type("#browser-search", "42")  # without quotation marks a latent's number, and there are 32
    browser.wait("document.querySelectorAll('#browser-list li').length === 0")
    assert browser.faults == []


def test_contexts_show_whole_characters_and_name_unseen_ones(browser, scripts_report):
    browser.open(scripts_report, "#sae=a&latent=3")
    browser.wait("document.querySelector('.context-text')")
    shown = SCRIPTS_TEXT.replace("\u200b", "⟨U+200B⟩").replace("\u202e", "⟨U+202E⟩")
    assert browser.texts(".context-text")[0] == shown
    smile = (
        "[...document.querySelectorAll('.context-text span, .context-text mark')].find((e) => e.textContent === '😀')"
    )
    assert "(4 tokens)" in browser.evaluate(f"{smile}.dataset.tip")
    assert browser.evaluate("document.querySelector('.context-text').dir") == "auto"


def test_a_latents_histogram_shrinks_with_the_window(browser, report):
    browser.open(report, "#sae=topk-k4&latent=3", width=800)
    width = "document.querySelector('#browser-latent .chart svg')?.getAttribute('width')"
    browser.wait(f"{width} > 500")
    browser.page.set_viewport_size({"width": 420, "height": 900})
    browser.wait(f"{width} < 420")
