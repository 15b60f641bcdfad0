"""The strength that steering begins with, against norms computed by NumPy from the store and the SAE."""

from __future__ import annotations

import numpy as np
import pytest

from thresher.shared.sae import Sae
from thresher.shared.store import ActivationStore

SIZES = {"topk_k10": ("blocks.1.resid_post", 32), "standard": ("blocks.0.resid_post", 24)}


@pytest.mark.parametrize("name", SIZES)
def test_it_is_twice_the_maximum_but_no_longer_than_an_activation(scope, sweep, tiny, name):
    hook_point, n = SIZES[name]
    store = ActivationStore.open(tiny.store)
    rows = store.read(hook_point, 0, store.n_rows).double().numpy()
    rows = rows[store.tokens(0, store.n_rows).numpy() != 0]
    typical = np.sort(np.linalg.norm(rows, axis=1))[(len(rows) - 1) // 2]
    lengths = np.linalg.norm(Sae.load(sweep / name).W_dec.detach().double().numpy(), axis=1)
    maxima = scope.services.tables.maxima(name).numpy()
    for latent in range(n):
        found = scope.client.json("GET", f"/api/saes/{name}/latents/{latent}/strength")
        amount = found["strength"] * (maxima[latent] if found["unit"] == "max" else 1)
        assert found["length"] == pytest.approx(amount * lengths[latent] / typical, rel=1e-3)
        if 0 < 2 * maxima[latent] * lengths[latent] <= typical:
            assert (found["strength"], found["unit"]) == (2.0, "max")
        else:
            assert found["unit"] == "activation"
            assert amount == pytest.approx(typical / lengths[latent], rel=0.06)  # of two digits


def test_a_latent_that_fires_at_a_huge_value_is_steered_by_less_than_its_maximum(scope, monkeypatch):
    plain = scope.client.json("GET", "/api/saes/topk_k10/latents/4/strength")
    huge = scope.services.tables.maxima("topk_k10").clone()
    huge[4] *= 1000
    monkeypatch.setitem(scope.services.tables._maxima, "topk_k10", huge)
    found = scope.client.json("GET", "/api/saes/topk_k10/latents/4/strength")
    assert found["unit"] == "activation"
    assert found["strength"] < 0.1 * float(huge[4])
    assert found["length"] == pytest.approx(1, rel=0.06)
    assert plain["max_activation"] * 1000 == pytest.approx(found["max_activation"], rel=1e-3)


def test_without_the_store_it_is_twice_the_maximum(serve, run_folder, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    settings = folder / "evaluation" / "config.toml"
    settings.write_text(settings.read_text().replace("store = ", 'store = "nowhere" # '))
    found = serve(run=str(folder), encoder=False, model=False)
    answer = found.client.json("GET", "/api/saes/topk_k10/latents/4/strength")
    assert (answer["strength"], answer["unit"], answer["length"]) == (2.0, "max", None)
    assert "from 0 to 31" in found.client.json("GET", "/api/saes/topk_k10/latents/99/strength", status=422)["error"]


def test_the_page_fills_in_the_suggestion_until_the_user_gives_a_strength(open_page, scope, expect):
    found = [scope.client.json("GET", f"/api/saes/topk_k10/latents/{latent}/strength") for latent in (4, 5)]
    page = open_page(scope)
    page.goto("/#sae=topk_k10&latent=4")
    page.locator("article").get_by_role("link", name="Steer").click()
    strength, unit = page.get_by_label("Strength", exact=True), page.get_by_label("Unit of the strength")
    expect(strength).to_have_value(f"{found[0]['strength']:g}")
    expect(unit).to_have_value(found[0]["unit"])
    expect(page.locator(".why")).to_contain_text("Suggested")
    page.get_by_label("Latent", exact=True).fill("5")
    expect(strength).to_have_value(f"{found[1]['strength']:g}")
    strength.fill("7")
    page.get_by_label("Latent", exact=True).fill("4")
    expect(page.locator(".why")).to_be_empty()
    expect(strength).to_have_value("7")
    strength.fill("")
    expect(strength).to_have_value(f"{found[0]['strength']:g}")
