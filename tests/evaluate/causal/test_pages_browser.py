"""The pages of attribute, steer, contrast and graph in headless Chromium; skipped without Chromium."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from thresher.evaluate.causal import attribute_command, contrast_command, steer_command
from thresher.evaluate.circuits import graph_command
from thresher.shared.sae import Sae

MODEL = Path(__file__).parents[3] / "models" / "stdlib-lm"
KINDS = ("attribution", "steering", "contrast", "graph")
TEXT = "def read(path):\n\twith open(path) as"


def number(text):
    """Return a number that a page shows, with its minus sign."""
    return float(text.replace("\u2212", "-"))


def random_sae(seed, hook_point, architecture="topk", k=8, **metadata):
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(128, 256, generator=generator), dim=1)
    tensors = {"W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(128), "W_dec": W_dec, "b_dec": torch.zeros(256)}
    return Sae(architecture, tensors, hook_point=hook_point, config={"k": k}, metadata=metadata)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the results of the four commands."""
    root = tmp_path_factory.mktemp("pages")
    saes = [random_sae(layer, f"blocks.{layer}.resid_post").save(root / f"sae-{layer}") for layer in (1, 2)]
    for layer in range(4):
        names = {"hook_point": f"blocks.{layer}.mlp_in", "hook_name_out": f"blocks.{layer}.mlp_out"}
        random_sae(layer, architecture="topk_transcoder", k=3, **names).save(root / "transcoders" / f"layer-{layer}")
    common = ["--model", str(MODEL), "--device", "cpu", "--output", str(root)]
    both = ["--saes", json.dumps(list(map(str, saes)))]
    fast = ["--method", "attribution_patching", "--verify", "4"]
    assert attribute_command.main([*common, *both, "--text", TEXT, *fast]) == 0
    steer = ["--saes", str(saes[1]), "--latent", "3", "--prompts", '["import", "def"]', "--concept", '[" os"]']
    more = ["--strengths", "0,20", "--random_latents", "1", "--max_new_tokens", "4", "--n", "1"]
    assert steer_command.main([*common, *steer, *more, "--unit", "activation"]) == 0
    sides = ["--a", '["raise ValueError(a)", "raise KeyError(b)"]', "--b", '["return [x]", "return None"]']
    assert contrast_command.main([*common, *both, *sides, "--top", "6"]) == 0
    transcoders = ["--transcoders", str(root / "transcoders"), "--verify", "3"]
    assert graph_command.main([*common, *transcoders, "--text", TEXT]) == 0
    return root


