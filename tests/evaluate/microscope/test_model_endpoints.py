"""The endpoints that run the model, against the model and the SAEs run by themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from thresher.shared.intervene.edits import Add, Clamp
from thresher.shared.intervene.sae_model import SaeModel
from thresher.shared.model.language_model import load_model, load_tokenizer
from thresher.shared.sae import Sae

TEXT = "from path import open self read file write yield"
LAYERS = {"topk_k2": 1, "topk_k10": 1, "standard": 0}


@pytest.fixture(scope="module")
def client(scope):
    return scope.client


@pytest.fixture(scope="module")
def own(speaker, sweep):
    """The latents of every SAE on the text, `[context, d_sae]`, by hooks on its blocks; the first token is BOS."""
    model, tokenizer = load_model(str(speaker), "float32", "cpu"), load_tokenizer(str(speaker))
    ids = torch.tensor([[0, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]])
    blocks = {}
    for layer, block in enumerate(model.transformer.h):

        def keep(_, __, out, layer=layer):
            blocks[layer] = out if torch.is_tensor(out) else out[0]

        block.register_forward_hook(keep)
    model(ids)
    found = {}
    for name, layer in LAYERS.items():
        latents = Sae.load(sweep / name).encode(blocks[layer][0]).detach().double().numpy()
        latents[0] = 0
        found[name] = latents
    return found, ids[0].tolist(), {name: blocks[layer][0].detach() for name, layer in LAYERS.items()}


def test_each_token_has_its_strongest_latents_in_every_sae(client, own, sweep):
    latents, ids, rows = own
    found = client.json("POST", "/api/activations", {"text": TEXT, "top": 3})
    assert [token["id"] for token in found["tokens"]] == ids
    assert "".join(token["text"] for token in found["tokens"][1:]).strip() == TEXT
    assert found["saes"].keys() == latents.keys()
    for name, expected in latents.items():
        sae = found["saes"][name]
        assert sae["l0"] == (expected != 0).sum(axis=1).tolist()
        for position, top in enumerate(sae["top"]):
            values = np.sort(expected[position])[::-1][: len(top)]
            np.testing.assert_allclose([one["activation"] for one in top], values, rtol=1e-3)
            for one in top:
                np.testing.assert_allclose(one["activation"], expected[position, one["latent"]], rtol=1e-3)
        for row in sae["latents"]:
            np.testing.assert_allclose(row["activations"], expected[:, row["latent"]], rtol=1e-3, atol=1e-6)
        assert sae["latents"][0]["max"] == pytest.approx(expected.max(), rel=1e-3)
        x, x_hat = rows[name].double(), Sae.load(sweep / name)(rows[name]).double()
        error = ((x - x_hat).square().sum(1) / x.square().sum(1)).detach().numpy()
        np.testing.assert_allclose(sae["error"][1:], error[1:], rtol=1e-2)


def test_latents_that_are_asked_for_are_followed(client, own):
    found = client.json("POST", "/api/activations", {"text": TEXT, "latents": {"topk_k10": [7, 30]}})
    assert list(found["saes"]) == ["topk_k10"]
    first = found["saes"]["topk_k10"]["latents"][:2]
    assert [row["latent"] for row in first] == [7, 30]
    for row in first:
        np.testing.assert_allclose(row["activations"], own[0]["topk_k10"][:, row["latent"]], rtol=1e-3, atol=1e-6)


def test_a_contrast_finds_what_fires_on_one_text_only(client, scope):
    a, b = "from path import open", "yield raise word40 word41"
    found = client.json("POST", "/api/contrast", {"a": [a], "b": [b], "saes": ["topk_k10"]})["latents"]
    sides = []
    for text in (a, b):
        run = client.json("POST", "/api/activations", {"text": text, "saes": ["topk_k10"]})["saes"]["topk_k10"]
        sides.append({row["latent"]: row["max"] for row in run["latents"]})
    maxima = scope.services.tables.maxima("topk_k10").numpy()
    expected = {
        latent: (sides[0].get(latent, 0) - sides[1].get(latent, 0)) / maxima[latent]
        for latent in range(len(maxima))
        if maxima[latent] > 0 and sides[0].get(latent, 0) > sides[1].get(latent, 0)
    }
    assert {row["latent"]: row["difference"] for row in found} == pytest.approx(expected, rel=1e-2)
    assert [row["difference"] for row in found] == sorted((row["difference"] for row in found), reverse=True)


def test_steering_streams_what_the_model_generates_with_and_without_the_edit(client, speaker, sweep):
    edit = {"sae": "topk_k10", "latent": 4, "action": "add", "strength": 25.0}
    sampling = {"max_new_tokens": 5, "temperature": 1.0, "n": 2, "seed": 3}
    events = client.events("/api/steer", {"prompt": "from path", "edits": [edit], "sampling": sampling})
    kinds = [kind for kind, _ in events]
    assert [kind for kind in kinds if kind not in ("token", "queued")] == ["start", "next", "done"]
    lm = SaeModel.open(str(speaker), [sweep / "topk_k10"], device="cpu")
    settings = {"temperature": 1.0, "n": 2, "seed": 3}
    clean = lm.generate("from path", 5, **settings)
    with lm.steer({("blocks.1.resid_post", 4): Add(25.0)}):
        steered = lm.generate("from path", 5, **settings)
        after = lm.run("from path").logits[0, -1].double().softmax(-1)
    assert clean != steered
    done = events[-1][1]
    assert done == {"clean": clean, "steered": steered}
    for kind, whole in done.items():
        for sample, text in enumerate(whole):
            said = [e["text"] for name, e in events if name == "token" and (e["kind"], e["sample"]) == (kind, sample)]
            assert "".join(said) == text
    before = lm.run("from path").logits[0, -1].double().softmax(-1)
    shown = next(content for kind, content in events if kind == "next")
    assert shown["kl"] == pytest.approx(float((before * (before / after).log()).sum()), rel=1e-3)
    for row in shown["tokens"]:
        assert row["clean"] == pytest.approx(float(before[row["token"]]), rel=1e-2, abs=1e-6)
        assert row["steered"] == pytest.approx(float(after[row["token"]]), rel=1e-2, abs=1e-6)


def test_strengths_in_multiples_of_the_maximum_are_those_of_the_index(client, scope, speaker, sweep):
    maxima = scope.services.tables.maxima("topk_k10")
    latent = int(maxima.argmax())
    edit = {"sae": "topk_k10", "latent": latent, "action": "clamp", "strength": 3.0, "unit": "max"}
    events = client.events("/api/steer", {"prompt": "self", "edits": [edit], "sampling": {"max_new_tokens": 1}})
    lm = SaeModel.open(str(speaker), [sweep / "topk_k10"], device="cpu")
    with lm.steer({("blocks.1.resid_post", latent): Clamp(3.0 * float(maxima[latent]))}):
        expected = lm.run("self").logits[0, -1].softmax(-1)
    shown = next(content for kind, content in events if kind == "next")["tokens"]
    for row in shown:
        assert row["steered"] == pytest.approx(float(expected[row["token"]]), rel=1e-2, abs=1e-6)


def test_a_curve_has_a_point_for_each_strength(client):
    edit = {"sae": "topk_k10", "latent": 4, "action": "add"}
    body = {"prompt": "from path", "edit": edit, "strengths": [0.0, 30.0], "random_latents": 1}
    events = client.events("/api/steer/curve", body | {"concept": ["import"], "sampling": {"max_new_tokens": 2}})
    assert events[-1][0] == "done"
    own = [point for point in events[-1][1]["points"] if not point["is_random"]]
    assert [point["strength"] for point in own] == [0.0, 30.0]
    assert own[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert own[1]["kl"] > 0.01


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/api/activations", {}, "expected a text or a list of messages"),
        ("/api/activations", {"text": "self " * 100}, "tokens, more than the limit of 12"),
        ("/api/activations", {"messages": [{"role": "user", "content": "hi"}]}, "no chat template"),
        ("/api/activations", {"text": "self", "latents": {"topk_k2": [99]}}, "expected a latent from 0 to 31"),
        ("/api/activations", {"text": "self", "top": 0}, "top"),
        ("/api/activations", b"{", "the request's body"),
        ("/api/activations", b'{"text": "\xff"}', "the request's body"),
        ("/api/steer", {"prompt": "self", "sampling": {"n": 99}}, "n is 99; expected from 1 to 4"),
        ("/api/steer", {"prompt": "self", "sampling": {"max_new_tokens": 10**9}}, "expected from 1 to 200"),
        ("/api/steer", {"prompt": "self", "edits": [{"sae": "topk_k2", "latent": -1}]}, "expected a latent"),
        ("/api/steer", {"prompt": "self", "edits": [{"sae": "topk_k2", "latent": 1, "strength": 1e300}]}, "a million"),
        ("/api/steer", {"prompt": "self", "edits": [{"sae": "topk_k2", "latent": 1, "where": "here"}]}, "where"),
    ],
)
def test_a_request_that_asks_too_much_is_refused(client, path, body, reason):
    assert reason in client.json("POST", path, body, status=422)["error"]


def test_errors_of_the_model_end_a_stream_with_their_reason(client):
    edits = [{"sae": name, "latent": 1} for name in ("topk_k2", "topk_k10")]
    (kind, content) = client.events("/api/steer", {"prompt": "self", "edits": edits})[-1]
    assert kind == "error"
    assert "both at 'blocks.1.resid_post'" in content["error"]
    (kind, content) = client.events("/api/steer", {"prompt": "self " * 10, "sampling": {"max_new_tokens": 9}})[-1]
    assert kind == "error"
    assert "model's context of 12" in content["error"]
