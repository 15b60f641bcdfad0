"""The page in headless Chromium; skipped without Chromium."""

from __future__ import annotations

import json
import re

import pytest

sync_api = pytest.importorskip("playwright.sync_api")


@pytest.fixture
def page(open_page, scope):
    return open_page(scope)


def count(page, selector, n):
    sync_api.expect(page.locator(selector)).to_have_count(n)


def test_the_overview_draws_the_reports_plots_and_links_to_each_sae(page):
    page.goto("/")
    count(page, "#pareto-variance .mark", 3)
    count(page, "#density-charts svg", 3)
    count(page, "#curves-chart .curve", 1)
    page.get_by_role("link", name="topk_k10", exact=True).first.click()
    sync_api.expect(page.get_by_role("heading", name="topk_k10")).to_be_focused()
    assert page.url.endswith("#sae=topk_k10")


def test_latents_are_listed_filtered_and_opened(page, scope):
    listed = scope.services.tables.page("topk_k2", limit=500)
    page.goto("/#sae=topk_k2")
    count(page, ".latents li", listed["total"])
    numbers = [int(text.split()[-1]) for text in page.locator(".latents .number").all_text_contents()]
    assert numbers == [row["latent"] for row in listed["latents"]]
    latent = max(listed["latents"], key=lambda row: row["firings"])["latent"]
    found = scope.services.tables.latent("topk_k2", latent)
    page.locator(f".latents a[data-latent='{latent}']").click()
    sync_api.expect(page.locator("#latent-heading")).to_have_text(f"Latent {latent}")
    count(page, ".context-group:first-of-type .context", min(8, len(found["top"])))
    count(page, ".effects >> nth=0 >> li", len(found["promoted"]))
    assert page.locator("mark").first.text_content() == found["top"][0]["texts"][found["top"][0]["peak"]]
    peak = found["promoted"][0]["text"]
    page.get_by_text("Filters").click()
    page.get_by_label("Promotes").fill(peak)
    page.get_by_label("Promotes").press("Enter")
    count(page, ".latents li", scope.services.tables.page("topk_k2", promotes=peak)["total"])
    assert page.locator("#latent-heading").is_visible()


def test_a_latent_links_to_the_same_one_in_another_sae(page, scope):
    best = scope.services.shelf.matches("topk_k2", 5)[0]["latents"][0]
    page.goto("/#sae=topk_k2&latent=5")
    link = page.locator("section", has_text="The same latent in other SAEs").locator(".card-link").first
    sync_api.expect(link).to_contain_text(f"topk_k10 · {best['latent']}")
    sync_api.expect(link).to_contain_text(f"{best['cosine']:.2f}")
    link.click()
    sync_api.expect(page.locator("h1")).to_have_text("topk_k10")
    sync_api.expect(page.locator("#latent-heading")).to_have_text(f"Latent {best['latent']}")


def test_the_search_box_finds_latents_and_says_what_it_cannot_do(page, scope):
    page.goto("/")
    page.locator("main h1").wait_for()
    page.keyboard.press("/")
    page.keyboard.type("word20")
    page.keyboard.press("Enter")
    expected = scope.services.search.search("word20")["results"]
    count(page, ".results li", len(expected))
    first = expected[0]
    sync_api.expect(page.locator(".results .number").first).to_contain_text(f"{first['sae']} · {first['latent']}")
    sync_api.expect(page.locator("main [role=status]")).to_contain_text("no sentence encoder")


def test_a_text_is_coloured_by_its_latents(page, scope):
    text = "from path import open self read"
    found = scope.client.json("POST", "/api/activations", {"text": text, "top": 6})
    page.goto("/#page=text")
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_role("button", name="Run").click()
    count(page, ".tokens-of-text button", len(found["tokens"]))
    name = next(iter(found["saes"]))
    first = found["saes"][name]["latents"][0]
    page.locator(f".pill[data-latent='{first['latent']}']").click()
    active = [i for i, value in enumerate(first["activations"]) if value]
    count(page, ".tokens-of-text .active", len(active))
    page.locator(".tokens-of-text button").nth(3).click()
    strongest = page.locator(".columns .cards").first.locator("li")
    sync_api.expect(strongest).to_have_count(len(found["saes"][name]["top"][3]))
    assert "text=from" in page.url


def test_a_contrast_lists_what_fires_on_one_text_only(page, scope):
    a, b = "from path import open", "yield raise word40"
    expected = scope.client.json("POST", "/api/contrast", {"a": [a], "b": [b]})["latents"]
    page.goto("/#page=text")
    page.get_by_label("Text", exact=True).fill(a)
    page.get_by_text("Compare with another text").click()
    page.get_by_label("The other text").fill(b)
    page.get_by_role("button", name="Run").click()
    count(page, ".result .cards li", len(expected))