@pytest.fixture
def page(browser, folder):
    """The function that opens a page."""

    def opened(kind, **settings):
        browser.open(folder / f"{kind}.html", ready="main h2", **settings)
        return browser

    return opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_page_fits_a_phone_and_is_readable(page, kind, dark):
    browser = page(kind, width=360, height=700, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360
    assert len(browser.evaluate("document.querySelector('main').innerText")) > 300
    assert browser.faint_texts() == []
    background = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((v) => v < 60)"
    assert browser.evaluate(background) == dark
    assert browser.faults == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_page_fits_a_laptop(page, kind):
    browser = page(kind, width=1300, height=900)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 1300
    assert browser.faults == []


def test_a_token_shows_its_latents_alone(page, folder):
    rows = pq.read_table(folder / "attribution.parquet").to_pylist()
    browser = page("attribution")
    assert "".join(browser.texts("#tokens button")).startswith("<|endoftext|>def")
    assert len(browser.texts("#latents tr")) == 60
    position = rows[0]["position"]
    token = f"document.querySelectorAll('#tokens button')[{position}]"
    browser.evaluate(f"{token}.focus()")
    browser.press("Enter")
    browser.wait(f"{token}.ariaPressed === 'true'")
    mine = [row for row in rows if row["position"] == position]
    shown = [f"{row['hook_point']} {row['latent']}" for row in mine]
    assert browser.texts("#latents th") == shown
    assert f"{len(mine)} scores of token {position}" in browser.texts("#latents-note")[0]
    assert browser.texts("#tooltip")[0].startswith(f"token {position}")
    assert [text != "\u2013" for text in browser.texts("#latents td:nth-child(5)")] == [
        r["ablation"] is not None for r in mine
    ]
    browser.press("Enter")
    browser.wait(f"{token}.ariaPressed === 'false'")
    assert len(browser.texts("#latents tr")) == 60
    assert browser.faults == []


def test_a_strength_shows_its_texts_and_a_dot_its_value(page, folder):
    found = json.loads((folder / "steering.json").read_text())
    texts = pq.read_table(folder / "texts.parquet").to_pylist()
    browser = page("steering")
    browser.wait("document.querySelectorAll('#curves svg').length === 3")
    assert len(browser.texts("#curves figure:first-child .dot")) == 2
    assert len(browser.texts("#curves figure:first-child .random")) == 2
    for strength in (0.0, 20.0):
        script = f"s.value = '{strength:g}'; s.dispatchEvent(new Event('change'));"
        browser.evaluate(f"(s => {{ {script} }})(document.querySelector('#texts-controls select'))")
        expected = [text["prompt"] for text in texts if text["strength"] == strength]
        assert browser.texts("#texts .context-head") == expected
    browser.evaluate("document.querySelector('#curves .dot').focus()")
    browser.press("Tab")
    (point,) = (p for p in found["points"] if p["strength"] == 20 and not p["is_random"])
    lines = browser.texts("#tooltip")[0].split("\n")
    assert lines[0] == "strength 20"
    assert number(lines[1]) == pytest.approx(point["effect"], rel=1e-3)
    assert browser.faults == []


def test_the_contrast_lists_what_was_found_and_confirmed(page, folder):
    rows = pq.read_table(folder / "contrast.parquet").to_pylist()
    browser = page("contrast")
    assert browser.texts("#contrast th") == [f"{row['hook_point']} {row['latent']}" for row in rows]
    browser.wait("document.querySelectorAll('#effects circle').length === 12")
    browser.evaluate("document.querySelector('#contrast td[tabindex]').focus()")
    browser.press("Tab")
    assert browser.texts("#tooltip")[0].startswith("95% interval")
    assert browser.faults == []


def test_the_keyboard_moves_in_the_graph_and_edges_lead_to_their_nodes(page, folder):
    content = json.loads((folder / "graph.json").read_text())
    logit = next(node["node_id"] for node in content["nodes"] if node["is_target_logit"])
    browser = page("graph")
    chosen = "document.querySelector('#graph .chosen').dataset.node"
    assert browser.evaluate(chosen) == logit
    assert len(browser.texts("#graph .place")) == len(content["nodes"])
    edges = sorted((link for link in content["links"] if link["target"] == logit), key=lambda e: -abs(e["weight"]))
    weights = [number(text) for text in browser.texts("#from .weight")]
    assert weights == pytest.approx([edge["weight"] for edge in edges[:20]], rel=1e-3)
    browser.evaluate("document.querySelector('#graph .chosen').focus()")
    browser.press("ArrowDown")
    lower = browser.evaluate(chosen)
    assert lower != logit
    assert browser.evaluate("document.activeElement.dataset.node") == lower
    browser.press("ArrowUp")
    assert browser.evaluate(f"{chosen} !== {json.dumps(lower)}")
    browser.evaluate(f"document.querySelector('[data-node=\"{logit}\"]').dispatchEvent(new Event('click'))")
    browser.evaluate("document.querySelector('#from button').click()")
    assert browser.evaluate(chosen) == edges[0]["source"]
    assert len(browser.texts("#verified tr")) == 3
    assert browser.faults == []


def test_a_phone_shows_the_chosen_node_and_the_names_of_layers(page):
    browser = page("graph", width=360, height=700)
    inside = "((node, box) => node.left >= box.left && node.right <= box.right)(%s.getBoundingClientRect(), %s)"
    box = "document.getElementById('graph').getBoundingClientRect()"
    assert browser.evaluate(inside % ("document.querySelector('#graph .chosen')", box))
    assert browser.evaluate(inside % ("document.querySelector('#graph .layer-name')", box))
