"""What a next token depends on: the endpoint against the gradient by autograd, and its page."""

from __future__ import annotations

import pytest
import torch

from thresher.shared.model.language_model import load_model, load_tokenizer
from thresher.shared.sae import Sae

TEXT = "from path import open"


@pytest.fixture(scope="module")
def expected(speaker, sweep):
    """Gradient times activation of every latent, `[context, d_sae]`, and the likeliest next token."""
    model, tokenizer = load_model(str(speaker), "float32", "cpu"), load_tokenizer(str(speaker))
    ids = torch.tensor([[0, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]])
    sae = Sae.load(sweep / "topk_k10")
    kept = {}

    def rebuild(_, __, out):
        x = out[0] if isinstance(out, tuple) else out
        latents = sae.encode(x[0]).detach()
        latents[0] = 0  # BOS is not read
        kept["latents"] = latents.requires_grad_()
        error = x[0].detach() - latents.detach() @ sae.W_dec.detach()
        rebuilt = (kept["latents"] @ sae.W_dec.detach() + error)[None]
        return (rebuilt, *out[1:]) if isinstance(out, tuple) else rebuilt

    handle = model.transformer.h[1].register_forward_hook(rebuild)
    with torch.enable_grad():
        log_p = model(ids).logits[0, -1].log_softmax(-1)
        target = int(log_p.argmax())
        (gradient,) = torch.autograd.grad(log_p[target], kept["latents"])
    handle.remove()
    return (gradient * kept["latents"]).detach(), target, float(log_p[target].detach().exp())


def test_a_latents_score_is_its_gradient_times_its_activation(scope, expected):
    scores, target, probability = expected
    found = scope.client.json("POST", "/api/attribution", {"text": TEXT, "saes": ["topk_k10"]})
    assert found["target"]["id"] == target
    assert found["target"]["probability"] == pytest.approx(probability, rel=1e-3)
    order = scores.abs().flatten().argsort(descending=True)[: len(found["latents"])]
    rows = [(row["position"], row["latent"]) for row in found["latents"]]
    assert len(rows) == int((scores != 0).sum()) or len(rows) == 60
    assert set(rows) == {divmod(place, scores.shape[1]) for place in order.tolist()}
    for row in found["latents"]:
        assert row["score"] == pytest.approx(float(scores[row["position"], row["latent"]]), rel=1e-2, abs=1e-6)
        assert row["peaks"]


def test_by_default_there_is_one_sae_at_each_hook_point(scope):
    found = scope.client.json("POST", "/api/attribution", {"text": TEXT})
    assert set(found["errors"]) == {"standard", "topk_k2"}
    body = {"text": TEXT, "saes": ["topk_k2", "topk_k10"]}
    assert "both at" in scope.client.json("POST", "/api/attribution", body, status=422)["error"]


def test_the_page_lists_latents_and_leads_to_them_and_to_their_ablation(open_page, scope, expect):
    body = {"text": TEXT, "saes": ["topk_k10"]}
    found = scope.client.json("POST", "/api/attribution", body)
    page = open_page(scope)
    page.goto("/#page=circuits&text=from+path+import+open&in=topk_k10")
    rows = page.locator(".attributed")
    expect(rows).to_have_count(len(found["latents"]))
    first = found["latents"][0]
    expect(rows.first.locator(".number")).to_have_text(f"topk_k10 · {first['latent']}")
    page.locator(".tokens-of-text button").nth(first["position"]).click()
    expect(rows).to_have_count(sum(row["position"] == first["position"] for row in found["latents"]))
    rows.first.get_by_role("link", name="ablate it").click()
    expect(page.get_by_label("Positions of tokens")).to_have_value(str(first["position"]))
    page.get_by_label("Tokens", exact=True).fill("2")
    page.get_by_role("button", name="Steer", exact=True).click()
    expect(page.locator("main [role=status]").first).to_have_text("Done.")
    page.go_back()
    rows.first.locator(".card-link").click()
    expect(page.locator("#latent-heading")).to_have_text(f"Latent {first['latent']}")