def test_steering_streams_both_continuations_and_is_shared_by_its_address(page, scope):
    edit = {"sae": "topk_k10", "latent": 4, "action": "add", "strength": 20.0}
    sampling = {"max_new_tokens": 4, "temperature": 0.7, "n": 2, "seed": 1}
    done = scope.client.events("/api/steer", {"prompt": "from path", "edits": [edit], "sampling": sampling})[-1][1]
    address = "/#page=steer&prompt=from+path&edit=4,add,20,activation,all,topk_k10&max_new_tokens=4&n=2&seed=1"
    page.goto(address)
    page.get_by_role("button", name="Steer", exact=True).click()
    sync_api.expect(page.locator("main [role=status]").first).to_have_text("Done.")
    for kind in ("clean", "steered"):
        texts = page.locator(f"[data-kind={kind}] .context-text").all_text_contents()
        assert [text.removeprefix(" ").removeprefix("from path") for text in texts] == done[kind]
    assert page.locator(".next tbody tr").count() > 5
    shared = page.url
    page.goto("/#page=notes")
    page.goto(shared)
    assert page.get_by_role("textbox", name="Prompt").input_value() == "from path"
    assert page.locator(".latent-number").input_value() == "4"
    page.get_by_role("button", name="Curve of strength").click()
    count(page, "#steered .dot", 12)


def test_what_the_model_refuses_is_said_on_the_page(page):
    page.goto("/#page=steer&prompt=self&edit=4,add,1,max,all,topk_k10&edit=4,add,1,max,all,topk_k2&max_new_tokens=2")
    page.get_by_role("button", name="Steer", exact=True).click()
    sync_api.expect(page.get_by_role("alert")).to_contain_text("both at 'blocks.1.resid_post'")


def test_two_saes_are_compared_on_one_text(page, scope):
    page.goto("/#page=compare&a=topk_k2&b=topk_k10&text=from+path+import")
    count(page, ".half", 2)
    found = scope.client.json("POST", "/api/activations", {"text": "from path import", "saes": ["topk_k2", "topk_k10"]})
    for side, name in enumerate(("topk_k2", "topk_k10")):
        missed = 100 * found["saes"][name]["error"][-1]
        sync_api.expect(page.locator(".half").nth(side)).to_contain_text(f"{missed:.1f}% missed")


def test_a_note_is_saved_shown_everywhere_and_escaped(page, scope):
    nasty = "<img src=x onerror=alert(1)>"
    page.goto("/#sae=topk_k10&latent=7")
    page.get_by_label("Label").fill(nasty)
    page.get_by_label("Label").press("Enter")
    sync_api.expect(page.locator(".note-editor [role=status]")).to_have_text("Saved")
    page.get_by_role("button", name="Star").click()
    for _ in range(100):
        note = scope.services.notes.get("topk_k10", 7)
        if note["starred"]:
            break
        page.wait_for_timeout(20)
    assert (note["label"], note["starred"]) == (nasty, True)
    page.goto("/#page=notes")
    sync_api.expect(page.locator(".card-link .about")).to_have_text(nasty)
    assert page.locator("main img").count() == 0
    page.goto("/#page=search&q=onerror")
    sync_api.expect(page.locator(".cards .about").first).to_have_text(nasty)
    scope.client.json("PUT", "/api/notes", {"sae": "topk_k10", "latent": 7})


@pytest.mark.parametrize("address", ["#sae=nobody", "#page=nothing", "#sae=topk_k2&latent=x", "#page=steer&edit=,,,"])
def test_a_wrong_address_does_no_harm(page, address):
    page.goto(f"/{address}")
    sync_api.expect(page.locator("main h1")).to_be_visible()


PAGES = ["", "#sae=topk_k2&latent=5", "#page=steer&edit=4,add,1,max,all,topk_k10", "#page=text", "#page=search&q=def"]


@pytest.mark.parametrize("address", PAGES)
def test_a_phone_does_not_scroll_sideways_and_every_control_has_a_name(page, address):
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"/{address}")
    sync_api.expect(page.locator("main h1")).to_be_visible()
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    nameless = page.evaluate(
        "[...document.querySelectorAll('main :is(input, select, textarea, button, a), header :is(a, input)')]"
        ".filter((e) => e.checkVisibility() && !(e.textContent.trim() || e.ariaLabel || e.labels?.length))"
        ".map((e) => e.outerHTML)"
    )
    assert nameless == []


def test_the_keyboard_reaches_the_page_and_walks_the_list(page):
    page.goto("/#sae=topk_k2")
    page.locator(".latents a").first.wait_for()
    page.locator(".latents a").first.focus()
    page.keyboard.press("ArrowDown")
    second = page.locator(".latents a").nth(1)
    sync_api.expect(second).to_be_focused()
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#latent-heading")).to_be_focused()
    page.locator("#skip").focus()
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#main")).to_be_focused()


def test_dark_mode_changes_the_colours(page):
    page.goto("/")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert [sum(map(int, re.findall(r"\d+", colour)[:3])) > 380 for colour in (light, dark)] == [True, False]
    assert json.dumps(light) != json.dumps(dark)
