"""Checkpoints of training beside the trained SAEs: their activations, and two states of one SAE on the page."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from thresher.shared.model.language_model import capture, load_model, resolve_hook_points
from thresher.shared.sae import Sae

TEXT = "from path import open"


def test_saes_list_their_checkpoints(trained):
    saes = trained.client.json("GET", "/api/saes")["saes"]
    for sae in saes:
        assert sae["checkpoints"] == [
            {"name": f"{sae['name']}@{step}", "step": step, "tokens": 16 * step} for step in (8, 16)
        ]


def test_a_checkpoint_reads_a_text_as_it_was(trained, trained_run, tiny):
    body = {"text": TEXT, "saes": ["topk", "topk@8"], "latents": {"topk@8": [3]}, "top": 4}
    found = trained.client.json("POST", "/api/activations", body)
    ids = torch.tensor([[token["id"] for token in found["tokens"]]])
    model = load_model(str(tiny.root / "chats"), "float32", "cpu")
    (rows,) = capture(model, ids, resolve_hook_points(model, ["blocks.1.resid_post"])).values()
    expected = (
        Sae.load(trained_run / "saes" / "topk" / "checkpoints" / "step-000000008").encode(rows[0]).detach().numpy()
    )
    expected[0] = 0  # BOS is not read
    then = found["saes"]["topk@8"]
    assert then["latents"][0]["latent"] == 3
    for row in then["latents"]:
        np.testing.assert_allclose(row["activations"], expected[:, row["latent"]], rtol=1e-3, atol=1e-6)
    assert then["error"] != found["saes"]["topk"]["error"]


@pytest.mark.parametrize(
    ("path", "body", "status", "reason"),
    [
        ("/api/activations", {"text": "self", "saes": ["topk@9"]}, 404, "no SAE 'topk@9'"),
        ("/api/activations", {"text": "self", "latents": {"topk@8": [99]}}, 422, "a latent from 0 to 31 of 'topk'"),
        ("/api/contrast", {"a": ["self"], "b": ["def"], "saes": ["topk@8"]}, 404, "no SAE 'topk@8'"),
        ("/api/steer", {"prompt": "self", "edits": [{"sae": "topk@8", "latent": 1}]}, 404, "no SAE 'topk@8'"),
    ],
)
def test_other_requests_take_trained_saes_only(trained, path, body, status, reason):
    assert reason in trained.client.json("POST", path, body, status=status)["error"]


def test_a_checkpoint_that_is_damaged_is_refused_in_one_line(serve, trained_run, tmp_path):
    folder = tmp_path / "trained"
    shutil.copytree(trained_run, folder)
    settings = folder / "evaluation" / "config.toml"
    settings.write_text(settings.read_text().replace(str(trained_run), str(folder)))
    path = folder / "saes" / "topk" / "checkpoints" / "step-000000008" / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    (folder / "saes" / "topk" / "checkpoints" / "step-000000016" / "cfg.json").write_text("[]")
    found = serve(run=str(folder), encoder=False, device="cpu")
    error = found.client.json("POST", "/api/activations", {"text": "self", "saes": ["topk@8"]}, status=422)["error"]
    assert "step-000000008" in error
    assert "\n" not in error
    (topk,) = [sae for sae in found.client.json("GET", "/api/saes")["saes"] if sae["name"] == "topk"]
    assert [one["step"] for one in topk["checkpoints"]] == [8]


def test_an_sae_is_compared_with_its_own_checkpoint(open_page, trained, expect):
    page = open_page(trained)
    body = {"text": TEXT, "saes": ["topk@8", "topk"], "top": 50}
    found = trained.client.json("POST", "/api/activations", body)["saes"]
    page.goto("/#page=compare&text=from+path+import+open")
    page.get_by_label("First").select_option("topk@8")
    page.get_by_label("Second").select_option("topk")
    page.get_by_role("button", name="Compare").click()
    halves = page.locator(".half")
    expect(halves.nth(0).locator("h2")).to_have_text("topk, after 128 tokens")
    expect(halves.nth(1).locator("h2")).to_have_text("topk")
    for side, name in enumerate(("topk@8", "topk")):
        expect(halves.nth(side)).to_contain_text(f"{100 * found[name]['error'][-1]:.1f}% missed")
        strongest = found[name]["top"][-1][0]["latent"]
        card = halves.nth(side).locator(".card-link").first
        expect(card.locator(".number")).to_have_text(str(strongest))
        expect(card.locator(".value")).to_contain_text("other:")
    halves.nth(0).locator(".card-link").first.click()
    expect(page.locator("h1")).to_have_text("topk")


def test_without_checkpoints_the_page_says_why(open_page, scope, expect):
    page = open_page(scope)
    page.goto("/#page=compare")
    expect(page.locator("main")).to_contain_text("saved no earlier states")
